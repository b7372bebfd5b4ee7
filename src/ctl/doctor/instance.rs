//! The instances, and their files: valid, readable by the data plane and by nobody who should not, in force.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::finding::{Check, Finding};
use super::host::{Host, Running};
use crate::config::{self, Config, InstanceName, Mode, guard_can_read, readable};

/// User and group of the data plane.
pub(super) const USER: &str = "tng";

/// One instance to look at.
pub(super) struct Instance {
    pub name: String,
    /// Its file, which may be gone.
    pub file: PathBuf,
    /// What the file says, or what is wrong with it.
    pub config: Result<Config, config::Report>,
    /// It answers.
    pub running: Option<Running>,
}

impl Instance {
    /// Whether it captures, as far as one can tell: of a broken file one has to assume it.
    pub fn captures(&self) -> bool {
        let captures = |c: &Config| c.endpoints.iter().any(|e| matches!(e.mode, Mode::Netfilter(_)));
        self.config.as_ref().map_or(true, captures)
    }

    /// The name, if it is a legal one.
    pub fn legal_name(&self) -> Option<InstanceName> {
        InstanceName::new(&self.name).ok()
    }
}

/// What the configurations need of the host.
#[derive(Debug, Default)]
pub(super) struct Wants {
    /// Any capture.
    pub captures: bool,
    /// Instance and cgroup path of captures by cgroup.
    pub slices: Vec<(String, String)>,
}

impl Wants {
    pub fn of(instances: &[Instance]) -> Self {
        let mut wants = Self { captures: instances.iter().any(Instance::captures), slices: Vec::new() };
        for (instance, config) in instances.iter().filter_map(|i| Some((i, i.config.as_ref().ok()?))) {
            for endpoint in &config.endpoints {
                let Mode::Netfilter(netfilter) = &endpoint.mode else { continue };
                let entries = netfilter.capture.iter().chain(&netfilter.exclude);
                let paths = entries.filter_map(|m| m.cgroup.as_ref()).map(|c| (instance.name.clone(), c.0.clone()));
                wants.slices.extend(paths);
            }
        }
        wants.slices.sort();
        wants.slices.dedup();
        wants
    }
}

/// The instances' files in a directory.
fn listed(dir: &Path) -> Vec<PathBuf> {
    let listed = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let is_file = |p: &PathBuf| {
        let hidden = p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        !hidden && p.extension().is_some_and(|e| e == "toml")
    };
    listed.filter(is_file).collect()
}

/// What the files of a directory say, as far as they are good.
pub(super) fn configs(dir: &Path) -> Vec<Config> {
    let good = |file: PathBuf| config::load(&file).ok().map(|loaded| loaded.config);
    listed(dir).into_iter().filter_map(good).collect()
}

/// The one that is named, or all that have a file or run.
pub(super) fn find(host: &dyn Host, only: Option<&str>) -> Vec<Instance> {
    let running = host.running();
    let dir = host.config_dir();
    let files: Vec<PathBuf> = match only {
        Some(name) if name.contains('/') || name.ends_with(".toml") => vec![name.into()],
        Some(name) => vec![dir.join(format!("{name}.toml"))],
        None => {
            let mut files = listed(&dir);
            files.extend(running.iter().map(|r| dir.join(format!("{}.toml", r.name))));
            files.sort();
            files.dedup();
            files
        }
    };
    let instance = |file: PathBuf| {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let running = running.iter().find(|r| r.name == name).cloned();
        Instance { config: config::load(&file).map(|l| l.config), name, file, running }
    };
    files.into_iter().map(instance).collect()
}

/// The user, and each file.
pub(super) fn check(host: &dyn Host, instances: &[Instance]) -> Vec<Finding> {
    let user = host.user(USER);
    // Without systemd, `tngd run` needs no such user.
    let missing =
        |check, what: String| if host.has_systemd() { Finding::error(check, what) } else { Finding::note(check, what) };
    let mut found = vec![match user {
        Some((uid, gid)) => Finding::ok(Check::User, format!("user {USER} is {uid}:{gid}")),
        None => missing(Check::User, format!("there is no user {USER}"))
            .why("under systemd the data plane runs as this user; its unit does not start without it")
            .fix("systemd-sysusers tng.conf || adduser --system --group --no-create-home --home /nonexistent tng"),
    }];
    let may_list =
        !std::fs::read_dir(host.config_dir()).is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied);
    if instances.is_empty() && !may_list {
        found.push(Finding::needs_root(Check::ConfigValid));
    } else if instances.is_empty() {
        let what = format!("no instance: {} holds no *.toml", host.config_dir().display());
        found.push(Finding::note(Check::ConfigValid, what).why("nothing is captured or protected").fix(
            "ls /usr/share/doc/tng/examples  # copy one to /etc/tng/NAME.toml, then: systemctl enable --now tng@NAME",
        ));
    }
    for instance in instances {
        found.push(valid(host, instance));
        found.extend(access(instance, user));
        found.extend(guard_access(instance));
        found.extend(applied(host, instance));
    }
    found
}

