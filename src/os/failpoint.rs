//! Named points in the life cycle where a test can kill, fail or stall the process.
//!
//! `TNG_FAILPOINT=NAME=ACTION[,NAME=ACTION...]` with ACTION `kill` (SIGKILL to oneself), `error`
//! (the step returns an error) or `stall` (the step never ends). Compiled in only with the cargo
//! feature `failpoints`; a release build has none of it.

/// What a test asked to happen at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The process ends at once by SIGKILL, as in a crash.
    Kill,
    /// The step fails.
    Error,
    /// The step never returns.
    Stall,
}

/// The action asked for at `name`, or `None`. Kills the process itself when asked to.
#[cfg(feature = "failpoints")]
pub fn at(name: &str) -> Option<Action> {
    let spec = std::env::var("TNG_FAILPOINT").ok()?;
    let action = spec
        .split(',')
        .filter_map(|item| item.split_once('='))
        .find(|(point, _)| *point == name)
        .map(|(_, action)| action)?;
    match action {
        "kill" => {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            None
        }
        "error" => Some(Action::Error),
        "stall" => Some(Action::Stall),
        other => panic!("TNG_FAILPOINT: {other} is not kill, error or stall"),
    }
}

/// Without the feature there are no failpoints.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn at(_name: &str) -> Option<Action> {
    None
}
