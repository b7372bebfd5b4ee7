//! systemd's view: version, states, and whether somebody loosened the data plane's unit.

use std::collections::BTreeMap;

use super::finding::{Check, Finding};
use super::host::Host;

/// What Debian 12 ships, on which the units were tested.
const SYSTEMD_FLOOR: u32 = 252;
/// As many restarts without an operator's start between them are a crash loop.
const MANY_RESTARTS: u32 = 3;

const PROPERTIES: &str = "Id,LoadState,ActiveState,SubState,Result,StatusText,NRestarts,NeedDaemonReload,UnitFileState,\
    DropInPaths,User,SupplementaryGroups,AmbientCapabilities,NoNewPrivileges,ProtectSystem,MemoryDenyWriteExecute";

/// The properties of one unit; empty for a unit that is not there.
#[derive(Debug, Clone, Default)]
pub(super) struct Unit(BTreeMap<String, String>);

impl Unit {
    fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }
    fn is_loaded(&self) -> bool {
        self.get("LoadState") == "loaded"
    }
    pub fn is_active(&self) -> bool {
        matches!(self.get("ActiveState"), "active" | "activating" | "reloading")
    }
}

/// The three units of one instance.
#[derive(Debug, Clone, Default)]
pub(super) struct Units {
    pub socket: Unit,
    pub service: Unit,
    pub guard: Unit,
}

impl Units {
    /// Empty where systemd does not run.
    pub fn of(host: &dyn Host, name: &str) -> Self {
        let units = [format!("tng@{name}.socket"), format!("tng@{name}.service"), format!("tng-guard@{name}.service")];
        if !host.has_systemd() {
            return Self::default();
        }
        let ran = host.run(&["systemctl", "show", "-p", PROPERTIES, &units[0], &units[1], &units[2]], None);
        let mut blocks = ran.text().unwrap_or_default().split("\n\n").map(parse);
        let mut next = || blocks.next().unwrap_or_default();
        Self { socket: next(), service: next(), guard: next() }
    }

    /// The user that the data plane runs as.
    pub fn user(&self) -> &str {
        match self.service.get("User") {
            "" => super::instance::USER,
            user => user,
        }
    }

    /// Its groups besides the user's own.
    pub fn groups(&self) -> Vec<&str> {
        self.service.get("SupplementaryGroups").split_whitespace().collect()
    }
}

