//! Endpoints of a configuration, and peers that want evidence too.

use crate::common::{attest_sample, ra, verify_sample};
use crate::{endpoint, instance, rats_tls, serves, tngctl, verify};

const VERIFIES: &str = "[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";
const BOTH: &str = "[ingress.attest]\nprovider = \"sample\"\n\
                    [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";

fn mutual(allow_sample: bool) -> std::sync::Arc<tng::tls::EndpointTls> {
    endpoint(ra(Some(attest_sample()), Some(verify_sample(allow_sample))))
}

#[tokio::test]
async fn a_peer_that_wants_evidence_is_verified_and_says_what_is_missing() {
    let addr = serves(mutual(true)).await;
    for protocol in ["tng/1", "rats-tls"] {
        let ran = verify(addr, &["--allow-sample", "--protocol", protocol]).await;
        assert_eq!((ran.code, ran.failed()), (4, ("accepted".into(), "session-unattested".into())), "{}", ran.out);
        let json = ran.json();
        assert_eq!((&json["tls"]["wants_evidence"], ran.check("report-data").0.as_str()), (&true.into(), "passed"));
        assert_eq!(json["verdict"]["appraisal"]["tee"], "sample", "its certificate was appraised all the same");
        assert!(json["verdict"]["detail"].as_str().unwrap().contains("--config"), "{json:#}");
    }
}

#[tokio::test]
async fn an_endpoint_of_a_configuration_gives_both_roles() {
    let dir = tempfile::tempdir().unwrap();
    let addr = serves(mutual(true)).await;
    let both = instance(dir.path(), "both", BOTH);
    for protocol in ["tng/1", "rats-tls"] {
        let ran = verify(addr, &["--config", &both, "--protocol", protocol]).await;
        assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
        assert_eq!(ran.check("accepted").0, "passed");
        let settings = ran.json()["appraiser"]["settings"].as_str().unwrap().to_owned();
        assert!(settings.starts_with("endpoint one of ") && settings.ends_with("both.toml"), "{settings}");
    }
    let only = instance(dir.path(), "only", VERIFIES);
    let ran = verify(addr, &["--config", &only]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("accepted".into(), "session-unattested".into())));
}

#[tokio::test]
async fn a_peer_that_refuses_this_side_tells_why() {
    let dir = tempfile::tempdir().unwrap();
    let addr = serves(mutual(false)).await;
    let both = instance(dir.path(), "both", BOTH);
    let ran = verify(addr, &["--config", &both, "--protocol", "tng/1"]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("accepted".into(), "session-refused".into())), "{}", ran.out);
    let verdict = &ran.json()["verdict"];
    assert!(verdict["detail"].as_str().unwrap().contains("sample-tee-refused"), "{verdict}");
    assert!(verdict["explanation"].as_str().unwrap().contains("Real hardware"), "{verdict}");
}

#[tokio::test]
async fn one_of_several_endpoints_has_to_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let more = format!(
        "{VERIFIES}[[ingress]]\nname = \"two\"\n[ingress.mapping]\nlisten = \"127.0.0.1:2\"\n\
         target = \"192.0.2.1:2\"\n[ingress.verify]\nprovider = \"sample\"\n"
    );
    let file = instance(dir.path(), "several", &more);
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let ran = verify(addr, &["--config", &file]).await;
    assert!(ran.code == 2 && ran.err.contains("--endpoint: one, two"), "{} {}", ran.code, ran.err);
    assert_eq!(verify(addr, &["--config", &file, "--endpoint", "one"]).await.code, 0);
    let ran = verify(addr, &["--config", &file, "--endpoint", "two"]).await;
    assert_eq!((ran.code, ran.failed()), (1, ("real-tee".into(), "sample-tee-refused".into())));
    let ran = verify(addr, &["--config", &file, "--endpoint", "three"]).await;
    assert!(ran.code == 2 && ran.err.contains("one, two"), "{}", ran.err);
    let ran = tngctl(&["attest", "--config", &file]).await;
    assert!(ran.code == 2 && ran.err.contains("table `attest`"), "{}", ran.err);
}

#[tokio::test]
async fn session_binding_that_an_endpoint_requires_is_required_here() {
    let dir = tempfile::tempdir().unwrap();
    let requires = instance(dir.path(), "strict", &format!("{VERIFIES}require_session_binding = true\n"));
    let old = serves(rats_tls(ra(Some(attest_sample()), None))).await;
    let ran = verify(old, &["--config", &requires]).await;
    assert_eq!((ran.code, ran.failed().0), (4, "protocol".into()), "{}", ran.out);
}
