//! Who appraises: a service, anchors for tokens, nobody with means.

use std::time::Duration;

use tng::config::*;

use crate::common::{attest_sample, ra};
use crate::fakes;
use crate::fakes::as_rest::{FakeAs, Mode as As};
use crate::{endpoint, serves, tngctl, verify};

const AFFIRMING: As = As::Status("affirming");

fn ca() -> String {
    fakes::fixture("as-ca.pem").to_string_lossy().into_owned()
}

#[tokio::test]
async fn a_service_appraises_and_its_token_is_shown() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let (url, ca) = (service.url().to_string(), ca());
    let args = ["--as-addr", &url, "--trusted-certs", &ca, "--allow-sample"];
    for protocol in ["tng/1", "rats-tls"] {
        let ran = verify(addr, &[&args[..], &["--protocol", protocol]].concat()).await;
        assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
        let json = ran.json();
        assert_eq!((&json["token"]["from"], &json["token"]["algorithm"]), (&"service".into(), &"ES256".into()));
        assert_eq!(json["token"]["parts"][0]["status"], "affirming");
        assert_eq!(json["token"]["parts"][0]["claims"]["debug"], "false");
        assert!(json["verdict"]["appraisal"]["trust_anchor"].as_str().unwrap().contains("tng test AS CA"));
        assert!(json["checks"].as_array().unwrap().iter().all(|c| c["state"] != "failed"), "{json:#}");
        assert_eq!(ran.check("token-policy").0, "passed");
    }
    let text = tngctl(&[&["verify", &addr.to_string()][..], &args[..]].concat()).await;
    assert!(text.out.contains("VERIFIED: the peer is sample") && text.out.contains("cpu0"), "{}", text.out);
    let without = verify(addr, &["--as-addr", &url, "--trusted-certs", &ca]).await;
    assert_eq!((without.code, without.failed()), (1, ("real-tee".into(), "sample-tee-refused".into())));
}

#[tokio::test]
async fn the_check_that_failed_at_the_service_is_named() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let (url, ca) = (service.url().to_string(), ca());
    for (mode, code, check, reason) in [
        (As::Status("contraindicated"), 1, "token-status", "token-status-contraindicated"),
        (As::Status("warning"), 1, "token-status", "token-status-warning"),
        (As::Rejected, 1, "evidence-accepted", "as-rejected"),
        (As::Stranger, 1, "token-signer", "token-untrusted-signer"),
        (As::WrongRuntimeData, 1, "token-binding", "token-runtime-data"),
        (As::WrongPolicy, 1, "token-policy", "token-policy"),
        (As::Expired, 1, "token-time", "token-expired"),
        (As::Html, 4, "service", "as-no-token"),
        (As::Unavailable, 4, "service", "as-error"),
    ] {
        service.set(mode);
        let ran = verify(addr, &["--as-addr", &url, "--trusted-certs", &ca, "--allow-sample"]).await;
        assert_eq!((ran.code, ran.failed()), (code, (check.into(), reason.into())), "{mode:?} {}", ran.err);
        assert_eq!(ran.json()["verdict"]["outcome"], if code == 1 { "refused" } else { "not_judged" });
        assert!(ran.json()["verdict"]["explanation"].is_string(), "{mode:?}");
    }
    // What the service said is shown, though nobody believes it.
    service.set(As::Status("contraindicated"));
    let ran = verify(addr, &["--as-addr", &url, "--trusted-certs", &ca, "--allow-sample"]).await;
    assert_eq!(ran.json()["token"]["parts"][0]["status"], "contraindicated");
    assert_eq!(ran.check("token-signer").0, "passed");
    assert_eq!(ran.check("token-policy").0, "not_done");
    let policy = ["--as-addr", &url, "--trusted-certs", &ca, "--allow-sample", "--policy-id", "other"];
    service.set(AFFIRMING);
    drop(service);
    let ran = verify(addr, &policy).await;
    assert_eq!((ran.code, ran.failed()), (4, ("service".into(), "as-unreachable".into())));
}

#[tokio::test]
async fn a_passport_is_checked_with_anchors_alone_and_the_other_model_is_told() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let passport = Passport {
        service: AsService { timeout: Duration::from_secs(5), ..AsService::at(service.url()) },
        policy_ids: vec!["default".into()],
    };
    let attest = Attest { passport: Some(passport), ..attest_sample() };
    let addr = serves(endpoint(ra(Some(attest), None))).await;
    let (ca, url) = (ca(), service.url().to_string());
    for protocol in ["tng/1", "rats-tls"] {
        let ran = verify(addr, &["--trusted-certs", &ca, "--allow-sample", "--protocol", protocol]).await;
        assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
        assert_eq!((&ran.json()["token"]["from"], &ran.json()["evidence"]["kind"]), (&"peer".into(), &"token".into()));
        assert_eq!(ran.check("token-binding").0, "passed");
        assert_eq!(ran.check("freshness").0, "not_done");
    }
    let ran = verify(addr, &["--as-addr", &url, "--allow-sample"]).await;
    assert_eq!(ran.code, 0, "the service vouches for its own tokens: {}", ran.out);
    let ran = verify(addr, &[]).await;
    assert_eq!((ran.code, &ran.json()["evidence"]["tee"]), (5, &"sample".into()), "{}", ran.out);
    let ran = verify(addr, &["--allow-sample"]).await;
    assert_eq!((ran.code, ran.failed()), (1, ("model".into(), "peer-evidence-passport".into())));
    service.set(As::Stranger);
    let stranger = Passport {
        service: AsService { timeout: Duration::from_secs(5), ..AsService::at(service.url()) },
        policy_ids: vec!["default".into()],
    };
    let addr = serves(endpoint(ra(Some(Attest { passport: Some(stranger), ..attest_sample() }), None))).await;
    let ran = verify(addr, &["--trusted-certs", &ca, "--allow-sample"]).await;
    assert_eq!((ran.code, ran.failed()), (1, ("token-signer".into(), "token-untrusted-signer".into())));
}

#[tokio::test]
async fn wrong_options_are_a_wrong_use_and_say_which() {
    for (args, said) in [
        (&["verify", "nothing"][..], "HOST:PORT"),
        (&["verify", "192.0.2.1:1", "--timeout", "5"], "--timeout"),
        (&["verify", "192.0.2.1:1", "--as-addr", "http://as.example/"], "--as-addr"),
        (&["verify", "192.0.2.1:1", "--trusted-certs", "/nonexistent/ca.pem"], "--trusted-certs"),
        (&["verify", "192.0.2.1:1", "--builtin", "--reference-file", "/nonexistent/r.toml"], "--reference-file"),
        (&["verify", "192.0.2.1:1", "--config", "x", "--allow-sample"], "--allow-sample"),
        (&["verify"], "HOST:PORT"),
        (&["attest"], "--aa-addr"),
        (&["attest", "--provider", "sgx"], "--provider"),
    ] {
        let ran = tngctl(args).await;
        assert!(ran.code == 2 && ran.err.contains(said) && ran.out.is_empty(), "{args:?}: {} {}", ran.code, ran.err);
    }
    let ran = tngctl(&["verify", "192.0.2.1:1", "--config", "no-such-instance"]).await;
    assert!(ran.code == 78 && ran.err.contains("no such file"), "{} {}", ran.code, ran.err);
}
