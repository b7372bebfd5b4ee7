//! Evidence from a CoCo Attestation Agent over ttrpc.

use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;

use super::agent::{self, Agent};
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

#[derive(Clone, PartialEq, Message)]
struct GetAdditionalEvidenceRequest {
    #[prost(bytes = "vec", tag = "1")]
    runtime_data: Vec<u8>,
}

/// Asks an agent for the evidence of its TEE and, when told to, of its devices.
pub struct AaAttester {
    client: Client,
    additional: bool,
    deadline: Duration,
    calls: AtomicU64,
}

/// Whether the agent does not have the method.
fn lacks(answer: &AttestError) -> bool {
    matches!(answer, AttestError::AaError { code: ttrpc::UNIMPLEMENTED | ttrpc::NOT_FOUND, .. })
}

impl AaAttester {
    /// An attester over the agent at `socket`; `deadline` bounds all calls of one piece of evidence together.
    pub fn new(socket: &Path, deadline: Duration) -> Self {
        Self { client: Client::new(socket), additional: false, deadline, calls: AtomicU64::new(0) }
    }

    /// Whether it asks for the devices' evidence too; an agent that has none is then an error.
    #[must_use]
    pub fn with_additional(self, additional: bool) -> Self {
        Self { additional, ..self }
    }

    async fn call<T: Message + Default>(&self, method: &str, request: &impl Message) -> Result<T, AttestError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let payload = match self.client.call(SERVICE, method, request, self.deadline).await {
            // The agent's own timer, which was told our deadline, ran out first.
            Err(AttestError::AaError { code: ttrpc::DEADLINE_EXCEEDED, .. }) => return Err(AttestError::AaTimeout),
            other => other?,
        };
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
        let tee = self.within(self.tee()).await?;
        if agent::is_tee_name(&tee) { Ok(tee) } else { Err(AttestError::AaGarbage("no name of a TEE")) }
    }
}

#[async_trait]
impl Agent for AaAttester {
    async fn tee(&self) -> Result<String, AttestError> {
        let answer: Result<GetTeeTypeResponse, _> = self.call("GetTeeType", &GetTeeTypeRequest {}).await;
        match answer {
            Err(e) if lacks(&e) => Err(AttestError::AaNoTeeType),
            other => other.map(|r| r.tee),
        }
    }

    async fn evidence_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError> {
        let request = GetEvidenceRequest { runtime_data: report_data.to_vec() };
        self.call("GetEvidence", &request).await.map(|r: GetEvidenceResponse| r.evidence)
    }

    async fn devices_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError> {
        let request = GetAdditionalEvidenceRequest { runtime_data: report_data.to_vec() };
        match self.call("GetAdditionalEvidence", &request).await {
            Err(e) if lacks(&e) => Ok(Vec::new()),
            other => other.map(|r: GetEvidenceResponse| r.evidence),
        }
    }
}

#[async_trait]
impl Attester for AaAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        agent::evidence(self, runtime_data, self.additional, self.deadline).await
    }
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn provider(&self) -> &'static str {
        "aa"
    }
}
