//! What an attestation service does with evidence, whatever protocol it is asked in: decodes it, recomputes the report
//! data and signs a fresh token. Faults are switchable.

use std::str::FromStr;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use aws_lc_rs::{digest, hmac};
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};

/// How the service behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Appraises; the status is this.
    Status(&'static str),
    /// Refuses all evidence, with the recorded text.
    Rejected,
    /// The recorded 400.
    BadRequest,
    /// The recorded 500 of an unknown policy.
    NoPolicy,
    /// Not there for now: 503, or UNAVAILABLE.
    Unavailable,
    /// 200 and no token.
    Garbage,
    /// As a service of another kind at the address: 404, or no such method.
    Absent,
    /// Reads the request and drops the call, as a handler that panics does.
    Drops,
    /// Bytes that are no HTTP.
    NotHttp,
    /// 200 and a page.
    Html,
    /// Reads and never answers.
    Silent,
    /// A token that is over.
    Expired,
    /// Affirms for so many seconds.
    Short(u64),
    /// Affirms the TEE and warns of the devices.
    DeviceWarning,
    /// A token about other runtime data.
    WrongRuntimeData,
    /// A token under another policy.
    WrongPolicy,
    /// A token signed with a key nobody vouches for.
    Stranger,
    /// Knows only the flat request of old services.
    OldApi,
    /// The openanolis line: spells TEEs without separators, publishes certificates and no keys, writes x5c in base64url;
    /// answers errors over REST as problem documents with codes.
    Openanolis {
        /// An older one, with flat requests and errors in plain text.
        flat: bool,
    },
    /// Appraises after a pause of 300 ms.
    Slow,
    /// Affirms, with so many bytes more in the token.
    Padded(usize),
    /// Sends the head of an answer and never its body.
    Stalls,
    /// Sends the client elsewhere.
    Redirect,
    /// Affirms; has no key set, but the certificates of its signer.
    CertificateOnly,
    /// The same with somebody else's certificate.
    OthersCertificate,
    /// Affirms; tells nobody who signs.
    NoAnchors,
    /// Affirms by a clock that is so many seconds off.
    Clock(i64),
    /// Signs something that must not be taken.
    Forged(Forgery),
}

/// What is wrong with a token that affirms everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forgery {
    /// `alg` none, no signature.
    AlgNone,
    /// HS256 with the signer's public key as the secret.
    Hs256,
    /// RS256, signed as ES256.
    Rs256,
    /// An extension that must be understood.
    Critical,
    /// A stranger's key, which the header calls by the trusted one's name.
    KidOfAnother,
    /// A stranger's key and its honest signature, without certificates.
    JwkOfStranger,
    /// A stranger's signature under the trusted key.
    SignedByStranger,
    /// To be used in an hour.
    NotBefore,
    /// A device beside the CPU, appraised under another policy.
    TwoPolicies,
    /// Nothing: the key is named, and not brought along.
    KidAlone,
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "affirming" => Self::Status("affirming"),
            "warning" => Self::Status("warning"),
            "none" => Self::Status("none"),
            "contraindicated" => Self::Status("contraindicated"),
            "rejected" => Self::Rejected,
            "bad-request" => Self::BadRequest,
            "no-policy" => Self::NoPolicy,
            "unavailable" => Self::Unavailable,
            "garbage" => Self::Garbage,
            "absent" => Self::Absent,
            "drops" => Self::Drops,
            "not-http" => Self::NotHttp,
            "html" => Self::Html,
            "silent" => Self::Silent,
            "expired" => Self::Expired,
            "wrong-runtime-data" => Self::WrongRuntimeData,
            "wrong-policy" => Self::WrongPolicy,
            "stranger" => Self::Stranger,
            "old-api" => Self::OldApi,
            "openanolis" => Self::Openanolis { flat: false },
            "stalls" => Self::Stalls,
            "huge" => Self::Padded(900 << 10),
            "clock-ahead" => Self::Clock(3600),
            "clock-behind" => Self::Clock(-3600),
            "alg-none" => Self::Forged(Forgery::AlgNone),
            "hs256" => Self::Forged(Forgery::Hs256),
            "rs256" => Self::Forged(Forgery::Rs256),
            "critical" => Self::Forged(Forgery::Critical),
            "kid-of-another" => Self::Forged(Forgery::KidOfAnother),
            "jwk-of-stranger" => Self::Forged(Forgery::JwkOfStranger),
            "signed-by-stranger" => Self::Forged(Forgery::SignedByStranger),
            "not-before" => Self::Forged(Forgery::NotBefore),
            "two-policies" => Self::Forged(Forgery::TwoPolicies),
            "slow" => Self::Slow,
            other => return Err(format!("unknown mode {other}")),
        })
    }
}

