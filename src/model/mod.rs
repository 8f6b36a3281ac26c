//! What a VM is and may become, as plain data.
//!
//! Architecture invariant: pure. No I/O, no clock, no async; everything here is tested without a machine.

mod budget;
mod config;
mod event;
mod health;
mod id;
mod ipv4;
mod kinds;
mod policy;
mod pool;
mod quota;
mod shapes;
mod spec;
mod state;
mod text;

pub use budget::{Budget, CPU_PERIOD_US, VMM_CPU_PERCENT};
pub use config::{ManagerConfig, CONFIG_KEYS};
pub use event::{Event, EventKind};
pub use health::{evaluate, GuestUse, HealthReport, HealthSample, HealthStatus, Liveness, Reason};
pub use id::{TemplateName, VmId};
pub use ipv4::{is_public, Ipv4Net};
pub use kinds::{Backend, Grade, IsolationType, JailMode};
pub use policy::{OnFailure, Policies, Policy};
pub use pool::{PoolSpec, PoolTier};
pub use quota::{QuotaLedger, QuotaUse, Reservation};
pub use spec::{
    BootImage, EgressRule, EgressTarget, GuestAddress, Labels, MacAddress, NamePattern, NetworkConfig, NetworkMode,
    NetworkText, ResourceLimits, SpecPatch, VmSpec, DEFAULT_PREFIX,
};
pub use state::VmState;
pub use text::{printable, said, RECORD_BYTES};
