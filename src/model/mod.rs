//! What a VM is and may become, as plain data.
//!
//! Architecture invariant: pure. No I/O, no clock, no async; everything here is tested without a machine.

mod budget;
mod config;
mod id;
mod kinds;
mod limits;
mod network;
mod quota;
mod state;

pub use budget::{Budget, CPU_PERIOD_US, VMM_CPU_PERCENT};
pub use config::{ManagerConfig, CONFIG_KEYS};
pub use id::VmId;
pub use kinds::{Backend, Grade, IsolationType, JailMode};
pub use limits::ResourceLimits;
pub use network::NetworkConfig;
pub use quota::{Quota, QuotaUse};
pub use state::VmState;
