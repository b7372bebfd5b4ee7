//! A host made of files in a directory and answers of commands. The one that [`FakeHost::new`] makes is whole.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tng::attest::{AsSeen, VerifyError};
use tng::capture::nft::NftError;
use tng::config::{AsKind, AsService, InstanceName, Verify};
use tng::ctl::doctor::{AgentError, Check, Fate, Finding, Host, Ran, Rules, Running, Severity, Trial, Tried, examine};

/// Some day in 2026.
pub const NOW: Duration = Duration::from_secs(1_780_000_000);
/// uid and gid of the data plane.
const TNG: u32 = 61_000;
/// The kernel's list of a table that nobody else is in.
const IP_RULES: &str = r#"[{"priority":0,"src":"all","table":"local"},{"priority":565,"src":"all","fwmark":"0x600","fwmask":"0xff00","table":"565","protocol":"116"},{"priority":32766,"src":"all","table":"main"}]"#;

/// The instance `in`: a capture by cgroup, an agent, a service.
const CONFIG: &str = r#"
[[ingress]]
name = "in"
[ingress.netfilter]
capture = [
  { to = "203.0.113.0/24", port = 8080, cgroup = "system.slice" },
  { to = "198.51.100.0/24", port = 8080 },
]
[ingress.verify]
as_addr = "http://127.0.0.1:8080/"
policy_ids = ["default"]
[ingress.attest]
aa_addr = "unix:///run/tng/aa.sock"
"#;

/// See the module.
pub struct FakeHost {
    dir: tempfile::TempDir,
    answers: BTreeMap<String, Ran>,
    /// Every command that was run.
    pub ran: RefCell<Vec<String>>,
    pub root: bool,
    pub now: SystemTime,
    pub user: Option<(u32, u32)>,
    pub running: Vec<Running>,
    pub rules: Result<Rules, String>,
    pub agent: Result<String, AgentError>,
    pub service: Result<AsSeen, VerifyError>,
    /// What becomes of a trial SYN.
    pub fate: Fate,
    _agent_socket: UnixListener,
}

pub fn done(stdout: &str) -> Ran {
    Ran::Done { ok: true, stdout: stdout.to_owned(), stderr: String::new() }
}

pub fn failed(stderr: &str) -> Ran {
    Ran::Done { ok: false, stdout: String::new(), stderr: stderr.to_owned() }
}

impl FakeHost {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let run = dir.path().join("run/tng");
        std::fs::create_dir_all(&run).expect("run");
        let agent_socket = UnixListener::bind(run.join("aa.sock")).expect("socket");
        let date = Some(UNIX_EPOCH + NOW);
        let mut host = Self {
            dir,
            answers: BTreeMap::new(),
            ran: RefCell::default(),
            root: true,
            now: UNIX_EPOCH + NOW,
            user: Some((TNG, TNG)),
            running: vec![Running { name: "in".into(), config_loaded_at: u64::MAX }],
            rules: Ok(Rules {
                capture_table: true,
                drift: None,
                missing_routes: Vec::new(),
                guard_running: true,
                guard_table: Some(true),
            }),
            agent: Ok("tdx".into()),
            service: Ok(AsSeen { kind: AsKind::Rest, anchors: "JWKS of http://127.0.0.1:8080".into(), date }),
            fate: Fate::Answered,
            _agent_socket: agent_socket,
        };
        for (file, text) in [
            ("/proc/sys/kernel/osrelease", "6.1.0-25-amd64"),
            ("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "0"),
            ("/proc/net/if_inet6", ""),
            ("/proc/net/ip_tables_names", ""),
            ("/proc/sys/net/core/somaxconn", "4096"),
            ("/proc/sys/net/netfilter/nf_conntrack_count", "10"),
            ("/proc/sys/net/netfilter/nf_conntrack_max", "262144"),
            ("/proc/sys/kernel/yama/ptrace_scope", "1"),
            ("/sys/fs/cgroup/cgroup.controllers", "cpu"),
            ("/sys/fs/cgroup/system.slice/cgroup.procs", ""),
            ("/run/systemd/system/x", ""),
            ("/dev/tdx_guest", ""),
            ("/etc/nftables.conf", "table inet filter {}\n"),
        ] {
            host.write(file, text);
        }
        host.config(CONFIG);
        host.answer("nft --version", done("nftables v1.0.6 (Lester Gooch #5)"));
        host.answer("unshare", done(""));
        host.answer("ip", done(IP_RULES));
        host.answer("nft list tables", done("table inet filter\ntable inet tng_in\n"));
        host.answer("nft -j list table", done(r#"{"nftables":[{"metainfo":{}}]}"#));
        host.answer("systemctl --version", done("systemd 252 (252.39-1~deb12u2)\n+PAM"));
        host.answer("systemctl is-active", failed(""));
        host.answer("timedatectl", done("yes\n"));
        host.unit("", "", "");
        host
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file of the host.
    pub fn write(&self, file: &str, text: &str) {
        let path = self.path(file);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        std::fs::write(path, text).expect("write");
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).expect("remove");
    }

    /// The instance's file, as the package's user may read it.
    pub fn config(&self, toml: &str) {
        self.write("/etc/tng/in.toml", toml);
        self.mode(0o640);
        let dir = self.config_dir();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o750)).expect("mode");
        for path in [dir.join("in.toml"), dir] {
            chown(path, Some(0), Some(TNG)).expect("needs root");
        }
    }

