//! What the captures of an endpoint do in effect, whatever they are spelled like: what can never match, and what takes
//! along more than its operator may expect.

use ipnet::IpNet;

use super::diagnostics::{Place, Sink};
use super::overlap::covers;
use super::raw::RawMatch;
use super::reader::At;
use super::{AsService, Endpoint, Match, Mode, PortRange, Side, VerifyProvider};

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
        if let Some(at) = excludes.iter().position(|exclude| covers(exclude, entry)) {
            let message = format!("exclude[{at}] takes everything out that this entry captures: it never matches");
            sink.error(&raw.at, "never-matches", message, "remove one of them, or narrow the exclusion");
            ok = false;
            continue;
        }
        if entry.uid.is_some() && entry.uid == own_uid {
            let message = format!("uid {OWN_USER} is the data plane's own, whose sockets are never captured");
            sink.error(&raw.at, "never-matches", message, "name the user of the application");
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
        let Some(VerifyProvider::As(service)) = endpoint.ra.verify.as_ref().map(|verify| &verify.provider) else {
            continue;
        };
        if let Some(name) = names(service).next() {
            let message = format!(
                "as_addr of endpoint {} names {name}, and the captures of endpoint {} take or refuse what looks names up: \
                 the service would not be found",
                endpoint.name, capturing.name
            );
            sink.warn(
                at,
                "service-by-name",
                message,
                "write the service's address, or exclude the name server's port 53",
            );
        }
    }
}

/// Whether an entry is about hosts that its operator has not listed.
fn is_wide(entry: &Match) -> bool {
    let wide = |net: IpNet| net.prefix_len() < net.max_prefix_len() / 2;
    entry.to.is_none_or(wide)
}

fn names(service: &AsService) -> impl Iterator<Item = &str> {
    service.addrs.iter().filter_map(|url| match url.host() {
        Some(url::Host::Domain(name)) if name != "localhost" => Some(name),
        _ => None,
    })
}
