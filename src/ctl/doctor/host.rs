//! The world that the checks look at, exchangeable in tests: files below a root, commands, and four questions that
//! need more than either.

use std::io::Read;
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::{Uid, User};

use super::agent;
use super::trial::{self, Trial, Tried};
use crate::attest::{AsSeen, AsVerifier, AsrAttester, AttestError, VerifyError};
use crate::capture::nft::{self, NftError};
use crate::capture::plan::{capture_table_name, guard_table_name};
use crate::capture::{guard, observe, routes};
use crate::config::{self, AsService, DEFAULT_INGRESS_MARK, InstanceName, Verify};
use crate::ctl::client;
use crate::daemon::StatusReport;
use crate::instance::Paths;
use crate::instance::paths::netns_inode;
use crate::os::clock::SystemClock;
use crate::os::process;
pub use crate::os::process::Ran;

/// The longest one command, one agent or one service is waited for.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;
/// The most that is read of a file, bytes.
const MAX_FILE: u64 = 4 << 20;

/// The kernel's side of an instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// The capture table exists.
    pub capture_table: bool,
    /// How it differs from what was applied.
    pub drift: Option<String>,
    /// Policy rules and routes that are missing.
    pub missing_routes: Vec<String>,
    /// A guard process answers.
    pub guard_running: bool,
    /// The guard table exists, and has an owner.
    pub guard_table: Option<bool>,
}

/// An instance that answers on its control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Its name.
    pub name: String,
    /// When it read its configuration, seconds since 1970.
    pub config_loaded_at: u64,
}

/// Where the facts come from.
pub trait Host {
    /// Where the file of this absolute path is.
    fn path(&self, absolute: &str) -> PathBuf;
    /// Runs a program to its end, at most [`DEADLINE`].
    fn run(&self, argv: &[&str], input: Option<&str>) -> Ran;
    /// Whether the caller may look everywhere.
    fn is_root(&self) -> bool;
    /// The time.
    fn now(&self) -> SystemTime;
    /// uid and gid of a user.
    fn user(&self, name: &str) -> Option<(u32, u32)>;
    /// Where the configurations are.
    fn config_dir(&self) -> PathBuf;
    /// Where the run-time files are.
    fn runtime_dir(&self) -> PathBuf;
    /// The instances that answer in this network namespace.
    fn running(&self) -> Vec<Running>;
    /// Looks at rules, routes and guard. Only as root.
    fn rules(&self, instance: &InstanceName) -> Result<Rules, NftError>;
    /// The addresses of this host's interfaces.
    fn local_addresses(&self) -> Vec<IpAddr>;
    /// Sends captured SYNs to the instance's own listeners. Only as root.
    ///
    /// # Errors
    /// Nothing was sent, and why.
    fn trial(&self, trials: &[Trial]) -> Result<Vec<Tried>, String>;
    /// Asks the agent for its TEE, as `user` with the groups `more` besides its own when the caller is root.
    fn agent(&self, socket: &Path, user: &str, more: &[&str]) -> Result<String, agent::AgentError>;
    /// Asks the attestation service for its anchors.
    fn service(&self, verify: &Verify, service: &AsService) -> Result<AsSeen, VerifyError>;
    /// Asks the CoCo API server for the TEE of the agent behind it.
    fn api_server(&self, addr: &url::Url) -> Result<String, AttestError> {
        let unreachable = |e: String| AttestError::AaUnreachable(format!("{addr}: {e}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| unreachable(e.to_string()))?.block_on(async {
            let server = AsrAttester::new(addr, false, DEFAULT_INGRESS_MARK, DEADLINE).map_err(unreachable)?;
            server.tee_type().await
        })
    }

    /// Whether the service at `addr` takes a TCP connection; else why not.
    fn connects(&self, addr: &url::Url) -> Result<(), String> {
        let found = addr.socket_addrs(|| None).map_err(|e| e.to_string())?;
        let mut last = "the name has no address".to_owned();
        for address in found.into_iter().take(MAX_ADDRESSES) {
            match TcpStream::connect_timeout(&address, DEADLINE / 2) {
                Ok(_) => return Ok(()),
                Err(e) => last = format!("{address}: {e}"),
            }
        }
        Err(last)
    }

