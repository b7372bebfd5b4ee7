//! The egress of a data plane, with a service behind it.

use std::time::Duration;

use tng::config::Side;
use tng::daemon::DataPlane;
use tokio::io::AsyncReadExt;

use crate::common::{attest_sample, ra};
use crate::plane::{config, ended, eventually, limits, listen, mapping};
use crate::{PATIENT, verify};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verified_egress_records_a_connection_that_brought_nothing() {
    let (service, addr) = listen().await;
    let (mut endpoint, listener) = mapping("model", Side::Egress, addr, limits());
    endpoint.ra = ra(Some(attest_sample()), None);
    endpoint.limits.handshake_timeout = PATIENT;
    let tunnel = listener.local;
    let egress = DataPlane::start(&config(vec![endpoint]), vec![listener]).expect("data plane");
    for (count, protocol) in [(1, "tng/1"), (2, "rats-tls")] {
        let ran = verify(tunnel, &["--allow-sample", "--protocol", protocol]).await;
        assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
        let accepted = tokio::time::timeout(Duration::from_secs(10), service.accept()).await;
        let (mut tcp, _) = accepted.expect("the egress connects").unwrap();
        let mut bytes = Vec::new();
        tcp.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes.is_empty(), "{bytes:?}");
        drop(tcp);
        eventually("a clean end", || ended(&egress, "closed") == count).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_egress_that_is_refused_sees_a_reset_and_no_clean_end() {
    let (service, addr) = listen().await;
    let (mut endpoint, listener) = mapping("model", Side::Egress, addr, limits());
    endpoint.ra = ra(Some(attest_sample()), None);
    endpoint.limits.handshake_timeout = PATIENT;
    let tunnel = listener.local;
    let egress = DataPlane::start(&config(vec![endpoint]), vec![listener]).expect("data plane");
    let ca = crate::fakes::fixture("as-ca.pem").to_string_lossy().into_owned();
    // It shows evidence, and a token is wanted.
    let ran = verify(tunnel, &["--trusted-certs", &ca]).await;
    assert_eq!((ran.code, ran.failed().1.as_str()), (1, "peer-evidence-background-check"));
    eventually("the egress is told", || ended(&egress, "session-refused") == 1).await;
    let nobody = tokio::time::timeout(Duration::from_millis(1), service.accept()).await;
    assert!(nobody.is_err(), "the service was connected to");
}
