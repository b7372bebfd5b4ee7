//! The clock: certificates and tokens live by it.

use std::time::{Duration, UNIX_EPOCH};

use super::finding::{Check, Finding};
use super::host::Host;

/// 2026-01-01, before which this program was not written.
const SANE_FROM: Duration = Duration::from_secs(1_767_225_600);
/// 2100-01-01.
const SANE_UNTIL: Duration = Duration::from_secs(4_102_444_800);

const WHY: &str = "tokens and certificates are refused as expired or not yet valid when clocks differ by a minute";
const SYNCHRONISE: &str = "apt install systemd-timesyncd && timedatectl set-ntp true";

/// The year, and whether anybody keeps it right.
pub(super) fn check(host: &dyn Host) -> Vec<Finding> {
    let now = host.now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut found = vec![if (SANE_FROM..SANE_UNTIL).contains(&now) {
        Finding::ok(Check::ClockYear, "the year is plausible")
    } else {
        let year = 1970 + now.as_secs() / 31_556_952;
        Finding::error(Check::ClockYear, format!("the clock says {year}")).why(WHY).fix(SYNCHRONISE)
    }];
    let shown =
        host.has_systemd().then(|| host.run(&["timedatectl", "show", "-p", "NTPSynchronized", "--value"], None));
    let check = Check::ClockSynchronised;
    found.push(match shown.as_ref().and_then(|ran| ran.text()).map(str::trim) {
        Some("yes") => Finding::ok(check, "the clock is synchronised"),
        Some("no") => Finding::warning(check, "the clock is not synchronised").why(WHY).fix(SYNCHRONISE),
        _ => Finding::note(check, "not checked: timedatectl gave no answer").why(WHY),
    });
    found
}
