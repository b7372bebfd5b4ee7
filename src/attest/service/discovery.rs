//! Trust anchors that are fetched: key sets at URLs, and what a service says about its own signer.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::address::Address;
use super::bucket::Bucket;
use super::http::{Http, HttpFailure};
use super::transport::{Headers, Roots, dialer, tls};
use crate::attest::VerifyError;
use crate::attest::anchors::Anchors;
use crate::config::{AsKind, AsService, JwksSource, Mark};
use crate::os::lock::Lock;

/// How long fetched anchors are used.
const TTL: Duration = Duration::from_secs(600);

/// Anchors as they were fetched.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// Whom to believe.
    pub anchors: Arc<Anchors>,
    /// When they were asked for: who signed something before that is among them, or is nobody's signer.
    pub asked: Instant,
}

/// What a caller needs.
#[derive(Clone, Copy)]
pub struct Need<'a> {
    /// Anchors that do not know a signer; `None`: whichever are at hand will do.
    pub beside: Option<&'a Fetched>,
    /// Since when it waits.
    pub since: Instant,
    /// Times that the service was seen not to answer, so far: one that is back may have another signer.
    pub outages: u64,
    /// When the wait is over.
    pub until: Instant,
}

impl Need<'_> {
    /// Whichever anchors are at hand will do.
    pub fn any(outages: u64, until: Instant) -> Self {
        Self { beside: None, since: Instant::now(), outages, until }
    }
}

/// Why there are none.
#[derive(Debug)]
pub enum Missing {
    /// They could not be had.
    Failed(VerifyError),
    /// They were asked for often enough; the next time is after so long.
    Later(Duration),
}

impl From<Missing> for VerifyError {
    fn from(missing: Missing) -> Self {
        match missing {
            Missing::Failed(error) => error,
            Missing::Later(left) => Self::TokenUntrustedSigner(later(left)),
        }
    }
}

/// When keys are asked for again, in words.
pub fn later(left: Duration) -> String {
    format!("its keys were asked for just now, and are asked for again in {} s", left.as_secs() + 1)
}

/// The newest anchors of one source. A signer that they do not know has them fetched again at once: a service without a
/// configured signer has a new one with each start. How often strangers can cause that is bounded.
#[derive(Default)]
pub struct Kept {
    held: Mutex<Held>,
    /// One fetch at a time, whose outcome all take who wait for it.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Held {
    newest: Option<Fetched>,
    /// The newest fetch, when it failed.
    failed: Option<(Instant, VerifyError)>,
    bucket: Bucket,
    /// [`Need::outages`] when the newest were fetched.
    outages: u64,
}

impl Held {
    fn at_hand(&self, need: Need<'_>) -> Option<Fetched> {
        let young = self.newest.as_ref().filter(|newest| newest.asked.elapsed() < TTL)?;
        let known = need.beside.is_some_and(|beside| Arc::ptr_eq(&beside.anchors, &young.anchors));
        (!known).then(|| young.clone())
    }

    /// How long a stranger's signer has to wait.
    fn pause(&mut self, need: Need<'_>) -> Option<Duration> {
        need.beside?;
        if self.failed.is_some() || need.outages != self.outages {
            return None;
        }
        self.bucket.pause(Instant::now())
    }
}

impl Kept {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.locked()
    }

    /// Anchors as `need` has it: those at hand, or what `fetch` brings.
    pub async fn anchors(
        &self,
        need: Need<'_>,
        fetch: impl Future<Output = Result<Anchors, VerifyError>>,
    ) -> Result<Fetched, Missing> {
        if let Some(found) = self.held().at_hand(need) {
            return Ok(found);
        }
        let turn = timeout_at(need.until, self.turn.lock()).await;
        let _turn = turn.map_err(|_| Missing::Failed(VerifyError::AsTimeout))?;
        {
            let mut held = self.held();
            if let Some(found) = held.at_hand(need) {
                return Ok(found);
            }
            // Who waited for a fetch that began after he came has his answer: one that fails slowly must not be
            // repeated for each of them.
            if let Some((_, error)) = held.failed.as_ref().filter(|(asked, _)| *asked >= need.since) {
                return Err(Missing::Failed(error.clone()));
            }
            if let Some(left) = held.pause(need) {
                return Err(Missing::Later(left));
            }
        }
        let asked = Instant::now();
        let outcome = fetch.await;
        let mut held = self.held();
        match outcome {
            Ok(anchors) => {
                let fetched = Fetched { anchors: Arc::new(anchors), asked };
                held.bucket.take(Instant::now());
                (held.newest, held.failed, held.outages) = (Some(fetched.clone()), None, need.outages);
                Ok(fetched)
            }
            Err(error) => {
                held.failed = Some((asked, error.clone()));
                Err(Missing::Failed(error))
            }
        }
    }

    /// In words.
    pub fn origin(&self) -> Option<String> {
        self.held().newest.as_ref().map(|newest| newest.anchors.origin().to_owned())
    }
}

