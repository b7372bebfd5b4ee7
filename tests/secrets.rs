//! What must never be written down: tokens, evidence, keys, session secrets and the headers of the attestation service,
//! in the whole log at its loudest and in all that status and metrics say.

mod common;
#[path = "common/daemon.rs"]
mod daemon;
mod fakes;
#[path = "common/raw.rs"]
mod raw;

use std::net::SocketAddr;

use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use daemon::{Daemon, echoes, free_port};
use fakes::aa::{FakeAa, Mode as Aa};
use fakes::as_rest::{FakeAs, Mode as As, Serves};
use raw::{Keys, message};
use tng::tls::session::{Message, Role, SECRET_LABEL, context};
use tokio_rustls::TlsStream;

const AFFIRMING: As = As::Status("affirming");
/// A word of the configuration that belongs into log and status: finding it shows that the search finds.
const MARKER: &str = "planted-5d1f0c7a9be24466";

/// Bytes of a secret that are looked for at once: a shortened one is a leak too.
const WINDOW: usize = 24;

/// How `secret` may look in a text: as it is, hexadecimal, base64 wherever it stands in a longer one, a list of numbers.
fn renderings(secret: &[u8]) -> Vec<String> {
    let mut all = Vec::new();
    let places = [0, secret.len().saturating_sub(WINDOW) / 2, secret.len().saturating_sub(WINDOW)];
    for at in places {
        let piece = &secret[at..secret.len().min(at + WINDOW)];
        if let Ok(text) = std::str::from_utf8(piece) {
            all.push(text.to_owned());
        }
        let hex: String = piece.iter().map(|b| format!("{b:02x}")).collect();
        all.push(hex.to_uppercase());
        all.push(hex);
        for skip in 0..3 {
            // What stands before the piece shifts its letters; those that it shares with others are left out.
            let shifted = [&vec![0; skip][..], piece].concat();
            let whole = shifted.len() / 3 * 4;
            let inner = |text: String| text[(skip * 4).div_ceil(3)..whole].to_owned();
            all.push(inner(BASE64_STANDARD.encode(&shifted)));
            all.push(inner(BASE64_URL_SAFE_NO_PAD.encode(&shifted)));
        }
        for comma in [", ", ","] {
            all.push(piece.iter().map(u8::to_string).collect::<Vec<_>>().join(comma));
        }
    }
    all
}

/// Where in `text` one of the renderings of `secret` stands.
fn leak<'a>(text: &'a str, secret: &[u8]) -> Option<&'a str> {
    renderings(secret).iter().find_map(|r| text.find(r.as_str())).map(|at| around(text, at))
}

fn around(text: &str, at: usize) -> &str {
    let mut from = at.saturating_sub(200);
    let mut to = text.len().min(at + 100);
    while !text.is_char_boundary(from) {
        from -= 1;
    }
    while !text.is_char_boundary(to) {
        to += 1;
    }
    &text[from..to]
}

/// What looks like 24 bytes or more of key, secret, token or quote, whosever it is.
fn looks_binary(text: &str) -> Option<&str> {
    let is_number = |s: &str| (1..=3).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_digit());
    for line in text.lines() {
        // A list of numbers below 256.
        let mut run = 0;
        for word in line.split([',', '[', ']', ' ']).filter(|w| !w.is_empty()) {
            run = if is_number(word) { run + 1 } else { 0 };
            if run >= WINDOW {
                return Some(line);
            }
        }
        for word in line.split(|c: char| !c.is_ascii_alphanumeric() && !"+_=-".contains(c)) {
            let has = |class: fn(&u8) -> bool| word.bytes().filter(class).count();
            let digits = has(u8::is_ascii_digit);
            let hex = word.len() >= 2 * WINDOW && word.bytes().all(|b| b.is_ascii_hexdigit());
            // Words are lower case, constants upper case; only codes mix both with digits throughout.
            let mixed = digits >= 2 && has(u8::is_ascii_uppercase) >= 4 && has(u8::is_ascii_lowercase) >= 4;
            if hex || (word.len() >= 20 && mixed) {
                return Some(line);
            }
        }
    }
    None
}

