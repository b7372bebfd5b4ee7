//! What an attestation service is asked, in each dialect it may speak, and what its refusals say.
//!
//! trustee from 1.6 takes a list of requests, before that (and the openanolis line for longer) one flat request; Azure's
//! TEEs have two spellings, and which one is known differs between REST and gRPC of one and the same release.

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde_json::{Map, Value, json};

use super::shorten;
use crate::attest::{AsStatus, Evidence, VerifyError, token};

/// Hash that binds the runtime data; the ecosystem's default.
const HASH: &str = "sha384";
/// TEEs with two spellings: of the REST API, and of gRPC and the certificate extension.
const SPELLINGS: [(&str, &str); 2] = [("az-snp-vtpm", "azsnpvtpm"), ("az-tdx-vtpm", "aztdxvtpm")];

/// An appraisal asked for.
pub struct Ask {
    tee: String,
    evidence: String,
    runtime_data: Map<String, Value>,
    policy_ids: Vec<String>,
}

/// How a service wants to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dialect {
    /// One request instead of a list: before 1.6.
    pub flat: bool,
    /// Names of TEEs without separators.
    pub compact: bool,
}

/// An answer that may be a token.
#[derive(Debug)]
pub struct Token {
    /// The JWT.
    pub text: String,
    /// The service's clock when it answered, if it told.
    pub date: Option<std::time::SystemTime>,
}

impl Ask {
    /// Asks for an appraisal of `evidence` under the policies.
    pub fn new(evidence: &Evidence, policy_ids: &[String]) -> Result<Self, VerifyError> {
        let object = evidence.runtime_object().ok_or(VerifyError::Malformed("runtime data is not an object"))?;
        Ok(Self {
            tee: evidence.tee.clone(),
            evidence: BASE64_URL_SAFE_NO_PAD.encode(&evidence.evidence),
            runtime_data: object,
            policy_ids: policy_ids.to_vec(),
        })
    }

    fn tee(&self, dialect: Dialect) -> &str {
        let pair = SPELLINGS.iter().find(|(long, short)| self.tee == *long || self.tee == *short);
        pair.map_or(&self.tee, |(long, short)| if dialect.compact { short } else { long })
    }

    /// Body of `POST /attestation`.
    pub fn json(&self, dialect: Dialect) -> String {
        let mut one = json!({
            "tee": self.tee(dialect),
            "evidence": self.evidence,
            "runtime_data": { "structured": self.runtime_data },
            "runtime_data_hash_algorithm": HASH,
        });
        if dialect.flat {
            one["policy_ids"] = json!(self.policy_ids);
            return one.to_string();
        }
        json!({ "verification_requests": [one], "policy_ids": self.policy_ids }).to_string()
    }

    /// Message of `AttestationEvaluate`.
    pub fn protobuf(&self, dialect: Dialect) -> Vec<u8> {
        use prost::Message;
        let structured = Some(Value::Object(self.runtime_data.clone()).to_string());
        let (tee, evidence, hash) = (self.tee(dialect).to_owned(), self.evidence.clone(), HASH.to_owned());
        if dialect.flat {
            let policy_ids = self.policy_ids.clone();
            return proto::Flat { tee, evidence, structured, hash, policy_ids }.encode_to_vec();
        }
        let one = proto::Individual { tee, evidence, structured, hash };
        proto::Request { requests: vec![one], policy_ids: self.policy_ids.clone() }.encode_to_vec()
    }

    /// The dialect to try after a refusal with this text, if it asks for another one.
    pub fn other(&self, refusal: &str, spoken: Dialect) -> Option<Dialect> {
        let says = |words: &[&str]| words.iter().any(|w| refusal.contains(w));
        // An old gRPC service reads the list's first request as the name of a TEE: no text, or no name that was sent.
        let old = ["missing field `tee`", "failed to decode Protobuf", "invalid string value", "invalid wire type"];
        let misread = refusal.split_once("Unsupported TEE type: ").is_some_and(|(_, tee)| {
            // Nothing else stands between the words and a name that was read as it was sent.
            !tee.starts_with(self.tee(spoken))
        });
        if !spoken.flat && (says(&old) || misread) {
            return Some(Dialect { flat: true, ..spoken });
        }
        if spoken.flat && says(&["missing field `verification_requests`"]) {
            return Some(Dialect { flat: false, ..spoken });
        }
        let named = refusal.contains(self.tee(spoken));
        let two = SPELLINGS.iter().any(|(long, short)| self.tee == *long || self.tee == *short);
        let unknown = says(&["not supported", "Unsupported TEE type", "unknown variant", "unknown TEE"]);
        (two && named && unknown).then_some(Dialect { compact: !spoken.compact, ..spoken })
    }
}

/// The token in an answer's text.
pub fn token_of(text: &str) -> Result<String, VerifyError> {
    let text = text.trim();
    // Some services put the token into quotes, as JSON.
    let text = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
    if token::looks_like_jwt(text) {
        return Ok(text.to_owned());
    }
    let what = match text.chars().next() {
        Some('<') => "a page",
        None => "nothing",
        Some(_) => "something else",
    };
    Err(VerifyError::AsNoToken(what))
}

/// What a refusal with this status and text means.
pub fn refusal(status: AsStatus, text: &str) -> VerifyError {
    // The service has no code for "refused": only this text tells it from a service that is broken.
    if text.contains("Verifier evaluate failed") || text.contains("verifier evaluate failed") {
        return VerifyError::AsRejected(shorten(text));
    }
    VerifyError::AsError { status, text: shorten(text) }
}

/// Text of a refusal over HTTP: the body, or the `detail` of a problem document (RFC 9457).
pub fn http_text(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Problem {
        detail: String,
    }
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => problem.detail,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    }
}

