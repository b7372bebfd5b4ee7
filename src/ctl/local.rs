//! The commands that work on files and rules: check, rules, reload.

use super::commands::{Answer, Exit};
use crate::capture::{apply, on_host};
use crate::config;
use crate::daemon::reload as daemon_reload;
use crate::instance::Paths;
use crate::os::privileges::{find_user, may_administer_network};

/// Exit status for a configuration with errors (EX_CONFIG of sysexits.h).
const EX_CONFIG: u8 = 78;
/// Exit status for a missing privilege (EX_NOPERM).
const EX_NOPERM: u8 = 77;

/// Text, errors, and an exit status beyond those of [`Exit`].
#[derive(Debug)]
pub struct LocalAnswer {
    /// For standard output.
    pub text: String,
    /// For standard error.
    pub errors: Vec<String>,
    /// The exit status.
    pub status: u8,
}

impl From<Answer> for LocalAnswer {
    fn from(answer: Answer) -> Self {
        Self { text: answer.text, errors: answer.errors, status: answer.exit as u8 }
    }
}

fn failed(status: u8, error: impl ToString) -> LocalAnswer {
    LocalAnswer { text: String::new(), errors: vec![error.to_string()], status }
}

/// `tngctl check [NAME|FILE...]`.
pub fn check(instances: &[String], json: bool) -> LocalAnswer {
    let output = config::check_command("tngctl", instances, json, on_host::warnings);
    let errors = if output.stderr.is_empty() { Vec::new() } else { vec![output.stderr] };
    LocalAnswer { text: output.stdout, errors, status: u8::try_from(output.code).unwrap_or(1) }
}

/// `tngctl rules`: exactly what is, or would be, applied.
pub fn rules(instance: &str) -> LocalAnswer {
    let config = match config::instance_path(instance).and_then(|path| config::load(&path)) {
        Ok(loaded) => loaded.config,
        Err(report) => return failed(EX_CONFIG, report),
    };
    let owner = find_user("tng").map_or(0, |(uid, _)| uid.as_raw());
    match apply::preview(&Paths::current(), &config, owner) {
        Ok(text) if text.is_empty() => {
            let note = format!("instance {} captures nothing: no rules", config.instance);
            LocalAnswer { text, errors: vec![note], status: 0 }
        }
        Ok(text) => LocalAnswer { text, errors: Vec::new(), status: 0 },
        Err(e) => failed(Exit::Degraded as u8, format!("{e} [{}]", e.reason())),
    }
}

/// `tngctl reload`.
pub fn reload(instance: &str) -> LocalAnswer {
    let path = match config::instance_path(instance) {
        Ok(path) => path,
        Err(report) => return failed(EX_CONFIG, report),
    };
    if !may_administer_network() {
        return failed(EX_NOPERM, "a reload changes rules and listeners; run it as root");
    }
    match daemon_reload::reload(&Paths::current(), &path) {
        Ok(done) => {
            // A finding of the file says "warning:" itself, behind its place.
            let said = |w: &String| if w.contains(": warning: ") { w.clone() } else { format!("warning: {w}") };
            let errors = done.warnings.iter().map(said).collect();
            LocalAnswer { text: String::new(), errors, status: 0 }
        }
        // Findings of a configuration come with a line and a hint each.
        Err(e) if e.exit_status() == EX_CONFIG => failed(EX_CONFIG, e),
        Err(e) => failed(e.exit_status(), format!("{e} [{}]", e.reason())),
    }
}