impl Mode {
    /// Seconds that the service's clock is off.
    pub fn clock(self) -> i64 {
        if let Self::Clock(off) = self { off } else { 0 }
    }
}

/// Name of the signer's key in its key set, where it has one.
pub const KID: &str = "as-signer";

/// The key that tokens are signed with, and its certificates.
pub struct Signer {
    key: EcdsaKeyPair,
    chain: Vec<Vec<u8>>,
    issued: Mutex<Vec<String>>,
}

impl Signer {
    pub fn load() -> Self {
        let key = PrivatePkcs8KeyDer::from_pem_slice(super::text("as-signer.key.TEST-ONLY.pem").as_bytes()).unwrap();
        let pem = super::text("as-signer-chain.pem");
        let mut chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).map(|c| c.unwrap()).collect();
        chain.extend(CertificateDer::pem_slice_iter(super::text("as-ca.pem").as_bytes()).map(|c| c.unwrap()));
        Self {
            key: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_pkcs8_der()).unwrap(),
            chain: chain.iter().take(2).map(|c| c.to_vec()).collect(),
            issued: Mutex::default(),
        }
    }
    pub fn stranger(&self) -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        Self { key, chain: self.chain.clone(), issued: Mutex::default() }
    }
    /// The public key, with certificates in standard base64, or in base64url without padding.
    pub fn jwk(&self, url_safe: bool) -> Value {
        let point = self.key.public_key().as_ref();
        let part = |range| BASE64_URL_SAFE_NO_PAD.encode(&point[range]);
        let encode = |der| if url_safe { BASE64_URL_SAFE_NO_PAD.encode(der) } else { BASE64_STANDARD.encode(der) };
        let x5c: Vec<String> = self.chain.iter().map(encode).collect();
        json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "x": part(1..33), "y": part(33..65), "x5c": x5c })
    }
    /// Tokens made so far.
    pub fn issued(&self) -> Vec<String> {
        self.issued.lock().unwrap().clone()
    }
    /// SHA-256 of the DER public key.
    pub fn pin(&self) -> [u8; 32] {
        let spki =
            aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(self.key.public_key());
        digest::digest(&digest::SHA256, spki.unwrap().as_ref()).as_ref().try_into().unwrap()
    }
    fn sign(&self, header: &Value, claims: &Value) -> String {
        let signed = unsigned(header, claims);
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
    fn token(&self, claims: &Value, mode: Mode) -> String {
        let url_safe = matches!(mode, Mode::Openanolis { .. });
        let header = json!({ "typ": "JWT", "alg": "ES256", "jwk": self.jwk(url_safe) });
        match mode {
            Mode::Stranger => {
                let stranger = self.stranger();
                stranger.sign(&json!({ "typ": "JWT", "alg": "ES256", "jwk": stranger.jwk(false) }), claims)
            }
            Mode::Forged(forgery) => self.forge(forgery, header, claims),
            _ => self.sign(&header, claims),
        }
    }
    fn forge(&self, forgery: Forgery, mut header: Value, claims: &Value) -> String {
        let stranger = self.stranger();
        match forgery {
            Forgery::AlgNone => {
                header["alg"] = "none".into();
                // A third part, so that the form is that of a signed one.
                return format!("{}.AA", unsigned(&header, claims));
            }
            Forgery::Hs256 => {
                header["alg"] = "HS256".into();
                let signed = unsigned(&header, claims);
                let secret = hmac::Key::new(hmac::HMAC_SHA256, self.key.public_key().as_ref());
                let mac = hmac::sign(&secret, signed.as_bytes());
                return format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(mac));
            }
            Forgery::Rs256 => header["alg"] = "RS256".into(),
            Forgery::Critical => {
                header["crit"] = json!(["b64"]);
                header["b64"] = true.into();
            }
            Forgery::KidOfAnother => {
                header["kid"] = KID.into();
                header["jwk"] = stranger.jwk(false);
                return stranger.sign(&header, claims);
            }
            Forgery::JwkOfStranger => {
                header["jwk"] = stranger.jwk(false);
                header["jwk"].as_object_mut().unwrap().remove("x5c");
                return stranger.sign(&header, claims);
            }
            Forgery::SignedByStranger => return stranger.sign(&header, claims),
            Forgery::KidAlone => header = json!({ "typ": "JWT", "alg": "ES256", "kid": KID }),
            Forgery::NotBefore | Forgery::TwoPolicies => {}
        }
        self.sign(&header, claims)
    }
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let encode = |v: &Value| BASE64_URL_SAFE_NO_PAD.encode(v.to_string());
    format!("{}.{}", encode(header), encode(claims))
}

