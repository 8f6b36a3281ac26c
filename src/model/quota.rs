//! What all VMs of one manager may have together.

use std::collections::HashMap;

use super::{ResourceLimits, VmId};
use crate::error::{Error, Result};

/// What is given out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QuotaUse {
    pub vcpus: u64,
    pub memory_mb: u64,
}

/// The ledger: one entry per VM, so releasing twice gives nothing back twice.
#[derive(Debug)]
pub struct Quota {
    max: QuotaUse,
    entries: HashMap<VmId, QuotaUse>,
}

impl Quota {
    #[must_use]
    pub fn new(max_vcpus: u64, max_memory_mb: u64) -> Self {
        Self { max: QuotaUse { vcpus: max_vcpus, memory_mb: max_memory_mb }, entries: HashMap::new() }
    }

    /// # Errors
    /// [`Error::QuotaExceeded`] naming what is short; [`Error::VmIdTaken`].
    pub fn reserve(&mut self, vm_id: &VmId, limits: &ResourceLimits) -> Result<()> {
        if self.entries.contains_key(vm_id) {
            return Err(Error::VmIdTaken { vm_id: vm_id.clone(), owner: "this manager".into() });
        }
        let left = self.available();
        let short = |what, needed, available, limit, remedy| Error::QuotaExceeded {
            vm_id: vm_id.clone(),
            what,
            needed,
            available,
            limit,
            remedy,
        };
        if limits.vcpu_count > left.vcpus {
            return Err(short("vCPUs", limits.vcpu_count, left.vcpus, self.max.vcpus, "raise max_vcpus"));
        }
        if limits.memory_mb > left.memory_mb {
            return Err(short(
                "memory (MB)",
                limits.memory_mb,
                left.memory_mb,
                self.max.memory_mb,
                "raise max_memory_mb",
            ));
        }
        self.entries.insert(vm_id.clone(), QuotaUse { vcpus: limits.vcpu_count, memory_mb: limits.memory_mb });
        Ok(())
    }

    pub fn release(&mut self, vm_id: &VmId) {
        self.entries.remove(vm_id);
    }

    #[must_use]
    pub fn allocated(&self) -> QuotaUse {
        self.entries.values().fold(QuotaUse::default(), |sum, entry| QuotaUse {
            vcpus: sum.vcpus + entry.vcpus,
            memory_mb: sum.memory_mb + entry.memory_mb,
        })
    }

    #[must_use]
    pub fn available(&self) -> QuotaUse {
        let used = self.allocated();
        QuotaUse {
            vcpus: self.max.vcpus.saturating_sub(used.vcpus),
            memory_mb: self.max.memory_mb.saturating_sub(used.memory_mb),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn test_quota_any_sequence_keeps_the_sum(ops in prop::collection::vec((any::<bool>(), 0u8..6, 1u64..8), 0..60)) {
            let mut quota = Quota::new(16, 4096);
            for (reserve, id, vcpu_count) in ops {
                let id = VmId::parse(&format!("vm{id}")).unwrap();
                if reserve {
                    let limits = ResourceLimits { vcpu_count, memory_mb: 256, ..Default::default() };
                    let before = quota.allocated();
                    if quota.reserve(&id, &limits).is_err() {
                        prop_assert_eq!(quota.allocated(), before);
                    }
                } else {
                    quota.release(&id);
                    quota.release(&id);
                }
                let (used, left) = (quota.allocated(), quota.available());
                prop_assert_eq!(used.vcpus + left.vcpus, 16);
                prop_assert_eq!(used.memory_mb + left.memory_mb, 4096);
            }
        }
    }
}
