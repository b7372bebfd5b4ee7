use super::super::test_pki::{Amd, Guest, NOW, Standing};
use super::*;

fn snp(amd: &Amd, files: &[PathBuf]) -> Snp {
    Snp::new(vec![amd.root()], files, None).unwrap()
}

async fn slug(snp: &Snp, evidence: &[u8]) -> &'static str {
    snp.appraise(evidence, &Standing(NOW)).await.map_or_else(|e| e.reason(), |_| "ok")
}

#[tokio::test]
async fn the_certificate_comes_from_the_evidence_or_from_a_file() {
    let (amd, other) = (Amd::new(), Amd::new());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vcek.pem");
    std::fs::write(&file, format!("{}{}", other.vcek_pem(), amd.vcek_pem())).unwrap();
    let bare = amd.evidence(&Guest::default(), false);
    assert_eq!(slug(&snp(&amd, &[]), &amd.evidence(&Guest::default(), true)).await, "ok");
    assert_eq!(slug(&snp(&amd, &[]), &bare).await, "snp-endorsement-missing");
    assert_eq!(slug(&snp(&amd, &[file]), &bare).await, "ok");
    // Another's certificate beside the report, and another's report beside the certificate.
    assert_eq!(slug(&snp(&other, &[]), &amd.evidence(&Guest::default(), true)).await, "snp-chain");
}

#[tokio::test]
async fn each_change_of_a_report_has_its_reason() {
    let amd = Amd::new();
    let verifier = snp(&amd, &[]);
    let changed = |at: usize, value: u8| {
        let mut report = amd.report(&Guest::default());
        report[at] = value;
        let chain = serde_json::json!([{ "cert_type": "VCEK", "data": amd.vcek_der() }]);
        let report = BASE64_STANDARD.encode(report);
        serde_json::json!({ "attestation_report": report, "cert_chain": chain }).to_string().into_bytes()
    };
    for (what, at, value, expected) in [
        ("nothing", 0x0, 3, "ok"),
        ("version", 0x0, 9, "snp-report-malformed"),
        ("algorithm", 0x34, 2, "snp-report-malformed"),
        ("signed by a VLEK", 0x48, 4, "snp-endorsement-mismatch"),
        ("signed by nothing", 0x48, 7 << 2, "snp-chain"),
        ("debug, not signed", 0x0a, 0x0b, "snp-report-signature"),
        ("measurement", 0x90, 0, "snp-report-signature"),
        ("report data", 0x50, 1, "snp-report-signature"),
        ("reserved", 0x29f, 1, "snp-report-signature"),
        ("firmware", 0x186, 21, "snp-endorsement-mismatch"),
        ("chip", 0x1a0, 0, "snp-endorsement-mismatch"),
        ("signature", 0x2a0 + 60, 1, "snp-report-signature"),
    ] {
        assert_eq!(slug(&verifier, &changed(at, value)).await, expected, "{what}");
    }
}

#[tokio::test]
async fn a_report_may_be_signed_by_a_key_of_the_provider() {
    let (amd, other) = (Amd::new(), Amd::new());
    let whole = amd.provided(&Guest::default(), &amd.vlek_chain());
    let found = snp(&amd, &[]).appraise(&whole, &Standing(NOW)).await.unwrap();
    assert_eq!(found.claims["provider"], "CN=cc.provider.example");
    assert_eq!(slug(&snp(&other, &[]), &whole).await, "snp-chain");
    // Hosts give the provider's certificate alone; its issuer is then in a file.
    let alone = amd.provided(&Guest::default(), &amd.vlek_chain()[..1]);
    assert_eq!(slug(&snp(&amd, &[]), &alone).await, "snp-chain");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("asvk.pem");
    std::fs::write(&file, amd.asvk_pem()).unwrap();
    assert_eq!(slug(&snp(&amd, std::slice::from_ref(&file)), &alone).await, "ok");
    // A report of the chip with a file of the provider's issuer beside it.
    assert_eq!(slug(&snp(&amd, &[file]), &amd.evidence(&Guest::default(), true)).await, "ok");
    // Neither kind of certificate serves for the other kind of report.
    let chips = amd.provided(&Guest::default(), &[amd.vcek_der()]);
    assert_eq!(slug(&snp(&amd, &[]), &chips).await, "snp-endorsement-mismatch");
    assert_eq!(slug(&snp(&amd, &[]), &amd.provided(&Guest::default(), &[])).await, "snp-endorsement-missing");
    let mut report = amd.report(&Guest::default());
    let shown = |report: &[u8]| {
        let chain: Vec<_> =
            amd.vlek_chain().iter().map(|der| serde_json::json!({"cert_type": "VLEK", "data": der})).collect();
        let report = BASE64_STANDARD.encode(report);
        serde_json::json!({ "attestation_report": report, "cert_chain": chain }).to_string().into_bytes()
    };
    assert_eq!(slug(&snp(&amd, &[]), &shown(&report)).await, "snp-endorsement-mismatch");
    report[0x48] = 4;
    assert_eq!(slug(&snp(&amd, &[]), &shown(&report)).await, "snp-report-signature");
}

