//! What one VM is to be.

mod egress;
mod limits;
mod mac;
mod network;

pub use egress::{EgressRule, EgressTarget, NamePattern};
pub use limits::ResourceLimits;
pub use mac::MacAddress;
pub use network::{GuestAddress, NetworkConfig, NetworkText, DEFAULT_PREFIX};
