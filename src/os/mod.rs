//! What tng asks of the operating system: system calls, other programs, users and capabilities, the clock.

pub mod clock;
pub mod failpoint;
pub(crate) mod files;
pub(crate) mod lock;
pub mod privileges;
pub mod process;
#[allow(unsafe_code)]
pub mod sys;