#[tokio::test]
async fn amds_service_gives_the_issuer_of_a_providers_key_once() {
    let amd = Amd::new();
    let body = [amd.asvk_pem(), amd.ark_pem()].concat().into_bytes();
    let (url, count) = answering("GET /vlek/v1/Milan/cert_chain HTTP/1.1".into(), body).await;
    let second = std::time::Duration::from_secs(1);
    let fetcher = Fetcher::new(&url, "KDS", crate::config::DEFAULT_INGRESS_MARK, second).unwrap();
    let verifier = Snp::new(vec![amd.root()], &[], Some(fetcher)).unwrap();
    let alone = amd.provided(&Guest::default(), &amd.vlek_chain()[..1]);
    for _ in 0..3 {
        assert_eq!(slug(&verifier, &alone).await, "ok");
    }
    assert_eq!(count.load(std::sync::atomic::Ordering::SeqCst), 1);
    let other = Amd::new();
    assert_eq!(slug(&verifier, &other.provided(&Guest::default(), &other.vlek_chain()[..1])).await, "snp-chain");
}

#[tokio::test]
async fn a_chain_is_refused_before_and_after_its_time() {
    let amd = Amd::new();
    let evidence = amd.evidence(&Guest::default(), true);
    let decades = 365 * 20 * 86_400;
    for (now, expected) in
        [(NOW, "ok"), (NOW + decades, "snp-chain-expired"), (NOW - decades, "snp-chain-not-yet-valid")]
    {
        let clock = Standing(now);
        let outcome = snp(&amd, &[]).appraise(&evidence, &clock).await;
        assert_eq!(outcome.map_or_else(|e| e.reason(), |_| "ok"), expected);
    }
}

#[test]
fn evidence_of_a_real_agent_is_read() {
    let recorded = include_bytes!("../../../tests/fixtures/quotes/snp_milan_evidence.json");
    let shown = shown(recorded).unwrap();
    assert_eq!(shown.certificates.len(), 1);
    let now = crate::os::clock::from_unix(NOW).unwrap();
    let endorsed = amd::endorse(&shown.report, &shown.certificates, &amd::pinned(), now).unwrap();
    assert_eq!(endorsed.product, "Milan");
    let found = finding(&shown.report, &endorsed);
    assert!(!found.debug);
    assert_eq!(found.seen["policy"].to_string(), "0000000000030000");
    assert_eq!(found.seen["tcb_microcode"], Seen::Number(115));
}

