//! The texts of the drop-ins (systemd.unit(5)), as pure functions of what an instance asks for.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::config::{Config, InstanceName, Mode, Netfilter};
use crate::daemon::listeners::ListenerSpec;

/// First line of every file that the generator writes.
const HEADER: &str = "# Written by tng-generator; edit the TOML file instead.\n";
/// What is shown of a file's first error in a unit's description.
const MAX_PROBLEM: usize = 240;

/// `tng@NAME.socket.d/50-listen.conf`: where systemd listens for the data plane.
///
/// `ipv6`: whether the kernel has IPv6; without it systemd could not open the socket unit at all.
pub(super) fn listen(specs: &[ListenerSpec], ipv6: bool) -> String {
    let mut text = format!("{HEADER}[Socket]\n");
    for spec in specs.iter().filter(|s| ipv6 || !s.addr.is_ipv6()) {
        let _ = writeln!(text, "ListenStream={}", spec.addr);
    }
    if specs.iter().any(|s| s.transparent) {
        text.push_str("Transparent=yes\n");
    }
    // One mark for all sockets of the unit: the egress's, whose handshakes must be known for ours before the data
    // plane runs. It takes the mark off those that must not have it.
    if let Some(mark) = specs.iter().find_map(|s| s.mark) {
        let _ = writeln!(text, "Mark={}", mark.0);
    }
    text
}

/// `tng-guard@NAME.service.d/50-slices.conf`: a cgroup match loads only when the cgroup is there.
///
/// Not `Requires=`: a slice that is stopped must not take the guard along, which follows it to its next start.
pub(super) fn slices(config: &Config) -> Option<String> {
    let slices: BTreeSet<&str> = captures(config)
        .flat_map(|n| n.capture.iter().chain(&n.exclude))
        .filter_map(|entry| entry.cgroup.as_ref()?.0.rsplit('/').next())
        .collect();
    if slices.is_empty() {
        return None;
    }
    let list = slices.into_iter().map(escaped).collect::<Vec<_>>().join(" ");
    Some(format!("{HEADER}[Unit]\nWants={list}\nAfter={list}\n"))
}

/// `tng@NAME.service.d/50-problem.conf`: the file's first error where `systemctl status` shows it.
pub(super) fn problem(instance: &str, problem: &str) -> String {
    let line: String = problem.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_PROBLEM).collect();
    format!("{HEADER}[Unit]\nDescription=tng {instance}, configuration refused: {}\n", escaped(&line))
}

/// `tng.target.d/50-instances.conf`: the target starts all instances.
pub(super) fn wants(instances: &[InstanceName]) -> String {
    let units: Vec<String> = instances.iter().map(|name| format!("tng@{name}.service")).collect();
    format!("{HEADER}[Unit]\nWants={}\n", units.join(" "))
}

/// `tng@.service.d/50-notify-reload.conf`, from systemd 253 on: a reload is over when the data plane says so.
///
/// The signal that this type sends is one without effect: the reload itself is `ExecReload=`, which is root's.
pub(super) fn notify_reload() -> String {
    format!("{HEADER}[Service]\nType=notify-reload\nReloadSignal=SIGCONT\n")
}

fn captures(config: &Config) -> impl Iterator<Item = &Netfilter> {
    config.endpoints.iter().filter_map(|e| match &e.mode {
        Mode::Netfilter(n) => Some(n),
        Mode::Mapping(_) => None,
    })
}

/// `%` begins a specifier in unit files, and `\` an escape.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{EndpointName, Mark, parse};

    fn spec(addr: &str, transparent: bool, mark: Option<u32>) -> ListenerSpec {
        ListenerSpec {
            endpoint: EndpointName::new("x").unwrap(),
            addr: addr.parse().unwrap(),
            transparent,
            mark: mark.map(Mark),
        }
    }

    #[test]
    fn listeners_are_listed_with_the_options_that_some_of_them_need() {
        let specs = [spec("127.0.0.1:10001", false, None), spec("[::1]:40000", true, Some(565))];
        let both = format!(
            "{HEADER}[Socket]\nListenStream=127.0.0.1:10001\nListenStream=[::1]:40000\nTransparent=yes\nMark=565\n"
        );
        assert_eq!(listen(&specs, true), both);
        assert!(!listen(&specs, false).contains("::1"), "without IPv6 the unit could not start");
        assert_eq!(listen(&specs[..1], true), format!("{HEADER}[Socket]\nListenStream=127.0.0.1:10001\n"));
    }

    #[test]
    fn the_guard_waits_for_the_slices_that_captures_name() {
        let text = "[[ingress]]\nname = \"a\"\n[ingress.netfilter]\n\
                    capture = [{ port = 1, cgroup = \"a.slice/a-b.slice\" }]\nexclude = [{ cgroup = \"c.slice\" }]\n\
                    [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";
        let config = parse(InstanceName::new("x").unwrap(), std::path::Path::new("/x.toml"), text).unwrap().config;
        let expected = format!("{HEADER}[Unit]\nWants=a-b.slice c.slice\nAfter=a-b.slice c.slice\n");
        assert_eq!(slices(&config), Some(expected));
    }

    #[test]
    fn a_problem_stays_one_line_and_no_specifier() {
        let text = problem("x", "/etc/tng/x.toml:1:1: 100% \"a\\b\"\n[Service]\nExecStart=/bin/sh");
        assert_eq!(text.lines().filter(|l| !l.starts_with('#')).count(), 2, "{text}");
        assert!(text.contains("100%% \"a\\\\b\" [Service] ExecStart"), "{text}");
    }
}
