//! From an attestation agent's evidence through TLS to the verdict, over machines of the tests' own making.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::test_pki::{Amd, Guest, Intel, NOW, Td, at};
use super::*;
use crate::config::{
    Attest, AttestProvider, DEFAULT_INGRESS_MARK, Endpoint, EndpointName, Limits, Mapping, Mode, Model, PortRange, Ra,
    RegoFile, Side, TargetHost, Verify, VerifyProvider, Wanted,
};
use crate::ctl::verify::{Outcome, reference_block, reference_trust};
use crate::tls::probe::{Observation, Prober};
use crate::tls::{Channel, ChannelError, EndpointTls, Peer};

thread_local! {
    /// What the next verifier made on this thread trusts instead of the makers.
    pub static INJECTED: Cell<Option<Roots>> = const { Cell::new(None) };
}

#[derive(Clone, PartialEq, Message)]
struct Call {
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

/// The first field of a message; in an answer to a call, the second.
#[derive(Clone, PartialEq, Message)]
struct Fields {
    #[prost(bytes = "vec", tag = "1")]
    first: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    second: Vec<u8>,
}

type Machine = Arc<dyn Fn([u8; 64]) -> Vec<u8> + Send + Sync>;

/// An agent on a machine with this TEE.
fn agent(socket: &Path, tee: &'static str, machine: Machine) {
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, tee, machine.clone()));
        }
    });
}

async fn serve(mut stream: UnixStream, tee: &'static str, machine: Machine) {
    let mut header = [0; 10];
    while stream.read_exact(&mut header).await.is_ok() {
        let mut body = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
        stream.read_exact(&mut body).await.unwrap();
        let call = Call::decode(&body[..]).unwrap();
        let value = if call.method == "GetTeeType" {
            tee.as_bytes().to_vec()
        } else {
            let mut report_data = [0; 64];
            let asked = Fields::decode(&call.payload[..]).unwrap().first;
            report_data[..asked.len()].copy_from_slice(&asked);
            machine(report_data)
        };
        let payload = Fields { first: value, second: vec![] }.encode_to_vec();
        let answer = Fields { first: vec![], second: payload }.encode_to_vec();
        let mut frame = u32::try_from(answer.len()).unwrap().to_be_bytes().to_vec();
        frame.extend_from_slice(&header[4..8]);
        frame.extend([2, 0]);
        frame.extend(answer);
        stream.write_all(&frame).await.unwrap();
    }
}

fn endpoint(ra: Ra) -> Arc<EndpointTls> {
    let any = "127.0.0.1".parse().unwrap();
    let mapping = Mapping {
        listen_addr: any,
        listen_ports: PortRange::single(1),
        target_host: TargetHost::Addr(any),
        target_ports: PortRange::single(1),
        so_mark: DEFAULT_INGRESS_MARK,
    };
    let endpoint = Endpoint {
        name: EndpointName::new("test").unwrap(),
        side: Side::Ingress,
        mode: Mode::Mapping(mapping),
        ra,
        limits: Limits { handshake_timeout: Duration::from_secs(5), ..Limits::default() },
    };
    EndpointTls::with_clock(&endpoint, at(NOW)).unwrap()
}

/// What a client that verifies makes of a server on `machine`.
async fn met(roots: Roots, config: Builtin, tee: &'static str, machine: Machine) -> Result<Channel, ChannelError> {
    asked(roots, config, None, tee, machine).await
}

