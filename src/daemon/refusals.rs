//! Who was refused and why: by peer and by reason, bounded.
//!
//! Apart from the verdicts: strangers that are refused must not push those of served peers out of a table.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::SystemTime;

use super::status::{PeerRefusals, RefusalView, unix_seconds};
use crate::os::lock::Lock;

/// Peers whose last refusal is kept; beyond it the one refused longest ago is forgotten.
const MAX_PEERS: usize = 64;
/// Characters kept of a refusal's detail, part of which came from the network.
const MAX_DETAIL: usize = 512;

#[derive(Default)]
struct Kept {
    by_reason: BTreeMap<&'static str, u64>,
    by_peer: HashMap<IpAddr, (SystemTime, PeerRefusals)>,
    last: Option<RefusalView>,
}

/// Refusals of one endpoint since the daemon started.
#[derive(Default)]
pub struct Refusals(Mutex<Kept>);

impl Refusals {
    /// One more.
    pub fn note(&self, peer: SocketAddr, reason: &'static str, detail: &str) {
        let now = SystemTime::now();
        let last = RefusalView {
            reason: reason.to_owned(),
            when: unix_seconds(now),
            peer: peer.to_string(),
            detail: detail.chars().take(MAX_DETAIL).collect(),
        };
        let mut kept = self.0.locked();
        *kept.by_reason.entry(reason).or_default() += 1;
        kept.last = Some(last.clone());
        let ip = peer.ip();
        if kept.by_peer.len() >= MAX_PEERS
            && !kept.by_peer.contains_key(&ip)
            && let Some(oldest) = kept.by_peer.iter().min_by_key(|(_, (at, _))| *at).map(|(ip, _)| *ip)
        {
            kept.by_peer.remove(&oldest);
        }
        let count = kept.by_peer.get(&ip).map_or(0, |(_, known)| known.count) + 1;
        kept.by_peer.insert(ip, (now, PeerRefusals { peer: ip.to_string(), count, last }));
    }

    /// The last one.
    pub fn last(&self) -> Option<RefusalView> {
        self.0.locked().last.clone()
    }

    /// How many for each reason.
    pub fn by_reason(&self) -> BTreeMap<String, u64> {
        let kept = self.0.locked();
        kept.by_reason.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect()
    }

    /// The last one of each peer, newest first.
    pub fn by_peer(&self) -> Vec<PeerRefusals> {
        let kept = self.0.locked();
        let mut all: Vec<_> = kept.by_peer.values().cloned().collect();
        all.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        all.into_iter().map(|(_, refusals)| refusals).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, (n % 250) as u8], 1000 + n))
    }

    #[test]
    fn each_peer_has_its_last_refusal_and_its_count() {
        let refusals = Refusals::default();
        refusals.note(peer(1), "as-timeout", "first");
        refusals.note(peer(1 + 250), "token-expired", "the same address, another port");
        refusals.note(peer(2), "as-timeout", &"x".repeat(10_000));
        let all = refusals.by_peer();
        let seen: Vec<_> = all.iter().map(|r| (r.peer.as_str(), r.count, r.last.reason.as_str())).collect();
        assert_eq!(seen, [("192.0.2.2", 1, "as-timeout"), ("192.0.2.1", 2, "token-expired")]);
        assert_eq!(all[0].last.detail.len(), MAX_DETAIL);
        assert_eq!(refusals.by_reason(), BTreeMap::from([("as-timeout".into(), 2), ("token-expired".into(), 1)]));
        assert_eq!(refusals.last().map(|r| r.peer), Some(peer(2).to_string()));
    }

    #[test]
    fn a_crowd_of_strangers_is_bounded_and_the_oldest_give_way() {
        let refusals = Refusals::default();
        for n in 0..1000 {
            refusals.note(SocketAddr::from(([10, 0, (n / 250) as u8, (n % 250) as u8], 1)), "tls-not-tls", "");
        }
        let all = refusals.by_peer();
        assert_eq!((all.len(), all[0].peer.as_str()), (MAX_PEERS, "10.0.3.249"));
        assert_eq!(refusals.by_reason()["tls-not-tls"], 1000);
    }
}
