//! tng puts unmodified TCP applications behind attested TLS.
//!
//! One connection meets the folders in this order:
//!
//! 1. [`config`]: a TOML file becomes a validated [`config::Config`].
//! 2. [`capture`]: captures become an nftables ruleset, routes and a guard.
//! 3. [`daemon`]: listeners, privileges and the life cycle; accepts the connection.
//! 4. [`ingress`] or [`egress`]: what one endpoint does with it.
//! 5. [`tls`] and [`attest`]: the attested channel to the other side.
//! 6. [`relay`]: bytes both ways, and the record the connection ends in.
//!
//! [`instance`] is what an instance has between processes. [`units`] is tng under systemd, which [`notify`] talks to. [`ctl`] is what `tngctl` prints, by [`output`]. [`os`] is what the kernel gives; `unsafe` lives in [`os::sys`] alone.

pub mod attest;
pub mod capture;
pub mod config;
pub mod ctl;
pub mod daemon;
pub mod egress;
pub mod ingress;
pub mod instance;
pub mod notify;
pub mod os;
pub mod output;
pub mod relay;
pub mod tls;
pub mod units;
