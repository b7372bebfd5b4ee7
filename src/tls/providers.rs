//! Attester and verifier of an endpoint, out of its configuration.

use std::sync::Arc;

use super::ChannelError;
use super::endpoint::setup;
use crate::attest::host::{DirectAttester, HelperAttester};
use crate::attest::rego::Policy;
use crate::attest::{
    AaAttester, AsVerifier, AsrAttester, Attester, BuiltinVerifier, PassportAttester, SampleAttester, SampleVerifier,
    TimedAttester, TokenVerifier, Verifier,
};
use crate::config::{Attest, AttestProvider, DEFAULT_INGRESS_MARK, Endpoint, Mark, Mode, Side, Verify, VerifyProvider};
use crate::os::clock::Clock;

/// The attester of `endpoint`.
pub(super) fn attester(
    endpoint: &Endpoint,
    attest: &Attest,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn Attester>, ChannelError> {
    // Less than a handshake may take, so that one that waits for the first evidence learns why there is none.
    let all = endpoint.limits.handshake_timeout * 2 / 3;
    let deadline = if attest.passport.is_some() { all / 2 } else { all };
    let (devices, mark) = (attest.additional_evidence, service_mark(endpoint));
    let evidence: Arc<dyn Attester> = match &attest.provider {
        AttestProvider::Sample => Arc::new(SampleAttester),
        AttestProvider::Aa { socket } => timed(AaAttester::new(socket, deadline).with_additional(devices)),
        AttestProvider::Helper { socket, provider } => timed(HelperAttester::new(socket, *provider, deadline)),
        AttestProvider::Direct(source) => timed(DirectAttester::new(source.clone(), deadline)),
        AttestProvider::Asr { addr } => timed(AsrAttester::new(addr, devices, mark, deadline).map_err(setup)?),
    };
    Ok(match &attest.passport {
        None => evidence,
        Some(passport) => {
            let issuer =
                AsVerifier::new(&passport.as_verify(), &passport.service, mark, clock.clone()).map_err(setup)?;
            Arc::new(PassportAttester::new(evidence, Arc::new(issuer), clock, deadline))
        }
    })
}

fn timed(attester: impl Attester + 'static) -> Arc<dyn Attester> {
    Arc::new(TimedAttester::new(attester))
}

/// The verifier of `endpoint`.
pub(super) fn verifier(
    endpoint: &Endpoint,
    verify: &Verify,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn Verifier>, ChannelError> {
    let (policies, sample) = (verify.policy_ids.clone(), verify.allow_sample);
    let rego = verify.rego.as_ref().map(|file| Policy::compile(&file.text)).transpose().map_err(setup)?;
    Ok(match &verify.provider {
        VerifyProvider::Sample => Arc::new(SampleVerifier::new(sample, policies, clock).with_policy(rego)),
        VerifyProvider::Anchors(trusted) => {
            Arc::new(TokenVerifier::new(trusted, policies, sample, clock).map_err(setup)?)
        }
        VerifyProvider::Builtin(builtin) => {
            let verifier = BuiltinVerifier::new(builtin, service_mark(endpoint), clock).map_err(setup)?;
            Arc::new(verifier.with_policy(rego, policies))
        }
        VerifyProvider::As(service) => {
            Arc::new(AsVerifier::new(verify, service, service_mark(endpoint), clock).map_err(setup)?)
        }
    })
}

/// Mark of the sockets to services: one that every ingress capture exempts. An egress's own mark would be taken by an
/// ingress on the same host.
pub(super) fn service_mark(endpoint: &Endpoint) -> Mark {
    match (endpoint.side, &endpoint.mode) {
        (Side::Egress, _) => DEFAULT_INGRESS_MARK,
        (Side::Ingress, Mode::Mapping(mapping)) => mapping.so_mark,
        (Side::Ingress, Mode::Netfilter(netfilter)) => netfilter.so_mark,
    }
}
