//! A uid that no other VM of this host has, for as long as its VM lives.
//!
//! A lease is a locked file named after the uid. The folder is the same for every manager of root's, whatever its own
//! runtime directory: uids are the host's. The first try is random, so that even managers that cannot see each other's
//! locks (containers on one kernel) hardly meet.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::clock;
use super::fork::{self, Concealed};
use crate::error::{Error, Result};

/// How many uids are tried before the range is called full.
const TRIES: u64 = 10_000;

/// One uid, and the gid of the same number.
#[derive(Debug)]
pub struct Lease {
    uid: u32,
    path: PathBuf,
    _concealed: Concealed,
    _lock: Flock<File>,
}

impl Lease {
    /// Takes a uid from `first..=last`; `folder` holds the locks.
    ///
    /// # Errors
    /// [`Error::Host`] when the folder cannot be used, or no uid is free.
    pub fn take(folder: &Path, first: u32, last: u32) -> Result<Self> {
        let failed = |error: std::io::Error| Error::host("lease a uid", folder.display(), error);
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        let size = u64::from(last - first) + 1;
        let start = u64::from_ne_bytes(clock::random()?);
        for step in 0..size.min(TRIES) {
            let offset = u32::try_from((start.wrapping_add(step)) % size).unwrap_or(0);
            if let Some(lease) = Self::try_take(folder, first + offset).map_err(failed)? {
                return Ok(lease);
            }
        }
        let reason = format!("every uid tried from {first} to {last} is taken; widen config[\"uid_range\"]");
        Err(Error::host("lease a uid", folder.display(), reason))
    }

    fn try_take(folder: &Path, uid: u32) -> std::io::Result<Option<Self>> {
        let path = folder.join(uid.to_string());
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno.into()),
        };
        // Its last owner may have removed the name between our open and our lock: then nobody else would see the lock.
        let named = path.metadata().is_ok_and(|named| lock.metadata().is_ok_and(|ours| ours.ino() == named.ino()));
        Ok(named.then(|| Self { uid, path, _concealed: fork::conceal(&*lock), _lock: lock }))
    }

    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // While it is still locked, so that nobody takes a name that is about to go.
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: the lease of uid {} was not removed: {error}", self.path.display(), self.uid);
        }
    }
}

/// Removes the leases of processes that died.
pub fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(uid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        match Lease::try_take(folder, uid) {
            // Dropped, and so removed.
            Ok(Some(_stale)) => {}
            Ok(None) => {}
            Err(error) => log::debug!("{}: not looked at: {error}", entry.path().display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_take_never_gives_a_uid_twice_and_drop_gives_it_back() {
        let folder = std::env::temp_dir().join(format!("leases-{}", std::process::id()));
        let first = Lease::take(&folder, 7, 8).unwrap();
        let second = Lease::take(&folder, 7, 8).unwrap();
        assert_ne!(first.uid(), second.uid());
        assert!(Lease::take(&folder, 7, 8).unwrap_err().to_string().contains("uid_range"));
        let freed = first.uid();
        drop(first);
        assert_eq!(Lease::take(&folder, 7, 8).unwrap().uid(), freed);
        drop(second);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::remove_dir(folder).unwrap();
    }

    #[test]
    fn test_sweep_removes_what_nobody_holds_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("leases-swept-{}", std::process::id()));
        let held = Lease::take(&folder, 7, 7).unwrap();
        for name in ["8", "readme"] {
            fs::write(folder.join(name), "").unwrap();
        }
        sweep(&folder);
        let mut left: Vec<_> = fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, ["7", "readme"]);
        drop(held);
        fs::remove_dir_all(folder).unwrap();
    }
}
