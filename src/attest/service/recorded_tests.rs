//! The recorded exchanges of trustee v0.21: what is sent, byte for byte, and what each refusal means.

use std::path::PathBuf;

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use proptest::prelude::*;
use prost::Message;
use serde_json::{Value, json};

use super::request::{Ask, Dialect, Refusal, proto, token_of};
use crate::attest::changes::{CASES, change, changed};
use crate::attest::{AsStatus, Evidence};

const NEW: Dialect = Dialect { flat: false, compact: false };

fn recorded(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/coco").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).replace("\r\n", "\n")
}

/// Reason of a refusal over HTTP, from the whole recorded answer.
fn of_http(answer: &str) -> &'static str {
    let status = answer.lines().next().unwrap().split(' ').find_map(|word| word.parse().ok()).unwrap();
    // Some recordings keep no headers.
    let body = answer.split_once("\n\n").map_or_else(
        || answer.split_once('\n').unwrap().1,
        |(head, body)| {
            if head.contains("An internal error") { answer.split_once('\n').unwrap().1 } else { body }
        },
    );
    Refusal::of_body(body.as_bytes()).error(AsStatus::Http(status)).reason()
}

#[test]
fn every_recorded_refusal_ends_in_its_reason() {
    for (name, reason) in [
        ("as-sample-ERR-tampered-runtime.response.txt", "as-binding"),
        ("as-sample-ERR-tee-nvidia.response.txt", "as-tee"),
        ("as-sample-ERR-tee-tdx.response.txt", "as-tee"),
        ("as-sample-ERR-tee-tpm-rest.response.txt", "as-tee"),
        ("as-sample-ERR-unknown-policy.response.txt", "as-policy"),
        ("as-snp-ERR-wrong-rd.response.txt", "as-rejected"),
    ] {
        assert_eq!(of_http(&recorded(name)), reason, "{name}");
    }
    for (name, reason) in [
        ("grpc-sample-ERR-policy.error.txt", "as-policy"),
        ("grpc-sample-ERR-tampered.error.txt", "as-binding"),
        ("grpc-sample-plus-device.error.txt", "as-tee"),
        ("grpc-tpm-ERR-tampered.error.txt", "as-binding"),
    ] {
        let text = recorded(name).split_once('\n').unwrap().1.to_owned();
        assert_eq!(Refusal::of_text(text).error(AsStatus::Grpc(10)).reason(), reason, "{name}");
    }
}

#[test]
fn every_recorded_answer_to_a_bad_request_ends_in_its_reason() {
    let text = recorded("as-rest-errors.txt");
    let asked: Vec<_> = text.split(">>> ").skip(1).filter(|part| !part.starts_with("POST /challenge")).collect();
    let reasons =
        ["as-error", "as-error", "as-error", "as-error", "as-binding", "as-error", "a token", "as-error", "as-error"];
    assert_eq!(asked.len(), reasons.len());
    for (part, reason) in asked.into_iter().zip(reasons) {
        let (request, answer) = part.split_once('\n').unwrap();
        if reason == "a token" {
            assert!(answer.starts_with("HTTP/1.1 200"), "{request}");
            // The recording keeps the beginning of it.
            assert!(answer.split_once("\n\n").unwrap().1.starts_with("eyJ"), "{request}");
        } else {
            assert_eq!(of_http(answer), reason, "{request}");
        }
    }
}

/// Name and answer of each exchange of a live recording.
fn exchanges(name: &str) -> Vec<(String, String)> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/live").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let parts = text.split("### ").skip(1);
    let answer = |part: &str| part.find("HTTP/1.1 ").map(|at| part[at..].trim_end().to_owned());
    parts.map(|part| (part.lines().next().unwrap().to_owned(), answer(part).unwrap_or_default())).collect()
}

#[test]
fn refusals_of_live_services_end_in_their_reasons() {
    let openanolis = [
        // Only its log knows more.
        ("POST /attestation: unknown policy", "as-error"),
        ("POST /attestation: other report data", "as-error"),
        ("POST /attestation: tee tdx", "as-tee"),
        ("POST /attestation: tee unknown", "as-tee"),
        ("POST /attestation: evidence not base64", "as-rejected"),
        ("POST /attestation: evidence not JSON", "as-rejected"),
        ("POST /attestation: not JSON", "as-error"),
    ];
    let trustee = [
        ("POST /attestation: unknown policy", "as-policy"),
        ("POST /attestation: other report data", "as-binding"),
        ("POST /attestation: tee tdx", "as-tee"),
        ("POST /attestation: tee unknown", "as-tee"),
        ("POST /attestation: not JSON", "as-error"),
    ];
    for (file, wanted) in [("openanolis-ear-signer.txt", &openanolis[..]), ("trustee-rest-signer.txt", &trustee[..])] {
        let seen = exchanges(file);
        for (name, reason) in wanted {
            let (_, answer) = seen.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{file}: no {name}"));
            assert_eq!(of_http(answer), *reason, "{file}: {name}");
        }
        let (_, token) = &seen[0];
        assert!(token_of(token.split_once("\n\n").unwrap().1).is_ok(), "{file}");
    }
}

