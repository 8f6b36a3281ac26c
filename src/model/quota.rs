//! What all VMs of one manager may have together.
//!
//! Architecture invariant: what is given out is the sum of the [`Reservation`]s that live. There is no other way to
//! reserve, and none to give back but to drop one.

use std::collections::HashMap;
use std::sync::Arc;

use super::{ResourceLimits, VmId};
use crate::error::{Error, Result};
use crate::mutex::Mutex;

/// What is given out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QuotaUse {
    pub vcpus: u64,
    pub memory_mb: u64,
}

impl QuotaUse {
    /// Whether this is no more than `other` in both.
    #[must_use]
    pub fn fits_in(&self, other: &Self) -> bool {
        self.vcpus <= other.vcpus && self.memory_mb <= other.memory_mb
    }
}

impl From<&ResourceLimits> for QuotaUse {
    fn from(limits: &ResourceLimits) -> Self {
        Self { vcpus: limits.vcpu_count, memory_mb: limits.memory_mb }
    }
}

impl std::ops::Add for QuotaUse {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { vcpus: self.vcpus + other.vcpus, memory_mb: self.memory_mb + other.memory_mb }
    }
}

impl std::iter::Sum for QuotaUse {
    fn sum<I: Iterator<Item = Self>>(uses: I) -> Self {
        uses.fold(Self::default(), |sum, one| sum + one)
    }
}

/// The quota and what is reserved of it. Its lock is held for a few instructions, and no other is taken under it.
#[derive(Debug)]
pub struct QuotaLedger {
    max: QuotaUse,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    reserved: HashMap<u64, QuotaUse>,
}

impl Entries {
    fn sum(&self) -> QuotaUse {
        self.reserved.values().copied().sum()
    }
}

/// One entry of a ledger, for as long as this lives: a VM runs by holding one.
#[derive(Debug)]
pub struct Reservation(Option<(Arc<QuotaLedger>, u64)>);

impl Reservation {
    /// That of a VM which no manager counts.
    #[must_use]
    pub fn uncounted() -> Self {
        Self(None)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some((ledger, entry)) = self.0.take() {
            ledger.entries.lock().reserved.remove(&entry);
        }
    }
}

impl QuotaLedger {
    #[must_use]
    pub fn new(max_vcpus: u64, max_memory_mb: u64) -> Arc<Self> {
        let max = QuotaUse { vcpus: max_vcpus, memory_mb: max_memory_mb };
        Arc::new(Self { max, entries: Mutex::default() })
    }

    fn left(&self, entries: &Entries) -> QuotaUse {
        let used = entries.sum();
        QuotaUse {
            vcpus: self.max.vcpus.saturating_sub(used.vcpus),
            memory_mb: self.max.memory_mb.saturating_sub(used.memory_mb),
        }
    }

    /// Reserves what `vm_id` may have.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`] naming what is short.
    pub fn reserve(self: &Arc<Self>, vm_id: &VmId, limits: &ResourceLimits) -> Result<Reservation> {
        let mut entries = self.entries.lock();
        let (left, wanted) = (self.left(&entries), QuotaUse::from(limits));
        let each = [
            ("vCPUs", wanted.vcpus, left.vcpus, self.max.vcpus, "raise max_vcpus"),
            ("memory (MB)", wanted.memory_mb, left.memory_mb, self.max.memory_mb, "raise max_memory_mb"),
        ];
        for (what, needed, available, limit, remedy) in each {
            if needed > available {
                let vm_id = vm_id.clone();
                return Err(Error::QuotaExceeded { vm_id, what, needed, available, limit, remedy });
            }
        }
        let entry = entries.next;
        entries.next += 1;
        entries.reserved.insert(entry, wanted);
        Ok(Reservation(Some((self.clone(), entry))))
    }

    #[must_use]
    pub fn allocated(&self) -> QuotaUse {
        self.entries.lock().sum()
    }

    #[must_use]
    pub fn available(&self) -> QuotaUse {
        self.left(&self.entries.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(vcpu_count: u64) -> ResourceLimits {
        ResourceLimits { vcpu_count, memory_mb: 256, ..Default::default() }
    }

    proptest! {
        #[test]
        fn test_quota_any_sequence_keeps_the_sum(ops in prop::collection::vec((0usize..8, 1u64..8), 0..60)) {
            let ledger = QuotaLedger::new(16, 4096);
            let vm_id = VmId::parse("vm").unwrap();
            let mut held: Vec<Option<(u64, Reservation)>> = (0..8).map(|_| None).collect();
            for (place, vcpu_count) in ops {
                let before = ledger.allocated();
                held[place] = match held[place].take() {
                    Some(given_back) => {
                        drop(given_back);
                        None
                    }
                    None => match ledger.reserve(&vm_id, &limits(vcpu_count)) {
                        Ok(reservation) => Some((vcpu_count, reservation)),
                        Err(_) => {
                            prop_assert!(before.vcpus + vcpu_count > 16 || before.memory_mb + 256 > 4096);
                            None
                        }
                    },
                };
                let (used, left) = (ledger.allocated(), ledger.available());
                prop_assert_eq!(used.vcpus, held.iter().flatten().map(|(vcpus, _)| vcpus).sum::<u64>());
                prop_assert_eq!(used.memory_mb, 256 * held.iter().flatten().count() as u64);
                prop_assert_eq!((used.vcpus + left.vcpus, used.memory_mb + left.memory_mb), (16, 4096));
            }
            drop(held);
            prop_assert_eq!(ledger.allocated(), QuotaUse::default());
        }
    }

    #[test]
    fn test_reservations_of_many_threads_never_exceed_the_quota_and_all_come_back() {
        let ledger = QuotaLedger::new(8, 1 << 20);
        let life = |ledger: Arc<QuotaLedger>| {
            let vm_id = VmId::parse("vm").unwrap();
            for round in 0..500 {
                let reservation = ledger.reserve(&vm_id, &limits(1 + round % 3));
                assert!(ledger.allocated().vcpus <= 8);
                drop(reservation);
            }
        };
        let threads: Vec<_> =
            (0..8).map(|_| ledger.clone()).map(|ledger| std::thread::spawn(move || life(ledger))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(ledger.allocated(), QuotaUse::default());
    }
}
