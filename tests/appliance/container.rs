//! A booted Debian: systemd-nspawn over a cached root file system that stays as it is.
//!
//! Its mounts live in a mount namespace of its own and end with it; what it wrote is in a directory that is
//! removed with the value. A container that is stopped and started again has the same files.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::netns::{Output, Proc, run, wait_until};
use super::wire::{BRIDGE, Wire};

/// Every container, cgroup and directory of ours begins so; `PREFIX<pid>-<name>`.
const PREFIX: &str = "tngapp-";
/// Where the hierarchies are that nspawn may use; it takes what is there.
const CGROUPS: [&str; 3] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup"];
/// From the start to a finished boot. It takes two seconds; four at once on two cores with a build beside take more.
const BOOT: Duration = Duration::from_secs(60);
/// For an orderly end.
const POWEROFF: Duration = Duration::from_secs(60);
/// For one command, in seconds, where the caller says nothing.
const COMMAND: u64 = 60;

/// The environment in which commands run, as a root login has it.
const ENV: [&str; 4] =
    ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb"];

/// What nspawn runs in, from the outside in: cgroup, private mounts, the overlay, nspawn itself. Of the system calls that
/// nspawn's own filter leaves out, and a machine does not, it allows those that tng uses.
const LAUNCH: &str = r#"
set -eu
dir=$1 lower=$2 machine=$3 bridge=$4 repository=$5 cgroups=$6
for group in $cgroups; do echo $$ > "$group/cgroup.procs"; done
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" "$dir/root"
exec env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --directory="$dir/root" --boot \
    --machine="$machine" --hostname="${machine##*-}" --network-bridge="$bridge" --bind-ro="$repository":/srv/tng-repository \
    --register=no --keep-unit --link-journal=no --console=pipe \
    --system-call-filter="pidfd_getfd landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"#;

/// A host of the test.
pub struct Container {
    /// What messages call it: `debian12`.
    pub name: String,
    machine: String,
    dir: PathBuf,
    lower: PathBuf,
    repository: PathBuf,
    nspawn: RefCell<Option<Proc>>,
    leader: Cell<i32>,
}

impl Container {
    /// A container over `lower`, not yet booted. `repository` will be at /srv/tng-repository.
    pub fn new(run: &str, name: &str, lower: &Path, repository: &Path) -> Self {
        let machine = format!("{PREFIX}{}-{run}-{name}", std::process::id());
        let scratch = Path::new("/dev/shm");
        let scratch = if scratch.is_dir() { scratch.to_owned() } else { std::env::temp_dir() };
        let dir = scratch.join(&machine);
        for part in ["upper", "work", "root"] {
            fs::create_dir_all(dir.join(part)).expect("scratch directory");
        }
        // The upper directory is the container's "/".
        fs::set_permissions(dir.join("upper"), fs::Permissions::from_mode(0o755)).expect("mode");
        Self {
            name: name.to_owned(),
            machine,
            dir,
            lower: lower.to_owned(),
            repository: repository.to_owned(),
            nspawn: RefCell::default(),
            leader: Cell::default(),
        }
    }

    /// Writes a file before a boot.
    pub fn prepare(&self, path: &str, text: &str) {
        assert!(!self.is_on(), "{} runs: an overlay's upper directory must not change below it", self.name);
        write_file(&self.dir.join("upper"), path, text);
    }

    /// Starts the boot on `wire` and returns at once.
    pub fn boot(&self, wire: &Wire) {
        assert!(!self.is_on(), "{} runs already", self.name);
        let mut groups = Vec::new();
        for hierarchy in CGROUPS {
            let group = Path::new(hierarchy).join(&self.machine);
            // Of a hybrid host the third is a tmpfs, of a unified host the first two are missing.
            let is_hierarchy = Path::new(hierarchy).join("cgroup.procs").exists();
            if is_hierarchy && fs::create_dir_all(&group).is_ok() {
                groups.push(group.to_string_lossy().into_owned());
            }
        }
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", wire.netns()));
        command.args(["--", "unshare", "--mount", "--propagation", "private", "--", "sh", "-c", LAUNCH, "boot"]);
        command.args([&self.dir, &self.lower]).args([&self.machine, BRIDGE]);
        command.arg(&self.repository).arg(groups.join(" "));
        *self.nspawn.borrow_mut() = Some(Proc::spawn(command));
    }

