//! Evidence from an attestation agent behind CoCo's HTTP API server (api-server-rest), for hosts that see no socket.
//!
//! `GET /info` tells the TEE, `GET /aa/evidence?runtime_data=...&encoding=base64` (base64url, no padding) and
//! `GET /aa/additional-evidence?...` are the agent's calls. A server too old for `encoding` takes the base64 text itself
//! as runtime data; `GET /aa/token` makes tokens that are bound to no key, and is not used.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::agent::{self, Agent};
use super::service::{Connector, dialer};
use super::{AttestError, Attester, Evidence, RuntimeData};
use crate::config::Mark;

/// Largest answer taken, as the agent's own protocol allows.
const MAX_ANSWER: usize = 4 << 20;
/// Longest error text kept, characters.
const MAX_TEXT: usize = 200;
/// Fields of evidence looked into for the text of the runtime data.
const MAX_FIELDS: usize = 256;

/// Asks an agent through the API server in front of it.
pub struct AsrAttester {
    client: Client<Connector, Empty<Bytes>>,
    base: String,
    additional: bool,
    deadline: Duration,
    calls: AtomicU64,
}

impl AsrAttester {
    /// An attester over the server at `addr`; `deadline` bounds all requests of one piece of evidence together.
    /// `additional`: the devices' evidence too. Its sockets carry `mark`, as those to an attestation service.
    ///
    /// # Errors
    /// Sockets cannot be marked for a reason other than missing privileges.
    pub fn new(addr: &url::Url, additional: bool, mark: Mark, deadline: Duration) -> Result<Self, String> {
        let client =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(4).build(Connector(dialer(mark, deadline)?));
        let base = addr.as_str().trim_end_matches('/').to_owned();
        Ok(Self { client, base, additional, deadline, calls: AtomicU64::new(0) })
    }

    /// The agent's TEE: the cheap call that shows that it answers.
    ///
    /// # Errors
    /// The server cannot be reached, is too old, or does not answer within the deadline.
    pub async fn tee_type(&self) -> Result<String, AttestError> {
        let tee = self.within(self.tee()).await?;
        if agent::is_tee_name(&tee) { Ok(tee) } else { Err(AttestError::AaGarbage("no name of a TEE")) }
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), AttestError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let unreachable = |why: &dyn std::fmt::Display| AttestError::AaUnreachable(format!("{}: {why}", self.base));
        let uri = format!("{}{path}", self.base).parse().map_err(|_| unreachable(&"not a URI"))?;
        let response = self.client.get(uri).await.map_err(|e| {
            let mut text = e.to_string();
            let mut source = std::error::Error::source(&e);
            while let Some(inner) = source {
                if inner.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
                    return AttestError::AaGarbage("not HTTP");
                }
                text = format!("{text}: {inner}");
                source = inner.source();
            }
            unreachable(&printable(&text))
        })?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| {
            if e.is::<LengthLimitError>() {
                AttestError::AaGarbage("an answer beyond 4 MiB")
            } else {
                unreachable(&"the answer broke off")
            }
        })?;
        Ok((status, body.to_bytes()))
    }

    async fn ask(&self, what: &str, report_data: &[u8]) -> Result<Option<Vec<u8>>, AttestError> {
        let text = BASE64_URL_SAFE_NO_PAD.encode(report_data);
        let (status, body) = self.get(&format!("/aa/{what}?runtime_data={text}&encoding=base64")).await?;
        match status {
            StatusCode::NOT_FOUND => return Ok(None),
            s if !s.is_success() => return Err(refused(s, &body)),
            _ => {}
        }
        if holds(&body, text.as_bytes()) {
            return Err(AttestError::AsrTooOld("it takes runtime data as text only; update it"));
        }
        Ok(Some(body.to_vec()))
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, AttestError>>) -> Result<T, AttestError> {
        tokio::time::timeout(self.deadline, work).await.unwrap_or(Err(AttestError::AaTimeout))
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT).collect()
}

fn refused(status: StatusCode, body: &[u8]) -> AttestError {
    let message = printable(&String::from_utf8_lossy(body)).trim().to_owned();
    AttestError::AaError { code: i32::from(status.as_u16()), message }
}