fn valid(host: &dyn Host, instance: &Instance) -> Finding {
    let (check, name) = (Check::ConfigValid, instance.name.as_str());
    let report = match &instance.config {
        Ok(config) => {
            let what = format!("{} is valid, {} endpoints", config.source.display(), config.endpoints.len());
            return Finding::ok(check, what).of(name);
        }
        Err(report) => report,
    };
    if !host.is_root() && report.errors().all(|d| d.reason == "file-unreadable") {
        return Finding::needs_root(check).of(name);
    }
    let first = report.errors().next().map(ToString::to_string).unwrap_or_default();
    let (first, hint) = first.split_once("\n    hint: ").map_or((first.as_str(), ""), |(f, h)| (f, h));
    let more = report.errors().count().saturating_sub(1);
    let mut what = if more > 0 { format!("{first} (and {more} more errors)") } else { first.to_owned() };
    if in_force(host, name).is_some() {
        what += "; the last good configuration is in force";
    }
    let why = if hint.is_empty() {
        "a start takes the last good configuration, and without one fails".to_owned()
    } else {
        format!("a start takes the last good configuration, and without one fails. Hint: {hint}")
    };
    Finding::error(check, what).why(why).fix(format!("tngctl check {name}")).of(name)
}

/// Root's copy of what is in force (`/run/tng/.net/NAME.toml`).
fn in_force(host: &dyn Host, name: &str) -> Option<Vec<u8>> {
    std::fs::read(host.runtime_dir().join(".net").join(format!("{name}.toml"))).ok()
}

fn access(instance: &Instance, user: Option<(u32, u32)>) -> Option<Finding> {
    let check = Check::ConfigAccess;
    let meta = std::fs::metadata(&instance.file).ok()?;
    let (uid, gid) = user?;
    let (mode, file) = (meta.mode() & 0o777, instance.file.display());
    let what = format!("{file} is {mode:04o} {}:{}", meta.uid(), meta.gid());
    let fix = format!("chown root:{USER} {file} && chmod 0640 {file}");
    let finding = if !readable(&instance.file, uid, gid) {
        Finding::error(check, format!("{what}: user {USER} cannot read it"))
            .why("the data plane reads its configuration itself; it cannot start or reload")
            .fix(format!("chown root:{USER} {d} && chmod 0750 {d} && {fix}", d = parent(&instance.file).display()))
    } else if meta.uid() != 0 || mode & 0o022 != 0 {
        Finding::warning(check, format!("{what}: others than root may write it"))
            .why("whoever writes it decides what is protected and whom to trust")
            .fix(fix)
    } else if mode & 0o004 != 0 && std::fs::metadata(parent(&instance.file)).is_ok_and(|dir| dir.mode() & 0o001 != 0) {
        Finding::warning(check, format!("{what}: everybody may read it"))
            .why("as_headers may hold the credentials of the attestation service")
            .fix(fix)
    } else {
        Finding::ok(check, what)
    };
    Some(finding.of(&instance.name))
}

/// Of instances that have a guard.
fn guard_access(instance: &Instance) -> Option<Finding> {
    let check = Check::GuardAccess;
    let meta = std::fs::metadata(&instance.file).ok().filter(|_| instance.captures())?;
    let file = instance.file.display();
    let finding =
        if guard_can_read(&instance.file) {
            Finding::ok(check, "the guard can read the file")
        } else {
            let what = format!("{file} is {:04o} {}:{}", meta.mode() & 0o777, meta.uid(), meta.gid());
            Finding::error(check, format!("{what}: the guard cannot read it"))
            .why("it is root without the right to read others' files; at the next start or boot it guards by the last \
                  good configuration, or not at all")
            .fix(format!("chown root:{USER} {file} && chmod 0640 {file}"))
        };
    Some(finding.of(&instance.name))
}

fn parent(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("/"))
}

fn applied(host: &dyn Host, instance: &Instance) -> Option<Finding> {
    let check = Check::ConfigApplied;
    instance.config.as_ref().ok()?;
    let file = std::fs::read(&instance.file).ok()?;
    let is_new = match (in_force(host, &instance.name), &instance.running) {
        (Some(in_force), _) => in_force != file,
        (None, Some(running)) => {
            let changed = std::fs::metadata(&instance.file).ok()?.mtime();
            u64::try_from(changed).unwrap_or(0) > running.config_loaded_at
        }
        (None, None) => return None,
    };
    let finding = if is_new {
        Finding::warning(check, format!("{} was changed and not applied", instance.file.display()))
            .why("the old configuration is in force; the next start takes the new one, unasked")
            .fix(format!("tngctl reload {}", instance.name))
    } else {
        Finding::ok(check, "the file is in force")
    };
    Some(finding.of(&instance.name))
}