    /// Waits until the boot reached its end.
    #[track_caller]
    pub fn wait_booted(&self) {
        let end = Instant::now() + BOOT;
        {
            let mut nspawn = self.nspawn.borrow_mut();
            let nspawn = nspawn.as_mut().expect("booting");
            let mut leader = None;
            wait_until(BOOT, || {
                leader = leader_of(nspawn.pid());
                leader.is_some() || nspawn.exited().is_some()
            });
            let Some(leader) = leader else {
                panic!("{} does not start:\n{}", self.name, nspawn.output());
            };
            self.leader.set(leader);
        }
        let mut state = String::new();
        let booted = wait_until(end.saturating_duration_since(Instant::now()), || {
            state = self.try_sh("systemctl is-system-running --wait").stdout;
            matches!(state.trim(), "running" | "degraded")
        });
        if !booted {
            panic!("{} does not finish its boot ({}):\n{}", self.name, state.trim(), self.console());
        }
    }

    /// Whether it was booted and not powered off.
    pub fn is_on(&self) -> bool {
        self.nspawn.borrow().is_some()
    }

    /// What came over its console.
    pub fn console(&self) -> String {
        self.nspawn.borrow().as_ref().map(Proc::output).unwrap_or_default()
    }

    /// Orderly power off, and wait for the end.
    #[track_caller]
    pub fn power_off(&self) {
        let Some(mut nspawn) = self.nspawn.take() else { return };
        // SIGTERM to nspawn is the power button.
        nspawn.signal(Signal::SIGTERM);
        let ended = wait_until(POWEROFF, || nspawn.exited().is_some());
        let console = nspawn.output();
        drop(nspawn);
        self.end_cgroups();
        assert!(ended, "{} does not power off:\n{console}", self.name);
    }

    /// A command inside, which may take `seconds`.
    pub fn command(&self, seconds: u64, words: &[&str]) -> Command {
        let leader = self.leader.get();
        let mut command = Command::new("timeout");
        command.args(["-k", "2", &seconds.to_string(), "nsenter", "-t", &leader.to_string()]);
        command.args(["-m", "-u", "-i", "-n", "-p", "-C", &format!("--root=/proc/{leader}/root"), "--wdns=/"]);
        command.args(["env", "-i"]).args(ENV).args(words);
        command
    }

    /// Runs a shell line inside to its end.
    pub fn try_sh(&self, line: &str) -> Output {
        let mut out = run(self.command(COMMAND, &["sh", "-euc", line]));
        out.command = format!("{}# {line}", self.name);
        out
    }

