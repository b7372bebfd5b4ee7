//! What the appraisal in process rests on: collateral and certificates in files, and the services that hand them out.

use std::path::Path;
use std::time::UNIX_EPOCH;

use super::finding::{Check, Finding};
use super::host::Host;
use crate::attest::collateral_dates;
use crate::config::{Builtin, readable};
use crate::ctl::human_age;

/// Collateral with less than this left is to be replaced.
const SOON: u64 = 3 * 24 * 3600;

const WHY: &str = "without valid collateral no tdx or sgx peer can be appraised: it is refused";

/// Files and services of one endpoint.
pub(super) fn check(host: &dyn Host, builtin: &Builtin, user: &str) -> Vec<Finding> {
    let mut found: Vec<_> = builtin.collateral.iter().map(|file| collateral(host, file, builtin, user)).collect();
    found.extend(builtin.amd_certs.iter().filter_map(|file| unreadable(host, file, user)));
    for (service, addr) in [("PCCS", &builtin.pccs_addr), ("KDS", &builtin.kds_addr)] {
        found.extend(addr.as_ref().map(|addr| answers(host, service, addr)));
    }
    found
}

/// The data plane reads its files itself, again whenever they change.
fn unreadable(host: &dyn Host, file: &Path, user: &str) -> Option<Finding> {
    let (uid, gid) = host.user(user)?;
    let shown = file.display();
    (!readable(file, uid, gid)).then(|| {
        Finding::error(Check::Collateral, format!("{shown}: user {user} cannot read it"))
            .why("the data plane reads it itself; it cannot start or take over a newer one")
            .fix(format!("chmod a+r {shown} && chmod a+x {}", file.parent().unwrap_or(Path::new("/")).display()))
    })
}

fn collateral(host: &dyn Host, file: &Path, builtin: &Builtin, user: &str) -> Finding {
    let check = Check::Collateral;
    let shown = file.display();
    if let Some(finding) = unreadable(host, file, user) {
        return finding;
    }
    let dates = match std::fs::read(file).map_err(|e| e.to_string()).and_then(|text| collateral_dates(&text)) {
        Ok(dates) => dates,
        Err(problem) => {
            return Finding::error(check, format!("{shown}: {problem}")).why(WHY).fix(format!("ls -l {shown}"));
        }
    };
    let now = host.now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let what = format!("{shown} ({} {})", dates.tee, dates.fmspc);
    // What a service hands out takes the place of a file that is over.
    let (bad, fix): (fn(Check, String) -> Finding, _) = match &builtin.pccs_addr {
        Some(pccs) => {
            (Finding::warning, format!("rm {shown}  # {pccs} is asked instead; take it out of `collateral` too"))
        }
        None => (Finding::error, format!("mv NEW.json {shown}  # fetch new collateral, or set pccs_addr")),
    };
    if now < dates.issued {
        let until = human_age(dates.issued - now);
        bad(check, format!("{what} is valid only in {until}")).why(WHY).fix("timedatectl  # is the clock right?")
    } else if now >= dates.ends {
        bad(check, format!("{what} ended {} ago", human_age(now - dates.ends))).why(WHY).fix(fix)
    } else if dates.ends - now < SOON {
        Finding::warning(check, format!("{what} ends in {}", human_age(dates.ends - now))).why(WHY).fix(fix)
    } else {
        Finding::ok(check, format!("{what} holds for {}", human_age(dates.ends - now)))
    }
}

fn answers(host: &dyn Host, service: &str, addr: &url::Url) -> Finding {
    let check = Check::CollateralService;
    match host.connects(addr) {
        Ok(()) => Finding::ok(check, format!("{service} at {addr} takes connections")),
        Err(error) => Finding::error(check, format!("{service} at {addr}: {error}"))
            .why("what it gave is used until it ends; after that, peers that need it are refused")
            .fix(format!("curl -v {addr}  # and correct {}_addr or the way there", service.to_lowercase())),
    }
}