/// One appraisal asked for.
pub struct Asked {
    pub tee: String,
    /// base64url without padding.
    pub evidence: String,
    pub structured: Value,
    pub hash: String,
    pub policy_ids: Vec<String>,
    /// What is appraised together with it.
    pub devices: Vec<Device>,
}

/// Evidence of a device beside the TEE's.
pub struct Device {
    pub tee: String,
    /// base64url without padding.
    pub evidence: String,
    pub structured: Value,
    pub hash: String,
}

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The evidence is bound to something else.
    Evidence,
    /// The evidence is not what the verifier wants.
    Rejected,
    /// The policy is not there.
    Policy,
    /// Something in the request is wrong.
    Request(String),
}

/// The evidence, if its report data is the digest of the runtime data that comes with it.
fn bound(evidence: &str, claims: &Value, hash: &str) -> Result<Value, Refusal> {
    let evidence = BASE64_URL_SAFE_NO_PAD.decode(evidence).ok();
    let Some(evidence) = evidence.and_then(|e| serde_json::from_slice::<Value>(&e).ok()) else {
        return Err(Refusal::Request("base64 decode evidence".into()));
    };
    let report = BASE64_STANDARD.encode(digest::digest(&digest::SHA384, claims.to_string().as_bytes()));
    if hash != "sha384" || evidence["report_data"] != *report {
        return Err(Refusal::Evidence);
    }
    Ok(evidence)
}

/// Appraises as `mode` says.
pub fn appraise(mode: Mode, signer: &Signer, asked: &Asked, compact: bool) -> Result<String, Refusal> {
    match mode {
        Mode::Rejected => return Err(Refusal::Rejected),
        Mode::NoPolicy => return Err(Refusal::Policy),
        _ => {}
    }
    let azure = if compact { "azsnpvtpm" } else { "az-snp-vtpm" };
    let tee = asked.tee.as_str();
    if tee != "sample" && tee != azure {
        return Err(Refusal::Request(tee.to_owned()));
    }
    // As recorded: the sample device over REST alone; gRPC has NVIDIA's. The names are read before any evidence.
    let known = if compact { "nvidia" } else { "sampledevice" };
    if let Some(other) = asked.devices.iter().find(|device| device.tee != known) {
        return Err(Refusal::Request(other.tee.clone()));
    }
    let claims = &asked.structured;
    let evidence = bound(&asked.evidence, claims, &asked.hash)?;
    let mut devices = Vec::new();
    for device in &asked.devices {
        devices.push((&device.structured, bound(&device.evidence, &device.structured, &device.hash)?));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let now = now.checked_add_signed(mode.clock()).unwrap();
    let iat = if mode == Mode::Expired { now - 600 } else { now };
    let claims = if mode == Mode::WrongRuntimeData { json!({ "pubkey-hash": "other" }) } else { claims.clone() };
    let policy = asked.policy_ids.first().cloned().unwrap_or_else(|| "default".to_owned());
    let policy = if mode == Mode::WrongPolicy { "another".to_owned() } else { policy };
    let status = if let Mode::Status(s) = mode { s } else { "affirming" };
    let submod = |policy: &str, status: &str, tee: &str, claims: &Value, evidence: &Value| {
        json!({
            "ear.status": status,
            "ear.trustworthiness-vector": { "executables": 2 },
            "ear.appraisal-policy-id": policy,
            "ear.veraison.annotated-evidence": {
                "report_data": evidence["report_data"],
                "runtime_data_claims": claims,
                tee: { "svn": evidence["svn"], "debug": false },
            },
        })
    };
    let mut token = json!({
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iat": iat,
        "exp": iat + if let Mode::Short(seconds) = mode { seconds } else { 300 },
        "iss": "CoCo-Attestation-Service",
        "ear.verifier-id": { "developer": "https://confidentialcontainers.org", "build": "attestation-service 0.1.0" },
        "submods": { "cpu0": submod(&policy, status, tee, &claims, &evidence) },
    });
    match mode {
        Mode::Padded(bytes) => token["padding"] = "x".repeat(bytes).into(),
        Mode::Forged(Forgery::NotBefore) => {
            token["nbf"] = (now + 3600).into();
            token["exp"] = (now + 7200).into();
        }
        Mode::Forged(Forgery::TwoPolicies) => {
            token["submods"]["gpu0"] = submod("lenient", status, tee, &claims, &evidence)
        }
        _ => {}
    }
    for (n, (claims, evidence)) in devices.into_iter().enumerate() {
        let status = if mode == Mode::DeviceWarning { "warning" } else { status };
        token["submods"][format!("gpu{n}")] = submod(&policy, status, known, claims, &evidence);
    }
    let token = signer.token(&token, mode);
    signer.issued.lock().unwrap().push(token.clone());
    Ok(token)
}