    pub fn mode(&self, mode: u32) {
        let file = self.config_dir().join("in.toml");
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).expect("mode");
    }

    /// The instance's file belongs to somebody else.
    pub fn owner(&self, uid: u32, mode: u32) {
        chown(self.config_dir().join("in.toml"), Some(uid), None).expect("needs root");
        self.mode(mode);
    }

    /// Who may go through the directory may read what is readable in it.
    pub fn dir_mode(&self, mode: u32) {
        std::fs::set_permissions(self.config_dir(), std::fs::Permissions::from_mode(mode)).expect("mode");
    }

    /// What a command that begins so answers. The longest beginning counts.
    pub fn answer(&mut self, beginning: &str, ran: Ran) {
        self.answers.insert(beginning.to_owned(), ran);
    }

    /// `systemctl show` of the three units; more lines each.
    pub fn unit(&mut self, socket: &str, service: &str, guard: &str) {
        let good = "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=no\n";
        let confined = "User=tng\nAmbientCapabilities=cap_net_raw\nNoNewPrivileges=yes\nProtectSystem=strict\n\
                        MemoryDenyWriteExecute=yes\nNRestarts=0\n";
        // Of a key that comes twice the last counts.
        let text = format!("{good}{socket}\n\n{good}{confined}{service}\n\n{good}{guard}\n");
        self.answer("systemctl show", done(&text));
    }

    pub fn rules(&mut self) -> &mut Rules {
        self.rules.as_mut().expect("rules")
    }

    /// All findings.
    pub fn examine(&self) -> Vec<Finding> {
        examine(self, None)
    }

    /// The worst that `check` found.
    #[track_caller]
    pub fn worst(&self, check: Check) -> Finding {
        let all = self.examine();
        let of_check = all.iter().filter(|f| f.check == check);
        of_check
            .min_by_key(|f| std::cmp::Reverse(f.severity))
            .unwrap_or_else(|| panic!("{check:?} found nothing: {all:?}"))
            .clone()
    }

    /// What is not well, by severity.
    pub fn problems(&self, at_least: Severity) -> Vec<Finding> {
        self.examine().into_iter().filter(|f| f.severity >= at_least).collect()
    }
}

impl Host for FakeHost {
    fn path(&self, absolute: &str) -> PathBuf {
        self.dir.path().join(absolute.trim_start_matches('/'))
    }
    fn run(&self, argv: &[&str], _: Option<&str>) -> Ran {
        let program = Path::new(argv[0]).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let line = [&[&*program], &argv[1..]].concat().join(" ");
        self.ran.borrow_mut().push(line.clone());
        let known = self.answers.iter().filter(|(beginning, _)| line.starts_with(beginning.as_str()));
        known.max_by_key(|(b, _)| b.len()).map_or(Ran::NotRun(format!("{program}: not found")), |(_, ran)| ran.clone())
    }
    fn is_root(&self) -> bool {
        self.root
    }
    fn now(&self) -> SystemTime {
        self.now
    }
    fn user(&self, _: &str) -> Option<(u32, u32)> {
        self.user
    }
    fn config_dir(&self) -> PathBuf {
        self.path("/etc/tng")
    }
    fn runtime_dir(&self) -> PathBuf {
        self.path("/run/tng")
    }
    fn running(&self) -> Vec<Running> {
        self.running.clone()
    }
    fn rules(&self, _: &InstanceName) -> Result<Rules, NftError> {
        self.rules.clone().map_err(NftError::Refused)
    }
    fn local_addresses(&self) -> Vec<IpAddr> {
        ["127.0.0.1", "::1", "192.0.2.11"].map(|a| a.parse().expect("address")).to_vec()
    }
    fn trial(&self, trials: &[Trial]) -> Result<Vec<Tried>, String> {
        let tried = |trial: &Trial| Tried { trial: trial.clone(), to: None, fate: self.fate.clone(), steps: None };
        Ok(trials.iter().map(tried).collect())
    }
    fn agent(&self, _: &Path, user: &str, _: &[&str]) -> Result<String, AgentError> {
        assert!(user == "tng" || user == "root", "{user}");
        self.agent.clone()
    }
    fn service(&self, _: &Verify, _: &AsService) -> Result<AsSeen, VerifyError> {
        self.service.clone()
    }
}
