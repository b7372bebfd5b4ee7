//! A second wall around the data plane (landlock(7)): whoever takes over the process reads what serving needs and
//! nothing else, and writes, creates and executes nothing (but a TPM or configfs-tsm that it was told to use itself). It also holds where uid 0 runs the data plane, whom file
//! modes do not keep from `/etc/shadow`.
//!
//! Connecting to unix sockets by path (attestation agent, journal, service manager) is not restricted. What the kernel
//! does not know is left out; what is in force is shown in the status.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, LandlockStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope, make_bitflags, path_beneath_rules,
};

use crate::attest::host::HostSource;
use crate::config::{AttestProvider, Config, Endpoint, InstanceName, Report};
use crate::instance::Paths;

/// The newest interface whose rights were thought through here; a newer one could forbid what serving needs.
const NEWEST: ABI = ABI::V6;

/// Libraries that name resolution loads, trust anchors, time zones, and what libc and the runtime ask the kernel.
const SYSTEM: &[&str] = &[
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/etc/ssl",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/share/zoneinfo",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/var/cache/nscd",
    "/proc/self",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
    "/dev/null",
    "/dev/urandom",
];

/// What name resolution and libc read of `/etc`.
const ETC: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/services",
    "/etc/localtime",
    "/etc/ld.so.cache",
];

/// A directory that holds far more than what one file of it is needed for.
const TOO_WIDE: &[&str] = &["/", "/etc", "/usr", "/var", "/run", "/home", "/root", "/srv", "/opt"];

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    abi: Option<i32>,
}

impl Confinement {
    /// `abi 6`, or `absent`.
    pub fn landlock(&self) -> String {
        self.abi.map_or_else(|| "absent".to_owned(), |abi| format!("abi {abi}"))
    }

    /// Says of files that this process may not read why that may be, and what to do.
    pub(super) fn explain(&self, report: &mut Report, instance: &InstanceName) {
        if self.abi.is_none() {
            return;
        }
        let denied = std::io::Error::from_raw_os_error(libc::EACCES).to_string();
        for finding in report.diagnostics.iter_mut().filter(|d| d.message.contains(&denied)) {
            finding.hint = Some(format!(
                "Landlock keeps the running data plane to the directories whose files it was started with; the file \
                 must be readable by its user, and then a restart is needed: systemctl restart tng@{instance}"
            ));
        }
    }
}

/// Confines the calling thread and all that it starts. Call it when sockets are bound and privileges dropped, before
/// the first thread. A kernel without Landlock, or one that refuses, is logged and not an error.
pub fn confine(paths: &Paths, config: &Config) -> Confinement {
    let abi = match restrict(&readable(paths, config), &writable(config)) {
        Ok(abi) => abi,
        Err(error) => {
            tracing::warn!(reason = "landlock-failed", %error, "the data plane is not confined by Landlock");
            return Confinement { abi: None };
        }
    };
    let confinement = Confinement { abi };
    tracing::info!(landlock = confinement.landlock(), "confined");
    confinement
}

/// Leaves nothing of the file system but `directory`, in which directories may be made and files be written. Descriptors
/// that are open stay usable.
pub(super) fn confine_to(directory: &Path) {
    if let Err(error) = restrict(&[], &[directory.to_owned()]) {
        tracing::warn!(reason = "landlock-failed", %error, "the helper is not confined by Landlock");
    }
}

fn restrict(readable: &[PathBuf], writable: &[PathBuf]) -> Result<Option<i32>, RulesetError> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let write = read | make_bitflags!(AccessFs::{WriteFile | MakeDir | RemoveDir});
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .scope(scopes(std::env::var_os("NOTIFY_SOCKET").as_deref()))?
        .create()?
        .add_rules(path_beneath_rules(readable, read))?
        .add_rules(path_beneath_rules(writable, write))?
        .restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => None,
        (_, LandlockStatus::Available { effective_abi, .. }) => Some((effective_abi as i32).min(NEWEST as i32)),
        _ => None,
    })
}

/// A service manager in a container may listen on an abstract socket, which it must go on to be told of.
fn scopes(notify_socket: Option<&OsStr>) -> BitFlags<Scope> {
    if notify_socket.is_some_and(|s| s.as_bytes().starts_with(b"@")) {
        Scope::Signal.into()
    } else {
        Scope::from_all(NEWEST)
    }
}

fn readable(paths: &Paths, config: &Config) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    all.push(paths.root().to_owned());
    if nix::unistd::geteuid().is_root() {
        all.extend(ETC.iter().map(PathBuf::from));
    } else {
        // Other programs replace these files by renaming new ones into their place, which rules for the old files
        // know nothing of. File modes keep secrets from a user who is not root.
        all.push("/etc".into());
    }
    for variable in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
        all.extend(std::env::var_os(variable).map(PathBuf::from));
    }
    for file in files_of(config) {
        around(&file, &mut all);
        // The kernel judges the place a link leads to.
        if let Ok(real) = file.canonicalize() {
            around(&real, &mut all);
        }
    }
    all
}

/// What evidence is made with where the configuration asks for it to be made in this process.
fn writable(config: &Config) -> Vec<PathBuf> {
    let attest = config.endpoints.iter().filter_map(|e| e.ra.attest.as_ref());
    let path = |provider: &AttestProvider| match provider {
        AttestProvider::Direct(HostSource::Tsm(settings)) => Some(settings.root.clone()),
        AttestProvider::Direct(HostSource::Tpm(settings)) => Some(settings.address.path().to_owned()),
        _ => None,
    };
    attest.filter_map(|a| path(&a.provider)).collect()
}

/// Files that a configuration names, and itself.
fn files_of(config: &Config) -> Vec<PathBuf> {
    let named = config.endpoints.iter().flat_map(Endpoint::files);
    std::path::absolute(&config.source).into_iter().chain(named).collect()
}

/// The directory of `file`, so that a new file in its place can be read.
fn around(file: &Path, all: &mut Vec<PathBuf>) {
    match file.parent() {
        Some(dir) if !TOO_WIDE.iter().any(|wide| dir == Path::new(wide)) => all.push(dir.to_owned()),
        _ => all.push(file.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stands_for_its_directory_unless_that_holds_everything() {
        let of = |file: &str| {
            let mut all = Vec::new();
            around(Path::new(file), &mut all);
            all
        };
        assert_eq!(of("/etc/tng/in.toml"), [PathBuf::from("/etc/tng")]);
        assert_eq!(of("/etc/in.toml"), [PathBuf::from("/etc/in.toml")]);
        assert_eq!(of("/in.toml"), [PathBuf::from("/in.toml")]);
    }

    #[test]
    fn an_abstract_notification_socket_stays_reachable() {
        assert_eq!(scopes(Some(OsStr::new("@/notify"))), Scope::Signal);
        assert_eq!(scopes(Some(OsStr::new("/run/systemd/notify"))), Scope::Signal | Scope::AbstractUnixSocket);
        assert_eq!(scopes(None), Scope::Signal | Scope::AbstractUnixSocket);
    }
}
