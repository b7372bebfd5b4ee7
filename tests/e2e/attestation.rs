//! An attestation agent beside the egress, an attestation service beside the ingress, and their bad days.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::netns::{Family, Host, Proc, Tng, World, fresh_hex, wait_for, wait_until};
use super::programs::*;

const START: Duration = Duration::from_secs(10);
pub const SERVICE: &str = "127.0.0.1:8500";

/// A program of examples/, which `cargo test` builds beside the tests.
fn example(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_tngd")).with_file_name("examples").join(name);
    assert!(program.exists(), "no {}: run cargo build --examples", program.display());
    program
}

pub fn start(host: &Host, name: &str, args: &[&str]) -> Proc {
    let proc = Proc::spawn(host.command(example(name), args));
    wait_for(name, START, || proc.output().starts_with("ready"));
    proc
}

fn agent(host: &Host, socket: &Path, mode: &str) -> Proc {
    // A killed agent leaves its socket; a real one removes it when it starts again.
    let _ = std::fs::remove_file(socket);
    start(host, "fake_aa", &[&socket.to_string_lossy(), mode])
}

fn last_refusal(tng: &Tng<'_>) -> String {
    let status: Value = serde_json::from_str(&tng.ctl(&["status", "--json"]).stdout).expect("JSON");
    status[0]["endpoints"][0]["last_refusal"]["reason"].as_str().unwrap_or_default().to_owned()
}

