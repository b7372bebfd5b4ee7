//! Quotes of a real TPM implementation: made, appraised, and refused for each thing that is wrong with them.

#[path = "common/tls.rs"]
mod common;
#[path = "fakes/swtpm.rs"]
mod swtpm;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use common::{attest_sample, endpoint, meet, ra, verify_sample};
use serde_json::Value;
use swtpm::Swtpm;
use tng::attest::VerifyError;
use tng::attest::builtin::tpm::{PCR_NAMES, TpmAppraisal, appraise};
use tng::attest::host::{HostProvider, HostSource, helper};
use tng::attest::tpm::commands::{Hierarchy, Tpm};
use tng::attest::tpm::quote::{AttestationKey, TpmSettings};
use tng::attest::tpm::sha256;
use tng::attest::tpm::structures::{KeyAlgorithm, PcrSelection};
use tng::attest::tpm::transport::{Connection, TpmAddress};
use tng::config::*;
use tng::tls::{Channel, ChannelError, Peer};

const ECC: AttestationKey = AttestationKey::Primary(Hierarchy::Endorsement, KeyAlgorithm::EccP256);
const RSA: AttestationKey = AttestationKey::Primary(Hierarchy::Endorsement, KeyAlgorithm::Rsa2048);
const OWNER: AttestationKey = AttestationKey::Primary(Hierarchy::Owner, KeyAlgorithm::EccP256);
const TIME: Duration = Duration::from_secs(10);
/// Report data of the tests.
const DATA: [u8; 48] = [7; 48];

fn padded(data: [u8; 48]) -> [u8; 64] {
    let mut out = [0; 64];
    out[..48].copy_from_slice(&data);
    out
}

fn quote(settings: TpmSettings) -> String {
    HostSource::Tpm(settings).make(&padded(DATA), TIME).expect("evidence").evidence
}

/// Which key and PCRs are accepted.
#[derive(Clone)]
struct Pinned {
    ak: [u8; 32],
    pcrs: BTreeMap<u8, Vec<[u8; 32]>>,
}

impl Pinned {
    fn block(&self) -> Reference {
        let exact = |value: &[u8; 32]| Wanted::Bytes { value: value.to_vec(), mask: vec![0xff; 32] };
        let pcrs = self.pcrs.iter().map(|(pcr, any)| (PCR_NAMES[usize::from(*pcr)], any.iter().map(exact).collect()));
        Reference { tee: "tpm", values: pcrs.chain([("ak", vec![exact(&self.ak)])]).collect() }
    }
}

/// The reference that evidence matches, with these PCRs pinned.
fn reference(evidence: &str, pcrs: &[u8]) -> Pinned {
    let json: Value = serde_json::from_str(evidence).expect("JSON");
    let value = |pcr: &u8| {
        let text = json["tpm_quote"]["pcrs"][usize::from(*pcr)].as_str().expect("PCR");
        let bytes: Vec<u8> = (0..32).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect();
        (*pcr, vec![bytes.try_into().unwrap()])
    };
    Pinned { ak: ak(evidence), pcrs: pcrs.iter().map(value).collect() }
}

fn ak(evidence: &str) -> [u8; 32] {
    let json: Value = serde_json::from_str(evidence).expect("JSON");
    sha256([&BASE64_STANDARD.decode(json["ak_public"].as_str().expect("key")).unwrap()[..]])
}

fn judge(evidence: &str, data: [u8; 48], reference: &Pinned) -> Result<TpmAppraisal, &'static str> {
    appraise(evidence.as_bytes(), &data, &[&reference.block()]).map_err(|e| e.reason())
}

#[test]
fn quotes_of_every_kind_of_key_are_accepted_and_the_key_stays_the_same() {
    let tpm = Swtpm::start();
    let mut keys = Vec::new();
    for key in [ECC, RSA, OWNER] {
        let evidence = quote(tpm.settings(key));
        let pinned = reference(&evidence, &[0, 7, 17]);
        let appraisal = judge(&evidence, DATA, &pinned).expect("accepted");
        assert_eq!(appraisal.pcrs.len(), 24);
        assert_eq!(appraisal.quoted.extra_data, DATA[..32]);
        assert!(appraisal.to_string().contains("reset "), "{appraisal}");
        // Four quotes more than a TPM without resource manager has room for keys, were they not flushed.
        for _ in 0..4 {
            judge(&quote(tpm.settings(key)), DATA, &pinned).expect("the same key again");
        }
        keys.push(pinned.ak);
    }
    assert!(keys[0] != keys[1] && keys[0] != keys[2], "different keys");
    let other = Swtpm::start();
    assert_ne!(ak(&quote(other.settings(ECC))), keys[0], "another TPM has another key");
}