    /// The text of a file, without white space around it; `None` when it cannot be read.
    fn read(&self, absolute: &str) -> Option<String> {
        let mut bytes = Vec::new();
        std::fs::File::open(self.path(absolute)).ok()?.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }
    /// Whether there is such a file.
    fn exists(&self, absolute: &str) -> bool {
        self.path(absolute).exists()
    }
    /// A sysctl by its path below /proc/sys, as a number.
    fn sysctl(&self, name: &str) -> Option<u64> {
        self.read(&format!("/proc/sys/{name}"))?.parse().ok()
    }
    /// Whether systemd runs here.
    fn has_systemd(&self) -> bool {
        self.exists("/run/systemd/system")
    }
    /// Whether a unit is active.
    fn is_active(&self, unit: &str) -> bool {
        self.has_systemd() && self.run(&["systemctl", "is-active", unit], None).text().is_some()
    }
}

/// This host.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealHost;

impl Host for RealHost {
    fn path(&self, absolute: &str) -> PathBuf {
        absolute.into()
    }
    fn run(&self, argv: &[&str], input: Option<&str>) -> Ran {
        process::run(argv, input, DEADLINE)
    }
    fn is_root(&self) -> bool {
        Uid::effective().is_root()
    }
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
    fn user(&self, name: &str) -> Option<(u32, u32)> {
        User::from_name(name).ok().flatten().map(|u| (u.uid.as_raw(), u.gid.as_raw()))
    }
    fn config_dir(&self) -> PathBuf {
        config::config_dir()
    }
    fn runtime_dir(&self) -> PathBuf {
        Paths::current().root().to_owned()
    }
    fn running(&self) -> Vec<Running> {
        let here = netns_inode("self").unwrap_or(0);
        crate::ctl::find(&crate::ctl::runtime_dir())
            .into_iter()
            .filter_map(|i| serde_json::from_slice::<StatusReport>(&client::get(&i.socket, "/status").ok()?).ok())
            .filter(|report| report.netns == here)
            .map(|report| Running { name: report.instance, config_loaded_at: report.config_loaded_at })
            .collect()
    }
    fn rules(&self, instance: &InstanceName) -> Result<Rules, NftError> {
        let paths = Paths::current();
        let (table, guard_table) = (capture_table_name(instance), guard_table_name(instance));
        let capture_table = observe::table_exists(&table)?;
        let guard_table = match nft::list_stateless(&guard_table) {
            Ok(listing) => Some(listing.lines().any(|l| l.trim().trim_end_matches(';') == "flags owner")),
            Err(e) if e.is_absent() => None,
            Err(e) => return Err(e),
        };
        Ok(Rules {
            capture_table,
            drift: observe::drift(&paths, instance, &table)?,
            missing_routes: routes::missing().unwrap_or_else(|e| vec![e.to_string()]),
            guard_running: guard::is_running(&paths, instance),
            guard_table,
        })
    }
    fn local_addresses(&self) -> Vec<IpAddr> {
        let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let address = |a: nix::ifaddrs::InterfaceAddress| {
            let address = a.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        };
        all.filter_map(address).collect()
    }
    fn trial(&self, trials: &[Trial]) -> Result<Vec<Tried>, String> {
        trial::run(self, trials)
    }
    fn agent(&self, socket: &Path, user: &str, more: &[&str]) -> Result<String, agent::AgentError> {
        agent::ask_as(self, socket, user, more)
    }
    fn service(&self, verify: &Verify, service: &AsService) -> Result<AsSeen, VerifyError> {
        let mut service = service.clone();
        service.timeout = service.timeout.min(DEADLINE);
        let verifier = AsVerifier::new(verify, &service, DEFAULT_INGRESS_MARK, std::sync::Arc::new(SystemClock))
            .map_err(VerifyError::AsUnreachable)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| VerifyError::AsUnreachable(e.to_string()))?.block_on(verifier.reach())
    }
}
