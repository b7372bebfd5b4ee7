//! The ways in which a connection comes about that are compared, and what each must have done to count.

use std::collections::BTreeSet;
use std::fmt;

use tng::tls::TlsStatus;

use crate::Outcome;

/// How two ends come to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Plain TLS in which the server alone shows a certificate. For orientation.
    ServerOnly,
    /// Plain mutual TLS, both chains verified: what everything is compared with.
    Mutual,
    /// The same resumed, with tickets as rustls gives them by default. For orientation.
    MutualResumed,
    /// RATS-TLS, each side asks the service about the other in each handshake.
    ColdCertificate,
    /// `tng/1`, each side makes evidence and asks the service about the other's in each handshake.
    ColdSession,
    /// RATS-TLS with verdicts from the cache.
    Cached,
    /// The same with evidence as large as that of real TEEs. For orientation.
    CachedLarge,
    /// `tng/1`, each side confirms an earlier session in a full handshake.
    Confirmed,
    /// `tng/1` in a resumed TLS session.
    Resumed,
}

/// What the handshakes of one slice did.
#[derive(Debug, Default)]
pub struct Tally {
    /// Handshakes.
    pub handshakes: u64,
    /// Of these, in resumed TLS sessions.
    pub resumed: u64,
    /// Appraisals that the service counted.
    pub appraisals: u64,
    /// Counters of the ends that attest, client and server.
    pub ends: Vec<Counters>,
    /// Cipher suite and group of the key exchange.
    pub primitives: BTreeSet<String>,
}

/// What one end counted itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests to the service.
    pub as_calls: u64,
    /// Verdicts reused.
    pub hits: u64,
    /// Connections with evidence about the key of the certificate.
    pub certificate: u64,
    /// Connections with evidence about themselves.
    pub session: u64,
    /// Connections that confirmed an earlier session.
    pub confirmed: u64,
    /// Connections that resumed one.
    pub resumed: u64,
}

impl Counters {
    /// As `status` tells them.
    pub fn of(status: &TlsStatus) -> Self {
        Self {
            as_calls: status.as_calls,
            hits: status.cache_hits,
            certificate: status.certificate_bound,
            session: status.session_bound,
            confirmed: status.session_confirmed,
            resumed: status.session_resumed,
        }
    }

    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            as_calls: self.as_calls - before.as_calls,
            hits: self.hits - before.hits,
            certificate: self.certificate - before.certificate,
            session: self.session - before.session,
            confirmed: self.confirmed - before.confirmed,
            resumed: self.resumed - before.resumed,
        }
    }
}

impl Way {
    /// In the order of the table.
    pub const ALL: [Self; 9] = [
        Self::ServerOnly,
        Self::Mutual,
        Self::MutualResumed,
        Self::ColdCertificate,
        Self::ColdSession,
        Self::Cached,
        Self::CachedLarge,
        Self::Confirmed,
        Self::Resumed,
    ];

    /// Key in the JSON, and how the table calls it.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::ServerOnly => ("tls_server_only", "TLS, server's certificate alone"),
            Self::Mutual => ("mutual_tls", "mutual TLS"),
            Self::MutualResumed => ("mutual_tls_resumed", "mutual TLS, resumed"),
            Self::ColdCertificate => ("rats_tls_cold", "RATS-TLS, cold"),
            Self::ColdSession => ("tng1_cold", "tng/1, cold"),
            Self::Cached => ("rats_tls_cached", "RATS-TLS, cached verdict"),
            Self::CachedLarge => ("rats_tls_cached_16_kib", "the same, evidence of 16 KiB"),
            Self::Confirmed => ("tng1_confirmed", "tng/1, confirmed"),
            Self::Resumed => ("tng1_resumed", "tng/1, resumed"),
        }
    }

    /// The way with this key.
    pub fn named(name: &str) -> Outcome<Self> {
        let found = Self::ALL.into_iter().find(|way| way.names().0 == name);
        Ok(found.ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|way| way.names().0).collect();
            format!("TNG_BENCH_WAYS: \"{name}\" is none of {}", all.join(", "))
        })?)
    }

    /// Whether the ends are endpoints of tng.
    pub fn attests(self) -> bool {
        !matches!(self, Self::ServerOnly | Self::Mutual | Self::MutualResumed)
    }

    /// Whether each handshake is appraised anew.
    pub fn is_cold(self) -> bool {
        matches!(self, Self::ColdCertificate | Self::ColdSession)
    }

    /// Whether TLS sessions are resumed.
    pub fn resumes(self) -> bool {
        matches!(self, Self::MutualResumed | Self::Resumed)
    }

    /// CPU time of [`Way::Mutual`] that it may need: at most this part, and whether less than that is demanded.
    pub fn budget(self) -> Option<(f64, bool)> {
        match self {
            Self::Cached => Some((1.1, false)),
            Self::Resumed => Some((1.0, true)),
            _ => None,
        }
    }

    /// What is wrong with a slice: a figure counts only for connections that came about in this way, all of them.
    pub fn complaint(self, tally: &Tally) -> Option<String> {
        let n = tally.handshakes;
        let (appraisals, each) = match self {
            Self::ServerOnly | Self::Mutual | Self::MutualResumed => (0, None),
            Self::ColdCertificate => (2 * n, Some(Counters { as_calls: n, certificate: n, ..Counters::default() })),
            Self::ColdSession => (2 * n, Some(Counters { as_calls: n, session: n, ..Counters::default() })),
            Self::Cached | Self::CachedLarge => (0, Some(Counters { hits: n, certificate: n, ..Counters::default() })),
            Self::Confirmed => (0, Some(Counters { hits: n, confirmed: n, ..Counters::default() })),
            Self::Resumed => (0, Some(Counters { hits: n, resumed: n, ..Counters::default() })),
        };
        let ends: Vec<Counters> = each.into_iter().flat_map(|counters| [counters; 2]).collect();
        let resumed = if self.resumes() { n } else { 0 };
        if tally.resumed != resumed {
            return Some(format!("{} of {n} sessions were resumed instead of {resumed}", tally.resumed));
        }
        if tally.appraisals != appraisals {
            return Some(format!("{} appraisals instead of {appraisals}", tally.appraisals));
        }
        (tally.ends != ends).then(|| format!("the ends counted {:?} instead of {ends:?}", tally.ends))
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.names().1)
    }
}
