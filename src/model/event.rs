//! What happens to VMs, as plain data.

use std::sync::Arc;

use serde_json::{json, Value};

use super::{HealthStatus, Reason, VmId, VmSpec, VmState};

/// The kind of an event, with the data of that kind.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
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
    /// The template of such VMs is made, which takes seconds: `fraction` of it is done where `stage` begins.
    Template {
        stage: &'static str,
        fraction: f64,
    },
}

impl EventKind {
    pub const NAMES: [&'static str; 8] =
        ["created", "removed", "state", "health", "oom", "limit", "policy", "template"];

    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            EventKind::Created => "created",
            EventKind::Removed => "removed",
            EventKind::State { .. } => "state",
            EventKind::Health { .. } => "health",
            EventKind::Oom { .. } => "oom",
            EventKind::Limit { .. } => "limit",
            EventKind::Policy { .. } => "policy",
            EventKind::Template { .. } => "template",
        }
    }
}

impl EventKind {
    /// `why`, after the old and the new state or health status.
    #[must_use]
    pub fn detail(&self, why: String) -> String {
        let change = match self {
            EventKind::State { from, to } => format!("{from} -> {to}"),
            EventKind::Health { from, to, reason } => {
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
    pub spec: Arc<VmSpec>,
    pub kind: EventKind,
    /// What happened and why, for people.
    pub detail: String,
}

impl Event {
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut event = json!({
            "sequence": self.sequence,
            "time": self.unix_time_s,
            "kind": self.kind.name(),
            "vm_id": self.vm_id.as_str(),
            "isolation_type": self.spec.isolation_type.as_str(),
            "detail": self.detail,
        });
        let mut add = |key: &str, value: Value| event[key] = value;
        if !self.spec.labels.is_empty() {
            add("labels", json!(self.spec.labels));
        }
        match &self.kind {
            EventKind::Created | EventKind::Removed => {}
            EventKind::State { from, to } => {
                add("from", from.as_str().into());
                add("to", to.as_str().into());
            }
            EventKind::Health { from, to, reason } => {
                add("from", from.as_str().into());
                add("to", to.as_str().into());
                add("reason", reason.as_str().into());
            }
            EventKind::Oom { place, kills } => {
                add("place", (*place).into());
                add("kills", (*kills).into());
            }
            EventKind::Limit { what } => add("what", (*what).into()),
            EventKind::Policy { action, replacement } => {
                add("action", (*action).into());
                add("replacement", replacement.as_ref().map(VmId::as_str).into());
            }
            EventKind::Template { stage, fraction } => {
                add("stage", (*stage).into());
                add("fraction", (*fraction).into());
            }
        }
        event
    }
}
