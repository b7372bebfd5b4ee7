//! What an attestation service is asked, in each dialect it may speak, and what its refusals say.
//!
//! trustee from 1.6 takes a list of requests, before that (and the openanolis line for longer) one flat request; Azure's
//! TEEs have two spellings, and which one is known differs between REST and gRPC of one and the same release.

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde_json::{Map, Value, json};

use super::grpc::code::UNIMPLEMENTED;
use super::shorten;
use crate::attest::tee_names::SPELLINGS;
use crate::attest::{AsStatus, Evidence, VerifyError, devices, token};

/// Hash that binds the runtime data; the ecosystem's default.
const HASH: &str = "sha384";
/// What a service says of a TEE that it does not know.
const UNKNOWN_TEE: [&str; 4] = ["not supported", "Unsupported TEE type", "unknown variant", "unknown TEE"];

/// What a verifier's refusal of evidence begins with: of trustee, and of the openanolis line over gRPC.
const REFUSED: [&str; 3] =
    ["Verifier evaluate failed", "verifier evaluate failed", "Evidence's identity verification error"];
/// What follows the word policy where a service has none of that name; the last is of the openanolis line.
const NO_SUCH_POLICY: [&str; 2] = ["not found", "No such file or directory"];

/// An appraisal asked for.
pub struct Ask {
    /// What is to be appraised together; the first is the CPU's.
    parts: Vec<Part>,
    policy_ids: Vec<String>,
}

/// Evidence of one TEE or device.
struct Part {
    tee: String,
    /// base64url without padding.
    evidence: String,
    runtime_data: Map<String, Value>,
}

impl Part {
    /// Name of its TEE, as the dialect spells it.
    fn tee(&self, dialect: Dialect) -> &str {
        self.spellings().map_or(&self.tee, |(long, short)| if dialect.compact { short } else { long })
    }