/// The same, with a policy.
async fn asked(
    roots: Roots,
    config: Builtin,
    rego: Option<RegoFile>,
    tee: &'static str,
    machine: Machine,
) -> Result<Channel, ChannelError> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("aa.sock");
    agent(&socket, tee, machine);
    INJECTED.set(Some(roots));
    let verify = Verify {
        provider: VerifyProvider::Builtin(config),
        policy_ids: rego.iter().map(RegoFile::id).collect(),
        allow_sample: false,
        verdict_ttl: Duration::from_secs(300),
        model: Model::BackgroundCheck,
        rego,
    };
    let client = endpoint(Ra { verify: Some(verify), ..Ra::default() });
    let attest = Attest {
        provider: AttestProvider::Aa { socket },
        refresh_interval: Duration::from_secs(600),
        additional_evidence: false,
        passport: None,
    };
    let server = endpoint(Ra { attest: Some(attest), ..Ra::default() });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (c, s) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (channel, _) = tokio::join!(client.connect(c.unwrap(), None), server.accept(s.unwrap().0));
    channel
}

fn config(reference: (&'static str, &'static str, u8), collateral: Vec<std::path::PathBuf>) -> Builtin {
    let (tee, field, byte) = reference;
    let wanted = Wanted::Bytes { value: vec![byte; 48], mask: vec![0xff; 48] };
    Builtin {
        references: vec![Reference { tee, values: BTreeMap::from([(field, vec![wanted])]) }],
        collateral,
        pccs_addr: None,
        minimum_tcb: vec!["UpToDate".into()],
        amd_certs: vec![],
        kds_addr: None,
        allow_debug: false,
        timeout: Duration::from_secs(5),
    }
}

fn reason_or_tee(outcome: Result<Channel, ChannelError>) -> String {
    match outcome.map(|c| c.peer) {
        Ok(Peer::Verified(verdict)) => format!("{} by {}", verdict.tee, verdict.verifier),
        Ok(Peer::Unverified) => panic!("not verified"),
        Err(e) => e.reason().to_owned(),
    }
}

#[tokio::test]
async fn a_peer_on_tdx_is_let_in_for_its_measurement_and_its_own_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("collateral.json");
    let intel = Arc::new(Intel::new(NOW));
    std::fs::write(&file, serde_json::to_vec(&intel.collateral("UpToDate", 1, 1)).unwrap()).unwrap();
    let roots = || Roots { intel: intel.root_der(), amd: vec![] };
    let honest: Machine = {
        let intel = intel.clone();
        Arc::new(move |report_data| intel.evidence(&Td { report_data, ..Td::default() }))
    };
    // A machine in the middle that shows a genuine peer's evidence under its own key.
    let relay: Machine = {
        let stolen = intel.evidence(&Td { report_data: [0x77; 64], ..Td::default() });
        Arc::new(move |_| stolen.clone())
    };
    let wants = |byte| config(("tdx", "mr_td", byte), vec![file.clone()]);
    assert_eq!(reason_or_tee(met(roots(), wants(0xa1), "tdx", honest.clone()).await), "tdx by builtin");
    assert_eq!(reason_or_tee(met(roots(), wants(0xa2), "tdx", honest.clone()).await), "reference-mismatch");
    assert_eq!(reason_or_tee(met(roots(), wants(0xa1), "tdx", relay).await), "evidence-report-data");
    assert_eq!(reason_or_tee(met(Roots::pinned(), wants(0xa1), "tdx", honest).await), "quote-chain");
}

#[tokio::test]
async fn a_peer_on_sev_snp_is_let_in_for_its_measurement_and_its_own_key() {
    let amd = Arc::new(Amd::new());
    let roots = || Roots { intel: vec![], amd: vec![amd.root()] };
    let machine = |guest: Guest| -> Machine {
        let amd = amd.clone();
        Arc::new(move |report_data| amd.evidence(&Guest { report_data, ..guest.clone() }, true))
    };
    let wants = |byte| config(("snp", "measurement", byte), vec![]);
    let honest = machine(Guest::default());
    assert_eq!(reason_or_tee(met(roots(), wants(0xc3), "snp", honest.clone()).await), "snp by builtin");
    assert_eq!(reason_or_tee(met(roots(), wants(0xc4), "snp", honest.clone()).await), "reference-mismatch");
    let debug = machine(Guest { policy: 1 << 19, ..Guest::default() });
    assert_eq!(reason_or_tee(met(roots(), wants(0xc3), "snp", debug).await), "tee-debug");
    assert_eq!(reason_or_tee(met(Roots::pinned(), wants(0xc3), "snp", honest).await), "snp-chain");
}