#[test]
fn a_persistent_key_vouches_and_a_missing_or_unfit_one_is_refused() {
    let tpm = Swtpm::start();
    let address = TpmAddress::Socket(tpm.socket.clone());
    let mut raw = Tpm(Connection::open(&address, TIME).unwrap());
    let made = raw.create_primary(Hierarchy::Owner, KeyAlgorithm::Rsa2048).expect("key");
    drop(raw);
    tpm.persist(made.handle, 0x8101_0002);
    let persistent = AttestationKey::persistent("0x81010002").unwrap();
    let evidence = quote(tpm.settings(persistent));
    judge(&evidence, DATA, &reference(&evidence, &[0])).expect("accepted");

    let missing = HostSource::Tpm(tpm.settings(AttestationKey::persistent("0x81010003").unwrap()));
    assert_eq!(missing.make(&padded(DATA), TIME).unwrap_err().reason(), "tpm-key");
    assert_eq!(AttestationKey::persistent("0x80000000"), None);
    assert_eq!(AttestationKey::persistent("81010002"), None);
}

#[test]
fn a_quote_of_another_key_of_other_pcrs_or_over_other_data_is_refused() {
    let (tpm, stranger) = (Swtpm::start(), Swtpm::start());
    let before = quote(tpm.settings(ECC));
    let pinned = reference(&before, &[0, 16]);
    judge(&before, DATA, &pinned).expect("accepted");

    assert_eq!(judge(&quote(stranger.settings(ECC)), DATA, &pinned), Err("tpm-ak-untrusted"));
    // Replayed for another peer's key.
    assert_eq!(judge(&before, [8; 48], &pinned), Err("evidence-report-data"));

    // Something else was loaded: PCR 16 is extended.
    tpm.extend(16, [1; 32]);
    let after = quote(tpm.settings(ECC));
    assert_eq!(judge(&after, DATA, &pinned), Err("tpm-pcr-value"));
    let both = Pinned {
        pcrs: BTreeMap::from([(16, [&pinned.pcrs[&16][..], &reference(&after, &[16]).pcrs[&16]].concat())]),
        ..pinned.clone()
    };
    judge(&after, DATA, &both).expect("either value is allowed");
    judge(&before, DATA, &both).expect("either value is allowed");

    // The old values beside the new quote.
    let (mut forged, old): (Value, Value) =
        (serde_json::from_str(&after).unwrap(), serde_json::from_str(&before).unwrap());
    forged["tpm_quote"]["pcrs"] = old["tpm_quote"]["pcrs"].clone();
    assert_eq!(judge(&forged.to_string(), DATA, &pinned), Err("tpm-pcr-digest"));
    // The old signature beside the new quote.
    let mut forged: Value = serde_json::from_str(&after).unwrap();
    forged["tpm_quote"]["signature"] = old["tpm_quote"]["signature"].clone();
    assert_eq!(judge(&forged.to_string(), DATA, &pinned), Err("tpm-signature"));
}

#[test]
fn a_pinned_pcr_that_was_not_quoted_is_refused() {
    let tpm = Swtpm::start();
    let few = TpmSettings { pcrs: PcrSelection::of([3, 16]).unwrap(), ..tpm.settings(ECC) };
    let evidence = quote(few);
    let mut pinned = Pinned { ak: ak(&evidence), pcrs: BTreeMap::new() };
    let appraisal = judge(&evidence, DATA, &pinned).expect("accepted");
    assert_eq!(appraisal.pcrs.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [3, 16]);
    pinned.pcrs.insert(3, vec![appraisal.pcrs[0].1]);
    judge(&evidence, DATA, &pinned).expect("accepted");
    pinned.pcrs.insert(7, vec![[0; 32]]);
    assert_eq!(judge(&evidence, DATA, &pinned), Err("tpm-pcr-missing"));
}

#[test]
fn every_bit_flip_and_every_cut_of_a_genuine_quote_is_refused() {
    let tpm = Swtpm::start();
    for key in [ECC, RSA] {
        let evidence = quote(tpm.settings(key));
        let pinned = reference(&evidence, &[0]);
        let json: Value = serde_json::from_str(&evidence).unwrap();
        for member in ["message", "signature"] {
            let good = BASE64_STANDARD.decode(json["tpm_quote"][member].as_str().unwrap()).unwrap();
            let with = |bytes: &[u8]| {
                let mut bad = json.clone();
                bad["tpm_quote"][member] = BASE64_STANDARD.encode(bytes).into();
                judge(&bad.to_string(), DATA, &pinned)
            };
            with(&good).expect("unchanged it is accepted");
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(with(&bad).is_err(), "bit {bit} of {member}");
            }
            for length in 0..good.len() {
                assert!(with(&good[..length]).is_err(), "{member} cut to {length}");
            }
            assert!(with(&[&good[..], &[0]].concat()).is_err(), "{member} with a byte more");
        }
        let area = BASE64_STANDARD.decode(json["ak_area"].as_str().unwrap()).unwrap();
        let mut unfit = area.clone();
        // TPMA_OBJECT follows type and name algorithm; bit 16 is `restricted`.
        unfit[5] ^= 1;
        for (bytes, reason) in [(&unfit[..], "tpm-ak-unfit"), (&area[..9], "tpm-evidence-malformed")] {
            let mut bad = json.clone();
            bad["ak_area"] = BASE64_STANDARD.encode(bytes).into();
            assert_eq!(judge(&bad.to_string(), DATA, &pinned), Err(reason));
        }
    }
}