/// What `address` says about its signer.
pub async fn of_service(address: &Address, headers: &Headers, kept: &Kept, need: Need<'_>) -> Result<Fetched, Missing> {
    kept.anchors(need, published(address, headers, need.until)).await
}

async fn published(address: &Address, headers: &Headers, until: Instant) -> Result<Anchors, VerifyError> {
    let base = address.base();
    let silent = |failure: HttpFailure| {
        // One that is known to speak REST was away for a moment.
        if failure.may_be_grpc && address.speaks() != Some(AsKind::Rest) {
            let text = format!("{base} is gRPC alone and publishes no keys: set trusted_certs, _keys or _jwks");
            return VerifyError::TokenUntrustedSigner(text);
        }
        failure.error
    };
    let jwks = address.get("/.well-known/jwks.json", headers, until).await.map_err(silent)?;
    if jwks.status.is_success()
        && let Some(found) = Anchors::from_jwks(&jwks.body, format!("JWKS of {base}"))
    {
        return Ok(found);
    }
    let pem = address.get("/certificate", headers, until).await.map_err(silent)?;
    if pem.status.is_success()
        && let Some(found) = Anchors::from_pem(&pem.body, format!("certificate of {base}"))
    {
        return Ok(found);
    }
    // Where the openanolis line publishes the key of a signer without certificates.
    let jwks = address.get("/jwks", headers, until).await.map_err(silent)?;
    if jwks.status.is_success()
        && let Some(found) = Anchors::from_jwks(&jwks.body, format!("JWKS of {base}"))
    {
        return Ok(found);
    }
    let text = "the service names no signer, and trusted_certs, trusted_keys and trusted_jwks are empty";
    Err(VerifyError::TokenUntrustedSigner(text.into()))
}

/// Key sets at URLs of the configuration. `as_headers` are not sent there: they are the service's.
pub struct KeySets {
    http: Http,
    urls: Vec<String>,
    kept: Kept,
}

impl KeySets {
    /// The URLs of `trusted_jwks`; `None` when there are none.
    pub fn new(service: &AsService, mark: Mark) -> Result<Option<Self>, String> {
        let url = |source: &JwksSource| if let JwksSource::Url(url) = source { Some(url.clone()) } else { None };
        let urls: Vec<_> = service.trusted.jwks.iter().filter_map(url).collect();
        if urls.is_empty() {
            return Ok(None);
        }
        let https = urls.iter().any(|url| url.scheme() == "https");
        let config = tls(if https { Roots::SystemAnd(&service.ca) } else { Roots::Unused })?;
        let http = Http::new(config, dialer(mark, service.timeout)?);
        Ok(Some(Self { http, urls: urls.iter().map(ToString::to_string).collect(), kept: Kept::default() }))
    }

    /// In words.
    pub fn origin(&self) -> String {
        format!("key set at {}", self.urls.join(", "))
    }

    /// The keys of all sets. One that cannot be had fails them all: which keys it holds, nobody knows.
    pub async fn anchors(&self, need: Need<'_>) -> Result<Fetched, Missing> {
        self.kept.anchors(need, self.fetch(need.until)).await
    }

    async fn fetch(&self, until: Instant) -> Result<Anchors, VerifyError> {
        let mut all = Anchors::default();
        for url in &self.urls {
            let failed = |what: String| VerifyError::KeySet(format!("{url}: {what}"));
            let reply =
                self.http.get(url, &Headers::default(), until).await.map_err(|e| failed(e.error.to_string()))?;
            if !reply.status.is_success() {
                return Err(failed(format!("answered {}", reply.status.as_u16())));
            }
            let found = Anchors::from_jwks(&reply.body, format!("key set at {url}"));
            all.add(found.ok_or_else(|| failed("holds no P-256 and no RSA key".into()))?);
        }
        Ok(all)
    }
}

#[cfg(test)]
#[path = "discovery_tests.rs"]
mod tests;
