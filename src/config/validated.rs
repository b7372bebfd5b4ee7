//! The validated configuration: every value is in range, every name is legal, nothing contradicts.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::attest::host::{HostProvider, HostSource};

/// The low half of the packet mark is tng's; the upper half belongs to others and is kept.
pub const MARK_MASK: u32 = 0xffff;
/// Mark of the egress's sockets to the service (565, what TNG has always used).
pub const DEFAULT_EGRESS_MARK: Mark = Mark(565);
/// Mark of the ingress's sockets to the peer. It differs from the egress's, otherwise an ingress
/// on the same host walks past the egress into the plaintext service.
pub const DEFAULT_INGRESS_MARK: Mark = Mark(566);

/// Name of an instance: the file's stem, `[a-z0-9][a-z0-9-]{0,31}`. It names the nftables tables.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct InstanceName(String);

/// Name of an endpoint within its instance, same alphabet as [`InstanceName`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct EndpointName(String);

/// Why a name was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a legal name: use 1 to 32 of a-z, 0-9 and -, beginning with a letter or digit")]
pub struct NameError(pub String);

fn legal_name(s: &str) -> bool {
    let mut bytes = s.bytes();
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    matches!(bytes.next(), Some(b) if alnum(b)) && s.len() <= 32 && bytes.all(|b| alnum(b) || b == b'-')
}

macro_rules! name_type {
    ($t:ty) => {
        impl $t {
            /// The name, if it is legal.
            pub fn new(s: &str) -> Result<Self, NameError> {
                if legal_name(s) { Ok(Self(s.to_owned())) } else { Err(NameError(s.to_owned())) }
            }
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
name_type!(InstanceName);
name_type!(EndpointName);

/// A firewall mark within [`MARK_MASK`], never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Mark(pub u32);

/// Inclusive range of TCP ports; a single port is a range of one. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, at least `first`.
    pub last: u16,
}

impl PortRange {
    /// The range of one port.
    pub const fn single(port: u16) -> Self {
        Self { first: port, last: port }
    }
    /// How many ports it holds.
    pub const fn len(self) -> usize {
        (self.last - self.first) as usize + 1
    }
    /// Never true: a range holds at least one port.
    pub const fn is_empty(self) -> bool {
        false
    }
    /// Whether `port` is in the range.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
    /// Whether both ranges share a port.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// One instance: everything one TOML file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of the instance.
    pub instance: InstanceName,
    /// The file it was read from.
    pub source: PathBuf,
    /// What a clean stop leaves.
    pub on_stop: OnStop,
    /// How long established connections may go on after a stop was asked for.
    pub drain_timeout: Duration,
    /// Where the control API listens over TCP, if anywhere. The unix socket is always there.
    pub control_listen: Option<SocketAddr>,
    /// The endpoints, ingresses first, each in the order of the file.
    pub endpoints: Vec<Endpoint>,
}

/// What a clean stop leaves for captured traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// The direct path comes back: the operator asked for it.
    #[default]
    Open,
    /// The guard stays and refuses.
    Closed,
}

/// Which end of the tunnel an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Takes plain traffic into the tunnel.
    Ingress,
    /// Lets it out of the tunnel to the service.
    Egress,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Ingress => "ingress",
            Side::Egress => "egress",
        })
    }
}

/// One `[[ingress]]` or `[[egress]]` table.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// Its name, unique in the instance over both sides.
    pub name: EndpointName,
    /// Which end of the tunnel it is.
    pub side: Side,
    /// How traffic gets in.
    pub mode: Mode,
    /// What it shows of itself and asks of the peer.
    pub ra: Ra,
    /// Bounds and deadlines.
    pub limits: Limits,
}

/// How an endpoint takes its traffic.
#[derive(Debug, Clone, PartialEq)]
pub enum Mode {
    /// Fixed listener, fixed target.
    Mapping(Mapping),
    /// nftables takes the traffic; the original destination is the target.
    Netfilter(Netfilter),
}

