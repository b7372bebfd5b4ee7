//! What the data plane may do, asked of systemd, of the kernel, and of a program in the very same sandbox.

use serde_json::Value;

use super::container::{Container, field};
use super::pair::Pair;

/// The most that `systemd-analyze security` may find; in tenths.
const EXPOSURE: u32 = 14;
/// CAP_NET_RAW alone, as /proc/PID/status writes it.
const NET_RAW: &str = "0000000000002000";
/// Of [Service], what makes the unit tng's and not a sandbox.
const NOT_SANDBOX: [&str; 18] = [
    "ExecStart",
    "ExecReload=",
    "ExecStop",
    "Type=",
    "NotifyAccess=",
    "Restart",
    "Sockets=",
    "FileDescriptorStore",
    "WatchdogSec=",
    "Timeout",
    "OOMPolicy=",
    "StartLimit",
    "SuccessExitStatus=",
    "KillMode=",
    "KillSignal=",
    "Environment=TNG",
    "Slice=",
    "RuntimeDirectoryPreserve=",
];
/// Tries what the daemon must not be able to do; prints what came of each as JSON.
const PROBE: &str = include_str!("probe.py");

/// Exposure, capabilities, seccomp, and the probe; for both sides.
pub fn confined(pair: &Pair) {
    for (host, name) in [(&pair.client, "ingress"), (&pair.server, "egress")] {
        pair.point(&format!("{name}: systemd-analyze security is at most 1.4"), || {
            let text = host.sh(&format!("systemd-analyze security --no-pager tng@{name}.service"));
            let line = text.lines().find(|line| line.contains("Overall exposure level")).expect("overall line");
            let level = line.split_whitespace().find_map(|word| word.parse::<f32>().ok()).expect("a level");
            let bad: Vec<&str> = text.lines().filter(|line| line.starts_with('✗')).collect();
            assert!((level * 10.0).round() as u32 <= EXPOSURE, "{line}\n{}", bad.join("\n"));
            level.to_string()
        });
        pair.point(&format!("{name}: runs as tng with CAP_NET_RAW alone, seccomp, no new privileges"), || {
            let inner = host.main_pid(&format!("tng@{name}.service")).expect("the service has a main process");
            let pid = host.outer_pid(inner);
            let has = |name: &str| field(pid, name).unwrap_or_default();
            let tng = host.sh("id -u tng").trim().to_owned();
            assert_ne!(tng, "0");
            assert!(has("Uid").split_whitespace().all(|uid| uid == tng), "Uid {} is not tng's {tng}", has("Uid"));
            for set in ["CapEff", "CapPrm", "CapBnd"] {
                assert_eq!(has(set), NET_RAW, "{set}");
            }
            assert_eq!(has("Seccomp"), "2");
            assert_eq!(has("NoNewPrivs"), "1");
            format!("uid {tng}, CapEff {NET_RAW}, {} seccomp filters", has("Seccomp_filters"))
        });
        pair.point(&format!("{name}: from its sandbox no /etc/shadow, no write, no module, no netlink, no W+X memory, no new namespace"), || {
            let got = probe(host, name);
            let denied = [
                "read /etc/shadow", "write /etc/tng", "write /usr", "write /run/tng", "write /var/lib/tng", "read /var/lib/tng",
                "load a module", "memory write and execute", "new user namespace", "mount", "netlink socket", "set uid 0",
            ];
            for what in denied {
                let outcome = got[what].as_str().unwrap_or_else(|| panic!("the probe did not try {what}: {got:#}"));
                assert_ne!(outcome, "DONE", "the sandbox allows: {what}\n{got:#}");
            }
            // Negative first, but a probe that can do nothing at all shows nothing.
            for what in ["read its configuration", "TCP socket"] {
                assert_eq!(got[what], "DONE", "{what}: {got:#}");
            }
            format!("{} attempts denied", denied.len())
        });
        pair.point(&format!("{name}: Landlock is in force where the kernel has it"), || {
            // landlock_create_ruleset(2) with LANDLOCK_CREATE_RULESET_VERSION, 444 on every architecture: the version, or -1.
            // /sys/kernel/security/lsm would say it too, but only where securityfs is mounted.
            let version = host.sh("python3 -I -c 'import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))'");
            let version: i64 = version.trim().parse().expect("a version");
            let status: Value = serde_json::from_str(&host.sh(&format!("tngctl status --json {name}"))).expect("JSON");
            let said = status[0]["confinement"]["landlock"].as_str().expect("confinement.landlock").to_owned();
            assert_eq!(said.starts_with("abi "), version > 0, "{said}; the kernel has version {version}");
            said
        });
    }
}

/// Runs the probe in a unit that has all of the service's sandbox lines.
#[track_caller]
fn probe(host: &Container, name: &str) -> Value {
    let unit = host.sh(&format!("systemctl cat tng@{name}.service"));
    let mut lines = Vec::new();
    let mut in_service = false;
    // Of a continued line the next is part, whatever it begins with.
    for line in unit.replace("\\\n", " ").lines() {
        if line.starts_with('[') {
            in_service = line == "[Service]";
        } else if in_service && !line.starts_with('#') && !NOT_SANDBOX.iter().any(|prefix| line.starts_with(prefix)) {
            lines.push(line.replace("%i", name).replace("%I", name));
        }
    }
    host.write("/usr/local/lib/tng-probe.py", PROBE);
    let text = format!(
        "[Service]\n{}\nExecPaths=/usr/bin\nType=oneshot\nStandardOutput=file:/run/tng-probe.json\nStandardError=journal\nTimeoutStartSec=20\nExecStart=/usr/bin/python3 -I /usr/local/lib/tng-probe.py {name}\n",
        lines.join("\n")
    );
    host.write("/run/systemd/system/tng-probe.service", &text);
    let out = host.try_sh("systemctl daemon-reload; rm -f /run/tng-probe.json; systemctl start tng-probe.service");
    let said = host.try_sh("cat /run/tng-probe.json; journalctl -q --no-pager -u tng-probe.service -n 20");
    let parsed = said.stdout.lines().next().and_then(|line| serde_json::from_str(line).ok());
    host.sh("rm -f /run/systemd/system/tng-probe.service /run/tng-probe.json /usr/local/lib/tng-probe.py; rmdir --ignore-fail-on-non-empty /usr/local/lib; systemctl daemon-reload");
    parsed.unwrap_or_else(|| panic!("the probe did not run:\n{}{}\nunit:\n{text}", out.stderr, said.stdout))
}
