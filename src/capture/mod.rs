//! Capture: rules as values ([`ir`]), built by pure functions ([`compile`]), rendered to nft text ([`render`]),
//! applied at the edge ([`apply`]). The only place that knows nftables.

pub mod allocation;
pub mod apply;
pub(crate) mod cgroups;
pub mod compile;
pub mod counted;
pub mod fdstore;
pub mod guard;
mod held;
pub mod ir;
pub mod marks;
pub mod nft;
pub(crate) mod nft_process;
pub mod observe;
pub mod on_host;
pub mod order;
mod owner;
pub mod plan;
pub mod policy_rules;
pub mod render;
pub mod routes;
pub mod selector;
pub mod sockets;
mod transition;
mod watch;
