//! Lock files: held by an open descriptor, so a process that dies lets go.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

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