#[test]
fn the_search_finds_secrets_in_every_form() {
    let secret: Vec<u8> = (0..64).map(|n: u8| n.wrapping_mul(151).wrapping_add(89)).collect();
    let hex: String = secret.iter().map(|b| format!("{b:02x}")).collect();
    let forms = [
        hex.to_uppercase(),
        hex,
        format!("{secret:?}"),
        format!("Key({:?})", &secret[..30]),
        serde_json::to_string(&secret).unwrap(),
        BASE64_STANDARD.encode(&secret),
        BASE64_URL_SAFE_NO_PAD.encode(&secret),
        BASE64_STANDARD.encode([b"x", &secret[..]].concat()),
        BASE64_URL_SAFE_NO_PAD.encode([b"xy", &secret[..]].concat()),
    ];
    for form in &forms {
        let line = format!("{{\"message\":\"before {form} behind\"}}");
        assert!(leak(&line, &secret).is_some(), "known: {form}");
        assert!(looks_binary(&line).is_some(), "unknown: {form}");
    }
    assert!(
        leak("Authorization: Bearer hunter2-hunter2-hunter2-hunter2", b"hunter2-hunter2-hunter2-hunter2").is_some()
    );
    let harmless = "{\"timestamp\":\"2026-11-21T11:00:00.123456Z\",\"target\":\"tng::attest::service::client\",\"src\":\
        \"127.0.0.1:40001\",\"took_ms\":12.75,\"path\":\"/tmp/.tmpAb12Cd/aa.sock\",\"x\":\"TLS13_AES_128_GCM_SHA256\"}";
    assert_eq!((leak(harmless, &secret), looks_binary(harmless)), (None, None));
}

