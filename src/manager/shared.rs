//! What managers, and VMs on their own, have in common in one process where their configurations agree.
//!
//! Each template is in memory once for a process, and each file's digest is taken once. What is shared goes with its last
//! user.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;

use tokio::sync::Semaphore;

use crate::host::fork::PerProcess;
use crate::image::template::{Digests, SnapshotStore, Store, StoreLimits};
use crate::mutex::Mutex;

/// Starts at once, for each CPU: one computes while another waits for the kernel.
const STARTS_PER_CPU: usize = 2;

/// Things of one kind, by what they were made of.
struct Known<K, V>(Mutex<Vec<(K, Weak<V>)>>);

impl<K, V> Default for Known<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: PartialEq, V> Known<K, V> {
    /// The one made of `key` that is in use, or a new one.
    fn get(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut known = self.0.lock();
        known.retain(|(_, value)| value.strong_count() > 0);
        let found = known.iter().find(|(other, _)| *other == key).and_then(|(_, value)| value.upgrade());
        found.unwrap_or_else(|| {
            let made = Arc::new(make());
            known.push((key, Arc::downgrade(&made)));
            made
        })
    }
}

/// The templates in a cache folder.
pub fn store(cache: &Path, limits: StoreLimits) -> Arc<Store> {
    static KNOWN: PerProcess<Known<(PathBuf, StoreLimits), Store>> = PerProcess::new();
    KNOWN.get().get((cache.to_owned(), limits), || Store::new(cache, limits))
}

/// The users' own templates in a cache folder.
pub fn snapshots(cache: &Path) -> Arc<SnapshotStore> {
    static KNOWN: PerProcess<Known<PathBuf, SnapshotStore>> = PerProcess::new();
    KNOWN.get().get(cache.to_owned(), || SnapshotStore::snapshots(cache))
}

/// The suspended VMs in a cache folder.
pub fn suspended(cache: &Path) -> Arc<SnapshotStore> {
    static KNOWN: PerProcess<Known<PathBuf, SnapshotStore>> = PerProcess::new();
    KNOWN.get().get(cache.to_owned(), || SnapshotStore::suspended(cache))
}

pub fn digests() -> Arc<Digests> {
    static KNOWN: PerProcess<Known<(), Digests>> = PerProcess::new();
    KNOWN.get().get((), Digests::default)
}

/// Turns to start: they are for the host's CPUs, whichever manager's VM it is.
pub fn starts() -> Arc<Semaphore> {
    static KNOWN: PerProcess<Known<(), Semaphore>> = PerProcess::new();
    let turns = || STARTS_PER_CPU * thread::available_parallelism().map_or(1, usize::from);
    KNOWN.get().get((), || Semaphore::new(turns()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn test_store_of_one_configuration_is_shared_while_it_is_used() {
        let limits = StoreLimits { max_bytes: 1, max_age: Duration::ZERO };
        let (here, there) = (Path::new("/cache/shared-here"), Path::new("/cache/shared-there"));
        let one = store(here, limits);
        assert!(Arc::ptr_eq(&one, &store(here, limits)));
        assert!(!Arc::ptr_eq(&one, &store(there, limits)));
        assert!(!Arc::ptr_eq(&one, &store(here, StoreLimits { max_bytes: 2, ..limits })));
        let gone = Arc::downgrade(&one);
        drop(one);
        assert_eq!((gone.strong_count(), store(here, limits).usage()), (0, (0, 0)));
    }

    #[test]
    fn test_shelves_of_two_kinds_are_two() {
        let cache = Path::new("/cache/shared-stores");
        let (snapshots, suspended) = (snapshots(cache), suspended(cache));
        assert_ne!(snapshots.folder(), suspended.folder());
        let digests_in_use = digests();
        assert!(Arc::ptr_eq(&digests_in_use, &digests()));
    }
}
