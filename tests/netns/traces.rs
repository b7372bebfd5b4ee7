//! What an instance has, or has left, on a host.

use std::path::Path;

use super::world::{Family, Host};

/// All that must be gone after a clean stop: tables, rules, routes and files. Empty when there is nothing.
pub fn traces(host: &Host) -> String {
    let tables = host.run("nft", &["list", "tables"]).stdout;
    let mut found: String = tables.lines().filter(|l| l.contains("tng")).map(|l| format!("{l}\n")).collect();
    found += &routing(host);
    let mut files = Vec::new();
    list(&host.runtime_dir(), &mut files);
    for file in files {
        found += &format!("{file}\n");
    }
    found
}

/// The rules, the routes and the whole ruleset without counts: equal before and after what changed nothing.
pub fn kernel_state(host: &Host) -> String {
    host.sh("nft -s list ruleset") + &routing(host)
}

fn routing(host: &Host) -> String {
    let mut found = String::new();
    for family in Family::BOTH {
        found += &host.run("ip", &[family.ip_option(), "rule", "show", "pref", "565"]).stdout;
        // "FIB table does not exist" is an error of ip, and the best answer.
        found += &host.run("ip", &[family.ip_option(), "route", "show", "table", "565"]).stdout;
    }
    found
}

/// Files and sockets below `dir`, but the lock that all instances of a host share.
fn list(dir: &Path, into: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).expect("readable directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            list(&path, into);
        } else if !path.ends_with(".net/lock") {
            into.push(path.display().to_string());
        }
    }
}
