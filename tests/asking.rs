//! What the operator learns of those who are asked: how long the attestation agent and service take, how
//! their calls ended, and how old what they gave is.

mod common;
#[path = "common/daemon.rs"]
mod daemon;
mod fakes;

use daemon::{Daemon, echoes, free_port};
use fakes::aa::{FakeAa, Mode as Aa};
use fakes::as_rest::{FakeAs, Mode as As};

const AFFIRMING: As = As::Status("affirming");

/// The value of the sample that begins so.
fn sample(samples: &str, begins: &str) -> Option<f64> {
    samples.lines().find_map(|line| line.strip_prefix(begins)?.strip_prefix(" = ")?.parse().ok())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn latencies_and_ages_are_in_status_and_metrics_failures_and_timeouts_too() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let aa = FakeAa::start(&dir.join("aa.sock"), Aa::Good);
    let (issuer, appraiser) =
        (FakeAs::start("127.0.0.1:0", AFFIRMING).await, FakeAs::start("127.0.0.1:0", AFFIRMING).await);
    let (entry, tunnel, echo) = (free_port(), free_port(), common::echo().await);
    let (second_entry, second) = (free_port(), free_port());
    let (socket, ca) = (dir.join("aa.sock"), fakes::fixture("as-ca.pem"));
    let (socket, ca) = (socket.display(), ca.display());
    let toml = format!(
        "[[egress]]\nname = \"out\"\n[egress.mapping]\nlisten = \"{tunnel}\"\ntarget = \"{echo}\"\n\
         [egress.attest]\naa_addr = \"unix://{socket}\"\nrefresh_interval = \"0s\"\nmodel = \"passport\"\n\
         as_addr = \"{}\"\n\
         [[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"{entry}\"\ntarget = \"{tunnel}\"\n\
         [ingress.attest]\nprovider = \"sample\"\n\
         [ingress.verify]\nmodel = \"passport\"\npolicy_ids = [\"default\"]\ntrusted_certs = [\"{ca}\"]\n\
         allow_sample = true\n\
         [[egress]]\nname = \"second\"\n[egress.mapping]\nlisten = \"{second}\"\ntarget = \"{echo}\"\n\
         [egress.verify]\nas_addr = \"{}\"\npolicy_ids = [\"default\"]\ntrusted_certs = [\"{ca}\"]\n\
         as_timeout = \"3s\"\nallow_sample = true\nverdict_ttl = \"0s\"\n\
         [[ingress]]\nname = \"to-second\"\n[ingress.mapping]\nlisten = \"{second_entry}\"\ntarget = \"{second}\"\n\
         [ingress.attest]\nprovider = \"sample\"\n",
        issuer.url(),
        appraiser.url(),
    );
    let daemon = Daemon::start(dir, "all", &toml);
    let (passport, checked) = (entry, second_entry);
    let works = |entry| tokio::task::block_in_place(|| echoes(entry));

    assert!(works(passport) && works(checked), "{}", daemon.everything());
    aa.set(Aa::Error);
    assert!(!works(passport));
    aa.set(Aa::Good);
    issuer.set(As::Rejected);
    assert!(!works(passport));
    issuer.set(AFFIRMING);
    appraiser.set(As::Silent);
    assert!(!works(checked));
    appraiser.set(As::Rejected);
    assert!(!works(checked));

    let samples = daemon.samples();
    let calls = |of: &str, endpoint: &str, outcome: &str, request: &str| {
        let name = format!("tng_{of}_request_duration_seconds");
        let labels = format!("endpoint={endpoint} outcome={outcome} request={request} side=egress");
        let count = sample(&samples, &format!("{name}_count {labels}"));
        // Cumulative, and the last bucket is all of them.
        let le = format!("endpoint={endpoint} le=+Inf outcome={outcome} request={request} side=egress");
        assert_eq!(sample(&samples, &format!("{name}_bucket {le}")), count, "{samples}");
        (count, sample(&samples, &format!("{name}_sum {labels}")))
    };
    let some = |(count, sum): (Option<f64>, Option<f64>)| count >= Some(1.0) && sum > Some(0.0);
    assert!(some(calls("aa", "out", "ok", "evidence")), "{samples}");
    assert!(some(calls("aa", "out", "error", "evidence")), "{samples}");
    assert!(some(calls("as", "out", "ok", "token")), "{samples}");
    assert!(some(calls("as", "out", "refused", "token")), "{samples}");
    assert!(some(calls("as", "second", "ok", "appraisal")), "{samples}");
    assert!(some(calls("as", "second", "refused", "appraisal")), "{samples}");
    let (timeouts, waited) = calls("as", "second", "timeout", "appraisal");
    assert!(timeouts >= Some(1.0) && waited >= Some(2.9), "{samples}");
    assert_eq!(calls("aa", "second", "ok", "evidence").0, None, "it does not attest: {samples}");
    for (gauge, endpoint, side) in [
        ("evidence_age", "out", "egress"),
        ("evidence_left", "out", "egress"),
        ("token_age", "out", "egress"),
        ("verdict_age", "in", "ingress"),
    ] {
        let age = sample(&samples, &format!("tng_{gauge}_seconds endpoint={endpoint} side={side}"));
        assert!(age.is_some_and(|age| (0.0..3600.0).contains(&age)), "{gauge}: {samples}");
    }
    assert_eq!(sample(&samples, "tng_token_age_seconds endpoint=second side=egress"), None);

    let text = daemon.ctl(&["status"]);
    for part in
        ["aa latency   last ", "as tokens    last ", "as latency   last ", " of 3 calls", "1 error", "1 timeout"]
    {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    for part in
        ["under policy default", "trust: O=tng-test", "debug false", "executables affirming", "bound to the session"]
    {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    for part in ["as-timeout 1", "as-rejected 1", "refused      as-rejected "] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let json: serde_json::Value = serde_json::from_str(&daemon.ctl(&["status", "--json"])).expect("JSON");
    let endpoint = |name: &str| {
        let all = json[0]["endpoints"].as_array().expect("endpoints");
        all.iter().find(|e| e["name"] == name).unwrap_or_else(|| panic!("no {name}: {json}"))
    };
    let verdict = &endpoint("in")["verdicts"][0];
    assert_eq!(verdict["claims"]["ar4si.executables"], "affirming (2)", "{verdict}");
    assert!(verdict["left"].as_u64() > Some(0) && verdict["age"].as_u64() < Some(600), "{verdict}");
    let second = endpoint("second");
    let refused = &second["refusals"][0];
    assert_eq!(
        (&refused["peer"], &refused["last"]["reason"]),
        (&"127.0.0.1".into(), &"as-rejected".into()),
        "{second}"
    );
    assert_eq!((&second["refused"]["as-timeout"], &refused["count"]), (&1.into(), &2.into()), "{second}");
    let latency = &second["attestation"]["as_latency"];
    assert_eq!((&latency["last_outcome"], &latency["calls"]), (&"refused".into(), &3.into()), "{latency}");
    assert_eq!(latency["outcomes"]["timeout"]["calls"], 1, "{latency}");
}
