//! Attesters over the host's own evidence: through the helper, or with root's rights.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use super::helper::{Answer, MAX_ANSWER, request};
use super::{HostError, HostEvidence, HostProvider, HostSource};
use crate::attest::{AttestError, Attester, Evidence, RuntimeData};

/// SHA-384 of the runtime data, filled up with zeros to what a TEE takes.
fn report_data(runtime_data: &RuntimeData) -> [u8; 64] {
    let mut out = [0; 64];
    out[..48].copy_from_slice(&runtime_data.digest());
    out
}

fn evidence(made: HostEvidence, runtime_data: &RuntimeData) -> Evidence {
    Evidence {
        tee: made.tee,
        evidence: made.evidence.into_bytes(),
        additional: None,
        runtime_data: runtime_data.canonical().into(),
    }
}

/// Asks the helper.
pub struct HelperAttester {
    socket: PathBuf,
    provider: HostProvider,
    deadline: Duration,
    calls: AtomicU64,
}

impl HelperAttester {
    /// An attester over the helper at `socket`; `deadline` bounds one piece of evidence.
    pub fn new(socket: &Path, provider: HostProvider, deadline: Duration) -> Self {
        Self { socket: socket.to_owned(), provider, deadline, calls: AtomicU64::new(0) }
    }

    /// Evidence over these 64 bytes.
    ///
    /// # Errors
    /// The helper cannot be reached or does not answer in time, or what it answers.
    pub async fn ask(&self, report_data: &[u8; 64]) -> Result<HostEvidence, HostError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let work = self.exchange(request(self.provider, report_data));
        let made = tokio::time::timeout(self.deadline, work).await.unwrap_or(Err(HostError::HelperTimeout))?;
        if self.provider.makes(&made.tee) {
            Ok(made)
        } else {
            Err(HostError::HelperGarbage("evidence of another kind than was asked for".into()))
        }
    }

    async fn exchange(&self, request: [u8; super::helper::REQUEST_LEN]) -> Result<HostEvidence, HostError> {
        let failed = |e: std::io::Error| HostError::HelperUnreachable(format!("{}: {e}", self.socket.display()));
        let mut stream = UnixStream::connect(&self.socket).await.map_err(failed)?;
        stream.write_all(&request).await.map_err(failed)?;
        stream.shutdown().await.map_err(failed)?;
        let mut answer = Vec::new();
        (&mut stream).take(MAX_ANSWER as u64 + 1).read_to_end(&mut answer).await.map_err(failed)?;
        if answer.len() > MAX_ANSWER {
            return Err(HostError::HelperGarbage("an answer that is too long".into()));
        }
        if answer.is_empty() {
            return Err(HostError::HelperGarbage(
                "it closed without an answer: see journalctl -u 'tng-evidence@*'".into(),
            ));
        }
        match serde_json::from_slice(&answer) {
            Ok(Answer::Evidence(made)) => Ok(made),
            Ok(Answer::Failure(failure)) => Err(failure),
            Err(_) => Err(HostError::HelperGarbage("an answer that is none".into())),
        }
    }
}

#[async_trait]
impl Attester for HelperAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        Ok(evidence(self.ask(&report_data(runtime_data)).await?, runtime_data))
    }
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn provider(&self) -> &'static str {
        self.provider.name()
    }
}

/// Makes evidence in this process, which has to have the rights.
pub struct DirectAttester {
    source: HostSource,
    deadline: Duration,
    calls: AtomicU64,
    /// A device that hangs holds one thread, not one for each attempt.
    one: std::sync::Arc<Semaphore>,
}

impl DirectAttester {
    /// An attester over `source`; `deadline` bounds one piece of evidence.
    pub fn new(source: HostSource, deadline: Duration) -> Self {
        Self { source, deadline, calls: AtomicU64::new(0), one: std::sync::Arc::new(Semaphore::new(1)) }
    }

    fn late(&self) -> HostError {
        match self.source {
            HostSource::Tsm(_) => HostError::TsmFailed("no report within the deadline".into()),
            HostSource::Tpm(_) => HostError::TpmTimeout,
        }
    }
}

#[async_trait]
impl Attester for DirectAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let (source, deadline, data) = (self.source.clone(), self.deadline, report_data(runtime_data));
        let one = self.one.clone();
        let work = async {
            let place = one.acquire_owned().await.map_err(|_| HostError::Internal)?;
            let made = tokio::task::spawn_blocking(move || {
                let _place = place;
                source.make(&data, deadline)
            });
            made.await.unwrap_or(Err(HostError::Internal))
        };
        let made = tokio::time::timeout(self.deadline, work).await.unwrap_or_else(|_| Err(self.late()))?;
        Ok(evidence(made, runtime_data))
    }
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn provider(&self) -> &'static str {
        self.source.provider().name()
    }
}
