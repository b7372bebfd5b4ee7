//! What `tngctl status` shows of an endpoint's attestation. Never a token, a key or a header's value.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::SystemTime;

use serde::Serialize;

use super::{ChannelError, CurrentVerdict};
use crate::attest::{CollateralStatus, LatencyStatus, ServiceStatus, Verdict};
use crate::os::lock::Lock;

/// Peers and reasons kept.
const MAX_PEERS: usize = 32;

/// What `status` shows of an endpoint's attestation. Times are seconds since the epoch.
#[derive(Debug, Clone, Serialize, Default)]
pub struct TlsStatus {
    /// Evidence this side shows; absent when it does not attest.
    pub attest: Option<AttestStatus>,
    /// Appraisal it demands; absent when it does not verify.
    pub verify: Option<VerifyStatus>,
    /// Last verdict of each peer address, newest first, at most 32.
    pub peers: Vec<PeerStatus>,
    /// The newest refusal.
    pub last_refusal: Option<RefusalStatus>,
    /// Channels established.
    pub handshakes_ok: u64,
    /// Channels refused, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Requests to the attestation service.
    pub as_calls: u64,
    /// Times that an address of the attestation service gave way to the next.
    pub as_failovers: u64,
    /// Verdicts reused.
    pub cache_hits: u64,
    /// Requests to the attestation agent.
    pub aa_calls: u64,
    /// How long the attestation agent, or the host's own TEE, took for evidence.
    pub aa_latency: Option<LatencyStatus>,
    /// How long the attestation service took for appraisals of peers.
    pub as_latency: Option<LatencyStatus>,
    /// How long it took for tokens about this side (passport).
    pub token_latency: Option<LatencyStatus>,
    /// Whether peers that do not speak `tng/1` are refused.
    pub require_session_binding: bool,
    /// Channels whose evidence was made for them (`tng/1`).
    pub session_bound: u64,
    /// Channels that confirmed a session that was bound before: the peer to this side or, where it does not verify, this side
    /// to the peer.
    pub session_confirmed: u64,
    /// Channels that resumed a bound session by a TLS ticket.
    pub session_resumed: u64,
    /// Channels with evidence about the certificate's key alone (RATS-TLS).
    pub certificate_bound: u64,
    /// Peers with open connections that were affirmed again after a reload had changed what is demanded of them.
    pub peers_reappraised: u64,
    /// Peers with open connections that were refused later, or whose verdict was not renewed.
    pub peers_failed: u64,
    /// Of these the ones that were affirmed again within the grace.
    pub peers_recovered: u64,
    /// Peers that have failed and whose connections are still open.
    pub peers_closing: u64,
}

/// Evidence this side shows.
#[derive(Debug, Clone, Serialize)]
pub struct AttestStatus {
    /// Provider, as in the configuration.
    pub provider: &'static str,
    /// What is shown: `background_check` (evidence) or `passport` (a token).
    pub model: &'static str,
    /// `ok`; `failing` while newer evidence cannot be had or there is none; `degraded` while it is such that peers refuse
    /// it: the token in it does not affirm this side, or it is too long.
    pub state: &'static str,
    /// Whether handshakes are still served.
    pub usable: bool,
    /// Slug of the failure, or with which peers refuse.
    pub reason: Option<&'static str>,
    /// Its text.
    pub error: Option<String>,
    /// Age of the evidence, seconds.
    pub evidence_age: Option<u64>,
    /// Seconds until it may be shown no more.
    pub evidence_left: Option<u64>,
    /// Age of the token shown, by its own word, seconds.
    pub token_age: Option<u64>,
    /// Time it took to get, token included, milliseconds.
    pub evidence_took_ms: Option<u64>,
    /// End of the certificate.
    pub certificate_expires: Option<u64>,
    /// The newest failure, also when it is over.
    pub last_failure: Option<FailureStatus>,
    /// Failures since the start.
    pub failures: u64,
}

