//! TPM 2.0, as much of its structures (Library specification, part 2) and commands (part 3) as a quote needs.
//!
//! [`structures`] reads what a TPM signs, without trust in it; [`commands`] talks to one; [`quote`] makes evidence.

pub mod commands;
pub mod quote;
pub mod structures;
pub mod transport;
mod wire;

use aws_lc_rs::digest;

/// TPM_ALG_SHA256, the only hash used here: of the PCR bank, of names and of signatures.
pub const ALG_SHA256: u16 = 0x000b;
/// PCRs of a bank that can be selected.
pub const PCRS: u8 = 24;

/// A PCR of the SHA-256 bank.
pub type PcrValue = [u8; 32];

/// What a quote's qualifying data holds: the first 32 bytes of the report data. A TPM need not take more than its
/// largest hash, and this is what CoCo's agent passes and its service compares.
pub const QUALIFYING_LEN: usize = 32;

/// SHA-256 of `parts`, one after the other.
pub fn sha256<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    parts.into_iter().for_each(|part| context.update(part));
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}
