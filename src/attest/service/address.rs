//! One address of an attestation service: what it speaks, how it fares, how it is asked.

mod look;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use prost::Message;
use rustls::ClientConfig;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::grpc::{Answer, CallError, Grpc, code};
use super::http::{Http, HttpFailure};
use super::request::{Ask, Dialect, Refusal, Token, proto, token_of};
use super::transport::Headers;
use crate::attest::{AsStatus, VerifyError};
use crate::config::AsKind;
use crate::os::lock::Lock;
use crate::relay::Dialer;

/// First pause after a failure; it doubles with each further one.
const BACK_OFF: Duration = Duration::from_secs(1);
const MAX_BACK_OFF: Duration = Duration::from_secs(60);
/// Dialects tried for one appraisal: as known, and corrected in both ways.
const MAX_TRIES: usize = 3;
/// What a proxy says in front of a service that wants HTTP/2, or another content type.
const OTHER_PROTOCOL: [u16; 4] = [415, 426, 464, 505];

/// What status shows of an address.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ServiceStatus {
    /// Its URL.
    pub addr: String,
    /// `rest` or `grpc`; nothing while it is not known.
    pub kind: Option<&'static str>,
    /// `untried`, `ok`, or `failing`: others are asked first, unless it was late only once.
    pub state: &'static str,
    /// Appraisals it answered, whatever the answer was.
    pub answered: u64,
    /// When it last did, seconds since the epoch.
    pub last_answer: Option<u64>,
    /// Slug of its last failure, while it is failing.
    pub reason: Option<&'static str>,
}

/// One address.
pub struct Address {
    base: String,
    configured: Option<AsKind>,
    /// 0: not known; 1: REST; 2: gRPC.
    found: AtomicU8,
    /// Bits of the dialect that was last understood: 1 flat, 2 compact over REST, 4 separated over gRPC.
    dialect: AtomicU8,
    http: Arc<Http>,
    grpc: Grpc,
    health: Mutex<Health>,
    requests: Arc<AtomicU64>,
}

#[derive(Default)]
struct Health {
    failures: u32,
    /// Timeouts since the last answer.
    late: u32,
    outages: u64,
    rests_until: Option<Instant>,
    reason: Option<&'static str>,
    answered: u64,
    last_answer: Option<SystemTime>,
}

impl Address {
    /// The service at `url`, which speaks `kind`, or what it is found to speak.
    pub fn new(
        url: &Url,
        kind: Option<AsKind>,
        http: Arc<Http>,
        (tls, dialer): (ClientConfig, Dialer),
        requests: Arc<AtomicU64>,
    ) -> Result<Self, String> {
        Ok(Self {
            base: url.as_str().trim_end_matches('/').to_owned(),
            configured: kind,
            found: AtomicU8::new(0),
            dialect: AtomicU8::new(0),
            http,
            grpc: Grpc::new(url, tls, dialer)?,
            health: Mutex::default(),
            requests,
        })
    }

    /// Its URL without the last slash.
    pub fn base(&self) -> &str {
        &self.base
    }

    fn kind(&self) -> Option<AsKind> {
        self.configured.or(match self.found.load(Ordering::Relaxed) {
            1 => Some(AsKind::Rest),
            2 => Some(AsKind::Grpc),
            _ => None,
        })
    }

    fn found(&self, kind: Option<AsKind>) {
        let value = match kind {
            None => 0,
            Some(AsKind::Rest) => 1,
            Some(AsKind::Grpc) => 2,
        };
        self.found.store(value, Ordering::Relaxed);
    }

