//! Certificates made for this run: one authority for the peers, and a stranger nobody may believe.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::Outcome;

/// Name in the server's certificate that each client end insists on.
pub const SERVER_NAME: &str = "server.bench.test";

/// The files and keys of one run. All keys are P-256, as tng's are.
pub struct Certs {
    /// The authority's certificate, PEM.
    pub ca: PathBuf,
    /// The server end's identity.
    pub server: Identity,
    /// The client end's identity.
    pub client: Identity,
    /// Same names and uses, signed by an authority that nobody was told of.
    pub stranger: Identity,
}

/// A certificate and its key, as files and in memory.
pub struct Identity {
    /// Certificate, PEM.
    pub cert: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
    /// Both in one file, as haproxy wants them.
    pub both: PathBuf,
    cert_der: CertificateDer<'static>,
    key_der: Vec<u8>,
}

impl Identity {
    /// For the probes.
    pub fn rustls(&self) -> Outcome<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        Ok((vec![self.cert_der.clone()], PrivateKeyDer::try_from(self.key_der.clone())?))
    }
}

impl Certs {
    /// Makes everything anew below `dir`.
    pub fn generate(dir: &Path) -> Outcome<Self> {
        let ca = authority("bench authority")?;
        let ca_file = dir.join("ca.pem");
        std::fs::write(&ca_file, ca.1)?;
        let stranger = authority("somebody else's authority")?;
        Ok(Self {
            ca: ca_file,
            server: identity(dir, "server", &ca.0)?,
            client: identity(dir, "client", &ca.0)?,
            stranger: identity(dir, "stranger", &stranger.0)?,
        })
    }
}

fn authority(name: &str) -> Outcome<(Issuer<'static, KeyPair>, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}

fn identity(dir: &Path, name: &str, issuer: &Issuer<'static, KeyPair>) -> Outcome<Identity> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = params.signed_by(&key, issuer)?;
    let file = |suffix: &str, text: String| -> Outcome<PathBuf> {
        let path = dir.join(format!("{name}.{suffix}"));
        // For its owner alone: peers complain about keys that others can read.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(text.as_bytes())?;
        Ok(path)
    };
    Ok(Identity {
        cert: file("crt", cert.pem())?,
        key: file("key", key.serialize_pem())?,
        both: file("pem", cert.pem() + &key.serialize_pem())?,
        cert_der: cert.der().clone(),
        key_der: key.serialize_der(),
    })
}
