//! A verifier that lets its token be seen.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use crate::attest::{AsVerifier, Evidence, RuntimeData, Verdict, Verifier, VerifyError};
use crate::config::{Endpoint, Verify, VerifyProvider};
use crate::os::clock::Clock;
use crate::os::lock::Lock;
use crate::tls::endpoint::setup;
use crate::tls::{ChannelError, providers};

/// A verifier that keeps the token a service gave it.
pub(super) struct Showing {
    inner: Inner,
    token: Mutex<Option<String>>,
}

enum Inner {
    Service(Box<AsVerifier>),
    Other(Arc<dyn Verifier>),
}

impl Showing {
    /// The verifier of `verify`, as an endpoint has it.
    pub(super) fn new(endpoint: &Endpoint, verify: &Verify, clock: Arc<dyn Clock>) -> Result<Self, ChannelError> {
        let inner = match &verify.provider {
            VerifyProvider::As(service) => {
                let mark = providers::service_mark(endpoint);
                Inner::Service(Box::new(AsVerifier::new(verify, service, mark, clock).map_err(setup)?))
            }
            _ => Inner::Other(providers::verifier(endpoint, verify, clock)?),
        };
        Ok(Self { inner, token: Mutex::default() })
    }

    /// What the service gave, if one was asked.
    pub(super) fn token(&self) -> Option<String> {
        self.token.locked().clone()
    }

    fn any(&self) -> &dyn Verifier {
        match &self.inner {
            Inner::Service(service) => &**service,
            Inner::Other(other) => &**other,
        }
    }
}

#[async_trait]
impl Verifier for Showing {
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let Inner::Service(service) = &self.inner else { return self.any().appraise(evidence, expected).await };
        let (token, outcome) = service.appraise_showing(evidence, expected).await;
        *self.token.locked() = token;
        outcome
    }
    async fn check_token(&self, token: &str, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        self.any().check_token(token, expected).await
    }
    fn calls(&self) -> u64 {
        self.any().calls()
    }
    fn provider(&self) -> &'static str {
        self.any().provider()
    }
    fn trust_anchor(&self) -> String {
        self.any().trust_anchor()
    }
}