#[test]
fn a_tpm_that_is_not_there_or_does_not_answer_has_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let at = |address| HostSource::Tpm(TpmSettings { address, ..TpmSettings::default() });
    let absent = at(TpmAddress::Device(dir.path().join("tpmrm0")));
    assert_eq!(absent.make(&[0; 64], TIME).unwrap_err().reason(), "tpm-unreachable");

    let path = dir.path().join("mute.sock");
    let _mute = UnixListener::bind(&path).unwrap();
    let mute = at(TpmAddress::Socket(path));
    assert_eq!(mute.make(&[0; 64], Duration::from_millis(200)).unwrap_err().reason(), "tpm-timeout");
}

/// As systemd does for tng-evidence@.service: one process for each connection.
fn serve(socket: &Path, tpm: PathBuf) {
    let listener = UnixListener::bind(socket).expect("bind");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let mut child = helper_process(stream, &tpm);
            std::thread::spawn(move || child.wait());
        }
    });
}

fn helper_process(stream: UnixStream, tpm: &Path) -> std::process::Child {
    Command::new(env!("CARGO_BIN_EXE_tngd"))
        .args(["evidence", "--tpm-device", &format!("unix://{}", tpm.display())])
        .args(["--tsm-root", "/nonexistent/tsm"])
        .stdin(Stdio::from(OwnedFd::from(stream)))
        .spawn()
        .expect("tngd evidence")
}

fn through(socket: &Path, provider: HostProvider) -> Attest {
    Attest { provider: AttestProvider::Helper { socket: socket.into(), provider }, ..attest_sample() }
}

fn builtin(references: Vec<Reference>) -> Verify {
    let builtin = Builtin {
        references,
        collateral: Vec::new(),
        pccs_addr: None,
        minimum_tcb: Vec::new(),
        amd_certs: Vec::new(),
        kds_addr: None,
        allow_debug: false,
        timeout: TIME,
    };
    Verify { provider: VerifyProvider::Builtin(builtin), ..verify_sample(false) }
}

fn refusal(outcome: Result<Channel, ChannelError>) -> &'static str {
    outcome.map_or_else(|e| e.reason(), |_| "ok")
}

#[tokio::test]
async fn a_tunnel_attests_with_a_tpm_through_the_helper_and_refuses_a_stranger() {
    let (tpm, stranger) = (Swtpm::start(), Swtpm::start());
    let dir = tempfile::tempdir().unwrap();
    let (socket, strange) = (dir.path().join("evidence.sock"), dir.path().join("strange.sock"));
    serve(&socket, tpm.socket.clone());
    serve(&strange, stranger.socket.clone());
    let pinned = reference(&quote(tpm.settings(ECC)), &[0, 7]).block();
    let client = endpoint(ra(None, Some(builtin(vec![pinned.clone()]))));

    let server = endpoint(ra(Some(through(&socket, HostProvider::Tpm)), None));
    let (c, s) = meet(&client, &server).await;
    s.unwrap();
    let Peer::Verified(verdict) = c.unwrap().peer else { panic!("not verified") };
    assert_eq!((verdict.tee.as_str(), verdict.verifier.as_str(), verdict.sample), ("tpm", "builtin", false));
    assert!(verdict.trust_anchor.starts_with("TPM key sha256:"), "{}", verdict.trust_anchor);
    assert_eq!((verdict.claims["resets"].as_str(), verdict.claims["pcr17"].len()), ("1", 64));
    assert_eq!(server.status().attest.unwrap().provider, "tpm");

    // A policy is asked besides, and cannot take the place of the reference that pins the key.
    let rego = |text: &str| Some(RegoFile { path: "/policy.rego".into(), text: text.into() });
    let with = |references: Vec<Reference>, text: &str| {
        endpoint(ra(None, Some(Verify { rego: rego(text), ..builtin(references) })))
    };
    let booted =
        "package tng\nallow if { input.tee == \"tpm\"; input.claims.resets == 1; count(input.claims.pcr17) == 64 }\n";
    meet(&with(vec![pinned.clone()], booted), &server).await.0.expect("as the policy wants it");
    assert_eq!(refusal(meet(&with(vec![], booted), &server).await.0), "tpm-ak-untrusted");
    let twice = booted.replace("resets == 1", "resets == 2");
    assert_eq!(refusal(meet(&with(vec![pinned], &twice), &server).await.0), "policy-denied");

    let other = endpoint(ra(Some(through(&strange, HostProvider::Tpm)), None));
    assert_eq!(refusal(meet(&client, &other).await.0), "tpm-ak-untrusted");
    let sample = endpoint(ra(Some(attest_sample()), None));
    assert_eq!(refusal(meet(&client, &sample).await.0), "tee-unsupported");
    let absent = endpoint(ra(Some(through(&socket, HostProvider::Tsm)), None));
    assert_eq!(refusal(meet(&client, &absent).await.1), "tsm-absent");
    let nobody = endpoint(ra(Some(through(&dir.path().join("none"), HostProvider::Tpm)), None));
    assert_eq!(refusal(meet(&client, &nobody).await.1), "evidence-helper-unreachable");

    let direct = Attest { provider: AttestProvider::Direct(HostSource::Tpm(tpm.settings(ECC))), ..attest_sample() };
    meet(&client, &endpoint(ra(Some(direct), None))).await.0.expect("with the rights, without the helper");
}

