//! What `/status` and `/connections` answer; `tngctl` reads the same types.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::attest::Verdict;
use crate::tls::{Binding, Closing, CurrentVerdict};

/// Where the instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not yet serving.
    Starting,
    /// Serving.
    Ready,
    /// Serving, and a new configuration is being taken over.
    Reloading,
    /// No new connections; established ones go on until the deadline.
    Draining,
    /// Ended.
    Stopped,
    /// Up, but something that the configuration asks for is missing.
    Degraded,
}

impl State {
    /// The word that `tngctl` and STATUS show.
    pub fn word(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Ready => "ready",
            State::Reloading => "reloading",
            State::Draining => "draining",
            State::Stopped => "stopped",
            State::Degraded => "degraded",
        }
    }
}

/// The whole answer of `/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Name of the instance.
    pub instance: String,
    /// Process id of the data plane.
    pub pid: u32,
    /// Version of tng.
    pub version: String,
    /// Inode of the network namespace it serves.
    pub netns: u64,
    /// Where it is in its life.
    pub state: State,
    /// What is wrong, in words, when `state` is degraded.
    pub problems: Vec<String>,
    /// The configuration file.
    pub config_path: String,
    /// When the configuration in force was loaded, in seconds since 1970.
    pub config_loaded_at: u64,
    /// Why the last reload was refused, if it was.
    pub last_reload_error: Option<String>,
    /// The listeners.
    pub listeners: Vec<ListenerView>,
    /// The endpoints, in the order of the file.
    pub endpoints: Vec<EndpointView>,
    /// What the data plane is confined by.
    #[serde(default)]
    pub confinement: ConfinementView,
    /// What `tngctl` as root saw in the kernel; the data plane itself may not look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelView>,
    /// Log records that were dropped because nobody read the log.
    #[serde(default)]
    pub log_records_lost: u64,
}

/// The kernel's side of an instance that captures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KernelView {
    /// What is missing or changed, in words; empty when all is as applied.
    pub problems: Vec<String>,
    /// Packets by counter: `captured_NAME` (connections), `refused_NAME`; of the instance `refused` and its parts
    /// `not_tcp`, `on_wire` and `injected`; the guard's as `guard_...`.
    pub counters: BTreeMap<String, u64>,
}

/// Walls around the data plane beside its lack of privileges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfinementView {
    /// landlock(7): `abi N`, or `absent`.
    pub landlock: String,
}

impl Default for ConfinementView {
    fn default() -> Self {
        Self { landlock: "absent".to_owned() }
    }
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListenerView {
    /// Whose connections arrive there.
    pub endpoint: String,
    /// Its address.
    pub local: String,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndpointView {
    /// Its name.
    pub name: String,
    /// `ingress` or `egress`.
    pub side: String,
    /// `mapping` or `netfilter`.
    pub mode: String,
    /// What it takes and where it sends it, in words.
    pub traffic: String,
    /// Source of its evidence, or nothing when it does not attest.
    pub attest: Option<String>,
    /// Who appraises the peer, or nothing when it does not verify.
    pub verify: Option<String>,
    /// Neither attests nor verifies.
    pub no_ra: bool,
    /// Shows or accepts evidence that proves nothing.
    pub sample: bool,
    /// What it has done.
    pub counters: Counters,
    /// The bound on its connections.
    #[serde(default)]
    pub bound: BoundView,
    /// Last verdict of each peer, newest first.
    pub verdicts: Vec<VerdictView>,
    /// Last refusal.
    pub last_refusal: Option<RefusalView>,
    /// Last refusal of each peer, newest first, at most 64.
    #[serde(default)]
    pub refusals: Vec<PeerRefusals>,
    /// Connections refused since the daemon started, by reason.
    #[serde(default)]
    pub refused: BTreeMap<String, u64>,
    /// State of the attestation, as its providers describe it.
    pub attestation: serde_json::Value,
}

/// `max_connections` of an endpoint, and who is beyond it; and an egress's bounds on what is not established yet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BoundView {
    /// `max_connections`.
    pub limit: u64,
    /// Established connections and streams that count for it.
    pub taken: u64,
    /// Connections that wait for a place, in the listen queue too.
    pub waiting: u64,
    /// How often it was reached.
    pub reached_times: u64,
    /// When it was reached last, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_at: Option<u64>,
    /// Since when it is reached without a break, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_since: Option<u64>,
    /// Connections of an egress that are not established yet: silent ones and handshakes.
    #[serde(default)]
    pub arriving: u64,
    /// The bounds on these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rooms: Vec<RoomView>,
    /// Who has most of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busiest: Option<BusySource>,
}

/// A bound on what is not established yet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RoomView {
    /// Of what.
    pub room: String,
    /// How many at once.
    pub limit: u64,
    /// How many now.
    pub taken: u64,
    /// Connections that wait for a place.
    pub waiting: u64,
    /// How often it was full.
    pub reached_times: u64,
    /// When it was full last, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_at: Option<u64>,
    /// Since when it is full without a break, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_since: Option<u64>,
}

