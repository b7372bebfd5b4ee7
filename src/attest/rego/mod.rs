//! An operator's policy in Rego, asked about evidence that a verifier in process has verified already.
//!
//! The policy is a file of the package `tng`: `data.tng.allow` must be `true`, and `data.tng.deny`, a set of strings that
//! may be left out, must be empty. Everything else refuses. It is judged by `regorus`, built without the functions that
//! reach the network, the clock, the environment, files or chance.
//!
//! What bounds it: [`check`] refuses recursion and functions whose result has no bound before anything runs; each
//! question has [`TIME`]; it runs on a thread of its own whose stack holds what `check` lets through.

mod check;
mod input;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use regorus::utils::limits::{ExecutionTimerConfig, TimeSource, set_time_source};
use regorus::{Engine, Value};
use tokio::sync::{Semaphore, oneshot};

pub use input::Facts;

/// Largest policy, bytes.
pub const MAX_TEXT: usize = 64 << 10;
/// Time for one question, of which there are two: `deny` and `allow`. An ordinary policy needs a thousandth of it.
const TIME: Duration = Duration::from_secs(1);
/// Steps between two looks at the clock.
const STEPS: std::num::NonZeroU32 = std::num::NonZeroU32::new(64).unwrap();
/// Evaluations of one policy at once; more wait.
const AT_ONCE: usize = 2;
/// Stack of an evaluation. The deepest policy that `check` accepts needs a quarter of it in a debug build, the unit
/// test's; pages that are not touched cost nothing.
const STACK: usize = 256 << 20;
/// Reasons of a denial that are shown, and characters of one.
const MAX_REASONS: usize = 8;
const MAX_REASON: usize = 120;
/// Characters of an error that are shown.
const MAX_PROBLEM: usize = 200;
/// What the library calls the file.
const NAME: &str = "policy";

/// The rules that are asked, within the package.
const ALLOW: &str = "allow";
const DENY: &str = "deny";

/// Why the policy did not let a peer in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// It said no.
    #[error("the policy (verify.rego) does not allow the peer: {0}")]
    Denied(String),
    /// It has no answer.
    #[error("the policy (verify.rego) failed: {0}")]
    Failed(String),
    /// It did not end.
    #[error("the policy (verify.rego) did not end within {} s", TIME.as_secs())]
    Timeout,
}

impl PolicyError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Denied(_) => "policy-denied",
            Self::Failed(_) => "policy-error",
            Self::Timeout => "policy-timeout",
        }
    }
}