#[test]
fn evidence_of_no_known_form_is_refused() {
    let report = BASE64_STANDARD.encode(Amd::new().report(&Guest::default()));
    let with = |rest: &str| shown(format!(r#"{{"attestation_report":"{report}"{rest}}}"#).as_bytes());
    assert!(with("").is_ok() && with(r#","cert_chain":null"#).is_ok() && with(r#","auxblob":"""#).is_ok());
    for bad in [
        r#","cert_chain":1"#,
        r#","cert_chain":[],"auxblob":"""#,
        r#","auxblob":"!""#,
        r#","cert_chain":[{"cert_type":"VCEK","data":[256]}]"#,
        r#","cert_chain":[{"cert_type":"VCEK"}]"#,
        r#","cert_chain":[1,1,1,1,1,1,1,1,1]"#,
    ] {
        assert!(with(bad).is_err(), "{bad}");
    }
    for bad in ["", "[]", "{}", r#"{"attestation_report":{}}"#, r#"{"attestation_report":"AAAA"}"#] {
        assert!(shown(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn amds_service_is_asked_for_the_chip_and_its_firmware() {
    let report = Report::from_bytes(&Amd::new().report(&Guest::default())).unwrap();
    assert_eq!(products(&report), ["Milan"]);
    let expected = format!("vcek/v1/Milan/{}?blSPL=04&teeSPL=01&snpSPL=20&ucodeSPL=72", "5a".repeat(64));
    assert_eq!(kds_path(&report, "Milan"), expected);
    let turin = kds_path(&report, "Turin");
    assert!(turin.starts_with(&format!("vcek/v1/Turin/{}?fmcSPL=04&blSPL=01&", "5a".repeat(8))), "{turin}");
}

/// AMD's service, which knows one chip.
async fn fake_kds(amd: &Amd) -> (url::Url, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
    let report = Report::from_bytes(&amd.report(&Guest::default())).unwrap();
    answering(format!("GET /{} HTTP/1.1", kds_path(&report, "Milan")), amd.vcek_der()).await
}

/// The same with `answer` to the request that begins with `known`.
async fn answering(known: String, answer: Vec<u8>) -> (url::Url, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let requests = count.clone();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            requests.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(tcp.read_u8().await.unwrap());
            }
            let found = String::from_utf8(head).unwrap().starts_with(&known);
            let (status, body) = if found { ("200 OK", answer.as_slice()) } else { ("404 Not Found", &[][..]) };
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            let _ = tcp.write_all(&[head.as_bytes(), body].concat()).await;
        }
    });
    (url, count)
}

#[tokio::test]
async fn amds_service_gives_what_the_evidence_lacks_once() {
    let (amd, other) = (Amd::new(), Amd::new());
    let (url, count) = fake_kds(&amd).await;
    let fetcher = |url| {
        let second = std::time::Duration::from_secs(1);
        Some(Fetcher::new(url, "KDS", crate::config::DEFAULT_INGRESS_MARK, second).unwrap())
    };
    let verifier = Snp::new(vec![amd.root()], &[], fetcher(&url)).unwrap();
    for _ in 0..3 {
        assert_eq!(slug(&verifier, &amd.evidence(&Guest::default(), false)).await, "ok");
    }
    assert_eq!((count.load(std::sync::atomic::Ordering::SeqCst), verifier.calls()), (1, 1));
    // The same chip by name, another key by signature.
    assert_eq!(slug(&verifier, &other.evidence(&Guest::default(), false)).await, "snp-report-signature");
    // A chip that the service does not know, one whose host hides it, and a service that is gone.
    let mut report = amd.report(&Guest::default());
    let bare = |report: &[u8]| format!(r#"{{"attestation_report":"{}"}}"#, BASE64_STANDARD.encode(report)).into_bytes();
    report[0x1a0] ^= 1;
    assert_eq!(slug(&verifier, &bare(&report)).await, "collateral-unreachable");
    report[0x1a0..0x1e0].fill(0);
    assert_eq!(slug(&verifier, &bare(&report)).await, "snp-endorsement-missing");
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gone = Snp::new(vec![amd.root()], &[], fetcher(&format!("http://{closed}/").parse().unwrap())).unwrap();
    let evidence = amd.evidence(&Guest::default(), false);
    assert_eq!(slug(&gone, &evidence).await, "collateral-unreachable");
}

mod properties {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn no_changed_evidence_panics(at in 0usize..1_000_000, value in any::<u8>(), cut in any::<bool>()) {
            let mut text = include_bytes!("../../../tests/fixtures/quotes/snp_milan_evidence.json").to_vec();
            let at = at % text.len();
            text[at] = value;
            if cut { text.truncate(at); }
            let _ = super::shown(&text);
        }
    }
}
