//! Process descriptors (pidfd_open(2)): unlike a number, they never come to mean another process.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::unistd::Pid;

/// Opens a process; `None` when there is none of that number.
///
/// # Errors
/// pidfd_open(2)'s; those of which [`are_missing`] is true say nothing about the process.
pub fn open(pid: Pid) -> io::Result<Option<OwnedFd>> {
    // SAFETY: pidfd_open(2) takes two numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    match RawFd::try_from(fd) {
        // SAFETY: it was opened above and belongs to nobody else.
        Ok(fd) if fd >= 0 => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            error => Err(error),
        },
    }
}

/// Whether [`open`] failed because there are no such descriptors: the kernel is older than 5.3, or a filter of system calls is.
#[must_use]
pub fn are_missing(error: &io::Error) -> bool {
    // What filters answer differs; pidfd_open(2) itself knows no EPERM.
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
}

/// Kills a process; one that has ended already is no error.
///
/// # Errors
/// What pidfd_send_signal(2) failed with.
pub fn kill(process: &OwnedFd) -> io::Result<()> {
    let (fd, no_info) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: three numbers, and no information about the signal.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) };
    match io::Error::last_os_error() {
        _ if sent == 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn test_kill_ends_the_process_that_was_opened_and_no_other() {
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let process = open(Pid::from_raw(child.id() as i32)).unwrap().unwrap();
        kill(&process).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        kill(&process).unwrap();
        assert!(open(Pid::from_raw(i32::MAX)).unwrap().is_none());
    }
}