/// Whether evidence was made over `text` itself: it stands in the bytes that one of its strings is the base64 of, or
/// that one of its arrays lists (SEV-SNP), as report data does in every kind of evidence.
fn holds(evidence: &[u8], text: &[u8]) -> bool {
    let Ok(root) = serde_json::from_slice::<Value>(evidence) else { return false };
    let (mut todo, mut seen) = (vec![&root], 0);
    while let Some(value) = todo.pop() {
        let bytes = match value {
            Value::Object(members) => {
                todo.extend(members.values());
                None
            }
            Value::Array(items) => {
                let listed = items.iter().map(|i| i.as_u64().and_then(|n| u8::try_from(n).ok())).collect();
                if items.iter().any(|i| !i.is_number()) {
                    todo.extend(items);
                }
                listed
            }
            Value::String(s) => BASE64_STANDARD.decode(s).or_else(|_| BASE64_URL_SAFE_NO_PAD.decode(s)).ok(),
            _ => None,
        };
        let Some(bytes) = bytes else { continue };
        seen += 1;
        if seen > MAX_FIELDS {
            return false;
        }
        if bytes.windows(text.len()).any(|w| w == text) {
            return true;
        }
    }
    false
}

#[async_trait]
impl Agent for AsrAttester {
    async fn tee(&self) -> Result<String, AttestError> {
        let (status, body) = self.get("/info").await?;
        if status == StatusCode::NOT_FOUND {
            return Err(AttestError::AsrTooOld("it has no /info, or it is no API server: check asr_addr"));
        }
        if !status.is_success() {
            return Err(refused(status, &body));
        }
        let info: Value = serde_json::from_slice(&body).map_err(|_| AttestError::AaGarbage("/info is not JSON"))?;
        match info.get("tee") {
            Some(Value::String(tee)) => Ok(tee.clone()),
            // It asks no agent for its TEE then. `resource` is what a server does that nobody told otherwise.
            None if info.get("feature").is_some_and(|f| f == "resource") => Err(AttestError::AsrFeature),
            // As of a server that was started without an agent, or before /info told the TEE.
            None if info.is_object() => {
                Err(AttestError::AsrTooOld("/info does not tell the TEE, or it has no agent; update it"))
            }
            _ => Err(AttestError::AaGarbage("no name of a TEE")),
        }
    }

    async fn evidence_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError> {
        self.ask("evidence", report_data).await?.ok_or(AttestError::AsrTooOld("it has no /aa/evidence; update it"))
    }

    async fn devices_over(&self, report_data: &[u8]) -> Result<Vec<u8>, AttestError> {
        Ok(self.ask("additional-evidence", report_data).await?.unwrap_or_default())
    }
}

#[async_trait]
impl Attester for AsrAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        agent::evidence(self, runtime_data, self.additional, self.deadline).await
    }
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn provider(&self) -> &'static str {
        "asr"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::changes::{CASES, change, changed};
    use proptest::prelude::*;
    use serde_json::json;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(CASES))]

        #[test]
        fn no_changed_evidence_panics(change in change(), at: u16, which: u8) {
            let good = json!({ "quote": BASE64_STANDARD.encode([7; 48]), "list": [1, 2, 255], "in": { "x": ["a"] } });
            for bad in [change.of(good.to_string().as_bytes()), changed(&good, at, which).to_string().into_bytes()] {
                let _ = holds(&bad, b"text");
                let AttestError::AaError { message, .. } = refused(StatusCode::BAD_GATEWAY, &bad) else { panic!() };
                prop_assert!(message.chars().count() <= MAX_TEXT && !message.contains(char::is_control));
            }
        }
    }

    #[test]
    fn evidence_over_the_text_of_the_runtime_data_is_recognised() {
        let text = BASE64_URL_SAFE_NO_PAD.encode([7; 48]);
        let sample = |data: &[u8]| format!(r#"{{"report_data":"{}","svn":"1"}}"#, BASE64_STANDARD.encode(data));
        assert!(holds(sample(text.as_bytes()).as_bytes(), text.as_bytes()));
        assert!(!holds(sample(&[7; 48]).as_bytes(), text.as_bytes()));
        // A quote has it in the middle.
        let quote = [&[1; 500][..], text.as_bytes(), &[2; 500]].concat();
        let tdx = format!(r#"{{"cc_eventlog":null,"quote":"{}"}}"#, BASE64_STANDARD.encode(quote));
        assert!(holds(tdx.as_bytes(), text.as_bytes()));
        let listed = format!(r#"{{"attestation_report":{{"report_data":{:?}}}}}"#, text.as_bytes());
        assert!(holds(listed.as_bytes(), text.as_bytes()));
        for other in ["", "null", "not JSON", r#"{"a":[1,{"b":"%%%"}]}"#] {
            assert!(!holds(other.as_bytes(), text.as_bytes()), "{other}");
        }
    }
}
