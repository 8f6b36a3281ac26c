//! VMs that a manager keeps ready before anyone asks for them.

use super::VmSpec;

/// How far the start of a warm VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolTier {
    /// The VMM runs: its own start-up is saved.
    Blank,
    /// The template is loaded, too.
    Restored,
    /// The guest has answered: only waking it is left.
    Ready,
}

impl PoolTier {
    pub const ALL: [PoolTier; 3] = [PoolTier::Blank, PoolTier::Restored, PoolTier::Ready];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            PoolTier::Blank => "blank",
            PoolTier::Restored => "restored",
            PoolTier::Ready => "ready",
        }
    }
}

/// How many VMs like `vm` are kept warm, and in which tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    pub vm: VmSpec,
    pub size: usize,
    pub tier: PoolTier,
}