/// A client of the test's own, so that it knows the secret of the session that it binds.
async fn bound_session(egress: SocketAddr) -> [u8; 32] {
    let tcp = tokio::net::TcpStream::connect(egress).await.expect("connect");
    let mut client = Keys::new().await.connect(tcp, &["tng/1"]).await.expect("handshake");
    // This side does not ask the egress, which attests, for anything.
    client.say(Message::Pass).await;
    let (nonce, _) = client.asked().await;
    let evidence = message(&client.evidence(&nonce).await);
    client.say(evidence).await;
    assert_eq!(client.hear().await, Message::Accept);
    let context = context(Role::Client, &nonce);
    let TlsStream::Client(tls) = &client.stream else { panic!("a client") };
    tls.get_ref().1.export_keying_material([0; 32], SECRET_LABEL, Some(&context)).expect("exporter")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_secret_is_in_logs_status_or_metrics_of_a_whole_run() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let echo = common::echo().await;
    let aa = FakeAa::start(&dir.join("aa.sock"), Aa::Good);
    let issuer = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let appraiser = FakeAs::start_as("127.0.0.1:0", AFFIRMING, Serves::GrpcAlone, None).await;
    let (entry, tunnel) = (free_port(), free_port());
    let (bearer, api_key) = ("Bearer xK2vQ9-wR7pL4mN8tZ1cB6yH3jF5dG0sA", "a8Xq3Zr7Yt1Wu5Pv9Mn2Lk6Jh0Gf4Ds");
    let (socket, ca) = (dir.join("aa.sock"), fakes::fixture("as-ca.pem"));
    let (socket, ca) = (socket.display(), ca.display());
    let egress = format!(
        "[[egress]]\nname = \"out\"\n[egress.mapping]\nlisten = \"{tunnel}\"\ntarget = \"{echo}\"\n\
         [egress.attest]\naa_addr = \"unix://{socket}\"\nmodel = \"passport\"\nrefresh_interval = \"0s\"\n\
         as_addr = \"{}\"\npolicy_ids = [\"{MARKER}\"]\nas_headers = {{ Authorization = \"{bearer}\" }}\n\
         [egress.verify]\nas_addr = \"{}\"\npolicy_ids = [\"{MARKER}\"]\ntrusted_certs = [\"{ca}\"]\n\
         as_headers = {{ x-api-key = \"{api_key}\" }}\nallow_sample = true\nverdict_ttl = \"0s\"\n",
        issuer.url(),
        appraiser.url(),
    );
    let ingress = format!(
        "[[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"{entry}\"\ntarget = \"{tunnel}\"\n\
         [ingress.attest]\naa_addr = \"unix://{socket}\"\nrefresh_interval = \"0s\"\n\
         [ingress.verify]\nmodel = \"passport\"\npolicy_ids = [\"{MARKER}\"]\ntrusted_certs = [\"{ca}\"]\n\
         allow_sample = true\nverdict_ttl = \"0s\"\n"
    );
    let (out, into) = (Daemon::start(dir, "out", &egress), Daemon::start(dir, "in", &ingress));
    let said = || out.everything() + &into.everything();
    let try_it = move || tokio::task::block_in_place(|| echoes(entry));
    assert!(try_it(), "the tunnel carries nothing:\n{}", said());
    let secret = bound_session(tunnel).await;

    // The bad days, when more is said.
    for mode in [As::Rejected, As::Html, As::Garbage, As::Expired, As::Stranger, As::Status("contraindicated")] {
        issuer.set(mode);
        assert!(!try_it(), "{mode:?}");
    }
    issuer.set(AFFIRMING);
    for mode in [As::Rejected, As::Stranger, As::WrongRuntimeData, As::Status("warning")] {
        appraiser.set(mode);
        assert!(!try_it(), "{mode:?}");
    }
    appraiser.set(AFFIRMING);
    for mode in [Aa::Error, Aa::Garbage, Aa::OtherKey] {
        aa.set(mode);
        assert!(!try_it(), "{mode:?}");
    }
    aa.set(Aa::Good);
    assert!(try_it(), "{}", said());

    // The headers were sent, evidence and tokens were made: there was something to leak.
    assert!(issuer.last_head().contains(bearer), "{}", issuer.last_head());
    assert!(appraiser.requests() > 0 && appraiser.last_request().is_null(), "gRPC");
    let (evidence, tokens) = (aa.asked_over(), [issuer.issued(), appraiser.issued()].concat());
    assert!(evidence.len() > 4 && tokens.len() > 6, "{} pieces of evidence, {} tokens", evidence.len(), tokens.len());

    let everything = said();
    // The search would find them, and the log was at its loudest.
    assert!(leak(&everything, MARKER.as_bytes()).is_some(), "the marker is nowhere:\n{everything}");
    for sign in ["\"TRACE\"", "tng_as_request_duration_seconds_bucket", "\"last_refusal\"", "refused      "] {
        assert!(everything.contains(sign), "{sign} is not in\n{everything}");
    }
    let mut secrets: Vec<(String, Vec<u8>)> = vec![
        ("session secret".into(), secret.to_vec()),
        ("header of the issuer".into(), bearer.into()),
        ("header of the appraiser".into(), api_key.into()),
    ];
    for token in &tokens {
        // The first part of a JWT is the same for all tokens of a signer, and says whose they are.
        secrets.extend(token.split('.').skip(1).map(|part| ("token".to_owned(), part.into())));
        let raw = token.split('.').skip(1).filter_map(|part| BASE64_URL_SAFE_NO_PAD.decode(part).ok());
        secrets.extend(raw.map(|part| ("token, decoded".to_owned(), part)));
        secrets.push(("token, whole".into(), token.as_bytes().into()));
    }
    for report_data in &evidence {
        secrets.push(("report data".into(), report_data.clone()));
        let made = format!(r#"{{"report_data":"{}","svn":"1"}}"#, BASE64_STANDARD.encode(report_data));
        secrets.push(("evidence".into(), BASE64_STANDARD.encode(report_data).into()));
        secrets.push(("evidence, whole".into(), made.into()));
    }
    for (what, secret) in &secrets {
        assert_eq!(leak(&everything, secret), None, "{what} was written down");
    }
    for private in ["PRIVATE KEY", "BEGIN CERT"] {
        assert!(!everything.contains(private), "{private}");
    }
    // Keys and secrets of the daemons' own, which nobody can know here, have a look of their own.
    assert_eq!(looks_binary(&everything), None, "this looks like a key, a secret or evidence");
}