/// What one look at a server on `machine` brings, appraised as these keys of `[ingress.verify]` say.
async fn looked(roots: Roots, keys: &str, tee: &'static str, machine: Machine) -> Observation {
    let text = format!(
        "[[ingress]]\nname = \"x\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:1\"\n\
         [ingress.verify]\nprovider = \"builtin\"\n{keys}"
    );
    let name = crate::config::InstanceName::new("x").unwrap();
    let config = crate::config::parse(name, Path::new("x.toml"), &text).unwrap_or_else(|r| panic!("{r}")).config;
    INJECTED.set(Some(roots));
    let prober = Prober::new(&config.endpoints[0], None, false, at(NOW)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("aa.sock");
    agent(&socket, tee, machine);
    let attest = Attest {
        provider: AttestProvider::Aa { socket },
        refresh_interval: Duration::from_secs(600),
        additional_evidence: false,
        passport: None,
    };
    let server = endpoint(Ra { attest: Some(attest), ..Ra::default() });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (c, s) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (observation, _) = tokio::join!(prober.look(c.unwrap(), None), server.accept(s.unwrap().0));
    observation
}

fn reason_of(observation: &Observation) -> Option<&'static str> {
    assert_eq!(observation.failure.is_none(), observation.verdict.is_some());
    observation.failure.as_ref().map(ChannelError::reason)
}

/// The block that one look at a peer makes, from evidence whose signatures were checked.
fn block_of(observation: &Observation) -> String {
    assert_eq!(reason_of(observation), Some("reference-missing"));
    let shown = crate::attest::Credential::from_extension(&observation.session.as_ref().unwrap().extension).unwrap();
    let crate::attest::Credential::Evidence(evidence) = shown else { panic!("a token") };
    let look = look(&evidence).unwrap();
    assert_eq!(look.bound, Some(true));
    reference_block(&evidence.tee, &look, "a machine", reference_trust(Outcome::Refused, Some("reference-missing")))
        .unwrap()
}

#[tokio::test]
async fn a_block_made_from_a_look_accepts_that_machine_and_refuses_another_measurement() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("collateral.json");
    let (intel, amd) = (Arc::new(Intel::new(NOW)), Arc::new(Amd::new()));
    std::fs::write(&file, serde_json::to_vec(&intel.collateral("UpToDate", 1, 1)).unwrap()).unwrap();
    let roots = || Roots { intel: intel.root_der(), amd: vec![amd.root()] };
    let td = |mr_td: u8| -> Machine {
        let intel = intel.clone();
        Arc::new(move |report_data| intel.evidence(&Td { report_data, mr_td: [mr_td; 48], ..Td::default() }))
    };
    let guest = |measurement: u8| -> Machine {
        let (amd, guest) = (amd.clone(), Guest { measurement: [measurement; 48], ..Guest::default() });
        Arc::new(move |report_data| amd.evidence(&Guest { report_data, ..guest.clone() }, true))
    };
    let collateral = format!("collateral = [\"{}\"]\n", file.display());
    for (tee, one, other) in [("tdx", td(0xa1), td(0xa2)), ("snp", guest(0xc3), guest(0xc4))] {
        let block = block_of(&looked(roots(), &collateral, tee, one.clone()).await);
        let keys = format!("{collateral}{block}");
        let accepted = looked(roots(), &keys, tee, one.clone()).await;
        assert_eq!((reason_of(&accepted), accepted.verdict.unwrap().tee.as_str()), (None, tee), "{keys}");
        assert_eq!(reason_of(&looked(roots(), &keys, tee, other).await), Some("reference-mismatch"));
        let forged = looked(Roots::pinned(), &keys, tee, one).await;
        assert!(["quote-chain", "snp-chain"].contains(&reason_of(&forged).unwrap()), "{:?}", forged.failure);
    }
}