#[test]
fn the_helper_answers_nothing_but_one_whole_request() {
    use std::io::{Read, Write};
    let tpm = Swtpm::start();
    let ask = |bytes: &[u8], shut: bool| {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut child = helper_process(theirs, &tpm.socket);
        ours.write_all(bytes).unwrap();
        if shut {
            ours.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut answer = String::new();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        ours.read_to_string(&mut answer).unwrap();
        (answer, child.wait().unwrap())
    };
    let good = helper::request(HostProvider::Tpm, &padded(DATA));
    let (answer, status) = ask(&good, true);
    assert!(status.success() && answer.starts_with(r#"{"evidence":{"tee":"tpm","#), "{answer}");

    let mut unknown = good;
    unknown[5] = 3;
    let mut reserved = good;
    reserved[7] = 1;
    let mut language = good;
    language[4] = 2;
    let long = [&good[..], &[0]].concat();
    for bad in [&good[..71], &[], &long, &unknown, &reserved, &language] {
        let (answer, _) = ask(bad, true);
        assert!(answer.starts_with(r#"{"failure":{"helper-refused":"#), "{answer}");
    }
    // Who sends the beginning and waits gets nothing.
    let (answer, status) = ask(&good[..10], false);
    assert!(answer.is_empty() && !status.success(), "{answer}");
}

#[test]
fn the_helper_is_no_command_for_a_terminal_and_shows_a_reference() {
    let out = Command::new(env!("CARGO_BIN_EXE_tngd")).arg("evidence").stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && text.contains("[evidence-no-connection]") && text.contains("--show"), "{text}");
    let tpm = Swtpm::start();
    let device = format!("unix://{}", tpm.socket.display());
    let out = Command::new(env!("CARGO_BIN_EXE_tngd"))
        .args(["evidence", "--show", "tpm", "--tpm-device", &device])
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(
        out.status.success() && text.contains("[[ingress.verify.reference]]\ntee = \"tpm\"\nak = \"sha256:"),
        "{text}"
    );
    // As it stands it is a configuration that accepts this very TPM.
    let file = format!(
        "[[ingress]]\nname = \"x\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1001\"\ntarget = \"192.0.2.1:1\"\n\
         [ingress.verify]\nprovider = \"builtin\"\n{text}"
    );
    let name = InstanceName::new("x").unwrap();
    let config = parse(name, Path::new("/etc/tng/x.toml"), &file).expect("valid").config;
    let verify = config.endpoints[0].ra.verify.clone().unwrap();
    let VerifyProvider::Builtin(builtin) = verify.provider else { panic!() };
    appraise(quote(tpm.settings(ECC)).as_bytes(), &DATA, &[&builtin.references[0]]).expect("accepted");
    let refused = Command::new(env!("CARGO_BIN_EXE_tngd")).args(["evidence", "--tpm-ak", "x"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(64), "{refused:?}");
}

#[test]
fn refusals_say_which_check_failed() {
    let e = appraise(b"{}", &DATA, &[]).unwrap_err();
    assert_eq!((e.reason(), e.is_about_peer()), ("tpm-evidence-malformed", true));
    assert!(matches!(e, VerifyError::Tpm(_)));
}