impl Mode {
    /// Mark of the endpoint's own sockets.
    pub fn so_mark(&self) -> Mark {
        match self {
            Self::Mapping(mapping) => mapping.so_mark,
            Self::Netfilter(netfilter) => netfilter.so_mark,
        }
    }

    /// As the configuration names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mapping(_) => "mapping",
            Self::Netfilter(_) => "netfilter",
        }
    }
}

/// `[ingress.mapping]` / `[egress.mapping]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Address to listen on.
    pub listen_addr: IpAddr,
    /// Ports to listen on.
    pub listen_ports: PortRange,
    /// Name or address to connect to.
    pub target_host: TargetHost,
    /// Ports to connect to, as many as `listen_ports`, in the same order.
    pub target_ports: PortRange,
    /// Mark of the sockets towards the target.
    pub so_mark: Mark,
}

/// The host part of a mapping's target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetHost {
    /// An address.
    Addr(IpAddr),
    /// An IPv6 link-local address and its zone (RFC 4007): the name or the index of an interface.
    LinkLocal(Ipv6Addr, String),
    /// A name, resolved for each connection.
    Name(String),
}

impl fmt::Display for TargetHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetHost::Addr(IpAddr::V6(a)) => write!(f, "[{a}]"),
            TargetHost::Addr(a) => write!(f, "{a}"),
            TargetHost::LinkLocal(a, zone) => write!(f, "[{a}%{zone}]"),
            TargetHost::Name(n) => f.write_str(n),
        }
    }
}

/// `[ingress.netfilter]` / `[egress.netfilter]`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Netfilter {
    /// What is captured: any entry matches.
    pub capture: Vec<Match>,
    /// What is not, though an entry of `capture` matches.
    pub exclude: Vec<Match>,
    /// Egress only: clients on the same host are captured too.
    pub capture_local_traffic: bool,
    /// Egress only: the service sees the client's address.
    pub preserve_source: bool,
    /// Egress only: the source ports used with `preserve_source`.
    pub preserve_source_ports: PortRange,
    /// Mark of the sockets to the peer (ingress) or to the service (egress).
    pub so_mark: Mark,
    /// Port of the transparent listener; allocated from 40000 up when absent.
    pub listen_port: Option<u16>,
}

/// One capture or exclude entry; the qualifiers AND together.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Match {
    /// Destination; absent: any non-local address on an ingress, any local one on an egress.
    pub to: Option<IpNet>,
    /// Destination port; absent: any.
    pub port: Option<PortRange>,
    /// Owner of the sending socket (ingress).
    pub uid: Option<u32>,
    /// Group of the sending socket (ingress).
    pub gid: Option<u32>,
    /// cgroup v2 path of the sending socket (ingress); a `.slice`.
    pub cgroup: Option<CgroupPath>,
    /// Interface the packet came in by (egress).
    pub iif: Option<String>,
}

/// Path of a cgroup below the root, without leading slash: `system.slice` or `a.slice/a-b.slice`.
/// Every part is `[A-Za-z0-9:_.@\\-]`, the last ends in `.slice`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct CgroupPath(pub String);

impl CgroupPath {
    /// Depth below the root, as `socket cgroupv2 level` counts.
    pub fn level(&self) -> usize {
        self.0.split('/').count()
    }
}

/// Remote attestation of one endpoint. Neither part: `no_ra = true`, for debugging.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ra {
    /// Evidence this side shows.
    pub attest: Option<Attest>,
    /// Appraisal this side demands of the peer.
    pub verify: Option<Verify>,
    /// Peers that cannot bind evidence to the session (`tng/1`) are refused.
    pub require_session_binding: bool,
    /// How long open connections go on after their peer failed; it says nothing of what is demanded, so it stands apart
    /// from `verify`. Zero: they are closed at once.
    pub grace: Duration,
}

