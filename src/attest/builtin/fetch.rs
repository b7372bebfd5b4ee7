//! Bounded GET requests to the services that hand out signed collateral and certificates.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Request};

use super::BuiltinError;
use crate::attest::service::{HttpClient, Roots, dialer, http_client, tls};
use crate::config::Mark;

/// Largest answer taken, bytes. Intel's largest, a TCB info, has some 20 KiB.
const MAX_ANSWER: usize = 1 << 20;

/// A client for one service. Its sockets carry the mark that captures on this host exempt.
pub struct Fetcher {
    client: HttpClient,
    base: url::Url,
    service: &'static str,
    timeout: Duration,
    calls: AtomicU64,
}

impl Fetcher {
    /// A client for the service at `base`. Fails for https without system roots.
    pub fn new(base: &url::Url, service: &'static str, mark: Mark, timeout: Duration) -> Result<Self, String> {
        let roots = if base.scheme() == "https" { Roots::SystemAnd(&[]) } else { Roots::Unused };
        let tls = tls(roots).map_err(|e| format!("{service}: {e}"))?;
        let client = http_client(tls, dialer(mark, timeout)?);
        Ok(Self { client, base: base.clone(), service, timeout, calls: AtomicU64::new(0) })
    }

    /// The service's address.
    pub fn base(&self) -> &url::Url {
        &self.base
    }

    /// Requests made.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Head and body of the answer to `path` below the base. Redirects are not followed.
    pub async fn get(&self, path: &str) -> Result<(HeaderMap, Bytes), BuiltinError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let url = self.base.join(path).map_err(|_| self.failed(path, "not a URL".into()))?;
        let work = async {
            let request = Request::get(url.as_str()).body(Full::default()).map_err(|e| e.to_string())?;
            let answer = self.client.request(request).await.map_err(|e| causes(&e))?;
            let (head, body) = answer.into_parts();
            if !head.status.is_success() {
                return Err(format!("answered {}", head.status));
            }
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            Ok((head.headers, body.map_err(|_| "the answer broke off or is beyond 1 MiB")?.to_bytes()))
        };
        let outcome = tokio::time::timeout(self.timeout, work).await;
        outcome.unwrap_or_else(|_| Err("no answer within the deadline".into())).map_err(|e| self.failed(path, e))
    }

    /// An answer that is not what was asked for.
    pub fn failed(&self, path: &str, problem: String) -> BuiltinError {
        let problem = problem.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
        BuiltinError::Fetch { service: self.service, url: format!("{}{path}", self.base), problem }
    }
}

fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
