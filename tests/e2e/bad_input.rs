//! What a service or a forger may answer, from curl to the record of the refusal (docs/bad-input.md).

use super::attestation::{SERVICE, accepted, refused, start};
use super::netns::{Tng, World};
use super::programs::*;

#[test]
fn every_bad_answer_of_a_service_is_a_refusal_with_its_own_reason() {
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let ca = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/coco/as-ca.pem");
    let verify = format!(
        "[ingress.verify]\nas_addr = \"http://{SERVICE}/\"\ntrusted_certs = [\"{ca}\"]\nallow_sample = true\n\
         as_timeout = \"1s\"\nverdict_ttl = \"0s\"\n"
    );
    let egress = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let ingress = Tng::start(&world.client, "in", &ingress(TO_SERVER, &verify));
    for (mode, reason) in [
        ("rejected", "as-rejected"),
        ("no-policy", "as-policy"),
        ("bad-request", "as-error"),
        ("html", "as-no-token"),
        ("absent", "as-garbage"),
        ("drops", "as-error"),
        ("not-http", "as-garbage"),
        ("silent", "as-timeout"),
        ("stalls", "as-stalled"),
        ("huge", "as-too-large"),
        ("clock-ahead", "as-clock"),
        ("clock-behind", "as-clock"),
        ("alg-none", "token-alg-none"),
        ("hs256", "token-alg-mac"),
        ("rs256", "token-alg"),
        ("critical", "token-critical"),
        ("kid-of-another", "token-untrusted-signer"),
        ("jwk-of-stranger", "token-untrusted-signer"),
        ("signed-by-stranger", "token-signature"),
        ("not-before", "token-not-yet-valid"),
        ("two-policies", "token-policy-mixed"),
        ("wrong-policy", "token-policy"),
        ("expired", "token-expired"),
    ] {
        let _appraiser = start(&world.client, "fake_as", &[SERVICE, mode]);
        refused(&world, &ingress, reason);
    }
    let _appraiser = start(&world.client, "fake_as", &[SERVICE, "affirming"]);
    accepted(&world, [&ingress, &egress]);
}
