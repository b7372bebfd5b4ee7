//! Trust anchors that are fetched: key sets at URLs, and what a service says about its own signer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::address::Address;
use super::http::{Http, HttpFailure};
use super::transport::{Headers, Roots, dialer, tls};
use crate::attest::VerifyError;
use crate::attest::anchors::Anchors;
use crate::config::{AsService, JwksSource, Mark};

/// How long fetched anchors are used.
const TTL: Duration = Duration::from_secs(600);
/// A signer may have changed: anchors are fetched again for an untrusted one, but no more often.
const MIN_AGE: Duration = Duration::from_secs(10);

/// The newest anchors of one source.
#[derive(Default)]
pub struct Kept(Mutex<Option<(Instant, Arc<Anchors>)>>);

impl Kept {
    /// The anchors if they are young enough; `again`: somebody was not among them.
    fn get(&self, again: bool) -> Option<Arc<Anchors>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = if again { MIN_AGE } else { TTL };
        kept.as_ref().filter(|(at, _)| at.elapsed() < longest).map(|(_, anchors)| anchors.clone())
    }

    fn put(&self, anchors: Anchors) -> Arc<Anchors> {
        let anchors = Arc::new(anchors);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), anchors.clone()));
        anchors
    }

    /// In words.
    pub fn origin(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(_, a)| a.origin().to_owned())
    }
}

/// What `address` says about its signer.
pub async fn of_service(
    address: &Address,
    headers: &Headers,
    kept: &Kept,
    again: bool,
    until: Instant,
) -> Result<Arc<Anchors>, VerifyError> {
    if let Some(anchors) = kept.get(again) {
        return Ok(anchors);
    }
    let base = address.base();
    let silent = |failure: HttpFailure| {
        if failure.may_be_grpc {
            let text = format!("{base} is gRPC alone and publishes no keys: set trusted_certs, _keys or _jwks");
            return VerifyError::TokenUntrustedSigner(text);
        }
        failure.error
    };
    let jwks = address.get("/.well-known/jwks.json", headers, until).await.map_err(silent)?;
    if jwks.status.is_success()
        && let Some(found) = Anchors::from_jwks(&jwks.body, format!("JWKS of {base}"))
    {
        return Ok(kept.put(found));
    }
    let pem = address.get("/certificate", headers, until).await.map_err(silent)?;
    if pem.status.is_success()
        && let Some(found) = Anchors::from_pem(&pem.body, format!("certificate of {base}"))
    {
        return Ok(kept.put(found));
    }
    // Where the openanolis line publishes the key of a signer without certificates.
    let jwks = address.get("/jwks", headers, until).await.map_err(silent)?;
    if jwks.status.is_success()
        && let Some(found) = Anchors::from_jwks(&jwks.body, format!("JWKS of {base}"))
    {
        return Ok(kept.put(found));
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
    pub async fn anchors(&self, again: bool, until: Instant) -> Result<Arc<Anchors>, VerifyError> {
        if let Some(anchors) = self.kept.get(again) {
            return Ok(anchors);
        }
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
        Ok(self.kept.put(all))
    }
}
