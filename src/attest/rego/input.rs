//! The document that a policy sees as `input`.

use serde_json::{Map, Value, json};

use crate::attest::binding::{EXPORTER, NONCE};
use crate::attest::{Evidence, RuntimeData};

/// What a verifier established about a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// kbs-types name.
    pub tee: String,
    /// Whether the TEE proves nothing.
    pub sample: bool,
    /// Whether the host can read the TEE.
    pub debug: bool,
    /// What the trust in it rests on, in words.
    pub trust_anchor: String,
    /// What its evidence says, by name: bytes in hexadecimal, numbers as numbers.
    pub claims: Map<String, Value>,
}

impl Facts {
    /// The document, with what `evidence` was bound to. That it is bound to `expected` must have been checked.
    ///
    /// Of the runtime data, whatever the peer put there is shown; it is in the evidence's digest, so the TEE vouches for
    /// having shown it. The nonce and the exporter value belong to one connection, and a policy has no use for them.
    pub fn document(self, evidence: &Evidence, expected: &RuntimeData) -> Value {
        let mut runtime_data = evidence.runtime_object().unwrap_or_default();
        let session = expected.object().contains_key(EXPORTER);
        for member in [NONCE, EXPORTER] {
            runtime_data.remove(member);
        }
        json!({
            "tee": self.tee,
            "sample": self.sample,
            "debug": self.debug,
            "trust_anchor": self.trust_anchor,
            "bound_to": if session { "session" } else { "certificate" },
            "claims": self.claims,
            "runtime_data": runtime_data,
        })
    }
}
