//! Processes of ours: started, weighed, and ended by pid whatever happens.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::Outcome;

/// Every child that still runs, for [`stop_all`].
static CHILDREN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// How long a process may take to end after SIGTERM.
const END_WITHIN: Duration = Duration::from_secs(2);

/// One end of a tunnel, with the processes it forked. Ended when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

/// CPU time used and memory held at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weight {
    /// User and system time since the start, all threads, seconds.
    pub cpu_seconds: f64,
    /// Resident memory, KiB.
    pub resident_kib: f64,
}

impl Process {
    /// Starts `command`; what it prints goes to `dir/output`.
    pub fn start(mut command: Command, dir: &Path) -> Outcome<Self> {
        let log = dir.join("output");
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let program = command.get_program().to_owned();
        let child = command.spawn().map_err(|e| format!("{}: {e}", program.display()))?;
        children().insert(child.id() as i32);
        Ok(Self { child, log })
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The last lines it printed.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n  ")
    }

    /// Weight of the process and of all its descendants.
    pub fn weight(&self) -> Outcome<Weight> {
        let mut sum = Weight::default();
        for pid in family(self.child.id() as i32) {
            let stat = Stat::read(pid).ok_or_else(|| format!("process {pid} is gone: {}", self.last_words()))?;
            sum.cpu_seconds += stat.cpu_seconds;
            sum.resident_kib += resident_kib(pid).unwrap_or(0.0);
        }
        Ok(sum)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let root = self.child.id() as i32;
        // Before the root is gone: nginx's workers outlive a killed master and would have no parent to be found by.
        let family = family(root);
        end(&family, root);
        let _ = self.child.wait();
        children().remove(&root);
    }
}

/// Ends every child that still runs. For the ways out that run no `Drop`.
pub fn stop_all() {
    let roots: Vec<i32> = children().iter().copied().collect();
    for root in roots {
        end(&family(root), root);
    }
}

/// The soft limit of descriptors becomes the hard one, for us and for what we start, and must then be `needed` at least.
pub fn raise_descriptor_limit(needed: u64) -> Outcome<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard < needed {
        return Err(format!("{hard} descriptors are allowed, {needed} are needed (ulimit -Hn)").into());
    }
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn children() -> std::sync::MutexGuard<'static, BTreeSet<i32>> {
    CHILDREN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// SIGTERM to the root, then SIGKILL to whoever of the family is left.
fn end(family: &[i32], root: i32) {
    let _ = kill(Pid::from_raw(root), Signal::SIGTERM);
    let deadline = Instant::now() + END_WITHIN;
    let runs = |pid: i32| Stat::read(pid).is_some_and(|stat| stat.state != 'Z');
    while family.iter().any(|pid| runs(*pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    for pid in family.iter().filter(|pid| runs(**pid)) {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
}

/// The fields of proc_pid_stat(5) that matter here.
struct Stat {
    state: char,
    parent: i32,
    cpu_seconds: f64,
}

impl Stat {
    /// `None` when there is no such process any more.
    fn read(pid: i32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold spaces and brackets itself.
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
        let ticks = sysconf(SysconfVar::CLK_TCK).ok()?? as f64;
        let number = |field: usize| fields.get(field - 3).and_then(|f| f.parse::<i64>().ok());
        // utime, stime, and those of children that were waited for.
        let used: i64 = [14, 15, 16, 17].into_iter().filter_map(number).sum();
        Some(Self {
            state: fields.first()?.chars().next()?,
            parent: number(4)? as i32,
            cpu_seconds: used as f64 / ticks,
        })
    }
}

/// `root` and everything that descends from it.
fn family(root: i32) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let parents: Vec<(i32, i32)> = pids.filter_map(|pid| Some((pid, Stat::read(pid)?.parent))).collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

fn resident_kib(pid: i32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}
