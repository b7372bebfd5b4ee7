//! Appraisal by a CoCo Attestation Service, over REST or gRPC, at one of several addresses.
//!
//! [`AsVerifier`] judges the token; the client below it gets one: it orders the addresses, each address knows what it
//! speaks and in which dialect, and the two transports move bytes within a deadline.

mod address;
mod bucket;
mod client;
mod connector;
mod discovery;
mod greeting;
mod grpc;
mod http;
mod request;
mod transport;
mod verifier;

pub use address::ServiceStatus;
pub(super) use connector::Connector;
pub(super) use http::{HttpClient, client as http_client};
pub(super) use transport::{Roots, dialer, tls};
pub use verifier::{AsSeen, AsVerifier};

/// Largest answer taken. Tokens with a TDX event log are about 50 KiB.
const MAX_ANSWER: usize = 1 << 20;
/// Longest error text kept, characters.
const MAX_TEXT: usize = 200;

/// What may be shown of a text that a service sent.
fn shorten(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT).collect();
    clean.trim().to_owned()
}

#[cfg(test)]
mod recorded_tests;