/// A failure to get evidence.
#[derive(Debug, Clone, Serialize)]
pub struct FailureStatus {
    /// When.
    pub at: u64,
    /// Slug.
    pub reason: &'static str,
    /// Text.
    pub error: String,
}

/// Appraisal this side demands.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyStatus {
    /// Provider, as in the configuration.
    pub provider: &'static str,
    /// `background_check` or `passport`.
    pub model: String,
    /// Policies demanded.
    pub policy_ids: Vec<String>,
    /// What the trust rests on.
    pub trust_anchor: String,
    /// Whether the sample TEE is let in.
    pub allow_sample: bool,
    /// Addresses of the attestation service and how they fare, in the order of the configuration.
    pub services: Vec<ServiceStatus>,
    /// Dates of the collateral at hand.
    pub collateral: Option<CollateralStatus>,
}

/// Last verdict of a peer.
#[derive(Debug, Clone, Serialize)]
pub struct PeerStatus {
    /// Its address.
    pub peer: IpAddr,
    /// TEE.
    pub tee: String,
    /// What the appraisal ended in.
    pub status: String,
    /// Devices appraised with it.
    pub devices: Vec<String>,
    /// What the appraisal found, printable and bounded.
    pub claims: BTreeMap<String, String>,
    /// What the trust in the appraisal rests on.
    pub trust_anchor: String,
    /// Policies.
    pub policy_ids: Vec<String>,
    /// Whether the TEE proves nothing.
    pub sample: bool,
    /// When it was appraised.
    pub appraised_at: u64,
    /// When the verdict ends.
    pub expires_at: u64,
}

impl PeerStatus {
    fn new(peer: IpAddr, v: &Verdict) -> Self {
        Self {
            peer,
            tee: v.tee.clone(),
            status: v.status.clone(),
            devices: v.devices.clone(),
            claims: v.claims.clone(),
            trust_anchor: v.trust_anchor.clone(),
            policy_ids: v.policy_ids.clone(),
            sample: v.sample,
            appraised_at: unix(v.appraised_at),
            expires_at: unix(v.expires_at),
        }
    }
}

/// A refusal.
#[derive(Debug, Clone, Serialize)]
pub struct RefusalStatus {
    /// The peer's address, if the socket still had one.
    pub peer: Option<SocketAddr>,
    /// When.
    pub at: u64,
    /// Slug.
    pub reason: &'static str,
    /// Text.
    pub error: String,
}

pub(super) fn unix(t: SystemTime) -> u64 {
    t.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[derive(Default)]
struct Kept {
    ok: u64,
    refused: BTreeMap<&'static str, u64>,
    peers: VecDeque<(IpAddr, CurrentVerdict)>,
    last_refusal: Option<RefusalStatus>,
}

/// Counts and remembers what the handshakes of one endpoint ended in.
#[derive(Default)]
pub(super) struct Ledger(Mutex<Kept>);

impl Ledger {
    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.locked()
    }

    pub fn established(&self, peer: Option<SocketAddr>, verdict: Option<CurrentVerdict>) {
        let mut kept = self.lock();
        kept.ok += 1;
        let (Some(peer), Some(v)) = (peer.map(|p| p.ip()), verdict) else { return };
        kept.peers.retain(|(known, _)| *known != peer);
        kept.peers.truncate(MAX_PEERS - 1);
        kept.peers.push_front((peer, v));
    }

    pub fn refused(&self, peer: Option<SocketAddr>, at: SystemTime, error: &ChannelError) {
        let mut kept = self.lock();
        *kept.refused.entry(error.reason()).or_default() += 1;
        kept.last_refusal =
            Some(RefusalStatus { peer, at: unix(at), reason: error.reason(), error: error.to_string() });
    }

    pub fn fill(&self, status: &mut TlsStatus) {
        let kept = self.lock();
        status.handshakes_ok = kept.ok;
        status.refused = kept.refused.clone();
        status.peers = kept.peers.iter().map(|(peer, v)| PeerStatus::new(*peer, &v.load())).collect();
        status.last_refusal = kept.last_refusal.clone();
    }
}
