//! What attestation agents have in common, however they are reached.

use async_trait::async_trait;

use super::devices::Devices;
use super::{AttestError, Evidence, RuntimeData};

/// An attestation agent. None of its answers is trusted: only the verifier says what they are worth.
#[async_trait]
pub(super) trait Agent: Send + Sync {
    /// Name of the TEE.
    async fn tee(&self) -> Result<String, AttestError>;
    /// Evidence over `report_data`.
    async fn evidence_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError>;
    /// Evidence of the devices over `report_data`; empty when there are none.
    async fn devices_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError>;
}

/// Whether `tee` has the form of a TEE's name.
pub(super) fn is_tee_name(tee: &str) -> bool {
    (1..=32).contains(&tee.len()) && tee.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Evidence bound to `runtime_data`. With `additional`, the devices' evidence is bound to it, and the TEE's evidence
/// to both: neither can be shown with a key, or with devices, it was not made for.
pub(super) async fn evidence(
    agent: &dyn Agent,
    runtime_data: &RuntimeData,
    additional: bool,
) -> Result<Evidence, AttestError> {
    // First, since it is cheap: an agent too old to tell makes no quote in vain.
    let tee = agent.tee().await?;
    if !is_tee_name(&tee) {
        return Err(AttestError::AaGarbage("no name of a TEE"));
    }
    let (devices, runtime_data) = if additional {
        let found = agent.devices_over(&runtime_data.digest()).await?;
        if found.is_empty() {
            return Err(AttestError::AaNoDevices);
        }
        Devices::parse(&found).map_err(AttestError::AaGarbage)?;
        let naming = runtime_data.with_devices(&found);
        (Some(found), naming)
    } else {
        (None, runtime_data.clone())
    };
    let evidence = agent.evidence_over(&runtime_data.digest()).await?;
    if evidence.is_empty() {
        return Err(AttestError::AaGarbage("empty evidence"));
    }
    Ok(Evidence { tee, evidence, additional: devices, runtime_data: runtime_data.canonical().into() })
}