/// Messages of package `attestation` (trustee, protos/attestation.proto); members that tng does not send are left out.
pub mod proto {
    use prost::Message;

    /// `IndividualAttestationRequest`. `structured` is a member of the oneof `runtime_data`.
    #[derive(Clone, PartialEq, Message)]
    pub struct Individual {
        /// TEE.
        #[prost(string, tag = "1")]
        pub tee: String,
        /// base64url without padding.
        #[prost(string, tag = "3")]
        pub evidence: String,
        /// JSON text.
        #[prost(string, optional, tag = "5")]
        pub structured: Option<String>,
        /// Hash of the runtime data.
        #[prost(string, tag = "8")]
        pub hash: String,
    }

    /// `AttestationRequest`.
    #[derive(Clone, PartialEq, Message)]
    pub struct Request {
        /// Requests, first the CPU's.
        #[prost(message, repeated, tag = "1")]
        pub requests: Vec<Individual>,
        /// Policies.
        #[prost(string, repeated, tag = "2")]
        pub policy_ids: Vec<String>,
    }

    /// `AttestationRequest` before 1.6.
    #[derive(Clone, PartialEq, Message)]
    pub struct Flat {
        /// TEE.
        #[prost(string, tag = "1")]
        pub tee: String,
        /// base64url without padding.
        #[prost(string, tag = "2")]
        pub evidence: String,
        /// JSON text.
        #[prost(string, optional, tag = "4")]
        pub structured: Option<String>,
        /// Hash of the runtime data.
        #[prost(string, tag = "7")]
        pub hash: String,
        /// Policies.
        #[prost(string, repeated, tag = "9")]
        pub policy_ids: Vec<String>,
    }

    /// `AttestationResponse`.
    #[derive(Clone, PartialEq, Message)]
    pub struct Response {
        /// The JWT.
        #[prost(string, tag = "1")]
        pub token: String,
    }

    /// `ChallengeRequest`, without its map.
    #[derive(Clone, PartialEq, Message)]
    pub struct Challenge {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Dialect = Dialect { flat: false, compact: false };

    fn ask(tee: &str) -> Ask {
        let evidence = Evidence {
            tee: tee.into(),
            evidence: vec![1],
            additional: None,
            runtime_data: r#"{"pubkey-hash":"x"}"#.into(),
        };
        Ask::new(&evidence, &["default".into()]).unwrap()
    }

    #[test]
    fn azures_tees_are_spelled_as_the_service_knows_them() {
        for tee in ["az-snp-vtpm", "azsnpvtpm"] {
            let ask = ask(tee);
            assert!(ask.json(NEW).contains(r#""tee":"az-snp-vtpm""#));
            assert!(ask.json(Dialect { compact: true, ..NEW }).contains(r#""tee":"azsnpvtpm""#));
            let refused = "An internal error occured: \n0: tee `az-snp-vtpm not supported`";
            assert_eq!(ask.other(refused, NEW), Some(Dialect { compact: true, ..NEW }));
        }
        assert_eq!(ask("tpm").other("tee `tpm not supported`", NEW), None);
    }

    #[test]
    fn a_flat_request_is_asked_for_in_words() {
        let flat = Dialect { flat: true, ..NEW };
        let ask = ask("tdx");
        assert_eq!(ask.other("Json deserialize error: missing field `tee` at line 1 column 9", NEW), Some(flat));
        assert_eq!(ask.other("missing field `verification_requests` at line 1 column 93", flat), Some(NEW));
        assert_eq!(ask.other("missing field `tee`", flat), None);
        let error = "failed to decode Protobuf message: AttestationRequest.tee: invalid string value";
        assert_eq!(ask.other(error, NEW), Some(flat));
        let misread = "parse TEE type: Unsupported TEE type: \n\u{6}sample\u{1a}";
        assert_eq!(ask.other(misread, NEW), Some(flat));
        assert_eq!(ask.other("parse TEE type: Unsupported TEE type: tdx", NEW), None);
    }

    #[test]
    fn the_message_is_byte_for_byte_the_recorded_one() {
        use prost::Message;
        let hex = include_str!("../../../tests/fixtures/coco/grpc-sample-affirming.request.pb.hex").trim();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let request = proto::Request::decode(&bytes[..]).unwrap();
        let one = &request.requests[0];
        assert_eq!((one.tee.as_str(), one.hash.as_str(), request.requests.len()), ("sample", HASH, 1));
        assert!(one.structured.as_ref().unwrap().contains("spki-sha256"), "{one:?}");
        assert_eq!(request.encode_to_vec(), bytes);
    }

    #[test]
    fn what_is_no_token_is_told_apart() {
        assert_eq!(token_of(" a.b.c\n"), Ok("a.b.c".into()));
        assert_eq!(token_of("\"a.b.c\""), Ok("a.b.c".into()));
        assert_eq!(token_of("<html></html>"), Err(VerifyError::AsNoToken("a page")));
        assert_eq!(token_of(""), Err(VerifyError::AsNoToken("nothing")));
        assert_eq!(token_of("{}"), Err(VerifyError::AsNoToken("something else")));
    }

    #[test]
    fn the_detail_of_a_problem_is_its_text() {
        let problem = br#"{"type":"about:blank","title":"Bad","status":500,"detail":"Verifier evaluate failed: x"}"#;
        assert!(matches!(refusal(AsStatus::Http(500), &http_text(problem)), VerifyError::AsRejected(_)));
        assert!(matches!(refusal(AsStatus::Http(500), "Policy not found"), VerifyError::AsError { .. }));
    }
}
