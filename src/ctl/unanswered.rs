//! Why an instance with an open socket does not answer: the service manager holds it for a dead data plane too.

use std::path::Path;

use super::doctor::{Host, RealHost};

/// Where sockets are that a service manager may hold.
const RUNTIME_DIR: &str = "/run/tng";

/// What systemd knows of the data plane behind the socket at `path`, when it is one of its units.
pub(super) fn why(path: &Path) -> Option<String> {
    let host = RealHost;
    let name = path.strip_prefix(RUNTIME_DIR).ok()?.parent()?.to_str()?;
    if !host.has_systemd() || name.contains('/') {
        return None;
    }
    let unit = format!("tng@{name}.service");
    let ran = host.run(&["systemctl", "show", "-p", "LoadState,ActiveState,SubState,Result", &unit], None);
    explain(name, ran.text()?)
}

/// In words, with the next step; nothing while the unit runs or starts: then it is only slow.
fn explain(name: &str, properties: &str) -> Option<String> {
    let get = |key: &str| {
        let value = properties.lines().filter_map(|line| line.split_once('=')).find(|(k, _)| *k == key);
        value.map_or("", |(_, value)| value)
    };
    if get("LoadState") != "loaded" {
        return None;
    }
    let (active, sub, result) = (get("ActiveState"), get("SubState"), get("Result"));
    let state = match (active, sub) {
        ("activating", "auto-restart" | "auto-restart-queued") => "ends and is started again",
        ("active" | "activating" | "reloading" | "refreshing", _) => return None,
        _ => "does not run",
    };
    Some(format!(
        "its data plane {state}: tng@{name}.service is {active} ({sub}, {result}); connections wait in the queue of its \
         socket. Look: systemctl status tng@{name}; journalctl -u tng@{name} -n 20"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(active: &str, sub: &str, result: &str) -> Option<String> {
        explain("web", &format!("LoadState=loaded\nActiveState={active}\nSubState={sub}\nResult={result}\n"))
    }

    #[test]
    fn a_dead_unit_is_told_from_a_slow_one() {
        for (active, sub) in [("active", "running"), ("activating", "start"), ("reloading", "reload")] {
            assert_eq!(unit(active, sub, "success"), None, "{active}");
        }
        let failed = unit("failed", "failed", "exit-code").unwrap();
        assert!(failed.contains("does not run: tng@web.service is failed (failed, exit-code)"), "{failed}");
        assert!(failed.contains("journalctl -u tng@web"), "{failed}");
        assert!(unit("activating", "auto-restart", "signal").unwrap().contains("started again"));
        assert!(unit("inactive", "dead", "success").is_some());
        assert_eq!(explain("web", "LoadState=not-found\nActiveState=inactive\n"), None, "no unit of that name");
        assert_eq!(explain("web", ""), None);
    }

    #[test]
    fn sockets_elsewhere_are_no_units() {
        assert_eq!(why(Path::new("/tmp/tng/web/control.sock")), None);
        assert_eq!(why(Path::new("/run/tng/netns-1/web/control.sock")), None);
    }
}