#[test]
fn what_is_no_attestation_service_is_said_to_be_none() {
    for status in [AsStatus::Http(404), AsStatus::Http(405), AsStatus::Grpc(12)] {
        let error = Refusal::of_text("URL NOT FOUND".into()).error(status);
        assert_eq!(error.reason(), "as-garbage", "{status}");
        assert!(error.to_string().contains("no attestation service there") && error.to_string().contains("as_addr"));
    }
    // One that says so itself is there.
    let coded = br#"{"detail":"No such resource.","code":"AS.REQUEST.NOT_FOUND"}"#;
    assert_eq!(Refusal::of_body(coded).error(AsStatus::Http(404)).reason(), "as-error");
    assert_eq!(Refusal::of_text("Policy `x` not found".into()).error(AsStatus::Http(404)).reason(), "as-policy");
}

#[test]
fn the_openanolis_lines_words_over_grpc_are_told_apart() {
    for (text, reason) in [
        ("Failed to read attestation service policy file: No such file or directory (os error 2)", "as-policy"),
        ("Evidence's identity verification error. REPORT_DATA is different from that in Sample Quote", "as-binding"),
        ("Evidence's identity verification error. missing field `measure_register`", "as-rejected"),
        ("No such file or directory (os error 2)", "as-error"),
    ] {
        assert_eq!(Refusal::of_text(text.into()).error(AsStatus::Grpc(10)).reason(), reason, "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn no_changed_answer_panics(bytes in change(), at: u16, which: u8, status in 0u16..600) {
        let problem = json!({ "type": "x", "status": 422, "code": "AS.EVIDENCE.BINDING_MISMATCH", "detail": "No." });
        let text = "An internal error occured: \n0: attestation report evaluate\n1: Verifier evaluate failed: x";
        let message = proto::Response { token: "eyJ0.eyJ0.AAAA".into() }.encode_to_vec();
        for body in [
            bytes.of(problem.to_string().as_bytes()),
            bytes.of(text.as_bytes()),
            changed(&problem, at, which).to_string().into_bytes(),
        ] {
            let refusal = Refusal::of_body(&body);
            let error = refusal.error(AsStatus::Http(status));
            prop_assert!(error.to_string().chars().all(|c| !c.is_control()) && error.to_string().len() < 2000);
            let asked = ask("az-tdx-vtpm", "AA", "{}", &[]);
            for dialect in [NEW, Dialect { flat: true, compact: true }] {
                prop_assert!(asked.other(&refusal, dialect).is_none_or(|other| other != dialect));
            }
            let _ = token_of(&String::from_utf8_lossy(&body));
        }
        if let Ok(read) = proto::Response::decode(&bytes.of(&message)[..]) {
            let _ = token_of(&read.token);
        }
    }
}

/// An appraisal that asks for what a recorded request asks for.
fn ask(tee: &str, evidence: &str, structured: &str, policy_ids: &[String]) -> Ask {
    let evidence = Evidence {
        tee: tee.into(),
        evidence: BASE64_URL_SAFE_NO_PAD.decode(evidence).unwrap(),
        additional: None,
        runtime_data: structured.into(),
    };
    Ask::new(&evidence, policy_ids).unwrap()
}

#[test]
fn requests_over_grpc_are_the_recorded_ones() {
    for name in [
        "grpc-sample-affirming",
        "grpc-sample-default",
        "grpc-sample-ERR-policy",
        "grpc-sample-ERR-tampered",
        "grpc-tpm-affirming",
    ] {
        let hex = recorded(&format!("{name}.request.pb.hex"));
        let hex = hex.trim();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let request = proto::Request::decode(&bytes[..]).unwrap();
        let [one] = &request.requests[..] else { panic!("{name}: one request") };
        let made = ask(&one.tee, &one.evidence, one.structured.as_deref().unwrap(), &request.policy_ids);
        assert_eq!(request.encode_to_vec(), bytes, "{name}: a member that is not known");
        // The recording's JSON has spaces; the service reads it before it hashes.
        let compact = |mut request: proto::Request| {
            for one in &mut request.requests {
                let value: Value = serde_json::from_str(one.structured.as_deref().unwrap()).unwrap();
                one.structured = Some(value.to_string());
            }
            request
        };
        let made = proto::Request::decode(&made.protobuf(NEW)[..]).unwrap();
        assert_eq!(compact(made), compact(request), "{name}");
    }
}

#[test]
fn a_request_over_rest_is_the_recorded_one() {
    let wanted: Value = serde_json::from_str(&recorded("as-sample-default-structured-sha384.request.json")).unwrap();
    let one = &wanted["verification_requests"][0];
    let text = |key: &str| one[key].as_str().unwrap();
    let structured = one["runtime_data"]["structured"].to_string();
    let policy_ids: Vec<String> = serde_json::from_value(wanted["policy_ids"].clone()).unwrap();
    let made = ask(text("tee"), text("evidence"), &structured, &policy_ids).json(NEW);
    assert_eq!(serde_json::from_str::<Value>(&made).unwrap(), wanted);
}
