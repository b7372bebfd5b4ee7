//! Evidence from a CoCo Attestation Agent over ttrpc.

use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;

use super::ttrpc::{self, Client};
use super::{AttestError, Attester, Evidence, RuntimeData};

const SERVICE: &str = "attestation_agent.AttestationAgentService";

#[derive(Clone, PartialEq, Message)]
struct GetEvidenceRequest {
    #[prost(bytes = "vec", tag = "1")]
    runtime_data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct GetEvidenceResponse {
    #[prost(bytes = "vec", tag = "1")]
    evidence: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct GetTeeTypeRequest {}

#[derive(Clone, PartialEq, Message)]
struct GetTeeTypeResponse {
    #[prost(string, tag = "1")]
    tee: String,
}

/// Asks an agent for the evidence of its TEE. Device evidence is not asked for: the only way TNG has for it
/// leaves it unbound to the key.
pub struct AaAttester {
    client: Client,
    deadline: Duration,
    calls: AtomicU64,
}

impl AaAttester {
    /// An attester over the agent at `socket`; `deadline` bounds all calls of one piece of evidence together.
    pub fn new(socket: &Path, deadline: Duration) -> Self {
        Self { client: Client::new(socket), deadline, calls: AtomicU64::new(0) }
    }

    async fn call<T: Message + Default>(&self, method: &str, request: &impl Message) -> Result<T, AttestError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let payload = self.client.call(SERVICE, method, request, self.deadline).await?;
        T::decode(&payload[..]).map_err(|_| AttestError::AaGarbage("a payload that is not protobuf"))
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, AttestError>>) -> Result<T, AttestError> {
        tokio::time::timeout(self.deadline, work).await.unwrap_or(Err(AttestError::AaTimeout))
    }

    /// The agent's TEE: the cheap call that shows that it answers.
    ///
    /// # Errors
    /// The agent cannot be reached, is too old, or does not answer within the deadline.
    pub async fn tee_type(&self) -> Result<String, AttestError> {
        self.within(self.tee()).await
    }

    async fn tee(&self) -> Result<String, AttestError> {
        let answer: Result<GetTeeTypeResponse, _> = self.call("GetTeeType", &GetTeeTypeRequest {}).await;
        match answer {
            Err(AttestError::AaError { code: ttrpc::UNIMPLEMENTED | ttrpc::NOT_FOUND, .. }) => {
                Err(AttestError::AaNoTeeType)
            }
            Err(e) => Err(e),
            Ok(GetTeeTypeResponse { tee }) => {
                let legal =
                    (1..=32).contains(&tee.len()) && tee.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
                if legal { Ok(tee) } else { Err(AttestError::AaGarbage("no name of a TEE")) }
            }
        }
    }
}

#[async_trait]
impl Attester for AaAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        let request = GetEvidenceRequest { runtime_data: runtime_data.digest().to_vec() };
        self.within(async {
            // First, since it is cheap: an agent too old to tell makes no quote in vain.
            let tee = self.tee().await?;
            let answer: GetEvidenceResponse = self.call("GetEvidence", &request).await?;
            if answer.evidence.is_empty() {
                return Err(AttestError::AaGarbage("empty evidence"));
            }
            Ok(Evidence {
                tee,
                evidence: answer.evidence,
                additional: None,
                runtime_data: runtime_data.canonical().into(),
            })
        })
        .await
    }
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn provider(&self) -> &'static str {
        "aa"
    }
}
