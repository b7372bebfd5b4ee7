//! The commands that only ask: what they print and how they exit.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::de::DeserializeOwned;

use crate::daemon::{ConnectionsReport, State, StatusReport, unix_seconds};
use crate::instance::paths::netns_inode;

use super::client::{CtlError, get};
use super::instances::{Instance, find, runtime_dir};
use super::style::Style;

/// Exit status of `tngctl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Everything runs as configured.
    Healthy = 0,
    /// Something is missing, or an instance could not be asked.
    Degraded = 1,
    /// The instance, or any, does not run.
    NotRunning = 3,
}

/// What a command prints and how it exits.
#[derive(Debug)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// Errors for standard error, a line each.
    pub errors: Vec<String>,
    /// The exit status.
    pub exit: Exit,
}

/// Which instances are asked.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Only the one of this name.
    pub name: Option<String>,
    /// Also those in other network namespaces.
    pub all: bool,
    /// Where their sockets are.
    pub root: PathBuf,
}

impl Scope {
    /// Of the caller's network namespace, below [`runtime_dir`].
    pub fn here(name: Option<String>) -> Self {
        Self { name, all: false, root: runtime_dir() }
    }
}

/// `tngctl status`.
pub fn status(scope: &Scope, json: bool, style: Style) -> Answer {
    let now = unix_seconds(SystemTime::now());
    let (found, exit) = look(scope);
    let text = if json {
        pretty(&found.reports.iter().map(|(_, r)| r).collect::<Vec<_>>())
    } else {
        found.reports.iter().map(|(_, r)| super::status::render(r, style, now)).collect::<Vec<_>>().join("\n")
    };
    Answer { text, errors: found.errors, exit }
}

/// `tngctl status --json --watch`: all of it as one JSON object in one line, errors too.
pub fn status_line(scope: &Scope) -> Answer {
    let (found, exit) = look(scope);
    let instances: Vec<_> = found.reports.iter().map(|(_, r)| r).collect();
    let now = unix_seconds(SystemTime::now());
    let line = serde_json::json!({ "time": now, "instances": instances, "errors": found.errors });
    Answer { text: format!("{line}\n"), errors: found.errors, exit }
}

/// Asks the instances, and as root the kernel.
fn look(scope: &Scope) -> (Found, Exit) {
    let mut found = ask(scope);
    let mut exit = found.exit();
    for (_, report) in &mut found.reports {
        report.kernel = super::kernel::look(report);
        let seen = report.kernel.as_ref().map_or(&[][..], |k| &k.problems);
        report.problems.extend(seen.iter().cloned());
        let healthy = matches!(report.state, State::Ready | State::Reloading) && report.problems.is_empty();
        if !healthy {
            exit = exit.max(Exit::Degraded);
        }
    }
    // Good to know, and no fault of those that run.
    if scope.name.is_none() {
        let reported = found.reports.iter().map(|(_, r)| r.instance.as_str());
        let known: Vec<_> = reported.chain(found.silent.iter().map(String::as_str)).collect();
        let left = super::kernel::left_behind_by_others(&known);
        found.errors.extend(left);
    }
    (found, exit)
}

/// `tngctl connections`.
pub fn connections(scope: &Scope, json: bool) -> Answer {
    let mut found = ask(scope);
    let mut answers = Vec::new();
    for (instance, report) in &found.reports {
        match fetch::<ConnectionsReport>(instance, "/connections") {
            Ok(connections) => answers.push((report.instance.clone(), connections)),
            Err(error) => found.errors.push(error.to_string()),
        }
    }
    let text = if json {
        let value: serde_json::Map<_, _> = answers
            .iter()
            .map(|(name, report)| (name.clone(), serde_json::to_value(report).unwrap_or_default()))
            .collect();
        pretty(&value)
    } else {
        answers.iter().map(|(name, report)| super::connections::render(name, report)).collect::<Vec<_>>().join("\n")
    };
    let exit = found.exit();
    Answer { text, errors: found.errors, exit }
}

struct Found {
    reports: Vec<(Instance, StatusReport)>,
    /// An instance is there but cannot be asked: denied, stuck, or not speaking our language.
    unheard: bool,
    /// Names of those.
    silent: Vec<String>,
    errors: Vec<String>,
}

impl Found {
    fn exit(&self) -> Exit {
        if self.unheard || (!self.reports.is_empty() && !self.errors.is_empty()) {
            Exit::Degraded
        } else if self.reports.is_empty() {
            Exit::NotRunning
        } else {
            Exit::Healthy
        }
    }
}

fn ask(scope: &Scope) -> Found {
    let here = netns_inode("self").unwrap_or(0);
    let mut found = Found { reports: Vec::new(), unheard: false, silent: Vec::new(), errors: Vec::new() };
    let wanted = |i: &Instance| scope.name.as_ref().is_none_or(|name| *name == i.name);
    for instance in find(&scope.root).into_iter().filter(wanted) {
        match fetch::<StatusReport>(&instance, "/status") {
            Ok(report) if scope.all || report.netns == here => found.reports.push((instance, report)),
            Ok(_) => {}
            Err(error) => {
                if !matches!(error, CtlError::NotRunning(_)) {
                    found.unheard = true;
                    found.silent.push(instance.name.clone());
                }
                found.errors.push(error.to_string());
            }
        }
    }
    if found.reports.is_empty() && found.errors.is_empty() {
        found.errors.push(match &scope.name {
            Some(name) => format!("instance {name} is not running"),
            None => "no instance is running".to_owned(),
        });
    }
    if let (true, Some(name)) = (found.reports.is_empty(), &scope.name) {
        found.errors.extend(super::kernel::left_behind(name).map(|state| state.to_string()));
    }
    found
}

fn fetch<T: DeserializeOwned>(instance: &Instance, resource: &str) -> Result<T, CtlError> {
    let body = get(&instance.socket, resource)?;
    serde_json::from_slice(&body)
        .map_err(|error| CtlError::Answer { path: instance.socket.clone(), what: error.to_string() })
}

fn pretty(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}
