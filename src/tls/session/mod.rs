//! `tng/1`: evidence bound to the session. After the TLS handshake the verifier sends a nonce, and the attester
//! answers with evidence over the key, the nonce and an exporter value of this very connection, or confirms that it
//! shares a secret of an earlier session that was bound so. Specified in docs/tng-1.md.

mod door;
mod error;
mod exchange;
mod keys;
mod memory;
mod message;

pub use door::{Door, Ending};
pub use error::SessionError;
pub(super) use exchange::{Asker, Exchange, Outcome, Proof, Prover};
pub use keys::{
    CONFIRMATION_LEN, EVIDENCE_LABEL, ID_LABEL, ID_LEN, NONCE_LEN, Role, SECRET_LABEL, Secret, SessionId, context,
};
pub(super) use memory::{BoundSession, Proven, Sessions, Turn};
pub use message::{HEADER_LEN, MAX_EVIDENCE, MAX_REASON, Message, VERSION};
