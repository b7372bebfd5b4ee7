//! Gets a token from the first address that answers.
//!
//! An address that cannot be reached, stalls or is broken gives way to the next one and is asked last for a while. A
//! refusal of the evidence never does: no second opinion is sought.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::address::{Address, ServiceStatus};
use super::http::Http;
use super::request::{Ask, Token};
use super::transport::{Headers, Roots, dialer, tls};
use crate::attest::{AsStatus, Latency, LatencyStatus, VerifyError};
use crate::config::{AsService, Mark};

/// A client of one service at all its addresses.
pub struct Client {
    addresses: Vec<Address>,
    headers: Headers,
    timeout: Duration,
    requests: Arc<AtomicU64>,
    failovers: AtomicU64,
    latency: Latency,
}

impl Client {
    /// Fails on what no waiting heals: an unreadable file of authorities, an illegal header, https and no authorities.
    pub fn new(service: &AsService, mark: Mark) -> Result<Self, String> {
        let dialer = dialer(mark, service.timeout)?;
        let https = service.addrs.iter().any(|a| a.scheme() == "https");
        let config = tls(if https { Roots::Own(&service.ca) } else { Roots::Unused })?;
        let http = Arc::new(Http::new(config.clone(), dialer));
        let requests = Arc::new(AtomicU64::new(0));
        let address = |url| Address::new(url, service.kind, http.clone(), (config.clone(), dialer), requests.clone());
        Ok(Self {
            addresses: service.addrs.iter().map(address).collect::<Result<_, String>>()?,
            headers: Headers::new(&service.headers)?,
            timeout: service.timeout,
            requests,
            failovers: AtomicU64::new(0),
            latency: Latency::of("attestation service"),
        })
    }

    /// When an appraisal that begins now must be over.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Addresses, in the order of the configuration.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Headers for requests to an address.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Requests sent.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Times that an address gave way to the next one.
    pub fn failovers(&self) -> u64 {
        self.failovers.load(Ordering::Relaxed)
    }

    /// Times that an address was found not to work.
    pub fn outages(&self) -> u64 {
        self.addresses.iter().map(Address::outages).sum()
    }

    /// How long it took to get tokens, or to learn that there are none.
    pub fn latency(&self) -> LatencyStatus {
        self.latency.status()
    }

    /// For status.
    pub fn status(&self) -> Vec<ServiceStatus> {
        self.addresses.iter().map(Address::status).collect()
    }

    /// A token, and the place of the address that gave it. All attempts together end at `until`.
    pub async fn token(&self, ask: &Ask, until: Instant) -> Result<(Token, usize), VerifyError> {
        self.latency.time(self.first_answer(ask, until)).await
    }

    async fn first_answer(&self, ask: &Ask, until: Instant) -> Result<(Token, usize), VerifyError> {
        let order = self.order(Instant::now());
        let mut worst = VerifyError::Internal;
        for (at, &place) in order.iter().enumerate() {
            let address = &self.addresses[place];
            // An address that stalls leaves each of the others the same time.
            let now = Instant::now();
            let share = until.saturating_duration_since(now) / (order.len() - at) as u32;
            let error = match address.token(ask, &self.headers, now + share).await {
                Ok(token) => {
                    address.answered();
                    return Ok((token, place));
                }
                Err(error) => error,
            };
            let failure = Failure::of(&error);
            match failure {
                Failure::Address => {
                    if address.failed(&error) {
                        let service = address.base();
                        tracing::warn!(service, %error, "attestation service failed");
                    }
                }
                Failure::Request | Failure::Verdict => address.answered(),
            }
            if failure == Failure::Verdict {
                return Err(error);
            }
            // The error of one that was reached says more than that of one that was not.
            let reached = matches!(
                worst,
                VerifyError::AsError { .. }
                    | VerifyError::AsDropped(_)
                    | VerifyError::AsAbsent(_)
                    | VerifyError::AsPolicy { .. }
                    | VerifyError::AsTee { .. }
            );
            if at == 0 || !reached {
                worst = error;
            }
            if at + 1 < order.len() {
                self.failovers.fetch_add(1, Ordering::Relaxed);
            }
        }
        Err(worst)
    }

    /// Those that are well as configured, then the others, whose pause ends first first: nobody is refused untried.
    fn order(&self, now: Instant) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.addresses.len()).collect();
        order.sort_by_key(|&place| self.addresses[place].rests_until().filter(|end| *end > now));
        order
    }
}

/// What an error says about an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// It does not work for anybody now.
    Address,
    /// It did not manage this request, maybe because of what is in it: others are asked, and it stays first. A peer
    /// could otherwise choose who appraises it.
    Request,
    /// The evidence was judged, or nothing was asked.
    Verdict,
}

impl Failure {
    fn of(error: &VerifyError) -> Self {
        match error {
            VerifyError::AsUnreachable(_)
            | VerifyError::AsTls(_)
            | VerifyError::AsTimeout
            | VerifyError::AsStalled
            | VerifyError::AsGarbage(_)
            | VerifyError::AsAbsent(_)
            | VerifyError::AsNoToken(_)
            | VerifyError::AsError { status: AsStatus::Http(502..=504), .. } => Self::Address,
            VerifyError::AsError { status: AsStatus::Http(500..) | AsStatus::Grpc(_), .. }
            | VerifyError::AsDropped(_)
            | VerifyError::AsPolicy { .. }
            | VerifyError::AsTee { .. } => Self::Request,
            _ => Self::Verdict,
        }
    }
}
