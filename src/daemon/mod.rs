//! Life cycle, listeners, privileges, control API, metrics.

mod api_sockets;
mod connections;
mod control;
mod dataplane;
mod dataplane_error;
mod describe;
mod endpoint;
mod gate;
pub mod handoff;
pub mod lifecycle;
pub mod listeners;
mod logging;
mod memory;
mod metrics;
mod paths;
mod privileges;
mod refusing;
pub mod reload;
mod stats;
mod status;
pub mod supervisor;
mod takeover;
mod worker;

pub use connections::{ConnState, Connection, Connections};
pub use control::{ControlError, ControlState, serve as serve_control};
pub use dataplane::{DataPlane, DrainOutcome, TunnelFactory};
pub use dataplane_error::DataPlaneError;
pub use endpoint::{Accepted, EndpointRuntime};
pub use gate::{Gate, Permit};
pub use listeners::BoundListener;
pub use logging::init as init_logging;
pub use metrics::{EndpointMetrics, Metrics};
pub use paths::{Paths, RUNTIME_DIR_ENV, netns_inode};
pub use privileges::{PrivilegeError, find_user, give_up, may_administer_network, raise_descriptor_limit};
pub use stats::EndpointStats;
pub use status::*;
