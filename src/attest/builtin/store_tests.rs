use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::super::test_pki::{FMSPC, Intel, NOW, Standing, at};
use super::*;
use crate::config::{DEFAULT_INGRESS_MARK, Seen};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Good,
    Down,
    Garbage,
    NoChain,
    Huge,
    Silent,
}

/// A PCCS over a maker of chips: what Intel's own service answers, CRLs in hexadecimal as a PCCS writes them.
struct FakePccs {
    url: url::Url,
    mode: Arc<Mutex<Mode>>,
    requests: Arc<AtomicUsize>,
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    Seen::Bytes(bytes.to_vec()).to_string()
}

fn answer(mode: Mode, path: &str, c: &dcap_qvl::QuoteCollateralV3) -> String {
    let (header, chain, body) = match path {
        p if p == format!("/sgx/certification/v4/pckcrl?ca={}&encoding=der", PckCa::Processor.as_id_str()) => {
            ("SGX-PCK-CRL-Issuer-Chain", &c.pck_crl_issuer_chain, hex(&c.pck_crl))
        }
        p if p == format!("/tdx/certification/v4/tcb?fmspc={FMSPC}") => {
            let body = format!(r#"{{"tcbInfo":{},"signature":"{}"}}"#, c.tcb_info, hex(&c.tcb_info_signature));
            ("TCB-Info-Issuer-Chain", &c.tcb_info_issuer_chain, body)
        }
        "/tdx/certification/v4/qe/identity" => {
            let (identity, signature) = (&c.qe_identity, hex(&c.qe_identity_signature));
            let body = format!(r#"{{"enclaveIdentity":{identity},"signature":"{signature}"}}"#);
            ("SGX-Enclave-Identity-Issuer-Chain", &c.qe_identity_issuer_chain, body)
        }
        "/sgx/certification/v4/rootcacrl" => ("X-None", &c.pck_crl_issuer_chain, hex(&c.root_ca_crl)),
        other => panic!("{other}"),
    };
    let header = if mode == Mode::NoChain { "X-Other" } else { header };
    let body = match mode {
        Mode::Garbage => "<html>".to_owned(),
        Mode::Huge => "x".repeat(2 << 20),
        _ => body,
    };
    let status = if mode == Mode::Down { "503 Service Unavailable" } else { "200 OK" };
    let (chain, length) = (percent(chain), body.len());
    format!("HTTP/1.1 {status}\r\n{header}: {chain}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

impl FakePccs {
    async fn start(collateral: dcap_qvl::QuoteCollateralV3) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let (mode, requests) = (Arc::new(Mutex::new(Mode::Good)), Arc::new(AtomicUsize::new(0)));
        let fake = Self { url, mode: mode.clone(), requests: requests.clone() };
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                requests.fetch_add(1, Ordering::SeqCst);
                let (mode, collateral) = (*mode.lock().unwrap(), collateral.clone());
                tokio::spawn(serve(tcp, mode, collateral));
            }
        });
        fake
    }
    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
    fn store(&self, files: &[PathBuf]) -> Store {
        let fetcher = Fetcher::new(&self.url, "PCCS", DEFAULT_INGRESS_MARK, Duration::from_millis(1500)).unwrap();
        Store::new(files, Some(fetcher)).unwrap()
    }
}

async fn serve(mut tcp: TcpStream, mode: Mode, collateral: dcap_qvl::QuoteCollateralV3) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tcp.read_u8().await.unwrap());
    }
    if mode == Mode::Silent {
        let _ = tcp.read_u8().await;
        return;
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap();
    let _ = tcp.write_all(answer(mode, path, &collateral).as_bytes()).await;
}

fn platform() -> Platform {
    Platform { tee: "tdx", fmspc: FMSPC.to_owned(), ca: PckCa::Processor }
}

async fn slug(store: &Store, now: u64) -> &'static str {
    store.get(&platform(), &at(now)).await.map_or_else(|e| e.reason(), |_| "ok")
}

#[tokio::test]
async fn what_a_pccs_gives_verifies_a_quote() {
    let intel = Intel::new(NOW);
    let pccs = FakePccs::start(intel.collateral("UpToDate", 1, 30)).await;
    let quotes = crate::attest::builtin::quote::Quotes::new(intel.root_der(), pccs.store(&[]), vec!["UpToDate".into()]);
    let evidence = intel.evidence(&Default::default());
    let found = quotes.appraise("tdx", &evidence, &at(NOW)).await.unwrap();
    assert_eq!(found.claims["fmspc"], FMSPC);
    assert_eq!((pccs.requests(), quotes.calls()), (4, 4));
    quotes.appraise("tdx", &evidence, &at(NOW + 60)).await.unwrap();
    assert_eq!(pccs.requests(), 4, "kept");
}

#[tokio::test]
async fn many_peers_cause_one_fetch() {
    let pccs = FakePccs::start(Intel::new(NOW).collateral("UpToDate", 1, 30)).await;
    let store = Arc::new(pccs.store(&[]));
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { slug(&store, NOW).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), "ok");
    }
    assert_eq!(pccs.requests(), 4);
}