    /// The same; any failure is a panic.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        self.try_sh(line).expect_ok()
    }

    /// Whether a shell line ends with 0.
    pub fn holds(&self, line: &str) -> bool {
        self.try_sh(line).ok()
    }

    /// A program inside that reads commands or the end of its life from standard input.
    pub fn spawn_piped(&self, seconds: u64, words: &[&str]) -> std::process::Child {
        let mut command = self.command(seconds, words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command.spawn().unwrap_or_else(|e| panic!("{}: cannot start {words:?}: {e}", self.name))
    }

    /// Writes a file inside, while it runs.
    pub fn write(&self, path: &str, text: &str) {
        write_file(&self.root(), path, text);
    }

    /// Copies a program of the test's host in.
    pub fn install_program(&self, from: &Path, path: &str) {
        let to = self.root().join(path.trim_start_matches('/'));
        fs::copy(from, &to).unwrap_or_else(|e| panic!("{} to {}: {e}", from.display(), to.display()));
    }

    /// Reads a file inside, while it runs.
    #[track_caller]
    pub fn read(&self, path: &str) -> String {
        let file = self.root().join(path.trim_start_matches('/'));
        fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {path}: {e}", self.name))
    }

    /// The running container's "/".
    fn root(&self) -> PathBuf {
        assert!(self.is_on(), "{} is off", self.name);
        PathBuf::from(format!("/proc/{}/root", self.leader.get()))
    }

    /// The id, as the test's host counts, of the process that the container calls `inner`.
    #[track_caller]
    pub fn outer_pid(&self, inner: i32) -> i32 {
        let namespace = fs::read_link(format!("/proc/{}/ns/pid", self.leader.get())).expect("pid namespace");
        let found = processes().into_iter().find(|pid| {
            fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|ns| ns == namespace) && ns_pid(*pid) == Some(inner)
        });
        found.unwrap_or_else(|| panic!("{}: no process {inner}", self.name))
    }

    /// Main process of a unit as the container counts; `None` while it has none.
    pub fn main_pid(&self, unit: &str) -> Option<i32> {
        let out = self.try_sh(&format!("systemctl show -P MainPID {unit}"));
        out.stdout.trim().parse().ok().filter(|pid| *pid > 0)
    }

    /// One property of a unit.
    #[track_caller]
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.sh(&format!("systemctl show -P {name} {unit}")).trim().to_owned()
    }

    fn end_cgroups(&self) {
        for hierarchy in CGROUPS {
            let group = Path::new(hierarchy).join(&self.machine);
            if group.is_dir() {
                let _ = fs::write(group.join("cgroup.kill"), "1");
                wait_until(Duration::from_secs(5), || remove_groups(&group));
            }
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(nspawn) = self.nspawn.take() {
            // The container's first process dies with nspawn, and everything in it with that one.
            drop(nspawn);
            wait_until(Duration::from_secs(5), || !Path::new(&format!("/proc/{}", self.leader.get())).exists());
        }
        self.end_cgroups();
        // No mount is left in there: it was in the namespace that just ended.
        wait_until(Duration::from_secs(5), || fs::remove_dir_all(&self.dir).is_ok());
    }
}

/// Removes what a test process left that was killed before it could.
pub fn sweep() {
    let names = CGROUPS.iter().copied().chain(["/dev/shm", "/tmp"]).filter_map(|dir| fs::read_dir(dir).ok());
    let mut stale: Vec<PathBuf> = names.flatten().flatten().map(|entry| entry.path()).collect();
    stale.retain(|path| {
        let pid = path.file_name().and_then(|n| n.to_str()?.strip_prefix(PREFIX)?.split('-').next().map(str::to_owned));
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    });
    for path in stale {
        if path.starts_with("/sys") {
            let _ = fs::write(path.join("cgroup.kill"), "1");
            wait_until(Duration::from_secs(5), || remove_groups(&path));
        } else {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Removes a cgroup and those below it; whether it is gone.
fn remove_groups(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok() || !group.exists()
}

fn write_file(root: &Path, path: &str, text: &str) {
    let file = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(file.parent().expect("a file has a directory")).expect("directory");
    // In place, as an editor that keeps owner and mode does.
    let mut open = fs::File::create(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    open.write_all(text.as_bytes()).expect("write");
}

/// The first process of the container that `nspawn` runs.
fn leader_of(nspawn: i32) -> Option<i32> {
    let child = processes().into_iter().find(|pid| field(*pid, "PPid").is_some_and(|p| p == nspawn.to_string()))?;
    // nspawn's helper has not entered the namespace yet, or is not init.
    (ns_pid(child) == Some(1)).then_some(child)
}

fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What a process is called in the innermost pid namespace; `None` in the outermost.
fn ns_pid(pid: i32) -> Option<i32> {
    let ids = field(pid, "NSpid")?;
    let ids: Vec<&str> = ids.split_whitespace().collect();
    if ids.len() < 2 { None } else { ids.last()?.parse().ok() }
}

/// A field of /proc/PID/status.
pub fn field(pid: i32, name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// SIGKILL to a process as the test's host counts.
pub fn kill_9(pid: i32) {
    // ESRCH: it ended by itself in the meantime.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}