    /// GETs what the service publishes beside its API.
    pub async fn get(&self, path: &str, headers: &Headers, until: Instant) -> Result<super::http::Reply, HttpFailure> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.http.get(&format!("{}{path}", self.base), headers, until).await
    }

    /// What it speaks, as far as that is known.
    pub fn speaks(&self) -> Option<AsKind> {
        self.kind()
    }

    /// Asks for a token.
    pub async fn token(&self, ask: &Ask, headers: &Headers, until: Instant) -> Result<Token, VerifyError> {
        let known = self.kind();
        let outcome = match known {
            Some(AsKind::Rest) => self.rest(ask, headers, until).await.map_err(|e| e.error),
            Some(AsKind::Grpc) => self.grpc(ask, headers, until).await,
            None => return self.find_out(ask, headers, until).await,
        };
        match &outcome {
            _ if self.configured.is_some() => {}
            Err(VerifyError::AsGarbage(_)) => {
                // Something else listens there now.
                self.found(None);
                return self.find_out(ask, headers, until).await;
            }
            // REST in place of gRPC gives HTTP/2 no answer. Asking it first the next time costs one small request.
            Err(VerifyError::AsTimeout) if known == Some(AsKind::Grpc) => self.found(None),
            _ => {}
        }
        outcome
    }

    /// REST is asked first, so that a REST service, which may leave a gRPC client without an answer, costs nothing; a
    /// gRPC service says at once that it is none, by its answer or by hanging up.
    async fn find_out(&self, ask: &Ask, headers: &Headers, until: Instant) -> Result<Token, VerifyError> {
        let rest = match self.rest(ask, headers, until).await {
            Err(failure) if failure.may_be_grpc => failure,
            other => {
                if is_answer(&other.as_ref().map_err(|e| &e.error)) {
                    self.found(Some(AsKind::Rest));
                }
                return other.map_err(|e| e.error);
            }
        };
        let grpc = self.grpc(ask, headers, until);
        tokio::pin!(grpc);
        // A service of REST leaves HTTP/2 without an answer; one of gRPC greets at once, however long the call takes.
        let soon = Instant::now() + until.saturating_duration_since(Instant::now()) / 2;
        let grpc = match timeout_at(soon, &mut grpc).await {
            Ok(outcome) => outcome,
            Err(_) if rest.is_grpc || self.grpc.is_greeted() => grpc.await,
            Err(_) => return Err(rest.error),
        };
        if is_answer(&grpc.as_ref()) && !grpc.as_ref().is_err_and(is_http) {
            self.found(Some(AsKind::Grpc));
            return grpc;
        }
        // Where it is gRPC's, or HTTP/2 is spoken, what became of the call is hidden by nothing.
        let other = matches!(&grpc, Err(VerifyError::AsGarbage(_))) || grpc.as_ref().is_err_and(is_http);
        if rest.is_grpc || self.grpc.is_greeted() && !other {
            return grpc;
        }
        // Neither: what the plainer protocol said is the better hint.
        Err(rest.error)
    }

    async fn rest(&self, ask: &Ask, headers: &Headers, until: Instant) -> Result<Token, HttpFailure> {
        let spoken = self.dialect.load(Ordering::Relaxed);
        let mut dialect = Dialect { flat: spoken & 1 != 0 && !ask.has_devices(), compact: spoken & 2 != 0 };
        for attempt in 1.. {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let url = format!("{}/attestation", self.base);
            let reply = self.http.post(&url, headers, ask.json(dialect), until).await?;
            if reply.is_grpc {
                let error = VerifyError::AsGarbage("it is a gRPC service, and was asked as REST".into());
                return Err(HttpFailure { error, may_be_grpc: true, is_grpc: true });
            }
            if reply.status.is_success() {
                self.understood(1, dialect.flat, 2, dialect.compact);
                return Ok(Token { text: token_of(&String::from_utf8_lossy(&reply.body))?, date: reply.date });
            }
            let refusal = Refusal::of_body(&reply.body);
            if let Some(other) = ask.other(&refusal, dialect).filter(|_| attempt < MAX_TRIES) {
                dialect = ask.whole_in(other)?;
                continue;
            }
            let status = reply.status.as_u16();
            let may_be_grpc = OTHER_PROTOCOL.contains(&status);
            return Err(HttpFailure { error: refusal.error(AsStatus::Http(status)), may_be_grpc, is_grpc: false });
        }
        Err(VerifyError::Internal.into())
    }

    async fn grpc(&self, ask: &Ask, headers: &Headers, until: Instant) -> Result<Token, VerifyError> {
        let spoken = self.dialect.load(Ordering::Relaxed);
        let mut dialect = Dialect { flat: spoken & 1 != 0 && !ask.has_devices(), compact: spoken & 4 == 0 };
        for attempt in 1.. {
            match self.call("AttestationEvaluate", &ask.protobuf(dialect), headers, until).await {
                Ok(answer) => {
                    self.understood(1, dialect.flat, 4, !dialect.compact);
                    let response = proto::Response::decode(answer.message)
                        .map_err(|_| VerifyError::AsGarbage("the message is no AttestationResponse".into()))?;
                    return Ok(Token { text: token_of(&response.token)?, date: answer.date });
                }
                Err(CallError::Failed(e)) => return Err(e),
                Err(CallError::Status(code, text)) => {
                    let refusal = Refusal::of_text(text);
                    match ask.other(&refusal, dialect) {
                        Some(other) if attempt < MAX_TRIES => dialect = ask.whole_in(other)?,
                        _ => return Err(of_status(code, refusal)),
                    }
                }
            }
        }
        Err(VerifyError::Internal)
    }

    fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    async fn call(&self, method: &str, message: &[u8], headers: &Headers, until: Instant) -> Result<Answer, CallError> {
        self.count();
        self.grpc.call(method, message, headers, until).await
    }

    fn understood(&self, flat_bit: u8, flat: bool, tee_bit: u8, tee: bool) {
        let set = |value: bool, bit: u8| if value { bit } else { 0 };
        let kept = self.dialect.load(Ordering::Relaxed) & !(flat_bit | tee_bit);
        self.dialect.store(kept | set(flat, flat_bit) | set(tee, tee_bit), Ordering::Relaxed);
    }

    /// Until when others are asked before it; `None`: it is well.
    pub fn rests_until(&self) -> Option<Instant> {
        self.lock().rests_until
    }

    /// It answered, though maybe with a refusal.
    pub fn answered(&self) {
        let mut health = self.lock();
        let (answered, outages) = (health.answered + 1, health.outages);
        *health = Health { answered, outages, last_answer: Some(SystemTime::now()), ..Health::default() };
    }

    /// Times that it was found not to work.
    pub fn outages(&self) -> u64 {
        self.lock().outages
    }

    /// It failed; `true` when it was well before. One answer that is late may be the fault of what it was asked, and
    /// counts only when the next one is late too.
    pub fn failed(&self, error: &VerifyError) -> bool {
        let mut health = self.lock();
        health.outages += 1;
        if matches!(error, VerifyError::AsTimeout | VerifyError::AsStalled) {
            health.late = health.late.saturating_add(1);
            if health.late == 1 && health.failures == 0 {
                health.reason = Some(error.reason());
                return true;
            }
        }
        let pause = BACK_OFF.saturating_mul(1 << health.failures.min(10)).min(MAX_BACK_OFF);
        health.failures = health.failures.saturating_add(1);
        health.rests_until = Some(Instant::now() + pause);
        health.reason = Some(error.reason());
        health.failures == 1 && health.late <= 1
    }

    /// For status.
    pub fn status(&self) -> ServiceStatus {
        let health = self.lock();
        ServiceStatus {
            addr: format!("{}/", self.base),
            kind: self.kind().map(AsKind::as_str),
            state: match (health.reason, health.answered) {
                (Some(_), _) => "failing",
                (None, 0) => "untried",
                (None, _) => "ok",
            },
            answered: health.answered,
            last_answer: health.last_answer.map(crate::os::clock::unix),
            reason: health.reason,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.locked()
    }
}

