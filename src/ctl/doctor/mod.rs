//! `tngctl doctor`: looks at everything that an instance depends on, and names for each finding what it is, why it
//! matters and the command that mends it.
//!
//! Facts come from a [`Host`], which tests replace; what they mean is decided by functions of the facts. Nothing of the
//! host is changed, and everything has a deadline. While the trial runs, a table and a TUN device of the doctor's own
//! are there; both go with the process.

mod agent;
mod attestation;
mod builtin;
mod cgroups;
mod clock;
mod conflicts;
mod evidence;
mod filters;
mod finding;
mod host;
mod instance;
mod kernel;
mod listing;
mod managers;
mod marks;
mod networkd;
mod render;
mod rules;
mod saved_rules;
mod settings;
mod trial;
mod units;

pub use agent::{AgentError, PROBE, probe};
pub use attestation::PROXY_SOCKET;
pub use finding::{Check, Finding, Severity};
pub use host::{Host, Ran, RealHost, Rules, Running};
pub use trial::{Event, Fate, Step, Trial, Tried, Way};

use super::local::LocalAnswer;
use super::style::Style;
use instance::Wants;
use listing::Listing;
use units::Units;

/// `tngctl doctor [NAME]`: exit status 1 when anything is an error.
pub fn doctor(host: &dyn Host, only: Option<&str>, json: bool, verbose: bool, style: Style) -> LocalAnswer {
    let findings = examine(host, only);
    let status = u8::from(findings.iter().any(|f| f.severity == Severity::Error));
    let text = if json {
        serde_json::to_string_pretty(&findings).unwrap_or_default() + "\n"
    } else {
        render::render(&findings, verbose, style)
    };
    LocalAnswer { text, errors: Vec::new(), status }
}

/// All findings about the host and about one instance, or all.
pub fn examine(host: &dyn Host, only: Option<&str>) -> Vec<Finding> {
    let instances = instance::find(host, only);
    let wants = Wants::of(&instances);
    let mut found = kernel::check(host, !wants.slices.is_empty());
    found.extend(settings::check(host, &wants));
    let listing = host.is_root().then(|| Listing::of(host)).flatten();
    found.extend(managers::check(host, listing.as_ref()));
    found.extend(saved_rules::check(host));
    found.extend(marks::check(host, &instances));
    found.extend(filters::check(host, listing.as_ref(), &instances));
    found.extend(cgroups::check(host, &wants));
    found.push(units::version(host));
    found.extend(clock::check(host));
    found.extend(instance::check(host, &instances));
    found.extend(conflicts::check(&instances, &instance::configs(&host.config_dir())));
    for instance in &instances {
        let units = Units::of(host, &instance.name);
        found.extend(units::check(&instance.name, &units));
        let rules = rules::check(host, instance, units.socket.is_active());
        let captures = rules.iter().any(|f| f.check == Check::RulesPresent && f.severity == Severity::Ok);
        found.extend(rules);
        found.extend(trial::check(host, listing.as_ref(), instance, captures));
        found.extend(attestation::check(host, instance, &units));
    }
    found.sort_by_key(|f| f.check);
    found
}
