//! The appraisal in process, from a file to a refused connection. Accepted peers need the makers' keys: they are in the
//! unit tests, which have makers of their own.

#[path = "common/tls.rs"]
mod common;

use std::path::Path;
use std::time::Duration;

use common::{attest_sample, endpoint, meet, ra};
use tng::config::{InstanceName, Verify, parse};

fn verify(keys: &str) -> Verify {
    let text = format!(
        "[[ingress]]\nname = \"a\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:2\"\n\
         [ingress.verify]\nprovider = \"builtin\"\n{keys}"
    );
    let loaded = parse(InstanceName::new("a").unwrap(), Path::new("a.toml"), &text);
    loaded.unwrap_or_else(|r| panic!("{r}")).config.endpoints[0].ra.verify.clone().unwrap()
}

#[tokio::test]
async fn a_peer_without_a_tee_is_refused_whatever_is_allowed() {
    let quotes = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quotes");
    let keys = format!(
        "allow_sample = true\ncollateral = [\"{quotes}/tdx_quote_collateral.json\"]\n\
         [[ingress.verify.reference]]\ntee = \"tdx\"\nmr_td = \"{}\"\n\
         [[ingress.verify.reference]]\ntee = \"snp\"\nguest_svn = 0\n",
        "00".repeat(48)
    );
    let client = endpoint(ra(None, Some(verify(&keys))));
    let server = endpoint(ra(Some(attest_sample()), None));
    let error = meet(&client, &server).await.0.err().expect("refused");
    assert_eq!(error.reason(), "tee-unsupported");
    let status = client.status();
    let shown = status.verify.unwrap();
    assert_eq!(shown.provider, "builtin");
    assert_eq!(shown.trust_anchor, "AMD ARK-Milan, -Genoa, -Turin (compiled in); Intel SGX Root CA (compiled in)");
    assert_eq!(status.refused["tee-unsupported"], 1);
    assert_eq!(status.last_refusal.unwrap().reason, "tee-unsupported");
}

#[test]
fn the_example_is_a_whole_configuration() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc/tng/builtin.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let loaded = parse(InstanceName::new("builtin").unwrap(), &file, &text).unwrap_or_else(|r| panic!("{r}"));
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    assert!(loaded.config.endpoints[0].limits.handshake_timeout > Duration::ZERO);
}
