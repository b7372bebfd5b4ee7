//! Asks the service, and believes it no further than its token's signature reaches.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::time::Instant;

use super::address::{Address, ServiceStatus};
use super::client::Client;
use super::discovery::{Fetched, Kept, KeySets, Missing, Need, later, of_service};
use super::request::{Ask, Token};
use super::transport::Headers;
use crate::attest::anchors::Anchors;
use crate::attest::{
    Evidence, LatencyStatus, RuntimeData, TOKEN_LEEWAY, TokenIssuer, Verdict, Verifier, VerifyError, is_sample_tee,
    token,
};
use crate::config::{AsKind, AsService, Mark, Verify};
use crate::os::clock::Clock;

/// A verifier that asks an Attestation Service.
pub struct AsVerifier {
    client: Client,
    policy_ids: Vec<String>,
    allow_sample: bool,
    trust: Trust,
    clock: Arc<dyn Clock>,
}

/// Where anchors come from.
enum Trust {
    /// The configuration names them.
    Named { fixed: Option<Arc<Anchors>>, sets: Option<Box<KeySets>> },
    /// Each address is asked for its own.
    Asked(Vec<Kept>),
}

/// What the attestation service showed of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AsSeen {
    /// What it speaks.
    pub kind: AsKind,
    /// Whom its tokens must be signed by, in words.
    pub anchors: String,
    /// Its clock, by the Date header of its answer (RFC 9110, 6.6.1).
    pub date: Option<SystemTime>,
}

impl AsVerifier {
    /// A verifier over `service`. Fails on what no waiting heals: an unreadable file, an illegal header, an https
    /// service and no authorities. Its sockets carry `mark`, so that a capture on this host never takes them; a
    /// process that may not mark goes without, since no capture depends on it.
    pub fn new(verify: &Verify, service: &AsService, mark: Mark, clock: Arc<dyn Clock>) -> Result<Self, String> {
        let trust = if service.trusted.is_empty() {
            Trust::Asked(service.addrs.iter().map(|_| Kept::default()).collect())
        } else {
            let fixed = Anchors::named(&service.trusted)?.map(Arc::new);
            Trust::Named { fixed, sets: KeySets::new(service, mark)?.map(Box::new) }
        };
        Ok(Self {
            client: Client::new(service, mark)?,
            policy_ids: verify.policy_ids.clone(),
            allow_sample: verify.allow_sample,
            trust,
            clock,
        })
    }

    /// Asks the first address for what it says about itself and its signer, and makes the service's own call in the protocol
    /// that is configured, with a request that it cannot appraise.
    ///
    /// # Errors
    /// It cannot be reached, is not who its address says, or is no attestation service: it has no such call, or names no
    /// signer although no anchors are configured.
    pub async fn reach(&self) -> Result<AsSeen, VerifyError> {
        let until = self.client.deadline();
        let address = self.client.addresses().first().ok_or(VerifyError::Internal)?;
        let published = address.get("/.well-known/jwks.json", self.client.headers(), until).await;
        let date = match published {
            Ok(reply) => reply.date,
            Err(failure) if failure.may_be_grpc => None,
            Err(failure) => return Err(failure.error),
        };
        let found = address.look(self.client.headers(), until).await?;
        let anchors = match &self.trust {
            Trust::Named { sets: Some(sets), .. } => {
                sets.anchors(Need::any(self.client.outages(), until)).await?;
                self.trust_anchor()
            }
            Trust::Named { .. } => self.trust_anchor(),
            Trust::Asked(kept) => {
                let first = kept.first().ok_or(VerifyError::Internal)?;
                let need = Need::any(address.outages(), until);
                of_service(address, self.client.headers(), first, need).await?.anchors.origin().to_owned()
            }
        };
        Ok(AsSeen { kind: found.kind, anchors, date: date.or(found.date) })
    }

    fn wanted<'a>(&'a self, expected: &'a RuntimeData) -> token::Expected<'a> {
        token::Expected {
            runtime_data: expected.object(),
            policy_ids: &self.policy_ids,
            allow_sample: self.allow_sample,
        }
    }

    /// Judges a token that the address at `place` gave.
    async fn judge(
        &self,
        token: &str,
        place: usize,
        expected: &token::Expected<'_>,
        until: Instant,
    ) -> Result<Verdict, VerifyError> {
        let verify = |anchors: &Anchors| token::verify(token, anchors, expected, self.clock.now());
        match &self.trust {
            Trust::Named { fixed, sets } => {
                let by_fixed = fixed.as_ref().map(|anchors| verify(anchors));
                match (by_fixed, sets) {
                    (Some(outcome), None) => outcome,
                    (Some(outcome), Some(_)) if !is_strange(&outcome) => outcome,
                    (_, Some(sets)) => by_newest(verify, Source::Sets(sets), self.client.outages(), until).await,
                    (None, None) => Err(VerifyError::Internal),
                }
            }
            Trust::Asked(kept) => {
                let (Some(kept), Some(address)) = (kept.get(place), self.client.addresses().get(place)) else {
                    return Err(VerifyError::Internal);
                };
                let source = Source::Service(address, self.client.headers(), kept);
                by_newest(verify, source, address.outages(), until).await
            }
        }
    }

