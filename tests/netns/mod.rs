//! Hosts for the network tests: namespaces that a test makes and removes itself, the wire between
//! them, a sniffer on that wire, and small application programs.
//!
//! ```text
//!  sidecar --- client ---- router ---- server --- backend
//!              198.51.100.2             203.0.113.2
//!              2001:db8:1::2            2001:db8:2::2
//! ```
//!
//! `sidecar` (192.0.2.2, 2001:db8:3::2) and `backend` (192.0.2.18, 2001:db8:4::2) stand for
//! containers: hosts that reach the others through `client` and `server`. Both exist in every
//! world, as a row of the leak matrix costs little more with them than without.
//!
//! Everything needs root and Debian's ip, nft, python3 and conntrack. A test without them fails
//! and says what to do; it never passes unseen.

// Each integration test compiles this module for itself and uses its own part of it.
#![allow(dead_code, unused_imports)]

mod app;
mod process;
mod sniffer;
mod tng;
mod traces;
mod wait;
mod world;

pub use app::{App, Connect, Fault};
pub use process::{Output, Proc, run};
pub use sniffer::Sniffer;
pub use tng::{Parts, Tng, kill_family, run_tngctl, run_tngd, tngctl, tngd};
pub use traces::{kernel_state, traces};
pub use wait::{wait_for, wait_until};
pub use world::{Family, Host, World, fresh_hex};
