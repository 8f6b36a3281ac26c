//! Locks: held by an open descriptor, so a process that dies lets go. What a lock file says proves that we made it: without
//! that, nothing that it guards is swept.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{openat, Flock, FlockArg, OFlag};
use nix::sys::stat::{fstat, Mode};

use super::dir::{Dir, Id};
use crate::host::fork::{self, ForkGuard};

/// The content of each lock file.
pub(super) const MARK: &[u8] = b"tw-microvm lock\n";

/// A lock on a file; no fork takes it along.
#[derive(Debug)]
pub struct Lock {
    _fork_guard: ForkGuard,
    file: Flock<File>,
}

impl Lock {
    /// Locks an open file; `None` when another description holds it.
    ///
    /// # Errors
    /// What flock(2) failed with.
    pub fn try_on(file: File) -> io::Result<Option<Self>> {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Some(Self { _fork_guard: fork::guard(&*file), file })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// A turn at a folder, until it is dropped; no fork takes it along.
#[derive(Debug)]
pub struct Turn {
    _fork_guard: ForkGuard,
    _lock: Flock<File>,
}

impl Dir {
    /// Takes the lock file `name`, which must be there; `None` when another process, or this one, holds it.
    ///
    /// # Errors
    /// `NotFound`, also when it was removed in between; `InvalidData` when [`Dir::make_lock`] did not make it; as
    /// [`Dir::open`]'s.
    pub fn lock(&self, name: impl AsRef<OsStr>) -> io::Result<Option<Lock>> {
        let file = self.open_writable(name.as_ref())?;
        let Some(lock) = self.held(name.as_ref(), file)? else { return Ok(None) };
        match content(lock.file())? == MARK {
            true => Ok(Some(lock)),
            false => Err(foreign()),
        }
    }

    /// As [`Dir::lock`], for one that is made when it is missing.
    ///
    /// # Errors
    /// `NotFound` when it was removed in between; the caller may try again. `InvalidData` when a file of that name has other
    /// content. As [`Dir::open`]'s.
    pub fn make_lock(&self, name: impl AsRef<OsStr>) -> io::Result<Option<Lock>> {
        let file = self.create_or_open(name.as_ref())?;
        let Some(lock) = self.held(name.as_ref(), file)? else { return Ok(None) };
        match content(lock.file())? {
            found if found == MARK => {}
            // New, or of a process that died before it wrote.
            found if MARK.starts_with(&found) => lock.file().write_all_at(MARK, 0)?,
            _ => return Err(foreign()),
        }
        Ok(Some(lock))
    }

    pub(super) fn held(&self, name: &OsStr, file: File) -> io::Result<Option<Lock>> {
        let Some(lock) = Lock::try_on(file)? else { return Ok(None) };
        // Its holder may have removed it between our open and our lock: then it has no name any more.
        match Id::of(&self.stat(name)?) == Id::of(&fstat(lock.file())?) {
            true => Ok(Some(lock)),
            false => Err(io::Error::from(ErrorKind::NotFound)),
        }
    }

    /// Waits for a turn: shared by those who add to the folder, alone for one who clears it.
    ///
    /// # Errors
    /// What opening or locking it failed with.
    pub fn turn(&self, kind: FlockArg) -> io::Result<Turn> {
        // A description of its own: threads that share one would share the lock.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut file = File::from(openat(self, ".", flags, Mode::empty())?);
        loop {
            match Flock::lock(file, kind) {
                Ok(lock) => return Ok(Turn { _fork_guard: fork::guard(&*lock), _lock: lock }),
                Err((again, Errno::EINTR)) => file = again,
                Err((_, errno)) => return Err(errno.into()),
            }
        }
    }
}

fn content(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = [0; MARK.len() + 1];
    let mut length = 0;
    loop {
        match file.read_at(&mut bytes[length..], length as u64)? {
            0 => return Ok(bytes[..length].to_vec()),
            read => length += read,
        }
    }
}

fn foreign() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "it is no lock of ours")
}

/// Whether this very process holds the lock file at `path`; `false` where the kernel does not tell (proc_locks(5)).
#[must_use]
pub(super) fn is_held_by_us(path: &Path) -> bool {
    let Ok(inode) = path.metadata().map(|meta| meta.ino()) else { return false };
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    // 1: FLOCK  ADVISORY  WRITE 708 00:17:4026531840 0 EOF
    locks.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let pid = fields.nth(2).and_then(|pid| pid.parse().ok());
        let file = fields.next().and_then(|file| file.rsplit(':').next()?.parse().ok());
        is_flock && pid == Some(std::process::id()) && file == Some(inode)
    })
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn test_turns_are_shared_by_those_who_add_and_alone_for_one_who_clears() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        let adds = dir.turn(FlockArg::LockShared).unwrap();
        drop(dir.turn(FlockArg::LockSharedNonblock).unwrap());
        let clears = dir.turn(FlockArg::LockExclusiveNonblock);
        assert_eq!(clears.unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(adds);
        drop(dir.turn(FlockArg::LockExclusiveNonblock).unwrap());
    }

    #[test]
    fn test_lock_is_one_holders_and_is_never_made_to_find_out() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        assert_eq!(dir.lock("lock").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!dir.has("lock").unwrap());
        let held = dir.make_lock("lock").unwrap().unwrap();
        assert!(dir.lock("lock").unwrap().is_none() && dir.make_lock("lock").unwrap().is_none());
        drop(held);
        assert!(dir.lock("lock").unwrap().is_some());
    }

    #[test]
    fn test_lock_is_taken_only_of_a_file_that_was_made_as_one() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        for (content, is_ours) in [("", false), ("tw-micro", false), ("tw-microvm lock\n", true), ("1234\n", false)] {
            std::fs::write(scratch.path().join("lock"), content).unwrap();
            assert_eq!(dir.lock("lock").is_ok_and(|lock| lock.is_some()), is_ours, "{content:?}");
            // One that says nothing else may be that of a process that died.
            assert_eq!(dir.make_lock("lock").is_ok_and(|lock| lock.is_some()), content != "1234\n", "{content:?}");
            std::fs::remove_file(scratch.path().join("lock")).unwrap();
        }
        std::fs::write(scratch.path().join("lock"), "1234\n").unwrap();
        assert_eq!(dir.make_lock("lock").unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(std::fs::read(scratch.path().join("lock")).unwrap(), b"1234\n");
    }

    #[test]
    fn test_lock_of_a_file_that_lost_its_name_is_not_taken() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        let file = dir.create_or_open("lock").unwrap();
        dir.remove_file("lock").unwrap();
        dir.create("lock").unwrap();
        assert_eq!(dir.held(OsStr::new("lock"), file).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn test_is_held_by_us_only_while_it_is_held() {
        let scratch = Scratch::new();
        let held = scratch.dir().make_lock("lock").unwrap().unwrap();
        assert!(is_held_by_us(&scratch.path().join("lock")));
        drop(held);
        assert!(!is_held_by_us(&scratch.path().join("lock")));
    }

    #[test]
    fn test_lock_behind_a_link_is_not_made() {
        let (scratch, outside) = (Scratch::new(), Scratch::new());
        symlink(outside.path().join("made"), scratch.path().join("lock")).unwrap();
        assert!(scratch.dir().make_lock("lock").is_err());
        assert!(!outside.path().join("made").exists());
    }
}
