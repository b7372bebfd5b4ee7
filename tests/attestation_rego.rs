//! A policy in Rego, from a file to a tunnel that is refused or not.

mod common;
#[path = "common/tls.rs"]
mod tls;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use tls::{attest_sample, endpoint, meet, ra, verify_sample};
use tng::config::{Config, Endpoint, InstanceName, Ra, RegoFile, Side, Verify, parse};
use tng::daemon::DataPlane;
use tng::tls::Peer;

fn with(rules: &str) -> Verify {
    let file = RegoFile { path: "/policy.rego".into(), text: format!("package tng\n{rules}\n").into() };
    Verify { policy_ids: vec![file.id()], rego: Some(file), ..verify_sample(true) }
}

#[tokio::test]
async fn a_policy_decides_about_a_peer_and_its_verdict_names_it() {
    let server = endpoint(ra(Some(attest_sample()), None));
    let rules = "allow if { input.sample; input.claims.svn == \"1\"; input.bound_to == \"session\" }";
    let client = endpoint(ra(None, Some(with(rules))));
    let Peer::Verified(verdict) = meet(&client, &server).await.0.expect("allowed").peer else { panic!("unverified") };
    assert_eq!(verdict.policy_ids, with(rules).policy_ids);
    assert_eq!(client.status().verify.unwrap().policy_ids, with(rules).policy_ids);

    for (rules, reason, words) in [
        ("allow := true\ndeny contains \"too old\" if input.claims.svn < \"2\"", "policy-denied", ": too old"),
        ("allow if input.claims.svn == \"2\"", "policy-denied", "allow is undefined"),
        ("allow if to_number(input.tee) == 1", "policy-error", "failed: 2:"),
    ] {
        let client = endpoint(ra(None, Some(with(rules))));
        let error = meet(&client, &server).await.0.err().expect(rules);
        assert_eq!(error.reason(), reason, "{rules}");
        let shown = client.status().last_refusal.unwrap();
        assert!(shown.reason == reason && shown.error.contains(words), "{}", shown.error);
    }
    // Of a peer that speaks RATS-TLS alone.
    let old = tls::rats_tls(ra(Some(attest_sample()), None));
    assert_eq!(meet(&client, &old).await.0.err().expect("bound to the certificate").reason(), "policy-denied");
}

/// The ingress of a configuration file, which has the policy file beside it.
struct Configured {
    dir: tempfile::TempDir,
    plane: Arc<DataPlane>,
    entry: std::net::SocketAddr,
}

impl Configured {
    fn read(dir: &Path, entry: std::net::SocketAddr, tunnel: std::net::SocketAddr) -> Config {
        let text = format!(
            "[[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"{entry}\"\ntarget = \"{tunnel}\"\n\
             [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\nrego = \"{}/policy.rego\"\n",
            dir.display()
        );
        let loaded = parse(InstanceName::new("t").unwrap(), &PathBuf::from("t.toml"), &text);
        loaded.unwrap_or_else(|r| panic!("{r}")).config
    }

    fn new(tunnel: std::net::SocketAddr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "allow if input.tee == \"sample\"");
        let (_, listener) = mapping("in", Side::Ingress, tunnel, limits());
        let entry = listener.local;
        let plane = DataPlane::start(&Self::read(dir.path(), entry, tunnel), vec![listener]).expect("data plane");
        Self { dir, plane, entry }
    }
}

fn write(dir: &Path, rules: &str) {
    std::fs::write(dir.join("policy.rego"), format!("package tng\n{rules}\n")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_takes_a_changed_policy_and_no_verdict_of_the_former_one() {
    let attested = Ra { attest: Some(attest_sample()), ..Ra::default() };
    let (mut out, out_listener) = mapping("out", Side::Egress, echo().await, limits());
    out = Endpoint { ra: attested, ..out };
    let tunnel = out_listener.local;
    let _egress = DataPlane::start(&config(vec![out]), vec![out_listener]).expect("egress");
    let ingress = Configured::new(tunnel);
    let hits = || ingress.plane.endpoint_views()[0].attestation["cache_hits"].as_u64().unwrap();
    let reload = || {
        let new = Configured::read(ingress.dir.path(), ingress.entry, tunnel);
        ingress.plane.reload(&new, ingress.plane.listeners().expect("duplicates")).expect("reload");
    };
    assert!(served(ingress.entry).await && served(ingress.entry).await);
    assert_eq!(hits(), 1, "the second has the verdict of the first");

    // What is written counts when it is asked for.
    write(ingress.dir.path(), "allow := false\ndeny contains \"not any more\"");
    assert!(served(ingress.entry).await);
    reload();
    assert!(!served(ingress.entry).await);
    eventually("the refusal is recorded", || ended(&ingress.plane, "policy-denied") == 1).await;
    let shown = ingress.plane.endpoint_views()[0].attestation["last_refusal"].to_string();
    assert!(shown.contains("not any more"), "{shown}");

    write(ingress.dir.path(), "allow if input.tee == \"sample\"");
    reload();
    assert!(served(ingress.entry).await);
    assert_eq!(hits(), 0, "nothing is left of before");
}
