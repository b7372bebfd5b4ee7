//! Stand-ins for the attestation agent and the attestation service. They behave as recordings of the real
//! ones show: evidence is decoded, report data recomputed, tokens freshly signed. Faults are switchable.
#![allow(dead_code, missing_docs)]

pub mod aa;
pub mod appraiser;
pub mod as_grpc;
pub mod as_rest;

use std::path::PathBuf;

/// A recorded sample.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/coco").join(name)
}

/// Its text.
pub fn text(name: &str) -> String {
    let path = fixture(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
