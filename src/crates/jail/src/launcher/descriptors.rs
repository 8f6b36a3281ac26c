//! Descriptors: what the launcher was given by accident, by intent, and where the VMM finds them.
//!
//! Architecture invariant: every descriptor above 2 in L and C is close-on-exec; what the VMM gets is duplicated to its
//! number by [`place`], in V, and nowhere else. From [`reserve`] on the launcher opens nothing below the highest target, so
//! [`place`] replaces no descriptor that is still needed.

use std::fs::{read_dir, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::Stage;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::failure::Failure;

/// The lowest number that is no standard stream.
pub const LOWEST: RawFd = 3;

/// Duplicates `fd` to the lowest free number from `lowest` up, close-on-exec.
pub fn duplicate_from(fd: BorrowedFd<'_>, lowest: RawFd) -> Result<OwnedFd, Errno> {
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(lowest))?;
    // SAFETY: fcntl has just made this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Closes everything above stderr that leaked in from the manager's process. To be called before the launcher opens
/// anything of its own.
pub fn close_inherited() -> Result<(), Failure> {
    // SAFETY: close_range takes three integers. No descriptor above 2 has an owner in this process yet.
    let closed = Errno::result(unsafe { libc::syscall(libc::SYS_close_range, LOWEST, libc::c_uint::MAX, 0) });
    match closed {
        Ok(_) => Ok(()),
        // Kernels before 5.9, and seccomp profiles that have not heard of close_range.
        Err(Errno::ENOSYS | Errno::EPERM) => close_listed(),
        Err(errno) => Err(Failure::errno(Stage::Fds, errno, "close_range(3, ...)")),
    }
}

fn close_listed() -> Result<(), Failure> {
    let failed =
        |error: std::io::Error| Failure::io(Stage::Fds, &error, "listing /proc/self/fd; /proc must be mounted");
    let mut inherited = Vec::new();
    for entry in read_dir("/proc/self/fd").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        inherited.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()).filter(|fd| *fd > 2));
    }
    for fd in inherited {
        // SAFETY: the number was open and has no owner in this process, except the listing's own, closed by now.
        match Errno::result(unsafe { libc::close(fd) }) {
            Ok(_) | Err(Errno::EBADF) => {}
            Err(errno) => return Err(Failure::errno(Stage::Fds, errno, format_args!("closing descriptor {fd}"))),
        }
    }
    Ok(())
}

/// Puts `/dev/null` on stdin, stdout and stderr; the VMM keeps those it is given no other descriptor for.
pub fn null_standard_streams() -> Result<(), Failure> {
    let null: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| Failure::io(Stage::Fds, &error, "opening /dev/null"))?;
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&null))
        .map_err(|errno| Failure::errno(Stage::Fds, errno, "putting /dev/null on 0, 1 and 2"))
}

/// The lowest number above all of `targets` and the standard streams: there, descriptors wait out of [`place`]'s way.
pub fn first_free_above(targets: &[i32]) -> RawFd {
    targets.iter().copied().max().unwrap_or(0).max(LOWEST - 1) + 1
}

/// Puts `/dev/null`, which is stdin by now, on every free number below `lowest`: what is opened from here on gets none that
/// [`place`] will replace. They are close-on-exec and have no owner.
pub fn reserve(lowest: RawFd) -> Result<(), Failure> {
    loop {
        let reserved = duplicate_from(std::io::stdin().as_fd(), LOWEST).map_err(|errno| {
            let what = format_args!("reserving the descriptors below {lowest} (raise RLIMIT_NOFILE)").to_string();
            Failure::errno(Stage::Fds, errno, what)
        })?;
        if reserved.as_raw_fd() >= lowest {
            return Ok(());
        }
        std::mem::forget(reserved);
    }
}

/// Moves `passed` out of the way of their targets.
pub fn raise(passed: Vec<OwnedFd>, lowest: RawFd) -> Result<Vec<OwnedFd>, Failure> {
    passed
        .into_iter()
        .map(|fd| if fd.as_raw_fd() >= lowest { Ok(fd) } else { duplicate_from(fd.as_fd(), lowest) })
        .collect::<Result<_, _>>()
        .map_err(|errno| {
            let what = format_args!("moving the passed descriptors above {lowest} (raise RLIMIT_NOFILE)").to_string();
            Failure::errno(Stage::Fds, errno, what)
        })
}

/// Duplicates each descriptor to its target number, without close-on-exec.
pub fn place(passed: &[OwnedFd], targets: &[i32]) -> Result<(), Failure> {
    for (fd, &target) in passed.iter().zip(targets) {
        // SAFETY: dup2 takes two integers. No owner in this process holds a number as low as `target`: what came before
        // [`reserve`] was raised above the targets, what came after it was opened there, and the reserved ones and the
        // standard streams have no owner.
        Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), target) })
            .map_err(|errno| Failure::errno(Stage::Fds, errno, format_args!("dup2 to descriptor {target}")))?;
    }
    Ok(())
}
