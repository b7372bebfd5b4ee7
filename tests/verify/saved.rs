//! `--save`.

use std::os::unix::fs::PermissionsExt;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tng::attest::Credential;

use crate::common::{attest_sample, ra};
use crate::fakes::as_rest::{FakeAs, Mode as As};
use crate::{endpoint, fakes, serves, tngctl, verify};

#[tokio::test]
async fn everything_that_was_seen_is_in_files_of_the_callers_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("seen");
    let dir_text = dir.to_string_lossy().into_owned();
    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let (url, ca) = (service.url().to_string(), fakes::fixture("as-ca.pem").to_string_lossy().into_owned());
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let args = ["--as-addr", &url, "--trusted-certs", &ca, "--allow-sample", "--save", &dir_text];
    let ran = verify(addr, &args).await;
    assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
    let names = ["certificate.pem", "evidence.cbor", "evidence.json", "runtime-data.json", "token.jwt", "report.json"];
    let saved: Vec<_> =
        ran.json()["saved"].as_array().unwrap().iter().map(|p| p.as_str().unwrap().to_owned()).collect();
    assert_eq!(saved, names.map(|n| dir.join(n).to_string_lossy().into_owned()));
    for path in &saved {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o600, "{path}");
    }
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let der = CertificateDer::from_pem_slice(&read("certificate.pem")).unwrap();
    let digest = ran.json()["certificate"]["sha256"].as_str().unwrap().to_owned();
    let found: String = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &der)
        .as_ref()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(found, digest);
    let Ok(Credential::Evidence(evidence)) = Credential::from_extension(&read("evidence.cbor")) else { panic!() };
    assert_eq!(
        (evidence.runtime_data.into_bytes(), evidence.evidence),
        (read("runtime-data.json"), read("evidence.json"))
    );
    assert!(read("token.jwt").starts_with(b"eyJ"));
    let report: serde_json::Value = serde_json::from_slice(&read("report.json")).unwrap();
    assert_eq!(report["verdict"]["outcome"], "verified");

    // Not again unasked; and what is there stays as it was.
    let before = read("evidence.cbor");
    let ran = verify(addr, &args).await;
    assert!(ran.code == 73 && ran.err.contains("--force"), "{} {}", ran.code, ran.err);
    assert_eq!(ran.json()["verdict"]["outcome"], "verified", "what was found is said all the same");
    assert_eq!(read("evidence.cbor"), before);
    let ran = verify(addr, &[&args[..], &["--force"]].concat()).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_ne!(read("evidence.cbor"), before, "evidence about a new nonce");
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_an_error_of_its_own() {
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let ran = tngctl(&["verify", &addr.to_string(), "--save", "/proc/no/such"]).await;
    assert!(ran.code == 73 && ran.err.contains("--save: /proc/no/such"), "{} {}", ran.code, ran.err);
    assert!(ran.out.contains("NOT APPRAISED"), "{}", ran.out);
}
