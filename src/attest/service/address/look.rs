//! Whether an attestation service is at an address, found out without an appraisal.
//!
//! The service's own call is made with a request that lacks what every version demands. What is there names the lack, as
//! only an attestation service does; something else has no such call, or answers whatever it is asked.

use std::time::SystemTime;

use tokio::time::Instant;

use super::super::grpc::{CallError, code};
use super::super::http::HttpFailure;
use super::super::request::{Refusal, token_of};
use super::super::transport::Headers;
use super::{Address, OTHER_PROTOCOL, of_status};
use crate::attest::{AsStatus, VerifyError};
use crate::config::AsKind;

/// Body of `POST /attestation`: every version misses `policy_ids`, or the members of a flat request. trustee and the
/// openanolis line answer 400.
const LACKING: &str = r#"{"verification_requests":[]}"#;
/// What the one says where it fails itself, and what the other's codes begin with.
const FAILED: &str = "An internal error occured";
const CODES: &str = "AS.";

/// What was found.
pub struct Found {
    /// What it speaks.
    pub kind: AsKind,
    /// Its clock, if it told.
    pub date: Option<SystemTime>,
}

impl Address {
    /// Looks what is there: in the protocol that is configured, else in either.
    ///
    /// # Errors
    /// No attestation service, or one that speaks the other protocol than the configured one.
    pub async fn look(&self, headers: &Headers, until: Instant) -> Result<Found, VerifyError> {
        // A service of REST leaves HTTP/2 without an answer, so time is left for the other question.
        let half = Instant::now() + until.saturating_duration_since(Instant::now()) / 2;
        let configured = self.configured;
        if configured == Some(AsKind::Grpc) {
            return match self.grpc_there(headers, half).await {
                Ok(()) => Ok(Found { kind: AsKind::Grpc, date: None }),
                Err(error) if is_absent(&error) => Err(error),
                Err(error) => match self.rest_there(headers, until).await {
                    Ok(_) => Err(VerifyError::AsGarbage("it is a REST service, and was asked as gRPC".into())),
                    Err(_) => Err(error),
                },
            };
        }
        let rest = match self.rest_there(headers, until).await {
            Ok(date) => return Ok(Found { kind: AsKind::Rest, date }),
            Err(failure) if !failure.may_be_grpc => return Err(failure.error),
            Err(failure) => failure,
        };
        match (self.grpc_there(headers, half).await, configured) {
            (Ok(()), None) => Ok(Found { kind: AsKind::Grpc, date: None }),
            (Ok(()), Some(_)) => Err(VerifyError::AsGarbage("it is a gRPC service, and was asked as REST".into())),
            // Neither: what was configured, or the plainer protocol, gives the better hint.
            (Err(error), None) if rest.is_grpc => Err(error),
            (Err(error), _) if is_absent(&error) => Err(error),
            (Err(_), _) => Err(rest.error),
        }
    }

    async fn rest_there(&self, headers: &Headers, until: Instant) -> Result<Option<SystemTime>, HttpFailure> {
        self.count();
        let reply = self.http.post(&format!("{}/attestation", self.base), headers, LACKING.to_owned(), until).await?;
        if reply.is_grpc {
            let error = VerifyError::AsGarbage("it is a gRPC service, and was asked as REST".into());
            return Err(HttpFailure { error, may_be_grpc: true, is_grpc: true });
        }
        let text = String::from_utf8_lossy(&reply.body);
        let is_page = text.trim_start().starts_with('<');
        if reply.status.is_success() || is_page && reply.status == 400 {
            let indifferent = VerifyError::AsGarbage("it gives tokens for no evidence".into());
            return Err(token_of(&text).err().unwrap_or(indifferent).into());
        }
        let (status, refusal) = (reply.status.as_u16(), Refusal::of_body(&reply.body));
        match status {
            400 | 422 => Ok(reply.date),
            500 if refusal.code.starts_with(CODES) || refusal.text.starts_with(FAILED) => Ok(reply.date),
            _ => {
                let may_be_grpc = OTHER_PROTOCOL.contains(&status);
                Err(HttpFailure { error: refusal.error(AsStatus::Http(status)), may_be_grpc, is_grpc: false })
            }
        }
    }

    async fn grpc_there(&self, headers: &Headers, until: Instant) -> Result<(), VerifyError> {
        // A request without anything in it.
        match self.call("AttestationEvaluate", &[], headers, until).await {
            Ok(_) => Err(VerifyError::AsGarbage("it gives answers to no question".into())),
            Err(CallError::Failed(error)) => Err(error),
            Err(CallError::Status(code, text)) => match code {
                code::UNIMPLEMENTED
                | code::UNAVAILABLE
                | code::DEADLINE_EXCEEDED
                | code::PERMISSION_DENIED
                | code::UNAUTHENTICATED => Err(of_status(code, Refusal::of_text(text))),
                _ => Ok(()),
            },
        }
    }
}

/// Whether gRPC is spoken there, and not by an attestation service.
fn is_absent(error: &VerifyError) -> bool {
    matches!(error, VerifyError::AsAbsent(AsStatus::Grpc(_)) | VerifyError::AsError { status: AsStatus::Grpc(_), .. })
}
