//! Lock files: held by an open descriptor, so a process that dies lets go.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::fork::{self, Concealed};

/// Takes the lock file at `path`, made when it is missing; `None` when someone holds it.
///
/// # Errors
/// `NotFound` when the file was removed in between; the caller may try again.
pub fn try_exclusive(path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    let held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => held,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, errno)) => return Err(errno.into()),
    };
    // Its holder may have removed it between our open and our lock: then it has no name any more.
    let same = path.metadata().is_ok_and(|named| held.metadata().is_ok_and(|ours| ours.ino() == named.ino()));
    if same {
        Ok(Some(held))
    } else {
        Err(io::Error::from(ErrorKind::NotFound))
    }
}

/// Whether this very process holds the lock file at `path`; `false` where the kernel does not tell (proc_locks(5)).
#[must_use]
pub fn is_held_by_us(path: &Path) -> bool {
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

/// Waits for a turn at a folder that exists: shared by those who add to it, alone for one who clears it.
///
/// # Errors
/// What opening or locking it failed with.
pub fn turn(folder: &Path, kind: FlockArg) -> io::Result<Turn> {
    let mut file = File::open(folder)?;
    loop {
        match Flock::lock(file, kind) {
            Ok(lock) => return Ok(Turn { _concealed: fork::conceal(&*lock), _lock: lock }),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// A turn at a folder, until it is dropped; no fork takes it along.
#[derive(Debug)]
pub struct Turn {
    _concealed: Concealed,
    _lock: Flock<File>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_is_held_by_us_only_while_it_is_held() {
        let path = std::env::temp_dir().join(format!("lock-of-ours-{}", std::process::id()));
        let held = try_exclusive(&path).unwrap().unwrap();
        assert!(is_held_by_us(&path));
        drop(held);
        assert!(!is_held_by_us(&path));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn test_turns_are_shared_by_those_who_add_and_alone_for_one_who_clears() {
        let folder = std::env::temp_dir();
        let adds = turn(&folder, FlockArg::LockShared).unwrap();
        let too = turn(&folder, FlockArg::LockSharedNonblock).unwrap();
        drop(too);
        let clears = turn(&folder, FlockArg::LockExclusiveNonblock);
        assert_eq!(clears.unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(adds);
    }
}
