//! Files that a configuration names beside itself. A reload reads them again: their contents count, not their names.

use std::path::PathBuf;

use super::{Attest, Endpoint, Verify, VerifyProvider};

impl Verify {
    /// What the appraisal of peers rests on: trust anchors, authorities, collateral, certificates, policy.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = match &self.provider {
            VerifyProvider::As(service) => service.files().cloned().collect(),
            VerifyProvider::Anchors(trusted) => trusted.files().cloned().collect(),
            VerifyProvider::Builtin(b) => [b.collateral.as_slice(), &b.amd_certs].concat(),
            VerifyProvider::Sample => Vec::new(),
        };
        files.extend(self.rego.as_ref().map(|rego| rego.path.clone()));
        files
    }
}

impl Attest {
    /// Authorities of the service that makes this side's token.
    pub fn files(&self) -> Vec<PathBuf> {
        self.passport.iter().flat_map(|p| p.service.files().cloned()).collect()
    }
}

impl Endpoint {
    /// All of them.
    pub fn files(&self) -> Vec<PathBuf> {
        let verify = self.ra.verify.iter().flat_map(Verify::files);
        verify.chain(self.ra.attest.iter().flat_map(Attest::files)).collect()
    }
}
