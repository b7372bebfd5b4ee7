//! `tngctl attest`.

use std::os::unix::fs::PermissionsExt;

use crate::fakes::aa::{FakeAa, Mode as Aa};
use crate::fakes::as_rest::{FakeAs, Mode as As};
use crate::swtpm::Swtpm;
use crate::{Ran, fakes, instance, listen, server, tngctl, verify};

async fn attest(args: &[&str]) -> Ran {
    tngctl(&[&["attest", "--json"][..], args].concat()).await
}

#[tokio::test]
async fn an_agents_evidence_and_the_services_token_are_shown_and_judged() {
    let dir = tempfile::tempdir().unwrap();
    let aa = FakeAa::start(&dir.path().join("aa.sock"), Aa::Device);
    let addr = format!("unix://{}", aa.socket.display());
    let ran = attest(&["--aa-addr", &addr, "--additional-evidence"]).await;
    assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
    let json = ran.json();
    assert_eq!((&json["evidence"]["tee"], &json["verdict"]["outcome"]), (&"sample".into(), &"not_appraised".into()));
    assert_eq!(json["evidence"]["devices"][0], serde_json::json!({ "tee": "sampledevice", "bound": true }));
    assert_eq!(ran.check("report-data").0, "passed");

    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let (url, ca) = (service.url().to_string(), fakes::fixture("as-ca.pem").to_string_lossy().into_owned());
    let save = dir.path().join("own").to_string_lossy().into_owned();
    let args = ["--aa-addr", &addr, "--as-addr", &url, "--trusted-certs", &ca, "--allow-sample"];
    let ran = attest(&[&args[..], &["--save", &save]].concat()).await;
    assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
    assert_eq!(
        (&ran.json()["verdict"]["outcome"], &ran.json()["token"]["from"]),
        (&"verified".into(), &"service".into())
    );
    let token = std::fs::metadata(dir.path().join("own/token.jwt")).unwrap();
    assert_eq!(token.permissions().mode() & 0o777, 0o600);
    let text = tngctl(&[&["attest"][..], &args[..]].concat()).await;
    assert!(text.out.contains("VERIFIED: this host is sample") && text.out.contains("affirming"), "{}", text.out);

    service.set(As::Stranger);
    let ran = attest(&args).await;
    assert_eq!((ran.code, ran.failed()), (1, ("token-signer".into(), "token-untrusted-signer".into())));
    service.set(As::Status("contraindicated"));
    let ran = attest(&args).await;
    assert_eq!((ran.code, ran.failed()), (1, ("token-status".into(), "token-status-contraindicated".into())));
}

#[tokio::test]
async fn what_keeps_a_host_from_attesting_has_its_reason_and_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let absent = format!("unix://{}/none.sock", dir.path().display());
    let aa = FakeAa::start(&dir.path().join("aa.sock"), Aa::Error);
    let failing = format!("unix://{}", aa.socket.display());
    let helper = dir.path().join("helper.sock");
    let helper = format!("unix://{}", helper.display());
    let tpm = dir.path().join("tpmrm0").to_string_lossy().into_owned();
    for (args, reason, step) in [
        (&["--aa-addr", &absent][..], "aa-unreachable", "Start it"),
        (&["--aa-addr", &failing], "aa-error", "Is the TEE's device there?"),
        (&["--provider", "tpm", "--evidence-addr", &helper], "evidence-helper-unreachable", "tng-evidence.socket"),
        (&["--provider", "tsm", "--evidence-addr", "direct"], "tsm-absent", "modprobe"),
        (
            &["--provider", "tpm", "--evidence-addr", "direct", "--tpm-device", &tpm],
            "tpm-unreachable",
            "cannot be opened",
        ),
    ] {
        let ran = attest(args).await;
        assert_eq!((ran.code, ran.failed()), (4, ("own-evidence".into(), reason.into())), "{} {}", ran.out, ran.err);
        let explanation = ran.json()["verdict"]["explanation"].as_str().unwrap().to_owned();
        assert!(explanation.contains(step), "{explanation}");
        let text = tngctl(&[&["attest"][..], args].concat()).await;
        assert!(text.out.contains(&format!("[{reason}]")) && text.out.contains(step), "{}", text.out);
    }
    aa.set(Aa::Silent);
    let ran = attest(&["--aa-addr", &failing, "--timeout", "600ms"]).await;
    assert_eq!((ran.code, ran.failed().1), (4, "aa-timeout".into()));
    aa.set(Aa::Good);
    let (gone, addr) = listen().await;
    drop(gone);
    let ran = attest(&["--aa-addr", &failing, "--as-addr", &format!("http://{addr}/"), "--allow-sample"]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("service".into(), "as-unreachable".into())));
    assert_eq!(ran.json()["evidence"]["tee"], "sample", "the evidence is shown all the same");
}

