//! Open connections when a reload changes what is demanded of their peers: appraised again by the new rules, and kept,
//! or closed after the grace.

mod common;
mod fakes;
#[path = "common/node.rs"]
mod node;
#[path = "common/raw.rs"]
mod raw;

use std::path::Path;
use std::time::{Duration, Instant};

use common::*;
use fakes::as_rest::{FakeAs, Mode as As};
use node::*;
use raw::Keys;
use tng::config::*;
use tokio::net::TcpStream;
use tokio::time::timeout;

const AFFIRMING: As = As::Status("affirming");
const REFUSING: As = As::Status("contraindicated");
const REFUSED: &str = "token-status-contraindicated";

fn key_set(services: &[&FakeAs]) -> String {
    let keys: Vec<_> = services.iter().map(|s| s.jwk()).collect();
    serde_json::json!({ "keys": keys }).to_string()
}

/// Replaces `file` as a careful program does: by renaming a new one into its place.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).expect("file");
    std::fs::rename(new, file).expect("rename");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_rules_close_whom_they_refuse_and_renew_the_verdict_on_whom_they_affirm() {
    for (verifier, speaks) in BOTH.iter().flat_map(|s| [(Side::Ingress, *s), (Side::Egress, *s)]) {
        let row = format!("{verifier} {speaks:?}");
        let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
        let tunnel = Tunnel::new(verifier, demands(&service, "default"), attests(), speaks).await;
        let (mut first, mut second) = (tunnel.open().await, tunnel.open().await);
        let node = tunnel.verifier();
        assert_eq!(service.appraisals(), 1, "{row}");
        node.reload(demands(&service, "stricter"));
        eventually("a verdict under the new policy", || {
            node.plane.endpoint_views()[0].verdicts[0].policy_ids == ["stricter"]
        })
        .await;
        assert_eq!((service.appraisals(), node.event("peer-reappraised")), (2, 1), "{row}: once for both connections");
        assert!(alive(&mut first).await && alive(&mut second).await, "{row}");
        assert_eq!(node.event("peer-failed"), 0, "{row}");

        service.set(REFUSING);
        node.reload(demands(&service, "strictest"));
        expect_reset(&mut first).await;
        expect_reset(&mut second).await;
        eventually("records", || ended(&node.plane, REFUSED) >= 2).await;
        assert_eq!((node.event("peer-failed"), node.event("peer-recovered")), (1, 0), "{row}");
        expect_refusal(tunnel.ingress.at).await;
        node.reload(demands(&service, "default"));
        service.set(AFFIRMING);
        tunnel.open().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_still_trusted_stays_beside_one_who_is_not_by_the_file_as_by_its_contents() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("signers.json");
    let one = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let other = FakeAs::start_with_its_own_key("127.0.0.1:0", AFFIRMING).await;
    let by_file = || demands_token(TrustedSigners { jwks: vec![JwksSource::File(file.clone())], ..Default::default() });
    let pins = |of: &[&FakeAs]| of.iter().map(|s| KeyPin(s.pin())).collect();
    let by_pin = |of: &[&FakeAs]| demands_token(TrustedSigners { keys: pins(of), ..Default::default() });
    for (speaks, contents) in BOTH.iter().flat_map(|s| [(*s, true), (*s, false)]) {
        let row = format!("{speaks:?} {contents}");
        replace(&file, &key_set(&[&one, &other]));
        let rules = if contents { by_file() } else { by_pin(&[&one, &other]) };
        let egress = Node::start(Side::Egress, echo().await, rules, speaks);
        let goes = Node::start(Side::Ingress, egress.at, with_passport(&one), speaks);
        let stays = Node::start(Side::Ingress, egress.at, with_passport(&other), speaks);
        let (mut lost, mut kept) = (open(goes.at).await, open(stays.at).await);
        // Nothing has changed, and nobody is looked at.
        egress.reload(egress.endpoint.ra.clone());
        assert_eq!((egress.event("peer-reappraised"), egress.event("peer-failed")), (0, 0), "{row}");
        assert!(alive(&mut lost).await && alive(&mut kept).await, "{row}");

        replace(&file, &key_set(&[&other]));
        egress.reload(if contents { by_file() } else { by_pin(&[&other]) });
        expect_reset(&mut lost).await;
        eventually("a record", || ended(&egress.plane, "token-untrusted-signer") >= 1).await;
        assert!(alive(&mut kept).await, "{row}");
        expect_refusal(goes.at).await;
        open(stays.at).await;
        eventually("the one who stays was looked at, too", || egress.event("peer-reappraised") == 1).await;
        assert!(alive(&mut kept).await, "{row}");
        assert_eq!(egress.event("peer-failed"), 1, "{row}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_that_is_replaced_on_disk_ends_whom_it_vouched_for() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("as-ca.pem");
    replace(&file, &fakes::text("as-ca.pem"));
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let rest = AsService { trusted: TrustedSigners::certs(vec![file.clone()]), ..service_at(&service) };
    let rules = Ra { verify: Some(verify(VerifyProvider::As(rest), "default")), ..Ra::default() };
    let tunnel = Tunnel::new(Side::Ingress, rules.clone(), attests(), Speaks::Tng1).await;
    let mut stream = tunnel.open().await;
    let stranger = rcgen::generate_simple_self_signed(vec!["other".to_owned()]).expect("certificate");
    replace(&file, &stranger.cert.pem());
    assert!(alive(&mut stream).await, "without a reload nobody reads it");
    tunnel.ingress.reload(rules.clone());
    expect_reset(&mut stream).await;
    eventually("a record", || ended(&tunnel.ingress.plane, "token-untrusted-signer") == 1).await;
    replace(&file, &fakes::text("as-ca.pem"));
    tunnel.ingress.reload(rules);
    tunnel.open().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_or_missing_file_refuses_the_reload_and_changes_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("as-ca.pem");
    replace(&file, &fakes::text("as-ca.pem"));
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let rest = AsService { trusted: TrustedSigners::certs(vec![file.clone()]), ..service_at(&service) };
    let rules = Ra { verify: Some(verify(VerifyProvider::As(rest), "default")), ..Ra::default() };
    let tunnel = Tunnel::new(Side::Ingress, rules.clone(), attests(), Speaks::RatsTls).await;
    let mut stream = tunnel.open().await;
    let broken: [&dyn Fn(); 3] = [
        &|| replace(&file, "no certificate"),
        &|| replace(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        &|| std::fs::remove_file(&file).expect("remove"),
    ];
    for (number, breaks) in broken.iter().enumerate() {
        breaks();
        let error = tunnel.ingress.try_reload(rules.clone()).expect_err("taken over").to_string();
        assert!(error.contains(&file.display().to_string()), "{number}: {error}");
        assert!(alive(&mut stream).await, "{number}");
        tunnel.open().await;
    }
    assert_eq!(service.appraisals(), 1, "the verdicts are those from before");
    // The file that tngctl reads says where.
    let toml = format!(
        "[[ingress]]\nname = \"a\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:2\"\n\
         [ingress.verify]\nas_addr = \"http://127.0.0.1:1/\"\ntrusted_certs = [{file:?}]\n"
    );
    let report = parse(InstanceName::new("a").expect("name"), Path::new("a.toml"), &toml).expect_err("no such file");
    assert!(report.to_string().contains("a.toml:8:18"), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_an_http2_tunnel_are_judged_by_the_new_rules_with_their_carrier() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let egress = Node::start(Side::Egress, echo().await, demands(&service, "default"), Speaks::Tng1);
    let tcp = TcpStream::connect(egress.at).await.expect("connect");
    let tunnel = Keys::new().await.connect(tcp, &["h2"]).await.expect("tls").stream;
    let (send, connection) = h2::client::handshake(tunnel).await.expect("http/2");
    let carrier = tokio::spawn(connection);
    let mut send = send.ready().await.expect("ready");
    let mut streams = Vec::new();
    for _ in 0..2 {
        let request = http::Request::builder().method("CONNECT").uri("tng.internal:443").body(()).expect("request");
        let (response, body) = send.send_request(request, false).expect("request");
        streams.push((response.await.expect("response").into_body(), body));
    }
    egress.reload(demands(&service, "stricter"));
    eventually("appraised again", || egress.event("peer-reappraised") == 1).await;
    assert_eq!(egress.plane.open_connections(), 3, "both streams and their carrier live on");
    service.set(REFUSING);
    egress.reload(demands(&service, "strictest"));
    for (body, _) in &mut streams {
        let end = timeout(Duration::from_secs(20), body.data()).await.expect("still open");
        assert!(end.expect("a clean end").is_err());
    }
    eventually("records", || ended(&egress.plane, REFUSED) == 3).await;
    let _ = timeout(Duration::from_secs(5), carrier).await.expect("the carrier is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_grace_is_shown_refuses_new_connections_and_ends() {
    const GRACE: Duration = Duration::from_secs(5);
    for (verifier, speaks) in [(Side::Ingress, Speaks::Tng1), (Side::Egress, Speaks::RatsTls)] {
        let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
        let tunnel = Tunnel::new(verifier, demands(&service, "default"), attests(), speaks).await;
        let mut stream = tunnel.open().await;
        let node = tunnel.verifier();
        service.set(REFUSING);
        let begun = Instant::now();
        node.reload(Ra { grace: GRACE, ..demands(&service, "stricter") });
        eventually("closing", || node.connections().first().is_some_and(|c| c.closing.is_some())).await;
        let closing = node.connections()[0].closing.clone().expect("closing");
        assert_eq!(closing.reason, REFUSED);
        assert!(closing.in_ms <= GRACE.as_millis() as u64 && closing.detail.contains("contraindicated"), "{closing:?}");
        let shown = node.plane.endpoint_views().remove(0);
        assert!(shown.verdicts[0].closing.is_some(), "{shown:?}");
        assert_eq!(shown.attestation["peers_closing"], 1);
        assert!(alive(&mut stream).await, "an open connection was cut in its grace");
        expect_refusal(tunnel.ingress.at).await;
        expect_reset(&mut stream).await;
        assert!(begun.elapsed() >= GRACE, "{:?}", begun.elapsed());
        eventually("a record", || ended(&node.plane, REFUSED) == 2).await;
        assert_eq!((node.event("peer-failed"), node.event("peer-recovered")), (1, 0));
        assert!(node.plane.metrics_text().expect("metrics").contains("tng_peers_closing{"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_affirmed_again_in_the_grace_lives_on() {
    let long = Duration::from_secs(3600);
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let with = |policy| Ra { grace: long, ..demands(&service, policy) };
    let tunnel = Tunnel::new(Side::Ingress, with("default"), attests(), Speaks::Tng1).await;
    let mut stream = tunnel.open().await;
    let node = tunnel.verifier();
    let is_closing = || node.connections().iter().any(|c| c.closing.is_some());

    // The reload is undone.
    service.set(As::WrongPolicy);
    node.reload(with("stricter"));
    eventually("closing", is_closing).await;
    service.set(AFFIRMING);
    node.reload(with("default"));
    eventually("not closing", || !is_closing()).await;
    assert!(alive(&mut stream).await);

    // The service changes its mind, and is asked again without anybody's doing.
    service.set(REFUSING);
    node.reload(Ra { grace: Duration::from_secs(16), ..demands(&service, "stricter") });
    eventually("closing", is_closing).await;
    service.set(AFFIRMING);
    eventually("not closing", || !is_closing()).await;
    assert!(alive(&mut stream).await);
    assert_eq!((node.event("peer-failed"), node.event("peer-recovered")), (2, 2));
    assert_eq!(node.plane.endpoint_views()[0].attestation["peers_closing"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_silent_after_the_reload_does_not_prolong_the_old_verdict() {
    let brief = Duration::from_secs(5);
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let silent = FakeAs::start("127.0.0.1:0", As::Silent).await;
    let by = |service| {
        let mut ra = demands(service, "default");
        ra.verify.as_mut().expect("verify").verdict_ttl = brief;
        ra
    };
    let tunnel = Tunnel::new(Side::Ingress, by(&service), attests(), Speaks::RatsTls).await;
    let begun = Instant::now();
    let mut stream = tunnel.open().await;
    // The one that was asked before would affirm for ever.
    tunnel.ingress.reload(by(&silent));
    assert!(alive(&mut stream).await, "nobody has said anything against it");
    expect_reset(&mut stream).await;
    assert!(begun.elapsed() >= brief - Duration::from_millis(500), "{:?}", begun.elapsed());
    eventually("a record", || ended(&tunnel.ingress.plane, "verdict-expired") == 1).await;
    assert_eq!(service.appraisals(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verification_that_a_reload_brings_ends_whom_nobody_verified_and_one_that_goes_lets_them_stay() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for speaks in BOTH {
        let mutual = |verify: &Ra| Ra { attest: Some(attest()), ..verify.clone() };
        let tunnel = Tunnel::new(Side::Egress, mutual(&Ra::default()), mutual(&Ra::default()), speaks).await;
        let mut unknown = tunnel.open().await;
        let egress = &tunnel.egress;
        assert_eq!((egress.connections()[0].tee.as_str(), egress.connections()[0].verdict_expires), ("", None));
        let rules = mutual(&demands(&service, "default"));
        egress.reload(rules.clone());
        expect_reset(&mut unknown).await;
        eventually("a record", || ended(&egress.plane, "peer-not-appraised") == 1).await;

        let mut known = tunnel.open().await;
        assert!(egress.connections()[0].verdict_expires.is_some());
        service.set(REFUSING);
        egress.reload(mutual(&Ra::default()));
        eventually("no verdict is asked for", || egress.connections()[0].verdict_expires.is_none()).await;
        assert!(alive(&mut known).await);
        // And asked for again.
        egress.reload(rules);
        expect_reset(&mut known).await;
        eventually("a record", || ended(&egress.plane, REFUSED) == 1).await;
        service.set(AFFIRMING);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_binding_that_a_reload_demands_ends_those_without_it() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let rules = demands(&service, "default");
    let egress = Node::start(Side::Egress, echo().await, rules.clone(), Speaks::Tng1);
    let old = Node::start(Side::Ingress, egress.at, attests(), Speaks::RatsTls);
    let new = Node::start(Side::Ingress, egress.at, attests(), Speaks::Tng1);
    let (mut by_key, mut by_session) = (open(old.at).await, open(new.at).await);
    egress.reload(Ra { require_session_binding: true, ..rules });
    expect_reset(&mut by_key).await;
    eventually("a record", || ended(&egress.plane, "session-binding-required") == 1).await;
    assert!(alive(&mut by_session).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_endpoint_keeps_its_rules_until_it_comes_back_with_others() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let tunnel = Tunnel::new(Side::Ingress, demands(&service, "default"), attests(), Speaks::Tng1).await;
    let mut stream = tunnel.open().await;
    let plane = &tunnel.ingress.plane;
    // Something else in its place, elsewhere.
    let (beside, listener) = mapping("beside", Side::Ingress, tunnel.egress.at, limits());
    let beside = Endpoint { ra: demands(&service, "default"), ..beside };
    plane.reload(&config(vec![beside]), vec![listener]).expect("reload");
    assert!(alive(&mut stream).await);
    assert_eq!(service.appraisals(), 1, "nobody looked at it");

    service.set(REFUSING);
    let (mut back, listener) = mapping("in", Side::Ingress, tunnel.egress.at, limits());
    back.ra = demands(&service, "stricter");
    plane.reload(&config(vec![back]), vec![listener]).expect("reload");
    expect_reset(&mut stream).await;
    eventually("a record", || ended(plane, REFUSED) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_endpoint_judges_the_connections_of_its_former_name() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let tunnel = Tunnel::new(Side::Egress, demands(&service, "default"), attests(), Speaks::RatsTls).await;
    let mut stream = tunnel.open().await;
    service.set(REFUSING);
    let name = EndpointName::new("renamed").expect("name");
    let renamed = Endpoint { name: name.clone(), ra: demands(&service, "stricter"), ..tunnel.egress.endpoint.clone() };
    let mut listeners = tunnel.egress.listeners();
    listeners.iter_mut().for_each(|l| l.endpoint = name.clone());
    tunnel.egress.plane.reload(&config(vec![renamed]), listeners).expect("reload");
    expect_reset(&mut stream).await;
    eventually("a record", || ended(&tunnel.egress.plane, REFUSED) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_does_not_wait_for_a_grace() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let tunnel = Tunnel::new(Side::Ingress, demands(&service, "default"), attests(), Speaks::Tng1).await;
    let mut stream = tunnel.open().await;
    service.set(REFUSING);
    let node = tunnel.verifier();
    node.reload(Ra { grace: Duration::from_secs(3600), ..demands(&service, "stricter") });
    eventually("closing", || node.connections()[0].closing.is_some()).await;
    node.plane.drain(Duration::from_millis(10)).await;
    expect_reset(&mut stream).await;
    eventually("a record", || ended(&node.plane, "drained") == 1).await;
}