/// The tunnel carries a page over both families, unseen.
#[track_caller]
pub fn accepted(world: &World, sides: [&Tng<'_>; 2]) {
    for family in Family::BOTH {
        let path = format!("/attested-{}", fresh_hex());
        let got = curl(&world.client, &socket_addr(&world.server, family, 8080), &path);
        let said = || sides.map(|side| side.ctl(&["status"]).stdout + &side.output()).join("\n");
        assert!(got.ok(), "{family:?}: {}\n{}", got.stderr, said());
        assert!(!world.saw(&path), "{family:?}: nothing is on the wire");
    }
}

/// It carries nothing, and `side` says why.
#[track_caller]
pub fn refused(world: &World, side: &Tng<'_>, reason: &str) {
    for family in Family::BOTH {
        let path = format!("/attested-{}", fresh_hex());
        let got = curl(&world.client, &socket_addr(&world.server, family, 8080), &path);
        assert!(!got.ok(), "{family:?}: refused for {reason}, but got {}", got.stdout);
        assert!(!world.saw(&path), "{family:?}: nothing is on the wire");
        // The peer's reset may reach curl before the record of why is written.
        let told = wait_until(START, || last_refusal(side) == reason);
        assert!(
            told,
            "{family:?}: {reason} is not {}
{}",
            last_refusal(side),
            side.output()
        );
        let text = side.ctl(&["status"]).stdout;
        assert!(text.contains(&format!("refused      {reason} ")), "{text}");
    }
}

#[test]
fn agent_and_service_decide_and_each_of_their_bad_days_is_a_refusal_with_its_reason() {
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let socket = world.server.dir().join("aa.sock");
    let attest = format!("[egress.attest]\naa_addr = \"unix://{}\"\nrefresh_interval = \"0s\"\n", socket.display());
    let ca = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/coco/as-ca.pem");
    let verify = format!(
        "[ingress.verify]\nas_addr = \"http://{SERVICE}/\"\npolicy_ids = [\"default\"]\ntrusted_certs = [\"{ca}\"]\n\
         allow_sample = true\n"
    );
    let aa = agent(&world.server, &socket, "good");
    let appraiser = start(&world.client, "fake_as", &[SERVICE, "affirming"]);
    let egress = Tng::start(&world.server, "out", &egress(8080, "", &attest));
    let ingress = Tng::start(&world.client, "in", &ingress(TO_SERVER, &verify));
    accepted(&world, [&ingress, &egress]);
    let status: Value = serde_json::from_str(&ingress.ctl(&["status", "--json"]).expect_ok()).expect("JSON");
    let verdict = &status[0]["endpoints"][0]["verdicts"][0];
    assert_eq!((&verdict["verifier"], &verdict["policy_ids"][0]), (&"as".into(), &"default".into()), "{verdict}");

    drop(appraiser);
    refused(&world, &ingress, "as-unreachable");
    for (mode, reason) in [
        ("contraindicated", "token-status-contraindicated"),
        ("stranger", "token-untrusted-signer"),
        ("wrong-runtime-data", "token-runtime-data"),
    ] {
        let _appraiser = start(&world.client, "fake_as", &[SERVICE, mode]);
        refused(&world, &ingress, reason);
    }
    let appraiser = start(&world.client, "fake_as", &[SERVICE, "affirming"]);
    accepted(&world, [&ingress, &egress]);
    drop(appraiser);
    refused(&world, &ingress, "as-unreachable");
    // Nobody told tng that the service speaks gRPC now.
    let appraiser = start(&world.client, "fake_as", &[SERVICE, "contraindicated", "grpc"]);
    refused(&world, &ingress, "token-status-contraindicated");
    drop(appraiser);
    let _appraiser = start(&world.client, "fake_as", &[SERVICE, "affirming", "grpc"]);
    accepted(&world, [&ingress, &egress]);

    drop(aa);
    refused(&world, &egress, "aa-unreachable");
    let aa = agent(&world.server, &socket, "other-key");
    refused(&world, &ingress, "as-binding");
    drop(aa);
    let _aa = agent(&world.server, &socket, "good");
    accepted(&world, [&ingress, &egress]);
}

#[test]
fn a_service_that_restarts_with_another_signer_refuses_nobody() {
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let egress = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    // Nobody is named whom its tokens are to be from, and each connection is appraised.
    let verify =
        format!("[ingress.verify]\nas_addr = \"http://{SERVICE}/\"\nallow_sample = true\nverdict_ttl = \"0s\"\n");
    for protocol in ["rest", "grpc"] {
        let begin = || start(&world.client, "fake_as", &[SERVICE, "affirming", protocol, "ephemeral"]);
        let ingress = Tng::start(&world.client, "in", &ingress(TO_SERVER, &verify));
        let mut appraiser = begin();
        accepted(&world, [&ingress, &egress]);
        for _ in 0..2 {
            drop(appraiser);
            appraiser = begin();
            accepted(&world, [&ingress, &egress]);
        }
        // Nor after a third time, when it was seen to be away.
        drop(appraiser);
        refused(&world, &ingress, "as-unreachable");
        let _appraiser = begin();
        accepted(&world, [&ingress, &egress]);
    }
}

#[test]
fn evidence_that_was_made_for_another_key_is_refused_without_a_service_too() {
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let socket = world.server.dir().join("aa.sock");
    let attest = format!("[egress.attest]\naa_addr = \"unix://{}\"\nrefresh_interval = \"0s\"\n", socket.display());
    let aa = agent(&world.server, &socket, "other-key");
    let egress = Tng::start(&world.server, "out", &egress(8080, "", &attest));
    let ingress = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    refused(&world, &ingress, "evidence-report-data");
    drop(aa);
    let _aa = agent(&world.server, &socket, "good");
    accepted(&world, [&ingress, &egress]);
}

#[test]
fn a_passport_is_checked_without_a_service_and_both_sides_must_be_of_one_model() {
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let socket = world.server.dir().join("aa.sock");
    let attest = format!(
        "[egress.attest]\naa_addr = \"unix://{}\"\nadditional_evidence = true\nrefresh_interval = \"0s\"\n\
         model = \"passport\"\nas_addr = \"http://{SERVICE}/\"\n",
        socket.display()
    );
    let ca = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/coco/as-ca.pem");
    let passport = format!("[ingress.verify]\nmodel = \"passport\"\ntrusted_certs = [\"{ca}\"]\nallow_sample = true\n");
    let aa = agent(&world.server, &socket, "device");
    let issuer = start(&world.server, "fake_as", &[SERVICE, "affirming"]);
    let egress = Tng::start(&world.server, "out", &egress(8080, "", &attest));
    let verifier = Tng::start(&world.client, "in", &ingress(TO_SERVER, &passport));
    accepted(&world, [&verifier, &egress]);
    let status: Value = serde_json::from_str(&verifier.ctl(&["status", "--json"]).expect_ok()).expect("JSON");
    let verdict = &status[0]["endpoints"][0]["verdicts"][0];
    assert_eq!((&verdict["tee"], &verdict["status"]), (&"sample".into(), &"affirming".into()), "{verdict}");
    assert_eq!(verdict["devices"][0], "sampledevice", "{verdict}");
    assert_eq!(verdict["claims"]["debug"], "false", "{verdict}");
    let shown = egress.ctl(&["status"]).stdout;
    assert!(shown.contains("passport of http://") && shown.contains("evidence "), "{shown}");

    drop(issuer);
    refused(&world, &egress, "as-unreachable");
    let issuer = start(&world.server, "fake_as", &[SERVICE, "stranger"]);
    refused(&world, &verifier, "token-untrusted-signer");
    drop(issuer);
    // Its own side is the first to know.
    let issuer = start(&world.server, "fake_as", &[SERVICE, "contraindicated"]);
    refused(&world, &verifier, "token-status-contraindicated");
    let shown = egress.ctl(&["status"]);
    let text = "is refused by its peers: token-status-contraindicated: ";
    assert!(!shown.ok() && shown.stdout.contains(text), "{}", shown.stdout);
    drop(issuer);
    let _issuer = start(&world.server, "fake_as", &[SERVICE, "affirming"]);
    drop(aa);
    let aa = agent(&world.server, &socket, "good");
    refused(&world, &egress, "aa-no-devices");
    drop(aa);
    let _aa = agent(&world.server, &socket, "device");
    accepted(&world, [&verifier, &egress]);
    let shown = egress.ctl(&["status"]);
    assert!(shown.ok() && !shown.stdout.contains("is refused by its peers"), "{}", shown.stdout);

    drop(verifier);
    let background = "[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";
    let verifier = Tng::start(&world.client, "in", &ingress(TO_SERVER, background));
    refused(&world, &verifier, "peer-evidence-passport");
}