#[tokio::test]
async fn each_failing_pccs_has_its_reason_and_the_next_good_answer_heals() {
    let pccs = FakePccs::start(Intel::new(NOW).collateral("UpToDate", 1, 30)).await;
    let store = pccs.store(&[]);
    for mode in [Mode::Down, Mode::Garbage, Mode::NoChain, Mode::Huge, Mode::Silent] {
        pccs.set(mode);
        let expected = "collateral-unreachable";
        assert_eq!(slug(&store, NOW).await, expected, "{mode:?}");
    }
    pccs.set(Mode::Good);
    assert_eq!(slug(&store, NOW).await, "ok");
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gone = format!("http://{closed}/").parse().unwrap();
    let fetcher = Fetcher::new(&gone, "PCCS", DEFAULT_INGRESS_MARK, Duration::from_secs(1)).unwrap();
    assert_eq!(slug(&Store::new(&[], Some(fetcher)).unwrap(), NOW).await, "collateral-unreachable");
}

#[tokio::test]
async fn collateral_is_refreshed_ahead_and_used_until_it_ends() {
    let pccs = FakePccs::start(Intel::new(NOW).collateral("UpToDate", 1, 10)).await;
    let store = pccs.store(&[]);
    assert_eq!(slug(&store, NOW).await, "ok");
    // A day later it is fetched again, and who asks does not wait for it.
    pccs.set(Mode::Silent);
    assert_eq!(slug(&store, NOW + REFRESH_AFTER).await, "ok");
    let until = |n: usize| {
        let requests = pccs.requests.clone();
        async move {
            let end = std::time::Instant::now() + Duration::from_secs(10);
            while requests.load(Ordering::SeqCst) < n {
                assert!(std::time::Instant::now() < end, "no new fetch");
                tokio::task::yield_now().await;
            }
        }
    };
    until(5).await;
    assert_eq!(slug(&store, NOW + REFRESH_AFTER).await, "ok");
    // The background fetch gives up; nothing is asked again at once, and what is kept still serves.
    let _gave_up = store.fetching.lock().await;
    drop(_gave_up);
    assert_eq!(slug(&store, NOW + REFRESH_AFTER + 1).await, "ok");
    assert_eq!(pccs.requests(), 5);
    // When it is over there is nothing but to wait for the service.
    pccs.set(Mode::Good);
    assert_eq!(slug(&store, NOW + 10 * 86_400).await, "collateral-expired");
}

#[tokio::test]
async fn a_file_comes_first_and_a_replaced_one_is_read() {
    let intel = Intel::new(NOW);
    let pccs = FakePccs::start(intel.collateral("UpToDate", 1, 30)).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tdx.json");
    let write = |collateral: &dcap_qvl::QuoteCollateralV3, modified: u64| {
        let new = dir.path().join("new");
        std::fs::write(&new, serde_json::to_vec(collateral).unwrap()).unwrap();
        let handle = std::fs::File::options().write(true).open(&new).unwrap();
        handle.set_modified(clock::from_unix(modified).unwrap()).unwrap();
        std::fs::rename(&new, &file).unwrap();
    };
    write(&intel.collateral("UpToDate", 1, 2), 1000);
    let alone = Store::new(std::slice::from_ref(&file), None).unwrap();
    let both = pccs.store(std::slice::from_ref(&file));
    assert_eq!((slug(&alone, NOW).await, slug(&both, NOW).await), ("ok", "ok"));
    assert_eq!(pccs.requests(), 0);
    // Over: alone it refuses, with a service beside it that is asked.
    let later = NOW + 3 * 86_400;
    assert_eq!((slug(&alone, later).await, slug(&both, later).await), ("collateral-expired", "ok"));
    assert_eq!(pccs.requests(), 4);
    write(&intel.collateral("UpToDate", 1, 20), 2000);
    assert_eq!(slug(&alone, later).await, "ok");
    // Broken by a bad copy: the former content serves on.
    std::fs::write(&file, "{").unwrap();
    assert_eq!(slug(&alone, later).await, "ok");
    let other = Platform { fmspc: "000000000000".into(), ..platform() };
    assert_eq!(alone.get(&other, &at(NOW)).await.unwrap_err().reason(), "collateral-missing");
    assert!(Store::new(&[file], None).is_err(), "a broken file does not start");
}

#[test]
fn the_store_is_bounded() {
    let collateral = Arc::new(Collateral::new(Intel::new(NOW).collateral("UpToDate", 1, 1)).unwrap());
    let kept = Mutex::default();
    for n in 0..MAX_KEPT + 10 {
        let platform = Platform { fmspc: format!("{n}"), ..platform() };
        keep(&kept, &platform, collateral.clone(), clock::unix(Standing(NOW).now()));
    }
    assert_eq!(kept.lock().unwrap().len(), MAX_KEPT);
}
