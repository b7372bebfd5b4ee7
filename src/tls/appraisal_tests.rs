use std::sync::Mutex;

use super::*;
use crate::config::*;

/// A clock that is set.
struct Set(Mutex<SystemTime>);

impl Clock for Set {
    fn now(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }
}

struct Case {
    clock: Arc<Set>,
    begun: SystemTime,
    appraisal: Appraisal,
}

impl Case {
    fn new(verdict_ttl: Duration) -> Self {
        let any = "127.0.0.1".parse().unwrap();
        let verify = Verify {
            provider: VerifyProvider::Sample,
            policy_ids: vec!["default".into()],
            allow_sample: true,
            verdict_ttl,
            model: Model::BackgroundCheck,
            rego: None,
        };
        let endpoint = Endpoint {
            name: EndpointName::new("test").unwrap(),
            side: Side::Ingress,
            mode: Mode::Mapping(Mapping {
                listen_addr: any,
                listen_ports: PortRange::single(1),
                target_host: TargetHost::Addr(any),
                target_ports: PortRange::single(1),
                so_mark: DEFAULT_INGRESS_MARK,
            }),
            ra: Ra::default(),
            limits: Limits::default(),
        };
        let begun = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Arc::new(Set(Mutex::new(begun)));
        let appraisal = Appraisal::new(&endpoint, &verify, clock.clone()).unwrap();
        Self { clock, begun, appraisal }
    }

    fn at(&self, seconds: i64) {
        let by = Duration::from_secs(seconds.unsigned_abs());
        *self.clock.0.lock().unwrap() = if seconds < 0 { self.begun - by } else { self.begun + by };
    }

    async fn of(&self, der: &[u8]) -> Result<Appraised, &'static str> {
        self.appraisal.of(self.appraisal.key(der), der).await.map_err(|e| e.reason())
    }

    /// A certificate with sample evidence that is valid from now on for an hour.
    async fn certificate(&self) -> Vec<u8> {
        let made = crate::tls::certificate::attested(&crate::attest::SampleAttester, self.begun).await.unwrap();
        made.certified.end_entity_cert().unwrap().to_vec()
    }

    /// Has a verdict on `der` kept that ends with the certificate after an hour.
    fn know(&self, der: &[u8]) -> Appraised {
        let not_after = self.begun + Duration::from_secs(3600);
        let verdict = Arc::new(Verdict { expires_at: not_after, ..Verdict::default() });
        let known = Appraised { verdict, not_after };
        self.appraisal.cache.put(self.appraisal.key(der), known.clone());
        known
    }
}

const TTL: Duration = Duration::from_secs(300);

#[tokio::test]
async fn a_known_certificate_is_not_looked_into_and_another_one_is() {
    let case = Case::new(TTL);
    let no_certificate = b"bytes that no parser takes";
    let known = case.know(no_certificate);
    assert_eq!(case.of(no_certificate).await, Ok(known), "its hash says all");
    assert_eq!(case.of(b"others").await, Err("peer-certificate-malformed"));
    assert_eq!(case.appraisal.hits(), 1);
    case.appraisal.forget_all();
    assert_eq!(case.of(no_certificate).await, Err("peer-certificate-malformed"));
}

#[tokio::test]
async fn a_certificate_is_appraised_once_and_keeps_its_own_end() {
    let case = Case::new(TTL);
    let der = case.certificate().await;
    let first = case.of(&der).await.unwrap();
    assert_eq!(first.verdict.expires_at, case.begun + TTL);
    assert_eq!(first.not_after, case.begun + crate::tls::certificate::VALIDITY);
    case.at(299);
    assert_eq!(case.of(&der).await.unwrap(), first);
    case.at(300);
    assert_eq!(case.of(&der).await.unwrap().verdict.expires_at, case.begun + 2 * TTL, "a new verdict");
    assert_eq!(case.appraisal.hits(), 1);
}

#[tokio::test]
async fn a_known_certificate_that_is_over_or_not_yet_valid_is_refused_for_that() {
    let case = Case::new(Duration::from_secs(24 * 3600));
    let der = case.certificate().await;
    let validity = crate::tls::certificate::VALIDITY.as_secs() as i64;
    case.of(&der).await.unwrap();
    case.at(validity - 1);
    case.of(&der).await.unwrap();
    assert_eq!(case.appraisal.hits(), 1);
    case.at(validity);
    assert_eq!(case.of(&der).await, Err("peer-certificate-expired"));
    case.at(-3600);
    assert_eq!(case.of(&der).await, Err("peer-certificate-not-yet-valid"), "a clock that was set back");
    assert_eq!(case.appraisal.hits(), 1);
}

#[tokio::test]
async fn nothing_is_known_without_a_time_to_live() {
    let case = Case::new(Duration::ZERO);
    let der = case.certificate().await;
    for _ in 0..2 {
        case.of(&der).await.unwrap();
    }
    assert_eq!(case.appraisal.hits(), 0);
    assert_eq!(case.of(b"others").await, Err("peer-certificate-malformed"));
}