/// Whether an attestation service said this, in whatever protocol was spoken; not a proxy in front of none.
fn is_answer(outcome: &Result<&Token, &VerifyError>) -> bool {
    match outcome {
        Ok(_) | Err(VerifyError::AsRejected(_) | VerifyError::AsBinding(_)) => true,
        Err(VerifyError::AsPolicy { .. } | VerifyError::AsTee { .. }) => true,
        Err(VerifyError::AsError { status, .. }) => !matches!(status, AsStatus::Http(502..=504)),
        // Over gRPC one stream of many; a hang-up over REST leads to the question what is spoken.
        Err(VerifyError::AsDropped(_)) => true,
        Err(_) => false,
    }
}

/// Whether HTTP refused a call before it was one of gRPC.
fn is_http(error: &VerifyError) -> bool {
    let status = match error {
        VerifyError::AsAbsent(status)
        | VerifyError::AsError { status, .. }
        | VerifyError::AsPolicy { status, .. }
        | VerifyError::AsTee { status, .. } => status,
        _ => return false,
    };
    matches!(status, AsStatus::Http(_))
}

fn of_status(code: u16, refusal: Refusal) -> VerifyError {
    match code {
        code::UNAVAILABLE => VerifyError::AsUnreachable(super::shorten(&format!("gRPC UNAVAILABLE: {}", refusal.text))),
        code::DEADLINE_EXCEEDED => VerifyError::AsTimeout,
        _ => refusal.error(AsStatus::Grpc(code)),
    }
}
