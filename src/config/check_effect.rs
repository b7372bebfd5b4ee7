//! What the captures of an endpoint do in effect, whatever they are spelled like: what can never match, and what takes
//! along more than its operator may expect.

use ipnet::IpNet;
use url::Url;

use super::diagnostics::{Place, Sink};
use super::overlap::{cover_together, covers};
use super::raw::RawMatch;
use super::reader::At;
use super::{AttestProvider, Endpoint, Match, Mode, PortRange, Side, VerifyProvider};

/// The service's user, as the package makes it (systemd/tng.sysusers).
const OWN_USER: &str = "tng";
const DNS: u16 = 53;
const SSH: u16 = 22;
/// Control connections of FTP; its data go over other ports, which are agreed upon inside (RFC 959).
const FTP: u16 = 21;
/// Ports of FTP's data connections in passive mode.
const UNPRIVILEGED: PortRange = PortRange { first: 1024, last: u16::MAX };

/// Looks at each capture entry. `false`: one of them can never match.
pub(super) fn entries(
    raw: &[At<RawMatch>],
    captures: &[Match],
    excludes: &[Match],
    side: Side,
    sink: &mut Sink<'_>,
) -> bool {
    let own_uid = nix::unistd::User::from_name(OWN_USER).ok().flatten().map(|user| user.uid.as_raw());
    let mut ok = true;
    for (raw, entry) in raw.iter().zip(captures) {
        if let Some((message, hint)) = never_matches(entry, excludes, own_uid) {
            sink.error(&raw.at, "never-matches", message, hint);
            ok = false;
            continue;
        }
        let takes = |port| takes(entry, excludes, port);
        match side {
            Side::Ingress if takes_dns(entry, excludes) => {
                let message = "captures port 53 of remote hosts: DNS over TCP goes through the tunnel, and over UDP it is \
                               refused";
                let hint = "exclude the name server: exclude = [{ to = \"192.0.2.53\", port = 53 }]";
                sink.warn(&raw.at, "captures-dns", message, hint);
            }
            Side::Egress if takes(SSH) => {
                let message = "captures port 22: ssh to this host is refused to every client without a tunnel";
                sink.warn(&raw.at, "captures-ssh", message, "exclude it: exclude = [{ port = 22 }]");
            }
            Side::Ingress | Side::Egress => {}
        }
        let whole = entry.port.is_none_or(|ports| ports.first <= UNPRIVILEGED.first && ports.last == UNPRIVILEGED.last);
        if takes(FTP) && !whole {
            let message = "captures port 21: FTP's control connection is tunnelled, its data connections are not";
            sink.warn(&raw.at, "captures-ftp", message, "use a protocol with one connection, as sftp is");
        }
    }
    ok
}

/// Why nothing can match `entry`, and what to do. `own_uid`: the data plane's.
fn never_matches(entry: &Match, excludes: &[Match], own_uid: Option<u32>) -> Option<(String, &'static str)> {
    if let Some(at) = excludes.iter().position(|exclude| covers(exclude, entry)) {
        let message = format!("exclude[{at}] takes everything out that this entry captures: it never matches");
        return Some((message, "remove one of them, or narrow the exclusion"));
    }
    if cover_together(excludes, entry) {
        let message = "the exclusions together take everything out that this entry captures: it never matches";
        return Some((message.to_owned(), "remove it, or narrow an exclusion"));
    }
    if entry.uid.is_some() && entry.uid == own_uid {
        let message = format!("uid {OWN_USER} is the data plane's own, whose sockets are never captured");
        return Some((message, "name the user of the application"));
    }
    None
}

/// Whether connections to `port` are captured by `entry`, exclusions considered.
fn takes(entry: &Match, excludes: &[Match], port: u16) -> bool {
    let traffic = Match { port: Some(PortRange::single(port)), ..entry.clone() };
    covers(entry, &traffic) && !excludes.iter().any(|exclude| covers(exclude, &traffic))
}

/// The same of DNS, which goes to few hosts: an exclusion of one of them says that its operator has thought of it.
fn takes_dns(entry: &Match, excludes: &[Match]) -> bool {
    let server = |exclude: &Match| exclude.to.is_some() && exclude.port.is_none_or(|ports| ports.contains(DNS));
    takes(entry, excludes, DNS) && !excludes.iter().any(server)
}

