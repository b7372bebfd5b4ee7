//! `tng-generator`, a systemd.generator(7): the files of `/etc/tng` become drop-ins, so that they stay the only place
//! where an instance is described. It never fails a boot: what is wrong with a file is logged, and shown by the unit.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use super::prepare::{listen_drop_in, problem_drop_in};
use super::{drop_in, manager};
use crate::capture::allocation::{Allocations, port_is_free};
use crate::capture::order;
use crate::config::{self, Config, InstanceName};
use crate::daemon::listeners;
use crate::instance::{Paths, in_force};

/// The name under which tngd is a generator.
pub const PROGRAM: &str = "tng-generator";
/// From here on systemd has Type=notify-reload.
const NOTIFY_RELOAD_SINCE: u32 = 253;
const UNIT_DIRS: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];

/// Writes all drop-ins into `dir`, the first of the three directories that systemd names.
pub fn run(dir: &Path) {
    let paths = Paths::current();
    let mut files = config::list_instances().unwrap_or_else(|report| {
        say(&report.to_string());
        Vec::new()
    });
    // An instance that is up keeps its sockets also when its file is gone.
    let up = in_force::instances(&paths).into_iter().map(|name| config::config_dir().join(format!("{name}.toml")));
    files.extend(up.filter(|file| !file.exists()));
    let allocations = Allocations::load(&paths).unwrap_or_else(|e| {
        say(&e.to_string());
        Allocations::default()
    });
    let mut generator = Generator {
        dir,
        paths,
        allocations,
        early_guards: target_is_enabled(),
        ipv6: listeners::has_ipv6(),
        named: order::named_ports(&files),
        instances: Vec::new(),
    };
    for file in &files {
        generator.complain(file, |g| g.instance(file));
    }
    // Not links in tng.target.wants: `systemctl is-enabled tng@NAME` would take them for an enabled instance.
    let wants = dir.join("tng.target.d/50-instances.conf");
    generator.complain(&wants, |g| put(&wants, &drop_in::wants(&g.instances)));
    if !files.is_empty() && manager::version().is_some_and(|v| v >= NOTIFY_RELOAD_SINCE) {
        let reload = dir.join("tng@.service.d/50-notify-reload.conf");
        generator.complain(&reload, |_| put(&reload, &drop_in::notify_reload()));
    }
}

struct Generator<'a> {
    dir: &'a Path,
    paths: Paths,
    /// Ids and ports as recorded, and those that the instances before will be given.
    allocations: Allocations,
    /// `tng.target` starts with the host, and all instances with it: their guards must come before the network.
    early_guards: bool,
    ipv6: bool,
    /// Ports that the files name themselves.
    named: BTreeSet<u16>,
    /// What `tng.target` wants.
    instances: Vec<InstanceName>,
}

impl Generator<'_> {
    fn complain(&mut self, what: &Path, step: impl FnOnce(&mut Self) -> io::Result<()>) {
        if let Err(e) = step(self) {
            say(&format!("{}: {e}", what.display()));
        }
    }

    fn instance(&mut self, file: &Path) -> io::Result<()> {
        let name = match config::instance_of(file) {
            Ok(name) => name,
            Err(report) => {
                say(&report.to_string());
                return Ok(());
            }
        };
        self.instances.push(name.clone());
        if self.early_guards {
            self.want("sysinit.target.wants", &format!("tng-guard@{name}.service"), "tng-guard@.service")?;
        }
        match in_force::load_or_last_good(&self.paths, file) {
            Ok(loaded) => {
                if let Some(report) = &loaded.problem {
                    self.refused(&name, &report.to_string())?;
                }
                // The sockets of a unit that is up must stay as they are, whatever the file says by now: systemd
                // closes those that a daemon-reload no longer finds. A changed file counts after a reload or restart.
                let config = in_force::current(&self.paths, file).map_or(loaded.config, |current| current.config);
                self.listeners(&config)
            }
            Err(report) => self.refused(&name, &report.to_string()),
        }
    }

    fn listeners(&mut self, config: &Config) -> io::Result<()> {
        let named = &self.named;
        let slots = match self.allocations.assign(config, 0, |port| !named.contains(&port) && port_is_free(port)) {
            Ok(slots) => slots,
            Err(e) => return self.refused(&config.instance, &e.to_string()),
        };
        match listeners::specs(config, Some(&slots)) {
            Ok(specs) => put(&listen_drop_in(self.dir, &config.instance), &drop_in::listen(&specs, self.ipv6))?,
            Err(e) => return self.refused(&config.instance, &e.to_string()),
        }
        match drop_in::slices(config) {
            Some(text) => put(&self.dir.join(format!("tng-guard@{}.service.d/50-slices.conf", config.instance)), &text),
            None => Ok(()),
        }
    }

    fn refused(&self, name: &InstanceName, problem: &str) -> io::Result<()> {
        say(problem);
        let first = problem.lines().next().unwrap_or_default();
        put(&problem_drop_in(self.dir, name), &drop_in::problem(name.as_str(), first))
    }

    fn want(&self, by: &str, unit: &str, template: &str) -> io::Result<()> {
        let dir = self.dir.join(by);
        fs::create_dir_all(&dir)?;
        symlink(unit_file(template), dir.join(unit))
    }
}

fn put(path: &Path, text: &str) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(path, text)
}

fn unit_file(name: &str) -> PathBuf {
    let found = UNIT_DIRS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| Path::new(UNIT_DIRS[0]).join(name))
}

/// Whether some enabled unit wants `tng.target` (`systemctl enable tng.target`).
fn target_is_enabled() -> bool {
    let Ok(entries) = fs::read_dir("/etc/systemd/system") else { return false };
    let wants = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "wants"));
    wants.into_iter().any(|dir| dir.join("tng.target").symlink_metadata().is_ok())
}

/// To the journal when there is one already, else to the kernel's log, which journald takes over when it starts
/// (systemd.generator(7): a generator's own output goes nowhere). Run by hand: to standard error.
fn say(text: &str) {
    let by_systemd = std::env::var_os("SYSTEMD_SCOPE").is_some();
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        if !by_systemd || to_journal(line).is_err() && to_kernel(line).is_err() {
            crate::output::complain(&format!("{PROGRAM}: {line}"));
        }
    }
}

fn to_journal(line: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let entry = format!("PRIORITY=3\nSYSLOG_IDENTIFIER={PROGRAM}\nTNG_REASON=config-invalid\nMESSAGE={line}\n");
    socket.send_to(entry.as_bytes(), "/run/systemd/journal/socket").map(drop)
}

fn to_kernel(line: &str) -> io::Result<()> {
    let mut kmsg = fs::OpenOptions::new().write(true).open("/dev/kmsg")?;
    kmsg.write_all(format!("<3>{PROGRAM}: {line}\n").as_bytes())
}
