//! `--reference`: from a look at a real TPM to a configuration that accepts it and nothing else.

use std::time::Duration;

use tng::attest::host::HostSource;
use tng::attest::tpm::commands::Hierarchy;
use tng::attest::tpm::quote::AttestationKey;
use tng::attest::tpm::structures::KeyAlgorithm;
use tng::config::{Attest, AttestProvider};

use crate::common::{attest, attest_sample, ra};
use crate::swtpm::Swtpm;
use crate::{endpoint, instance, serves, tngctl, verify};

const ECC: AttestationKey = AttestationKey::Primary(Hierarchy::Endorsement, KeyAlgorithm::EccP256);

async fn on(tpm: &Swtpm) -> std::net::SocketAddr {
    let source = HostSource::Tpm(tpm.settings(ECC));
    // New evidence for each connection: a certificate made before the PCR was extended would still hold.
    let attest = Attest { provider: AttestProvider::Direct(source), ..attest(Duration::ZERO) };
    serves(endpoint(ra(Some(attest), None))).await
}

#[tokio::test]
async fn the_block_accepts_the_peer_it_was_made_from_and_refuses_another() {
    let dir = tempfile::tempdir().unwrap();
    let (tpm, other) = (Swtpm::start(), Swtpm::start());
    let (addr, stranger) = (on(&tpm).await, on(&other).await);
    let ran = tngctl(&["verify", &addr.to_string(), "--reference"]).await;
    assert_eq!(ran.code, 5, "{} {}", ran.out, ran.err);
    assert!(ran.out.starts_with("# What ") && ran.out.contains("# WARNING: nobody vouches"), "{}", ran.out);
    assert!(ran.err.contains("trust on first use"), "{}", ran.err);
    assert!(ran.out.contains("\nak = \"sha256:") && ran.out.contains("\npcr7 = ") && ran.out.contains("\n# pcr16 = "));

    let file = dir.path().join("reference.toml");
    std::fs::write(&file, &ran.out).unwrap();
    let config = instance(dir.path(), "builtin", &format!("[ingress.verify]\nprovider = \"builtin\"\n{}", ran.out));
    let file = file.to_string_lossy().into_owned();
    for args in [&["--config", &config][..], &["--builtin", "--reference-file", &file]] {
        let ran = verify(addr, args).await;
        assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
        assert_eq!(ran.json()["verdict"]["appraisal"]["tee"], "tpm");
        assert_eq!((ran.check("quote-signature").0, ran.check("reference").0), ("passed".into(), "passed".into()));
        let ran = verify(stranger, args).await;
        assert_eq!((ran.code, ran.failed()), (1, ("attestation-key".into(), "tpm-ak-untrusted".into())));
    }
    let accepted = tngctl(&["verify", &addr.to_string(), "--config", &config, "--reference"]).await;
    assert!(accepted.code == 0 && accepted.out.contains("was appraised and accepted"), "{}", accepted.out);
    assert!(!accepted.err.contains("trust on first use"), "{}", accepted.err);

    // Another boot loader.
    tpm.extend(4, [9; 32]);
    let ran = verify(addr, &["--config", &config]).await;
    assert_eq!((ran.code, ran.failed()), (1, ("reference".into(), "tpm-pcr-value".into())), "{}", ran.out);
    assert_eq!(ran.check("quote-signature").0, "passed");
    let shown = tngctl(&["verify", &addr.to_string(), "--config", &config]).await;
    assert!(
        shown.code == 1 && shown.out.contains("FAILED    PCRs are those of the reference value: PCR 4"),
        "{}",
        shown.out
    );
}

#[tokio::test]
async fn a_tee_without_reference_values_has_no_block() {
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let ran = tngctl(&["verify", &addr.to_string(), "--reference", "--allow-sample"]).await;
    assert!(
        ran.code == 4 && ran.out.is_empty() && ran.err.contains("tdx, sgx, snp or tpm"),
        "{} {}",
        ran.code,
        ran.err
    );
}
