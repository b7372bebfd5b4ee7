//! Tokens that must not be taken, each with its reason, beside the one that must.

use fakes::appraiser::Forgery;
use std::time::SystemTime;

use super::*;

#[tokio::test]
async fn every_forgery_has_its_reason() {
    for serves in [Serves::Rest, Serves::GrpcAlone] {
        let service = start(AFFIRMING, serves).await;
        for (forgery, expected) in [
            (Forgery::AlgNone, "token-alg-none"),
            (Forgery::Hs256, "token-alg-mac"),
            (Forgery::Rs256, "token-alg"),
            (Forgery::Critical, "token-critical"),
            (Forgery::KidOfAnother, "token-untrusted-signer"),
            (Forgery::JwkOfStranger, "token-untrusted-signer"),
            (Forgery::SignedByStranger, "token-signature"),
            (Forgery::KidAlone, "token-untrusted-signer"),
            (Forgery::NotBefore, "token-not-yet-valid"),
            (Forgery::TwoPolicies, "token-policy-mixed"),
        ] {
            service.set(Mode::Forged(forgery));
            assert_eq!(reason(&at(&[&service])).await, expected, "{serves:?} {forgery:?}");
        }
        service.set(AFFIRMING);
        assert_eq!(reason(&at(&[&service])).await, "ok");
    }
}

#[tokio::test]
async fn the_sample_tee_is_refused_before_anybody_is_asked() {
    for serves in [Serves::Rest, Serves::GrpcAlone] {
        let service = start(AFFIRMING, serves).await;
        let of = |allow_sample| {
            let asked = at(&[&service]);
            let provider = VerifyProvider::As(asked.clone());
            let verify = Verify { provider, allow_sample, ..common::verify_sample(true) };
            AsVerifier::new(&verify, &asked, DEFAULT_INGRESS_MARK, Arc::new(SystemClock)).unwrap()
        };
        assert_eq!(ask(&of(false)).await.unwrap_err().reason(), "sample-tee-refused");
        // Beside a TEE that is none, too.
        let bound = RuntimeData::for_key(b"a key");
        let device = br#"{"sampledevice":{"svn":"2"}}"#.to_vec();
        let evidence = SampleAttester.evidence(&bound.with_devices(&device)).await.unwrap();
        let evidence = Evidence { tee: "tdx".into(), additional: Some(device), ..evidence };
        assert_eq!(of(false).appraise(&evidence, &bound).await.unwrap_err().reason(), "sample-tee-refused");
        assert_eq!(service.requests(), 0, "{serves:?}");
        ask(&of(true)).await.unwrap();
        assert_eq!(service.appraisals(), 1, "{serves:?}");
    }
}

/// As recorded: a service that is given two policies appraises under the first.
#[tokio::test]
async fn two_policies_that_were_not_both_used_are_refused() {
    for serves in [Serves::Rest, Serves::GrpcAlone] {
        let running = start(AFFIRMING, serves).await;
        let service = at(&[&running]);
        let verify = Verify {
            provider: VerifyProvider::As(service.clone()),
            policy_ids: vec!["default".into(), "strict".into()],
            ..common::verify_sample(true)
        };
        let verifier = AsVerifier::new(&verify, &service, DEFAULT_INGRESS_MARK, Arc::new(SystemClock)).unwrap();
        assert_eq!(ask(&verifier).await.unwrap_err().reason(), "token-policy", "{serves:?}");
    }
}

#[tokio::test]
async fn a_key_that_is_named_is_the_one_of_the_set() {
    let service = start(AFFIRMING, Serves::Rest).await;
    let set = JwksSource::Url(service.url().join("named.json").unwrap());
    let named =
        AsService { trusted: TrustedSigners { jwks: vec![set], ..TrustedSigners::default() }, ..at(&[&service]) };
    for (mode, expected) in [
        (AFFIRMING, "ok"),
        (Mode::Forged(Forgery::KidAlone), "ok"),
        (Mode::Forged(Forgery::KidOfAnother), "token-key-confusion"),
        (Mode::Forged(Forgery::JwkOfStranger), "token-untrusted-signer"),
        (Mode::Stranger, "token-untrusted-signer"),
    ] {
        service.set(mode);
        assert_eq!(reason(&named).await, expected, "{mode:?}");
    }
}

struct Shifted(i64);

impl Clock for Shifted {
    fn now(&self) -> SystemTime {
        let by = Duration::from_secs(self.0.unsigned_abs());
        if self.0 < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
    }
}

#[tokio::test]
async fn clocks_that_differ_are_named_as_the_cause() {
    for serves in [Serves::Rest, Serves::Grpc] {
        for (theirs, ours, word) in
            [(3600, 0, "ahead of"), (-3600, 0, "behind"), (0, 3600, "behind"), (0, -3600, "ahead of")]
        {
            let service = start(Mode::Clock(theirs), serves).await;
            let verifier = verifier_with(&at(&[&service]), Arc::new(Shifted(ours)));
            let error = ask(&verifier).await.unwrap_err();
            assert_eq!(error.reason(), "as-clock", "{serves:?} {theirs} {ours}: {error}");
            let text = error.to_string();
            assert!(text.contains("s ") && text.contains(word), "{text}");
        }
        // Within the allowance nobody is blamed.
        let service = start(Mode::Clock(30), serves).await;
        assert_eq!(reason(&at(&[&service])).await, "ok");
    }
}