/// `[*.attest]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Attest {
    /// Where evidence comes from.
    pub provider: AttestProvider,
    /// How old evidence may get; it is made anew at half of that. Zero: new evidence for every handshake.
    pub refresh_interval: Duration,
    /// Whether the evidence of devices is shown too, bound to the same key.
    pub additional_evidence: bool,
    /// Passport: where the evidence is turned into a token. Absent: the evidence itself is shown.
    pub passport: Option<Passport>,
}

/// How an attester comes to its token.
#[derive(Debug, Clone, PartialEq)]
pub struct Passport {
    /// The service that makes it. Its anchors are not asked for: the peer checks the token.
    pub service: super::AsService,
    /// Policies it is made under.
    pub policy_ids: Vec<String>,
}

impl Passport {
    /// The service as a verifier would ask it. Nothing is judged with it here: the peer does that.
    pub fn as_verify(&self) -> Verify {
        Verify {
            provider: VerifyProvider::As(self.service.clone()),
            policy_ids: self.policy_ids.clone(),
            allow_sample: true,
            verdict_ttl: Duration::ZERO,
            model: Model::BackgroundCheck,
            rego: None,
        }
    }
}

/// What a verifier wants to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Model {
    /// Evidence, which it has appraised.
    #[default]
    BackgroundCheck,
    /// A token, made where the peer had its evidence appraised.
    Passport,
}

impl fmt::Display for Model {
    /// As in the configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackgroundCheck => "background_check",
            Self::Passport => "passport",
        })
    }
}

/// Source of evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttestProvider {
    /// A CoCo Attestation Agent over ttrpc on a unix socket.
    Aa {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// The host's own evidence, made by root's helper.
    Helper {
        /// Path of the helper's socket.
        socket: PathBuf,
        /// What it is asked for.
        provider: HostProvider,
    },
    /// The host's own evidence, made in process, which needs root's rights.
    Direct(HostSource),
    /// The same behind CoCo's HTTP API server.
    Asr {
        /// Base URL, http.
        addr: url::Url,
    },
    /// Evidence made in process that proves nothing.
    Sample,
}

/// `[*.verify]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Verify {
    /// Who appraises.
    pub provider: VerifyProvider,
    /// Policies the appraisal must name.
    pub policy_ids: Vec<String>,
    /// Whether the `sample` TEE is accepted, whoever vouches for it.
    pub allow_sample: bool,
    /// The longest a verdict is reused.
    pub verdict_ttl: Duration,
    /// Whether the peer shows evidence or a token.
    pub model: Model,
    /// What the operator asks beyond, of an appraisal in process. Its digest is among `policy_ids`.
    pub rego: Option<super::RegoFile>,
}

/// Who appraises the peer's evidence.
#[derive(Debug, Clone, PartialEq)]
pub enum VerifyProvider {
    /// A CoCo Attestation Service.
    As(super::AsService),
    /// Passport without a service: who may sign tokens, by files alone.
    Anchors(super::TrustedSigners),
    /// In process, against reference values.
    Builtin(super::Builtin),
    /// In process, knows only the sample TEE.
    Sample,
}

/// Bounds and deadlines of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; more wait in the listen queue.
    pub max_connections: usize,
    /// From accept to the end of the appraisal.
    pub handshake_timeout: Duration,
    /// Egress: from accept to the first byte of the client.
    pub first_byte_timeout: Duration,
    /// TCP connect to the peer or the service, each address.
    pub connect_timeout: Duration,
    /// Without a byte in either direction the connection ends. Zero: never.
    pub idle_timeout: Duration,
    /// Data that the other host does not acknowledge for so long end the connection. Zero: by the kernel's own measure,
    /// which is about a quarter of an hour.
    pub unacknowledged_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            handshake_timeout: Duration::from_secs(30),
            first_byte_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(3600),
            unacknowledged_timeout: Duration::from_secs(30),
        }
    }
}