/// The own look-ups of a file's endpoints under its captures: the resolver is the C library's, whose sockets carry no mark
/// of tng's.
pub(super) fn own_names<'a>(at: &Place, endpoints: impl Iterator<Item = &'a Endpoint> + Clone, sink: &mut Sink<'_>) {
    let captures_dns = |endpoint: &Endpoint| match &endpoint.mode {
        Mode::Netfilter(n) if endpoint.side == Side::Ingress => {
            n.capture.iter().any(|entry| takes_dns(entry, &n.exclude) && is_wide(entry))
        }
        Mode::Netfilter(_) | Mode::Mapping(_) => false,
    };
    let Some(capturing) = endpoints.clone().find(|endpoint| captures_dns(endpoint)) else { return };
    for endpoint in endpoints {
        for (key, name) in asked(endpoint).into_iter().filter_map(|(key, url)| Some((key, name_of(url)?))) {
            let message = format!(
                "{key} of endpoint {} names {name}, and the captures of endpoint {} take or refuse what looks names up: \
                 the service would not be found",
                endpoint.name, capturing.name
            );
            let hint = "write the service's address, or exclude the name server's port 53";
            sink.warn(at, "service-by-name", message, hint);
        }
    }
}

/// The services that an endpoint asks, by the keys that name them.
fn asked(endpoint: &Endpoint) -> Vec<(&'static str, &Url)> {
    let mut all = Vec::new();
    match endpoint.ra.verify.as_ref().map(|verify| &verify.provider) {
        Some(VerifyProvider::As(service)) => all.extend(service.addrs.iter().map(|url| ("as_addr", url))),
        Some(VerifyProvider::Builtin(builtin)) => {
            let keys = [("pccs_addr", &builtin.pccs_addr), ("kds_addr", &builtin.kds_addr)];
            all.extend(keys.into_iter().filter_map(|(key, url)| Some((key, url.as_ref()?))));
        }
        Some(VerifyProvider::Anchors(_) | VerifyProvider::Sample) | None => {}
    }
    if let Some(attest) = &endpoint.ra.attest {
        if let AttestProvider::Asr { addr } = &attest.provider {
            all.push(("asr_addr", addr));
        }
        let passport = attest.passport.iter().flat_map(|passport| &passport.service.addrs);
        all.extend(passport.map(|url| ("as_addr", url)));
    }
    all
}

/// Whether an entry is about hosts that its operator has not listed.
fn is_wide(entry: &Match) -> bool {
    let wide = |net: IpNet| net.prefix_len() < net.max_prefix_len() / 2;
    entry.to.is_none_or(wide)
}

fn name_of(url: &Url) -> Option<&str> {
    match url.host() {
        Some(url::Host::Domain(name)) if name != "localhost" => Some(name),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(to: Option<&str>, ports: Option<(u16, u16)>, uid: Option<u32>) -> Match {
        let to = to.map(|net| net.parse().expect("a prefix"));
        let port = ports.map(|(first, last)| PortRange { first, last });
        Match { to, port, uid, gid: None, cgroup: None, iif: None }
    }

    #[test]
    fn the_data_planes_own_user_is_never_captured() {
        let own = entry(None, Some((80, 80)), Some(994));
        let (message, hint) = never_matches(&own, &[], Some(994)).expect("never");
        assert!(message.contains("uid tng") && hint.contains("application"), "{message}");
        assert_eq!(never_matches(&own, &[], Some(995)), None);
        assert_eq!(never_matches(&entry(None, Some((80, 80)), None), &[], None), None, "no such user, no uid asked");
    }

    #[test]
    fn exclusions_are_put_together_by_addresses_and_ports() {
        let never = |capture: &Match, excludes: &[Match]| never_matches(capture, excludes, None).is_some();
        let net = entry(Some("198.51.100.0/24"), Some((80, 90)), None);
        let low = entry(Some("198.51.100.0/25"), None, None);
        let high = entry(Some("198.51.100.128/25"), Some((1, 85)), None);
        let rest = entry(None, Some((86, 95)), None);
        assert!(never(&net, &[low.clone(), high.clone(), rest.clone()]));
        assert!(never(&net, &[rest.clone(), high.clone(), low.clone()]), "in any order");
        assert!(!never(&net, &[low.clone(), high.clone()]), "86 to 90 of the upper half are left");
        assert!(!never(&net, &[low.clone(), rest.clone()]));
        assert!(!never(&net, &[]));
        // Of both families when no address is named.
        let any = entry(None, Some((80, 80)), None);
        let halves = ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"].map(|half| entry(Some(half), None, None));
        assert!(never(&any, &halves) && !never(&any, &halves[..3]));
        assert!(never(
            &entry(None, None, None),
            &[entry(None, Some((1, 100)), None), entry(None, Some((101, 65535)), None)]
        ));
        // One user's exclusion leaves the others captured, and the other way round it takes all.
        let of_user = |uid| entry(Some("198.51.100.0/25"), None, Some(uid));
        let upper = entry(Some("198.51.100.128/25"), None, None);
        assert!(!never(&net, &[of_user(5), upper.clone()]));
        assert!(never(&Match { uid: Some(5), ..net }, &[of_user(5), upper]));
    }
}
