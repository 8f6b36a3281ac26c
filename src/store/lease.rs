//! A uid that no other VM of this host has, for as long as its VM lives.
//!
//! A lease is a locked file named after the uid. The first try is random, so that even managers that cannot see each other's
//! locks (containers on one kernel) hardly meet.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use super::base::{leases_folder, Base, Kind, Root};
use super::lock::Lock;
use crate::error::{Error, Result};
use crate::host::clock;
use crate::host::fork::PerProcess;

/// Looked for once: uids are the host's, and all leases of a process are in one place.
static LEASES: PerProcess<Base> = PerProcess::new();

fn leases() -> &'static Base {
    LEASES.get_or_init(|| Base::new(Kind::Leases, leases_folder()))
}

/// How many uids are tried before the range is called full.
const TRIES: u64 = 10_000;

/// One uid, and the gid of the same number.
#[derive(Debug)]
pub struct Lease {
    uid: u32,
    folder: Arc<Root>,
    _lock: Lock,
}

impl Lease {
    /// Takes a uid from `first..=last`. Blocking.
    ///
    /// # Errors
    /// [`Error::FolderRefused`], [`Error::Host`] when no uid is free.
    pub fn take(first: u32, last: u32) -> Result<Self> {
        Self::take_in(&leases().root()?, first, last)
    }

    fn take_in(folder: &Arc<Root>, first: u32, last: u32) -> Result<Self> {
        let failed = |error: io::Error| Error::host("lease a uid", folder.path().display(), error);
        let size = u64::from(last - first) + 1;
        let start = u64::from_ne_bytes(clock::random()?);
        for step in 0..size.min(TRIES) {
            let offset = u32::try_from((start.wrapping_add(step)) % size).unwrap_or(0);
            let uid = first + offset;
            match folder.make_lock(uid.to_string()) {
                Ok(Some(lock)) => return Ok(Self { uid, folder: folder.clone(), _lock: lock }),
                Ok(None) => {}
                // Its last owner let go of it in between.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let reason = format!("every uid tried from {first} to {last} is taken; widen config[\"uid_range\"]");
        Err(Error::host("lease a uid", folder.path().display(), reason))
    }

    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // While it is still locked, so that no process takes a name that is about to go.
        if let Err(error) = self.folder.remove_file(self.uid.to_string()) {
            log::warn!("{}: the lease of uid {} was not removed: {error}", self.folder.path().display(), self.uid);
        }
    }
}

/// Removes the leases of processes that died. Blocking.
pub fn sweep() {
    match leases().existing() {
        Ok(Some(folder)) => sweep_in(&folder),
        Ok(None) => {}
        // An ordinary user has none.
        Err(error) if !nix::unistd::geteuid().is_root() => log::debug!("{error}"),
        Err(error) => log::warn!("{error}"),
    }
}

fn sweep_in(folder: &Arc<Root>) {
    for entry in folder.entries().unwrap_or_default() {
        let Some(uid) = entry.name.to_str().and_then(|name| name.parse().ok()) else { continue };
        match folder.lock(&entry.name) {
            // Dropped, and so removed.
            Ok(Some(lock)) => drop(Lease { uid, folder: folder.clone(), _lock: lock }),
            Ok(None) => {}
            Err(error) => log::debug!("{}: not looked at: {error}", folder.at(&entry.name).display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;

    fn names(folder: &Root) -> Vec<String> {
        folder.entries().unwrap().into_iter().map(|entry| entry.name.into_string().unwrap()).collect()
    }

    #[test]
    fn test_take_never_gives_a_uid_twice_and_drop_gives_it_back() {
        let scratch = Scratch::new();
        let folder = Base::new(Kind::Leases, scratch.path().join("uids")).root().unwrap();
        let first = Lease::take_in(&folder, 7, 8).unwrap();
        let second = Lease::take_in(&folder, 7, 8).unwrap();
        assert_ne!(first.uid(), second.uid());
        assert!(Lease::take_in(&folder, 7, 8).unwrap_err().to_string().contains("uid_range"));
        let freed = first.uid();
        drop(first);
        assert_eq!(Lease::take_in(&folder, 7, 8).unwrap().uid(), freed);
        drop(second);
        assert_eq!(names(&folder), [".tw-microvm"]);
    }

    #[test]
    fn test_sweep_removes_what_nobody_holds_and_nothing_else() {
        let scratch = Scratch::new();
        let folder = Base::new(Kind::Leases, scratch.path().join("uids")).root().unwrap();
        let held = Lease::take_in(&folder, 7, 7).unwrap();
        drop(folder.make_lock("8").unwrap());
        for name in ["11", "readme"] {
            folder.create(name).unwrap();
        }
        folder.make_dir("9").unwrap();
        std::os::unix::fs::symlink("readme", folder.at("10")).unwrap();
        sweep_in(&folder);
        assert_eq!(names(&folder), [".tw-microvm", "10", "11", "7", "9", "readme"]);
        drop(held);
    }
}
