//! systemd-networkd removes rules and routes that it does not know, unless its configuration says otherwise. Run on
//! systemd 252: `networkctl reconfigure LINK` removed tng's policy rule; a restart alone did not.

use std::collections::BTreeMap;

use super::finding::{Check, Finding};
use super::host::Host;

/// Directories of its configuration, those that win first (systemd-networkd's networkd.conf(5)).
const DIRECTORIES: [&str; 4] = ["/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd"];
/// Both default to yes.
const KEYS: [&str; 2] = ["ManageForeignRoutingPolicyRules", "ManageForeignRoutes"];

/// Nothing when networkd does not run.
pub(super) fn check(host: &dyn Host) -> Option<Finding> {
    if !host.is_active("systemd-networkd.service") {
        return None;
    }
    let settings = settings(host);
    let managed: Vec<&str> = KEYS.into_iter().filter(|key| *settings.get(key).unwrap_or(&true)).collect();
    let check = Check::NetworkdRules;
    if managed.is_empty() {
        return Some(Finding::ok(check, "systemd-networkd leaves foreign rules and routes alone"));
    }
    let lines: String = KEYS.iter().map(|key| format!("{key}=no\\n")).collect();
    let what = format!("systemd-networkd manages foreign rules and routes ({} is yes)", managed.join(" and "));
    Some(
        Finding::warning(check, what)
            .why("when it configures a link anew it removes foreign rules, tng's too; traffic is refused until the guard puts them back")
            .fix(format!(
                "mkdir -p /etc/systemd/networkd.conf.d && \
                 printf '[Network]\\n{lines}' >/etc/systemd/networkd.conf.d/50-tng.conf && \
                 systemctl restart systemd-networkd"
            )),
    )
}

/// The main file, then the drop-ins by name; what comes later wins, and of one name the first directory's.
fn settings(host: &dyn Host) -> BTreeMap<&'static str, bool> {
    let mut files: Vec<String> =
        DIRECTORIES.iter().map(|d| format!("{d}/networkd.conf")).find(|f| host.exists(f)).into_iter().collect();
    let mut drop_ins = BTreeMap::new();
    for directory in DIRECTORIES {
        let directory = format!("{directory}/networkd.conf.d");
        let entries = std::fs::read_dir(host.path(&directory)).into_iter().flatten().flatten();
        for name in entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.ends_with(".conf")) {
            let path = format!("{directory}/{name}");
            drop_ins.entry(name).or_insert(path);
        }
    }
    files.extend(drop_ins.into_values());
    let mut found = BTreeMap::new();
    for text in files.iter().filter_map(|file| host.read(file)) {
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            }
            let Some((key, value)) = line.split_once('=').filter(|_| section == "[Network]") else { continue };
            let Some(key) = KEYS.into_iter().find(|k| *k == key.trim()) else { continue };
            let no = ["no", "false", "0", "off", "n", "f"].contains(&value.trim().to_ascii_lowercase().as_str());
            found.insert(key, !no);
        }
    }
    found
}
