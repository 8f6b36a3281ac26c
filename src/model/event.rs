//! What happens to VMs, as plain data.

use serde_json::{json, Value};

use super::{HealthStatus, IsolationType, Reason, VmId, VmState};

/// What an event is about, and what is particular to it.
#[derive(Debug, Clone, PartialEq)]
pub enum Happening {
    Created,
    /// It is in the registry no more.
    Removed,
    State {
        from: VmState,
        to: VmState,
    },
    Health {
        from: HealthStatus,
        to: HealthStatus,
        reason: Reason,
    },
    /// Processes killed for want of memory: in the guest, or of the VMM's group on the host.
    Oom {
        place: &'static str,
        kills: u64,
    },
    /// A limit was hit: `quota`, `processes`, `host_disk`.
    Limit {
        what: &'static str,
    },
    /// What the policy of its isolation type did: `restart`, `replace`, `give_up`, `deadline`, `idle_limit`.
    Policy {
        action: &'static str,
        replacement: Option<VmId>,
    },
}

impl Happening {
    pub const KINDS: [&'static str; 7] = ["created", "removed", "state", "health", "oom", "limit", "policy"];

    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Happening::Created => "created",
            Happening::Removed => "removed",
            Happening::State { .. } => "state",
            Happening::Health { .. } => "health",
            Happening::Oom { .. } => "oom",
            Happening::Limit { .. } => "limit",
            Happening::Policy { .. } => "policy",
        }
    }
}

impl Happening {
    /// `why`, after what a state or a verdict was and is now.
    #[must_use]
    pub fn detail(&self, why: String) -> String {
        let change = match self {
            Happening::State { from, to } => format!("{from} -> {to}"),
            Happening::Health { from, to, reason } => {
                format!("{} -> {} ({})", from.as_str(), to.as_str(), reason.as_str())
            }
            _ => return why,
        };
        if why.is_empty() {
            change
        } else {
            format!("{change}: {why}")
        }
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Counts up by one; a gap is what a reader has missed.
    pub sequence: u64,
    pub unix_time_s: f64,
    pub vm_id: VmId,
    pub isolation_type: IsolationType,
    pub happening: Happening,
    /// What happened and why, for people.
    pub detail: String,
}

impl Event {
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut event = json!({
            "sequence": self.sequence,
            "time": self.unix_time_s,
            "kind": self.happening.kind(),
            "vm_id": self.vm_id.as_str(),
            "isolation_type": self.isolation_type.as_str(),
            "detail": self.detail,
        });
        let mut add = |key: &str, value: Value| event[key] = value;
        match &self.happening {
            Happening::Created | Happening::Removed => {}
            Happening::State { from, to } => {
                add("from", from.as_str().into());
                add("to", to.as_str().into());
            }
            Happening::Health { from, to, reason } => {
                add("from", from.as_str().into());
                add("to", to.as_str().into());
                add("reason", reason.as_str().into());
            }
            Happening::Oom { place, kills } => {
                add("place", (*place).into());
                add("kills", (*kills).into());
            }
            Happening::Limit { what } => add("what", (*what).into()),
            Happening::Policy { action, replacement } => {
                add("action", (*action).into());
                add("replacement", replacement.as_ref().map(VmId::as_str).into());
            }
        }
        event
    }
}