/// What is wrong with a policy's text, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, from 1; absent when it is about the whole.
    pub at: Option<(u32, u32)>,
    /// In words, printable.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some((line, column)) = self.at {
            write!(f, "{line}:{column}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl Problem {
    fn whole(message: impl Into<String>) -> Self {
        Self { at: None, message: message.into() }
    }

    /// The library's errors are texts: the place, the line with a mark below it, and `error: ` with the words.
    fn of(error: &anyhow::Error) -> Self {
        let text = error.to_string();
        let at = text.split_once(&format!("--> {NAME}:")).and_then(|(_, rest)| {
            let mut numbers = rest.lines().next()?.split(':').map(str::parse);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
        let words = text.split_once("\nerror: ").map_or(text.as_str(), |(_, words)| words);
        Self { at, message: printable(words, MAX_PROBLEM) }
    }
}

/// One line of at most `max` characters, none of which a terminal obeys.
fn printable(text: &str, max: usize) -> String {
    let clean = text.chars().map(|c| if c.is_control() || c == '\u{fffd}' { ' ' } else { c });
    let clean: String = clean.filter(|c| !matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}')).collect();
    let words: Vec<&str> = clean.split_whitespace().collect();
    words.join(" ").chars().take(max).collect()
}

/// The library is built without std, and asks for a clock.
struct Monotonic;

impl TimeSource for Monotonic {
    fn now(&self) -> Option<Duration> {
        static FIRST: OnceLock<Instant> = OnceLock::new();
        Some(FIRST.get_or_init(Instant::now).elapsed())
    }
}

/// A policy that was read and checked.
pub struct Policy {
    engine: Engine,
    /// Whether it has `deny`.
    denies: bool,
    places: Arc<Semaphore>,
}

impl Policy {
    /// Reads and checks `text`.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn compile(text: &str) -> Result<Self, Problem> {
        if text.len() > MAX_TEXT {
            return Err(Problem::whole("longer than 64 KiB"));
        }
        let thread = std::thread::Builder::new().name("rego".into()).stack_size(STACK);
        std::thread::scope(|scope| match thread.spawn_scoped(scope, || compile(text)) {
            Ok(work) => work.join().unwrap_or_else(|_| Err(Problem::whole("reading it broke off"))),
            Err(e) => Err(Problem::whole(format!("no thread to read it: {e}"))),
        })
    }

    /// Asks about a peer of which `document` says what is known ([`Facts::document`]).
    ///
    /// # Errors
    /// The peer is not to be let in.
    pub async fn judge(&self, document: serde_json::Value) -> Result<(), PolicyError> {
        let broken = |what: &str| PolicyError::Failed(what.to_owned());
        let place = self.places.clone().acquire_owned().await.map_err(|_| broken("this side ends"))?;
        let (engine, denies) = (self.engine.clone(), self.denies);
        let (tell, outcome) = oneshot::channel();
        let work = move || {
            // Held until the end also when nobody waits for it any more.
            let _place = place;
            let _ = tell.send(decide(engine, denies, document));
        };
        let thread = std::thread::Builder::new().name("rego".into()).stack_size(STACK);
        thread.spawn(work).map_err(|e| PolicyError::Failed(format!("no thread to judge on: {e}")))?;
        outcome.await.unwrap_or_else(|_| Err(broken("the evaluation broke off")))
    }
}

fn compile(text: &str) -> Result<Policy, Problem> {
    // A second time changes nothing.
    let _ = set_time_source(&Monotonic);
    let mut engine = Engine::new();
    // A function that fails ends the question: taken as undefined, it would turn around in `not`.
    engine.set_strict_builtin_errors(true);
    engine.set_execution_timer_config(ExecutionTimerConfig { limit: TIME, check_interval: STEPS });
    engine.add_policy(NAME.into(), text.into()).map_err(|e| Problem::of(&e))?;
    check::check(&mut engine)?;
    // Schedules the statements, which finds variables that nothing binds.
    engine.compile_with_entrypoint(&path(ALLOW).into()).map_err(|e| Problem::of(&e))?;
    let denies = engine.has_declared_rule_rooted_at(NAME, DENY).map_err(|e| Problem::of(&e))?;
    Ok(Policy { engine, denies, places: Arc::new(Semaphore::new(AT_ONCE)) })
}

fn path(rule: &str) -> String {
    format!("data.tng.{rule}")
}

fn decide(mut engine: Engine, denies: bool, document: serde_json::Value) -> Result<(), PolicyError> {
    engine.set_input(document.into());
    let reasons = if denies { reasons(&ask(&mut engine, DENY)?)? } else { Vec::new() };
    let allow = ask(&mut engine, ALLOW)?;
    let shown = |otherwise: &str| {
        let text = if reasons.is_empty() { otherwise.to_owned() } else { reasons.join("; ") };
        Err(PolicyError::Denied(text))
    };
    match allow {
        Value::Bool(true) if reasons.is_empty() => Ok(()),
        Value::Bool(true) => shown(""),
        Value::Bool(false) => shown("allow is false"),
        Value::Undefined => shown("allow is undefined"),
        other => Err(PolicyError::Failed(format!("allow is {}, not a boolean", kind(&other)))),
    }
}

fn ask(engine: &mut Engine, rule: &str) -> Result<Value, PolicyError> {
    let started = Instant::now();
    let answer = engine.eval_rule(path(rule));
    // The library forgets within functions that an error was the clock's.
    if started.elapsed() > TIME {
        return Err(PolicyError::Timeout);
    }
    answer.map_err(|e| PolicyError::Failed(Problem::of(&e).to_string()))
}

/// The reasons in `deny`, sorted as a set is; undefined is none.
fn reasons(deny: &Value) -> Result<Vec<String>, PolicyError> {
    let all: Vec<&Value> = match deny {
        Value::Undefined => Vec::new(),
        Value::Set(set) => set.iter().collect(),
        Value::Array(array) => array.iter().collect(),
        other => return Err(PolicyError::Failed(format!("deny is {}, not a set of strings", kind(other)))),
    };
    let text = |reason: &&Value| match reason {
        Value::String(text) => Ok(printable(text, MAX_REASON)),
        other => Err(PolicyError::Failed(format!("deny holds {}, not only strings", kind(other)))),
    };
    let mut shown = all.iter().take(MAX_REASONS).map(text).collect::<Result<Vec<_>, _>>()?;
    if all.len() > MAX_REASONS {
        shown.push(format!("and {} more", all.len() - MAX_REASONS));
    }
    Ok(shown)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Undefined => "undefined",
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Set(_) => "a set",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