#[tokio::test]
async fn the_sample_tee_of_this_host_needs_to_be_allowed_and_nobody_calls_it_a_peer() {
    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let (url, ca) = (service.url().to_string(), fakes::fixture("as-ca.pem").to_string_lossy().into_owned());
    let args = ["attest", "--provider", "sample", "--as-addr", &url, "--trusted-certs", &ca];
    let refused = tngctl(&args).await;
    assert_eq!((refused.code, service.requests()), (1, 0), "{} {}", refused.out, refused.err);
    assert!(refused.out.contains("REFUSED: this host failed a check"), "{}", refused.out);
    assert!(refused.out.contains("[sample-tee-refused]") && refused.out.contains("--allow-sample"), "{}", refused.out);
    assert!(!refused.out.contains("peer"), "{}", refused.out);
    let allowed = tngctl(&[&args[..], &["--allow-sample"]].concat()).await;
    assert_eq!((allowed.code, service.appraisals()), (0, 1), "{} {}", allowed.out, allowed.err);
    assert!(!allowed.out.contains("peer"), "{}", allowed.out);
    for status in ["warning", "contraindicated"] {
        service.set(As::Status(status));
        let ran = tngctl(&[&args[..], &["--allow-sample"]].concat()).await;
        assert!(ran.code == 1 && ran.out.contains("REFUSED: this host"), "{}", ran.out);
    }
}

// Needs root, to become somebody else.
#[tokio::test]
async fn a_socket_that_the_caller_may_not_open_is_named_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let (program, closed) = (dir.path().join("tngctl"), dir.path().join("closed"));
    std::fs::copy(env!("CARGO_BIN_EXE_tngctl"), &program).unwrap();
    std::fs::create_dir(&closed).unwrap();
    for (path, mode) in [(dir.path(), 0o755), (&program, 0o755), (&closed, 0o700)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let aa = FakeAa::start(&closed.join("aa.sock"), Aa::Good);
    let addr = format!("unix://{}", aa.socket.display());
    let as_nobody = async |args: &[&str]| {
        let mut command = tokio::process::Command::new(&program);
        command.args(args).stdin(std::process::Stdio::null()).uid(65534).gid(65534).kill_on_drop(true);
        let out = command.output().await.expect("as nobody");
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let json = as_nobody(&["attest", "--json", "--aa-addr", &addr]).await;
    let verdict = &json["verdict"];
    assert_eq!(verdict["reason"], "aa-unreachable", "{json}");
    assert!(verdict["detail"].as_str().unwrap().contains("Permission denied"), "{verdict}");
    assert!(verdict["explanation"].as_str().unwrap().contains("open its socket"), "{verdict}");
    assert_eq!(attest(&["--aa-addr", &addr]).await.code, 0, "root may");

    // Nor may it mark its connections, which a capture of this host could take then.
    let closes = server(|tcp| async move { drop(tcp) }).await;
    let said = |json: &serde_json::Value| json["notes"].to_string().contains("may not mark its connection");
    assert!(said(&as_nobody(&["verify", "--json", &closes.to_string()]).await));
    assert!(!said(&verify(closes, &[]).await.json()));
}

#[tokio::test]
async fn an_endpoint_of_a_configuration_attests_with_its_passports_service() {
    let dir = tempfile::tempdir().unwrap();
    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let tables = format!(
        "[ingress.attest]\nprovider = \"sample\"\nmodel = \"passport\"\nas_addr = \"{}\"\n\
         [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n",
        service.url()
    );
    let ran = attest(&["--config", &instance(dir.path(), "passport", &tables)]).await;
    assert_eq!((ran.code, &ran.json()["token"]["from"]), (0, &"service".into()), "{} {}", ran.out, ran.err);
    assert_eq!(ran.json()["evidence"]["kind"], "evidence", "what the token was made from");
    let plain = "[ingress.attest]\nprovider = \"sample\"\n[ingress.verify]\nprovider = \"sample\"\n";
    let ran = attest(&["--config", &instance(dir.path(), "plain", plain)]).await;
    assert_eq!((ran.code, ran.json()["appraiser"].is_null()), (0, true), "{}", ran.out);
}

#[tokio::test]
async fn a_tpms_own_block_is_for_its_peers() {
    let tpm = Swtpm::start();
    let device = format!("unix://{}", tpm.socket.display());
    let args = ["attest", "--provider", "tpm", "--evidence-addr", "direct", "--tpm-device", &device, "--reference"];
    let ran = tngctl(&args).await;
    assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
    assert!(ran.out.contains("of itself") && !ran.err.contains("warning"), "{} {}", ran.out, ran.err);
    assert!(ran.out.contains("[[ingress.verify.reference]]\ntee = \"tpm\"\nak = \"sha256:"), "{}", ran.out);
}
