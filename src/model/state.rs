//! The life of a VM: one table.

use std::fmt;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VmState {
    Created,
    Starting,
    Running,
    Paused,
    Stopping,
    Stopped,
    Error,
    Destroyed,
}

impl VmState {
    pub const ALL: [VmState; 8] = [
        VmState::Created,
        VmState::Starting,
        VmState::Running,
        VmState::Paused,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Error,
        VmState::Destroyed,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            VmState::Created => "created",
            VmState::Starting => "starting",
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Stopping => "stopping",
            VmState::Stopped => "stopped",
            VmState::Error => "error",
            VmState::Destroyed => "destroyed",
        }
    }

    /// The states that may follow this one.
    #[must_use]
    pub fn successors(self) -> &'static [VmState] {
        use VmState::{Destroyed, Error, Paused, Running, Starting, Stopped, Stopping};
        match self {
            VmState::Created => &[Starting, Destroyed],
            VmState::Starting => &[Running, Error, Destroyed],
            VmState::Running => &[Paused, Stopping, Error, Destroyed],
            VmState::Paused => &[Running, Stopping, Error, Destroyed],
            VmState::Stopping => &[Stopped, Error, Destroyed],
            VmState::Stopped => &[Starting, Destroyed],
            // A failed VM holds nothing any more, so it may be tried again.
            VmState::Error => &[Starting, Stopped, Destroyed],
            VmState::Destroyed => &[],
        }
    }

    #[must_use]
    pub fn can_become(self, next: VmState) -> bool {
        self.successors().contains(&next)
    }

    /// The states from which `next` can be reached in one step, for messages.
    #[must_use]
    pub fn predecessors_of(next: VmState) -> String {
        let from: Vec<_> = Self::ALL.into_iter().filter(|s| s.can_become(next)).map(VmState::as_str).collect();
        from.join(", ")
    }

    /// Whether a VMM process stands behind the VM.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping)
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_can_become_over_all_pairs_is_this_table() {
        // Rows: from; columns: to, in the order of ALL.
        let table = [
            /* created   */ "01000001", /* starting  */ "00100011", /* running   */ "00011011",
            /* paused    */ "00101011", /* stopping  */ "00000111", /* stopped   */ "01000001",
            /* error     */ "01000101", /* destroyed */ "00000000",
        ];
        for (from, row) in VmState::ALL.into_iter().zip(table) {
            for (to, cell) in VmState::ALL.into_iter().zip(row.chars()) {
                assert_eq!(from.can_become(to), cell == '1', "{from} -> {to}");
            }
        }
    }

    #[test]
    fn test_starting_ends_only_in_running_error_or_destroyed() {
        assert_eq!(VmState::Starting.successors(), [VmState::Running, VmState::Error, VmState::Destroyed]);
    }
}