    fn spellings(&self) -> Option<&'static (&'static str, &'static str)> {
        SPELLINGS.iter().find(|(long, short)| self.tee == *long || self.tee == *short)
    }

    fn json(&self, dialect: Dialect) -> Value {
        json!({
            "tee": self.tee(dialect),
            "evidence": self.evidence,
            "runtime_data": { "structured": self.runtime_data },
            "runtime_data_hash_algorithm": HASH,
        })
    }

    fn message(&self, dialect: Dialect) -> proto::Individual {
        proto::Individual {
            tee: self.tee(dialect).to_owned(),
            evidence: self.evidence.clone(),
            structured: Some(Value::Object(self.runtime_data.clone()).to_string()),
            hash: HASH.to_owned(),
        }
    }
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
    /// Asks for an appraisal of `evidence`, and of the devices bound to it, under the policies.
    pub fn new(evidence: &Evidence, policy_ids: &[String]) -> Result<Self, VerifyError> {
        let part = |piece: devices::Piece| Part {
            tee: piece.tee,
            evidence: BASE64_URL_SAFE_NO_PAD.encode(&piece.evidence),
            runtime_data: piece.runtime_data,
        };
        let parts = devices::pieces(evidence)?.into_iter().map(part).collect();
        Ok(Self { parts, policy_ids: policy_ids.to_vec() })
    }

    /// TEE and devices that are to be appraised, by their names.
    pub fn tees(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.tee.as_str())
    }

    /// Whether there is more to appraise than the TEE.
    pub fn has_devices(&self) -> bool {
        self.parts.len() > 1
    }

    /// `dialect`, when all parts can be asked for in it.
    ///
    /// # Errors
    /// A flat request has room for the first alone: a service of before 1.6 cannot appraise the devices.
    pub fn whole_in(&self, dialect: Dialect) -> Result<Dialect, VerifyError> {
        if dialect.flat && self.has_devices() {
            return Err(VerifyError::Devices("the service takes one piece of evidence alone"));
        }
        Ok(dialect)
    }

    /// Body of `POST /attestation`, of all parts or of the first alone.
    pub fn json(&self, dialect: Dialect) -> String {
        let mut all: Vec<Value> = self.parts.iter().map(|part| part.json(dialect)).collect();
        if dialect.flat {
            all[0]["policy_ids"] = json!(self.policy_ids);
            return all[0].to_string();
        }
        json!({ "verification_requests": all, "policy_ids": self.policy_ids }).to_string()
    }

    /// Message of `AttestationEvaluate`.
    pub fn protobuf(&self, dialect: Dialect) -> Vec<u8> {
        use prost::Message;
        let policy_ids = self.policy_ids.clone();
        if dialect.flat {
            let proto::Individual { tee, evidence, structured, hash } = self.parts[0].message(dialect);
            return proto::Flat { tee, evidence, structured, hash, policy_ids }.encode_to_vec();
        }
        let requests = self.parts.iter().map(|part| part.message(dialect)).collect();
        proto::Request { requests, policy_ids }.encode_to_vec()
    }

    /// The dialect to try after a refusal with this text, if it asks for another one.
    pub fn other(&self, refusal: &Refusal, spoken: Dialect) -> Option<Dialect> {
        let (text, code) = (&refusal.text, refusal.code.as_str());
        let says = |words: &[&str]| words.iter().any(|w| text.contains(w));
        // An old gRPC service reads the list's first request as the name of a TEE: no text, or no name that was sent.
        let old = ["missing field `tee`", "failed to decode Protobuf", "invalid string value", "invalid wire type"];
        let misread = text.split_once("Unsupported TEE type: ").is_some_and(|(_, tee)| {
            // Nothing else stands between the words and a name that was read as it was sent.
            !self.parts.iter().any(|part| tee.starts_with(part.tee(spoken)))
        });
        if !spoken.flat && (says(&old) || misread) {
            return Some(Dialect { flat: true, ..spoken });
        }
        if spoken.flat && (says(&["missing field `verification_requests`"]) || code == "AS.REQUEST.INVALID_JSON") {
            return Some(Dialect { flat: false, ..spoken });
        }
        // A code names no TEE.
        let coded = code == "AS.REQUEST.UNSUPPORTED_TEE";
        let named = |part: &Part| part.spellings().is_some() && (coded || text.contains(part.tee(spoken)));
        let named = self.parts.iter().any(named);
        let unknown = coded || says(&UNKNOWN_TEE);
        (named && unknown).then_some(Dialect { compact: !spoken.compact, ..spoken })
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

/// A refusal as the service words it.
#[derive(Default)]
pub struct Refusal {
    /// For people; of most services also the only thing that tells refusals apart.
    pub text: String,
    /// `AS.EVIDENCE.BINDING_MISMATCH` and the like, of services that have codes (openanolis).
    pub code: String,
}

impl Refusal {
    /// Of a gRPC status.
    pub fn of_text(text: String) -> Self {
        Self { text, ..Self::default() }
    }

    /// Of the body of an HTTP answer: text, or a problem document (RFC 9457).
    pub fn of_body(body: &[u8]) -> Self {
        #[derive(serde::Deserialize)]
        struct Problem {
            detail: String,
            #[serde(default)]
            code: String,
        }
        match serde_json::from_slice::<Problem>(body) {
            Ok(Problem { detail, code }) => Self { text: detail, code },
            Err(_) => Self::of_text(String::from_utf8_lossy(body).into_owned()),
        }
    }

    /// What it means together with its status.
    pub fn error(&self, status: AsStatus) -> VerifyError {
        let says = |words: &[&str]| words.iter().any(|w| self.text.contains(w));
        let said = says(&REFUSED);
        let shown = match self.code.as_str() {
            "" => shorten(&self.text),
            code => shorten(&format!("{code}: {}", self.text)),
        };
        if self.code == "AS.EVIDENCE.BINDING_MISMATCH"
            || said && ["report_data", "report data"].iter().any(|w| self.text.to_ascii_lowercase().contains(w))
        {
            return VerifyError::AsBinding(shown);
        }
        if said || self.code.starts_with("AS.EVIDENCE.") {
            return VerifyError::AsRejected(shown);
        }
        if self.code == "AS.REQUEST.UNSUPPORTED_TEE" || says(&UNKNOWN_TEE) || says(&["-verifier` is not enabled"]) {
            return VerifyError::AsTee { status, text: shown };
        }
        if says(&["olicy"]) && says(&NO_SUCH_POLICY) {
            return VerifyError::AsPolicy { status, text: shown };
        }
        // A KBS, an API server, a web server: the service itself has a code, or another status.
        if self.code.is_empty() && matches!(status, AsStatus::Http(404 | 405) | AsStatus::Grpc(UNIMPLEMENTED)) {
            return VerifyError::AsAbsent(status);
        }
        VerifyError::AsError { status, text: shown }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Dialect = Dialect { flat: false, compact: false };

    fn said(text: &str) -> Refusal {
        Refusal::of_text(text.into())
    }

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
    fn devices_are_never_left_out_of_a_request() {
        let shown = br#"{"sampledevice":{}}"#;
        let runtime_data = crate::attest::RuntimeData::for_key(b"key").with_devices(shown);
        let evidence = Evidence {
            tee: "tdx".into(),
            evidence: vec![1],
            additional: Some(shown.to_vec()),
            runtime_data: runtime_data.canonical().into(),
        };
        let with = Ask::new(&evidence, &["default".into()]).unwrap();
        let flat = with.other(&said("missing field `tee`"), NEW).unwrap();
        assert!(flat.flat && with.has_devices() && !ask("tdx").has_devices());
        assert_eq!(with.whole_in(flat).unwrap_err().reason(), "evidence-devices");
        assert_eq!((with.whole_in(NEW), ask("tdx").whole_in(flat)), (Ok(NEW), Ok(flat)));
    }

    #[test]
    fn azures_tees_are_spelled_as_the_service_knows_them() {
        for tee in ["az-snp-vtpm", "azsnpvtpm"] {
            let ask = ask(tee);
            assert!(ask.json(NEW).contains(r#""tee":"az-snp-vtpm""#));
            assert!(ask.json(Dialect { compact: true, ..NEW }).contains(r#""tee":"azsnpvtpm""#));
            let refused = "An internal error occured: \n0: tee `az-snp-vtpm not supported`";
            assert_eq!(ask.other(&said(refused), NEW), Some(Dialect { compact: true, ..NEW }));
        }
        assert_eq!(ask("tpm").other(&said("tee `tpm not supported`"), NEW), None);
    }

    #[test]
    fn a_flat_request_is_asked_for_in_words() {
        let flat = Dialect { flat: true, ..NEW };
        let ask = ask("tdx");
        assert_eq!(ask.other(&said("Json deserialize error: missing field `tee` at line 1 column 9"), NEW), Some(flat));
        assert_eq!(ask.other(&said("missing field `verification_requests` at line 1 column 93"), flat), Some(NEW));
        assert_eq!(ask.other(&said("missing field `tee`"), flat), None);
        let error = "failed to decode Protobuf message: AttestationRequest.tee: invalid string value";
        assert_eq!(ask.other(&said(error), NEW), Some(flat));
        let misread = "parse TEE type: Unsupported TEE type: \n\u{6}sample\u{1a}";
        assert_eq!(ask.other(&said(misread), NEW), Some(flat));
        assert_eq!(ask.other(&said("parse TEE type: Unsupported TEE type: tdx"), NEW), None);
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
    fn problem_documents_are_read_with_and_without_codes() {
        let of = |body: &[u8], status| Refusal::of_body(body).error(AsStatus::Http(status)).to_string();
        let plain = br#"{"type":"x","detail":"attestation report evaluate: Verifier evaluate failed: y"}"#;
        assert!(of(plain, 500).starts_with("attestation service refused the evidence: attestation report"));
        let coded = br#"{"type":"x","status":422,"code":"AS.EVIDENCE.BINDING_MISMATCH","detail":"Not bound."}"#;
        assert_eq!(
            of(coded, 422),
            "attestation service found the evidence bound to something else: AS.EVIDENCE.BINDING_MISMATCH: Not bound."
        );
        assert_eq!(of(b"try again", 500), "attestation service answered 500: try again");
        let coded = |code: &str| Refusal { code: code.into(), ..Refusal::default() };
        let other = |tee, code, spoken| ask(tee).other(&coded(code), spoken);
        let (flat, compact) = (Dialect { flat: true, ..NEW }, Dialect { compact: true, ..NEW });
        assert_eq!(other("az-tdx-vtpm", "AS.REQUEST.UNSUPPORTED_TEE", NEW), Some(compact));
        assert_eq!(other("tpm", "AS.REQUEST.UNSUPPORTED_TEE", NEW), None);
        assert_eq!(other("tdx", "AS.REQUEST.INVALID_JSON", flat), Some(NEW));
        assert_eq!(other("tdx", "AS.REQUEST.INVALID_JSON", NEW), None);
    }
}
