//! What an instance has between processes: where its run-time files are, and the configuration that is in force.

pub mod in_force;
pub mod paths;

pub use in_force::InForce;
pub use paths::Paths;
