//! One connection's bytes: where they go, how they are copied, and the record it ends in.

mod addr;
mod buffer;
mod carrier;
mod copy;
#[cfg(test)]
mod copy_tests;
mod dial;
mod leg;
mod live_ports;
mod meter;
mod race;
mod record;
mod refusal;
mod stream_leg;
mod tls_leg;
mod tunnel;
mod vanished;

pub use addr::{ClientAddr, OriginalDst, PeerAddr, canonical};
pub use carrier::{Carrier, CarrierView};
pub use copy::{End, RelayOptions, relay};
pub use dial::{Dialer, MarkPolicy, Source, Target, probe_mark};
pub(crate) use dial::{keep_urgent_bytes, tune};
pub use leg::Leg;
pub use live_ports::{LivePort, LivePorts};
pub use meter::{Flow, Meter};
pub use record::{Outcome, Record};
pub use refusal::Refusal;
pub use stream_leg::StreamLeg;
pub use tls_leg::TlsLeg;
pub use tunnel::TunnelSide;
pub use vanished::Gone;
