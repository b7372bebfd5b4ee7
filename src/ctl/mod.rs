//! What `tngctl` asks the running instances and how it prints the answers.

mod client;
mod commands;
mod completions;
mod connections;
pub mod doctor;
mod instances;
mod kernel;
mod local;
mod peers;
mod status;
mod style;
mod unanswered;
pub mod verify;

pub use client::{CtlError, get};
pub use commands::{Answer, Exit, Scope, connections, status, status_line};
pub use completions::script as completions;
pub use instances::{Instance, find, runtime_dir};
pub use local::{LocalAnswer, check, reload, rules};
pub use style::{Style, human_age, human_bytes};