fn parse(block: &str) -> Unit {
    let pairs = block.lines().filter_map(|line| line.split_once('='));
    Unit(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

/// The manager.
pub(super) fn version(host: &dyn Host) -> Finding {
    let check = Check::SystemdVersion;
    if !host.has_systemd() {
        return Finding::note(check, "systemd does not run here; units are not looked at")
            .why("without it nothing starts instances at boot or restarts them");
    }
    let ran = host.run(&["systemctl", "--version"], None);
    let first = ran.text().and_then(|t| t.lines().next()).unwrap_or_default();
    match first.split_whitespace().nth(1).and_then(|v| v.split(['.', '~']).next()?.parse::<u32>().ok()) {
        Some(version) if version >= SYSTEMD_FLOOR => Finding::ok(check, first),
        Some(_) => Finding::error(check, format!("{first} is older than {SYSTEMD_FLOOR}"))
            .why(
                "the units use what older versions lack or do otherwise: queued connections would be lost on a restart",
            )
            .fix("apt full-upgrade  # Debian 12 or later"),
        None => Finding::warning(check, format!("systemd's version cannot be read from \"{first}\"")),
    }
}

/// The units of one instance; nothing for an instance that systemd does not know.
pub(super) fn check(name: &str, units: &Units) -> Vec<Finding> {
    let all = [&units.socket, &units.service, &units.guard];
    if !all.iter().any(|u| u.is_loaded()) {
        return Vec::new();
    }
    let mut found = vec![state(name, units)];
    if all.iter().any(|u| u.is_active()) {
        let enabled = all.iter().any(|u| u.get("UnitFileState").starts_with("enabled"));
        found.push(if enabled {
            Finding::ok(Check::UnitEnabled, "starts at boot")
        } else {
            Finding::warning(Check::UnitEnabled, "runs, and is not enabled")
                .why("after the next boot its traffic goes in plaintext")
                .fix(format!("systemctl enable tng@{name}"))
        });
        found.push(restarts(name, &units.service));
    }
    if all.iter().any(|u| u.get("NeedDaemonReload") == "yes") {
        found.push(
            Finding::warning(Check::UnitStale, "unit files were changed since systemd read them")
                .why("systemd goes by the old ones until it reads them again")
                .fix("systemctl daemon-reload"),
        );
    }
    if units.service.is_loaded() {
        found.push(sandbox(name, &units.service));
    }
    found.into_iter().map(|f| f.of(name)).collect()
}

fn state(name: &str, units: &Units) -> Finding {
    let check = Check::UnitState;
    let named = [("tng@", ".socket", &units.socket), ("tng@", ".service", &units.service)];
    let named = named.into_iter().chain([("tng-guard@", ".service", &units.guard)]);
    for (prefix, suffix, unit) in named {
        let id = format!("{prefix}{name}{suffix}");
        if unit.get("ActiveState") == "failed" {
            return Finding::error(check, format!("{id} failed: {}", unit.get("Result")))
                .why("systemd gave it up; captured traffic is refused, or not captured at all")
                .fix(format!("journalctl -u {id} -n 20; systemctl reset-failed {id} && systemctl start tng@{name}"));
        }
    }
    if units.service.is_active() && !units.socket.is_active() {
        return Finding::error(check, format!("tng@{name}.service runs without its socket unit"))
            .why("rules and listeners belong to the socket unit: nothing is captured")
            .fix(format!("systemctl restart tng@{name}.socket tng@{name}.service"));
    }
    if !units.socket.is_active() {
        return Finding::note(check, "not started")
            .why("it captures and protects nothing")
            .fix(format!("systemctl start tng@{name}"));
    }
    let status = units.service.get("StatusText");
    let said = if status.is_empty() { String::new() } else { format!(": {status}") };
    Finding::ok(check, format!("service {}{said}", units.service.get("ActiveState")))
}

fn restarts(name: &str, service: &Unit) -> Finding {
    let check = Check::UnitRestarts;
    let count: u32 = service.get("NRestarts").parse().unwrap_or(0);
    if count < MANY_RESTARTS {
        return Finding::ok(check, format!("{count} restarts"));
    }
    Finding::warning(check, format!("systemd restarted the data plane {count} times"))
        .why("connections wait in the queue meanwhile, and those that were open are lost")
        .fix(format!("journalctl -u tng@{name}.service -p warning -n 50"))
}

fn sandbox(name: &str, service: &Unit) -> Finding {
    let check = Check::UnitSandbox;
    let mut loose = Vec::new();
    let mut unless = |key: &str, good: &[&str]| {
        let value = service.get(key);
        if !good.contains(&value) {
            loose.push(format!("{key}={value}"));
        }
    };
    unless("User", &[super::instance::USER]);
    unless("AmbientCapabilities", &["cap_net_raw", ""]);
    unless("NoNewPrivileges", &["yes"]);
    unless("ProtectSystem", &["strict"]);
    unless("MemoryDenyWriteExecute", &["yes"]);
    if loose.is_empty() {
        return Finding::ok(check, "the data plane's unit is as confined as it was shipped");
    }
    // Below /run/systemd/generator* lie our own.
    let by_hand = |path: &&str| path.starts_with("/etc/") || path.starts_with("/run/systemd/system");
    let drop_ins: Vec<&str> = service.get("DropInPaths").split_whitespace().filter(by_hand).collect();
    let apply = format!("systemctl daemon-reload && systemctl restart tng@{name}.service");
    let fix = if drop_ins.is_empty() {
        format!("apt install --reinstall tng && {apply}")
    } else {
        format!("rm {} && {apply}", drop_ins.join(" "))
    };
    Finding::warning(check, format!("the data plane's unit was loosened: {}", loose.join(", ")))
        .why("the data plane needs one user, one capability and no more; what else it gets, an attacker in it gets")
        .fix(fix)
}