/// A source of connections.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BusySource {
    /// An IPv4 address, or a network of IPv6 with 64 bits.
    pub source: String,
    /// How many it has.
    pub connections: u64,
}

/// Counters of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Accepted since the daemon started.
    pub connections_total: u64,
    /// Open now.
    pub connections_open: u64,
    /// Refused since the daemon started.
    pub connections_refused: u64,
    /// Bytes from clients to services.
    pub bytes_up: u64,
    /// Bytes from services to clients.
    pub bytes_down: u64,
}

/// A peer's last verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictView {
    /// The peer's address.
    pub peer: String,
    /// When it last connected, in seconds since 1970.
    pub seen: u64,
    /// Its TEE.
    pub tee: String,
    /// What the appraisal ended in.
    #[serde(default)]
    pub status: String,
    /// Devices appraised together with it.
    #[serde(default)]
    pub devices: Vec<String>,
    /// What the appraisal found, printable and bounded.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
    /// Policies it was appraised under.
    pub policy_ids: Vec<String>,
    /// Who appraised.
    pub verifier: String,
    /// What the trust in that rests on.
    pub trust_anchor: String,
    /// Whether the TEE proves nothing.
    pub sample: bool,
    /// What its last connection's evidence was bound to: `session` or `certificate`.
    #[serde(default)]
    pub binding: String,
    /// When it was made, in seconds since 1970.
    pub appraised_at: u64,
    /// When it ends, in seconds since 1970.
    pub expires_at: u64,
    /// Its age when it was shown, seconds.
    #[serde(default)]
    pub age: u64,
    /// Seconds it had left then; 0: it has ended.
    #[serde(default)]
    pub left: u64,
    /// The peer has failed since, and its open connections are about to be closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closing: Option<ClosingView>,
}

impl VerdictView {
    /// The verdict as shown.
    pub fn new(peer: IpAddr, seen: SystemTime, current: &CurrentVerdict, binding: Binding) -> Self {
        let verdict: &Verdict = &current.load();
        let now = unix_seconds(SystemTime::now());
        let (appraised_at, expires_at) = (unix_seconds(verdict.appraised_at), unix_seconds(verdict.expires_at));
        Self {
            closing: current.closing().map(Into::into),
            peer: peer.to_string(),
            seen: unix_seconds(seen),
            tee: verdict.tee.clone(),
            status: verdict.status.clone(),
            devices: verdict.devices.clone(),
            claims: verdict.claims.clone(),
            policy_ids: verdict.policy_ids.clone(),
            verifier: verdict.verifier.clone(),
            trust_anchor: verdict.trust_anchor.clone(),
            sample: verdict.sample,
            binding: binding.word().to_owned(),
            appraised_at,
            expires_at,
            age: now.saturating_sub(appraised_at),
            left: expires_at.saturating_sub(now),
        }
    }
}

/// Open connections of a peer that was refused when it was appraised again, or whose verdict was not renewed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosingView {
    /// Stable slug.
    pub reason: String,
    /// In words.
    pub detail: String,
    /// They are closed in so many milliseconds, unless the peer is affirmed again.
    pub in_ms: u64,
}

impl From<Closing> for ClosingView {
    fn from(closing: Closing) -> Self {
        let Closing { why, left } = closing;
        Self { reason: why.reason.to_owned(), detail: why.text, in_ms: left.as_millis() as u64 }
    }
}

/// A refused connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalView {
    /// Stable slug.
    pub reason: String,
    /// Seconds since 1970.
    pub when: u64,
    /// The other side.
    pub peer: String,
    /// In words.
    pub detail: String,
}

/// Refusals of one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRefusals {
    /// Its address.
    pub peer: String,
    /// How many, since it was last forgotten for others.
    pub count: u64,
    /// The newest.
    pub last: RefusalView,
}

/// The answer of `/connections`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionsReport {
    /// How many there are; `connections` may hold fewer.
    pub total: usize,
    /// Oldest first.
    pub connections: Vec<ConnectionView>,
}

/// One live connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionView {
    /// Unique in the process.
    pub id: u64,
    /// Its endpoint.
    pub endpoint: String,
    /// Its endpoint's side.
    pub side: String,
    /// Who connected.
    pub src: String,
    /// Where to.
    pub dst: String,
    /// The tunnel's other end.
    pub peer: String,
    /// The peer's TEE.
    pub tee: String,
    /// What the evidence is bound to: `session`, `certificate` or `none`; empty during the handshake.
    #[serde(default)]
    pub binding: String,
    /// When the peer's verdict ends unless it is renewed, in seconds since 1970; absent when it is not verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict_expires: Option<u64>,
    /// The peer has failed since, and the connection is about to be closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closing: Option<ClosingView>,
    /// Milliseconds since it was accepted.
    pub age_ms: u64,
    /// Bytes from client to service.
    pub bytes_up: u64,
    /// Bytes from service to client.
    pub bytes_down: u64,
    /// `handshake`, `relay` or `draining`.
    pub state: String,
}

/// Seconds since 1970; a clock before that reads 0.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0)
}
