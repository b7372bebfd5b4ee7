//! Stand-ins for the attestation agent and the attestation service. They behave as recordings of the real
//! ones show: evidence is decoded, report data recomputed, tokens freshly signed. Faults are switchable.
#![allow(dead_code, missing_docs)]

pub mod aa;
pub mod appraiser;
pub mod as_grpc;
pub mod as_rest;
pub mod asr;

use std::path::PathBuf;

/// A recorded sample: of this tree, or of `TNG_TEST_FIXTURES` where a fake runs away from it.
pub fn fixture(name: &str) -> PathBuf {
    let elsewhere = std::env::var_os("TNG_TEST_FIXTURES").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/coco")).join(name)
}

/// Its text.
pub fn text(name: &str) -> String {
    let path = fixture(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
