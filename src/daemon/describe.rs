//! An endpoint's configuration in the words of `status`.

use crate::config::{
    AsService, AttestProvider, Endpoint, Mapping, Match, Mode, Model, Netfilter, Side, Verify, VerifyProvider,
};

use super::stats::EndpointStats;
use super::status::EndpointView;

impl EndpointView {
    /// The endpoint as it is now.
    pub fn new(endpoint: &Endpoint, stats: &EndpointStats, attestation: serde_json::Value) -> Self {
        let (mode, traffic) = match &endpoint.mode {
            Mode::Mapping(mapping) => ("mapping", mapping_text(mapping)),
            Mode::Netfilter(netfilter) => ("netfilter", netfilter_text(netfilter, endpoint.side)),
        };
        let (attest, verify) = (&endpoint.ra.attest, &endpoint.ra.verify);
        Self {
            name: endpoint.name.to_string(),
            side: endpoint.side.to_string(),
            mode: mode.to_owned(),
            traffic,
            attest: attest
                .as_ref()
                .map(|a| match &a.provider {
                    AttestProvider::Aa { socket } => format!("aa {}", socket.display()),
                    AttestProvider::Asr { addr } => format!("asr {addr}"),
                    AttestProvider::Helper { socket, provider } => format!("{} {}", provider.name(), socket.display()),
                    AttestProvider::Direct(source) => source.provider().name().to_owned(),
                    AttestProvider::Sample => "sample".to_owned(),
                })
                .map(|from| match attest.as_ref().and_then(|a| a.passport.as_ref()) {
                    Some(passport) => format!("{from}, passport of {}", addresses(&passport.service)),
                    None => from,
                }),
            verify: verify.as_ref().map(|v| match &v.provider {
                VerifyProvider::As(service) if v.model == Model::Passport => {
                    format!("passport ({}), anchors of {}", v.policy_ids.join(", "), addresses(service))
                }
                VerifyProvider::As(service) => format!("as {} ({})", addresses(service), v.policy_ids.join(", ")),
                VerifyProvider::Anchors(_) => format!("passport ({})", v.policy_ids.join(", ")),
                VerifyProvider::Builtin(b) => format!("builtin ({} reference(s){})", b.references.len(), rego(v)),
                VerifyProvider::Sample => format!("sample{}", rego(v)),
            }),
            no_ra: attest.is_none() && verify.is_none(),
            sample: attest.as_ref().is_some_and(|a| a.provider == AttestProvider::Sample)
                || verify.as_ref().is_some_and(|v| v.allow_sample),
            counters: stats.counters(),
            bound: super::BoundView::default(),
            verdicts: stats.verdicts(),
            last_refusal: stats.refusals.last(),
            refusals: stats.refusals.by_peer(),
            refused: stats.refusals.by_reason(),
            attestation,
        }
    }
}

fn mapping_text(mapping: &Mapping) -> String {
    let listen = match mapping.listen_addr {
        std::net::IpAddr::V6(addr) => format!("[{addr}]"),
        addr => addr.to_string(),
    };
    format!("{listen}:{} -> {}:{}", mapping.listen_ports, mapping.target_host, mapping.target_ports)
}

fn rego(verify: &Verify) -> String {
    verify.rego.as_ref().map(|file| format!(", policy {}", file.path.display())).unwrap_or_default()
}

fn addresses(service: &AsService) -> String {
    service.addrs.iter().map(|url| url.as_str()).collect::<Vec<_>>().join(" ")
}

fn netfilter_text(netfilter: &Netfilter, side: Side) -> String {
    let list = |entries: &[Match]| entries.iter().map(|m| match_text(m, side)).collect::<Vec<_>>().join("; ");
    let mut text = list(&netfilter.capture);
    if !netfilter.exclude.is_empty() {
        text.push_str(" except ");
        text.push_str(&list(&netfilter.exclude));
    }
    text
}

fn match_text(entry: &Match, side: Side) -> String {
    let mut text = match (&entry.to, side) {
        (Some(to), _) => format!("to {to}"),
        (None, Side::Ingress) => "to any remote address".to_owned(),
        (None, Side::Egress) => "to any local address".to_owned(),
    };
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!(" {name} {value}"));
        }
    };
    add("port", entry.port.map(|p| p.to_string()));
    add("uid", entry.uid.map(|u| u.to_string()));
    add("gid", entry.gid.map(|g| g.to_string()));
    add("cgroup", entry.cgroup.as_ref().map(|c| c.0.clone()));
    add("iif", entry.iif.clone());
    text
}