fn rego(rules: &str) -> Option<RegoFile> {
    Some(RegoFile { path: "/policy.rego".into(), text: format!("package tng\n{rules}\n").into() })
}

#[tokio::test]
async fn a_policy_judges_alone_or_beside_references() {
    let amd = Arc::new(Amd::new());
    let roots = || Roots { intel: vec![], amd: vec![amd.root()] };
    let machine = |guest: Guest| -> Machine {
        let amd = amd.clone();
        Arc::new(move |report_data| amd.evidence(&Guest { report_data, ..guest.clone() }, true))
    };
    let trusted = format!(
        "allow if {{ input.tee == \"snp\"; input.claims.measurement == \"{}\"; input.claims.vmpl == 0; \
         input.claims.tcb_snp >= 1; input.bound_to == \"session\"; input.runtime_data[\"pubkey-hash\"] }}",
        "c3".repeat(48)
    );
    let alone = Builtin { references: vec![], ..config(("snp", "measurement", 0xc3), vec![]) };
    let beside = |byte| config(("snp", "measurement", byte), vec![]);
    let honest = machine(Guest::default());
    let one = async |config: Builtin, rules: &str, machine: &Machine| {
        reason_or_tee(asked(roots(), config, rego(rules), "snp", machine.clone()).await)
    };
    assert_eq!(one(alone.clone(), &trusted, &honest).await, "snp by builtin");
    assert_eq!(one(alone.clone(), &trusted.replace("c3", "c4"), &honest).await, "policy-denied");
    assert_eq!(one(beside(0xc3), &trusted, &honest).await, "snp by builtin");
    assert_eq!(one(beside(0xc4), &trusted, &honest).await, "reference-mismatch");
    assert_eq!(one(beside(0xc3), "allow := false", &honest).await, "policy-denied");
    assert_eq!(one(beside(0xc3), "allow if to_number(input.tee) > 0", &honest).await, "policy-error");
    // A policy does not allow what the configuration forbids.
    let debug = machine(Guest { policy: 1 << 19, ..Guest::default() });
    assert_eq!(one(alone.clone(), "allow := true", &debug).await, "tee-debug");
    let lax = Builtin { allow_debug: true, ..alone };
    assert_eq!(one(lax.clone(), "allow if input.debug", &debug).await, "snp by builtin");
    assert_eq!(one(lax, "allow if not input.debug", &debug).await, "policy-denied");
}

#[tokio::test]
async fn a_policy_sees_the_state_of_an_intel_platform() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("collateral.json");
    let intel = Arc::new(Intel::new(NOW));
    std::fs::write(&file, serde_json::to_vec(&intel.collateral("UpToDate", 1, 1)).unwrap()).unwrap();
    let honest: Machine = {
        let intel = intel.clone();
        Arc::new(move |report_data| intel.evidence(&Td { report_data, ..Td::default() }))
    };
    let alone = Builtin { references: vec![], ..config(("tdx", "mr_td", 0xa1), vec![file]) };
    let one = async |rules: &str| {
        let roots = Roots { intel: intel.root_der(), amd: vec![] };
        reason_or_tee(asked(roots, alone.clone(), rego(rules), "tdx", honest.clone()).await)
    };
    let state = "allow if { input.claims.tcb_status == \"UpToDate\"; input.claims.tcb_date > \"2000-01-01\"; \
                 startswith(input.claims.mr_td, \"a1a1\"); input.claims.fmspc }";
    assert_eq!(one(state).await, "tdx by builtin");
    assert_eq!(one(&state.replace("UpToDate", "OutOfDate")).await, "policy-denied");
    assert_eq!(one(&state.replace("2000-", "9999-")).await, "policy-denied");
}