    /// [`Verifier::appraise`], and the token that the service gave, which says what it says whether it is believed or
    /// not: for who wants to look.
    pub async fn appraise_showing(
        &self,
        evidence: &Evidence,
        expected: &RuntimeData,
    ) -> (Option<String>, Result<Verdict, VerifyError>) {
        let until = self.client.deadline();
        let asked = async {
            let ask = Ask::new(evidence, &self.policy_ids)?;
            // It would be refused whatever the service makes of it.
            if let Some(tee) = ask.tees().find(|tee| !self.allow_sample && is_sample_tee(tee)) {
                return Err(VerifyError::SampleTeeRefused(tee.to_owned()));
            }
            self.client.token(&ask, until).await
        };
        let (token, place) = match asked.await {
            Ok(given) => given,
            Err(e) => return (None, Err(e)),
        };
        let outcome = self.judge(&token.text, place, &self.wanted(expected), until).await;
        let outcome = outcome.map_err(|e| self.explain(e, &token));
        (Some(token.text), outcome)
    }

    /// A token made for this very question is of now, by the clock of who made it.
    fn explain(&self, error: VerifyError, token: &Token) -> VerifyError {
        use VerifyError as V;
        let Some(theirs) =
            token.date.filter(|_| matches!(error, V::TokenExpired | V::TokenNotYetValid | V::TokenFromFuture))
        else {
            return error;
        };
        let ours = self.clock.now();
        let (apart, word) = match ours.duration_since(theirs) {
            Ok(behind) => (behind, "behind"),
            Err(ahead) => (ahead.duration(), "ahead of"),
        };
        if apart <= TOKEN_LEEWAY {
            return error;
        }
        V::AsClock(format!("its clock is {} s {word} ours", apart.as_secs()))
    }
}

fn is_strange(outcome: &Result<Verdict, VerifyError>) -> bool {
    matches!(outcome, Err(VerifyError::TokenUntrustedSigner(_)))
}

/// Where anchors are fetched.
enum Source<'a> {
    /// At URLs of the configuration.
    Sets(&'a KeySets),
    /// Of the service itself.
    Service(&'a Address, &'a Headers, &'a Kept),
}

impl Source<'_> {
    async fn anchors(&self, need: Need<'_>) -> Result<Fetched, Missing> {
        match self {
            Self::Sets(sets) => sets.anchors(need).await,
            Self::Service(address, headers, kept) => of_service(address, headers, kept, need).await,
        }
    }
}

/// Judges by anchors that are fetched: by those at hand, and, where they do not know the signer, by such as were asked
/// for after the token was there. Ends, since only a fetch that was under way can come between.
async fn by_newest(
    verify: impl Fn(&Anchors) -> Result<Verdict, VerifyError>,
    source: Source<'_>,
    outages: u64,
    until: Instant,
) -> Result<Verdict, VerifyError> {
    let since = Instant::now();
    let mut tried: Option<(Fetched, String)> = None;
    loop {
        let beside = tried.as_ref().map(|(fetched, _)| fetched);
        let fetched = match (source.anchors(Need { beside, since, outages, until }).await, &tried) {
            (Ok(fetched), _) => fetched,
            (Err(Missing::Later(left)), Some((_, why))) => {
                return Err(VerifyError::TokenUntrustedSigner(format!("{why}; {}", later(left))));
            }
            (Err(missing), _) => return Err(missing.into()),
        };
        match verify(&fetched.anchors) {
            Err(VerifyError::TokenUntrustedSigner(why)) if fetched.asked < since => tried = Some((fetched, why)),
            outcome => return outcome,
        }
    }
}

#[async_trait]
impl TokenIssuer for AsVerifier {
    /// What the token says is not looked at: the peer checks it.
    async fn issue(&self, evidence: &Evidence) -> Result<String, VerifyError> {
        let ask = Ask::new(evidence, &self.policy_ids)?;
        let (token, _) = self.client.token(&ask, self.client.deadline()).await?;
        Ok(token.text)
    }
    fn latency(&self) -> Option<LatencyStatus> {
        Some(self.client.latency())
    }
}

#[async_trait]
impl Verifier for AsVerifier {
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        self.appraise_showing(evidence, expected).await.1
    }
    /// Of a token that somebody got from the service; where each address is asked for its anchors, any may vouch for it.
    async fn check_token(&self, token: &str, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let until = self.client.deadline();
        let mut outcome = Err(VerifyError::Internal);
        for place in 0..self.client.addresses().len() {
            outcome = self.judge(token, place, &self.wanted(expected), until).await;
            // Which address it came from, nobody knows: another one may vouch for its signer.
            let named = matches!(self.trust, Trust::Named { .. });
            let next = matches!(outcome, Err(VerifyError::TokenUntrustedSigner(_) | VerifyError::AsUnreachable(_)));
            if named || !next {
                break;
            }
        }
        outcome
    }
    fn calls(&self) -> u64 {
        self.client.requests()
    }
    fn failovers(&self) -> u64 {
        self.client.failovers()
    }
    fn services(&self) -> Vec<ServiceStatus> {
        self.client.status()
    }
    fn latency(&self) -> Option<LatencyStatus> {
        Some(self.client.latency())
    }
    fn provider(&self) -> &'static str {
        "as"
    }
    fn trust_anchor(&self) -> String {
        match &self.trust {
            Trust::Named { fixed, sets } => {
                let fixed = fixed.as_ref().map(|a| a.origin().to_owned());
                let both: Vec<_> = fixed.into_iter().chain(sets.as_ref().map(|s| s.origin())).collect();
                both.join("; ")
            }
            Trust::Asked(kept) => {
                let fetched: Vec<_> = kept.iter().filter_map(Kept::origin).collect();
                if fetched.is_empty() {
                    let asked: Vec<_> = self.client.addresses().iter().map(|a| a.base()).collect();
                    return format!("not yet fetched from {}", asked.join(", "));
                }
                fetched.join("; ")
            }
        }
    }
}
