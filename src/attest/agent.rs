//! What attestation agents have in common, however they are reached.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

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

/// Whose turn it is where the evidence is a TPM's quote. The agent takes several steps for one, opens the device for
/// each, and no lock: two quotes at once fail both. A host has one TPM, so there is one of these, whoever asks.
static TPM: Mutex<()> = Mutex::const_new(());

/// Whether the evidence of `tee` is made by a TPM, of Azure's TEEs too (`az-snp-vtpm`, `azsnpvtpm`).
fn quotes_by_tpm(tee: &str) -> bool {
    tee.ends_with("tpm")
}

/// Evidence bound to `runtime_data`. With `additional`, the devices' evidence is bound to it, and the TEE's evidence
/// to both: neither can be shown with a key, or with devices, it was not made for. All of it has `deadline`.
pub(super) async fn evidence(
    agent: &dyn Agent,
    runtime_data: &RuntimeData,
    additional: bool,
    deadline: Duration,
) -> Result<Evidence, AttestError> {
    let until = Instant::now() + deadline;
    // First, since it is cheap: an agent too old to tell makes no quote in vain.
    let tee = timeout_at(until, agent.tee()).await.unwrap_or(Err(AttestError::AaTimeout))?;
    if !is_tee_name(&tee) {
        return Err(AttestError::AaGarbage("no name of a TEE"));
    }
    let _turn = match quotes_by_tpm(&tee) {
        true => Some(timeout_at(until, TPM.lock()).await.map_err(|_| AttestError::AaTurn)?),
        false => None,
    };
    let work = evidence_of(tee, agent, runtime_data, additional);
    timeout_at(until, work).await.unwrap_or(Err(AttestError::AaTimeout))
}

async fn evidence_of(
    tee: String,
    agent: &dyn Agent,
    runtime_data: &RuntimeData,
    additional: bool,
) -> Result<Evidence, AttestError> {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// An agent that takes its time, and counts who asks at once.
    struct Slow {
        tee: &'static str,
        now: AtomicU64,
        most: AtomicU64,
    }

    #[async_trait]
    impl Agent for Slow {
        async fn tee(&self) -> Result<String, AttestError> {
            Ok(self.tee.into())
        }
        async fn evidence_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError> {
            self.most.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(report_data.to_vec())
        }
        async fn devices_over(&self, _: &[u8]) -> Result<Vec<u8>, AttestError> {
            Ok(Vec::new())
        }
    }

    /// Eight ask at once: how many were served at once, and how each ended.
    async fn asked(tee: &'static str, deadline: Duration) -> (u64, Vec<&'static str>) {
        let agent = Arc::new(Slow { tee, now: AtomicU64::new(0), most: AtomicU64::new(0) });
        let mut all = tokio::task::JoinSet::new();
        for n in 0..8u8 {
            let agent = agent.clone();
            let bound = RuntimeData::for_key(&[n]);
            all.spawn(async move {
                match evidence(&*agent, &bound, false, deadline).await {
                    Ok(_) => "ok",
                    Err(AttestError::AaTurn) => "turn",
                    Err(e) => e.reason(),
                }
            });
        }
        let ends = all.join_all().await;
        (agent.most.load(Ordering::SeqCst), ends)
    }

    // One test: a paused clock runs on while somebody else holds the one turn of this process.
    #[tokio::test(start_paused = true)]
    async fn quotes_of_a_tpm_are_made_one_after_the_other_and_other_evidence_at_once() {
        for (tee, most) in [("tpm", 1), ("az-snp-vtpm", 1), ("azsnpvtpm", 1), ("tdx", 8), ("sample", 8)] {
            assert_eq!(asked(tee, Duration::from_secs(20)).await, (most, vec!["ok"; 8]), "{tee}");
        }
        // Who waits in vain is told what for, and not that the agent was silent.
        let (most, mut ends) = asked("tpm", Duration::from_millis(3500)).await;
        ends.sort_unstable();
        assert_eq!((most, ends), (1, vec!["aa-timeout", "ok", "ok", "ok", "turn", "turn", "turn", "turn"]));
    }
}
