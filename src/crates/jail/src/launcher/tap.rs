//! The device of a VMM that finds its tap by name: C answers its opening of `/dev/net/tun` with one that L opened.
//!
//! A descriptor of that device looks for names in the network namespace in which it was opened. So the VMM has its tap, and
//! for all else an empty namespace of its own. Which taps it may have is the kernel's to say: those of its own uid.
//!
//! Architecture invariant: answered are a reading and writing open(2) or openat(2) of exactly this path, once. The kernel does
//! whatever else is asked as it would have: what a caller writes over a path that was read here is held by its root and by
//! Landlock.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use crate::Stage;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};

use super::audit::{read_path, send_reply, Notification, Reply};
use super::failure::Failure;

const DEVICE: &str = "/dev/net/tun";
/// What may come with O_RDWR; musl adds O_LARGEFILE, which other C libraries define as 0 here.
const O_LARGEFILE: i32 = 0o100_000;
const MODIFIERS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | O_LARGEFILE;

/// seccomp_unotify(2): struct seccomp_notif_addfd.
#[repr(C)]
struct AddFd {
    id: u64,
    flags: u32,
    source: u32,
    target: u32,
    target_flags: u32,
}

/// linux/seccomp.h: answers the call with the descriptor in one step; from 5.14 on.
const SEND: u32 = 1 << 1;
nix::ioctl_write_ptr!(is_waiting, b'!', 2, u64);
nix::ioctl_write_ptr!(add_fd, b'!', 3, AddFd);

/// The device, opened where the host's taps are.
#[derive(Debug)]
pub struct Tap(Option<File>);

/// To be called in the manager's network namespace, with the manager's rights.
pub fn open() -> Result<Tap, Failure> {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    let opened = opened.map_err(|error| Failure::io(Stage::NetNamespace, &error, format_args!("opening {DEVICE}")))?;
    Ok(Tap(Some(opened)))
}

/// The flags of an opening for reading and writing with nothing unusual about it, and where its path is.
fn wanted(notification: &Notification) -> Option<(i32, u64)> {
    let [first, second, third, ..] = notification.arguments;
    let (path, flags) = match libc::c_long::from(notification.number) {
        libc::SYS_openat => (second, third),
        libc::SYS_open => (first, second),
        _ => return None,
    };
    // The kernel, too, takes the lower half of the register.
    let flags = flags as u32 as i32;
    (flags & !MODIFIERS == libc::O_RDWR).then_some((flags, path))
}

impl Tap {
    /// Answers, if it is this that is asked for; `false`: it is not, and remains to be answered.
    pub fn answer(&mut self, listener: BorrowedFd<'_>, notification: &Notification) -> Result<bool, Failure> {
        let failed = |errno| Failure::errno(Stage::Seccomp, errno, format_args!("answering the opening of {DEVICE}"));
        let (Some(device), Some((flags, path))) = (&self.0, wanted(notification)) else { return Ok(false) };
        if read_path(notification.pid, path).as_deref() != Some(Path::new(DEVICE)) {
            return Ok(false);
        }
        // The number may have become another process's while its memory was read.
        // SAFETY: the id outlives the call, which only reads it.
        match unsafe { is_waiting(listener.as_raw_fd(), &notification.id) } {
            Ok(_) => {}
            Err(Errno::ENOENT) => return Ok(true),
            Err(errno) => return Err(failed(errno)),
        }
        fcntl(device, FcntlArg::F_SETFL(OFlag::from_bits_truncate(flags & libc::O_NONBLOCK))).map_err(failed)?;
        let request = AddFd {
            id: notification.id,
            flags: SEND,
            source: device.as_raw_fd().unsigned_abs(),
            target: 0,
            target_flags: (flags & libc::O_CLOEXEC).unsigned_abs(),
        };
        // SAFETY: the struct is the kernel's and outlives the call, which only reads it.
        let mut given = unsafe { add_fd(listener.as_raw_fd(), &request) };
        let answered = given != Err(Errno::EINVAL);
        if !answered {
            // SAFETY: as above.
            given = unsafe { add_fd(listener.as_raw_fd(), &AddFd { flags: 0, ..request }) };
        }
        let (value, error) = match given {
            Ok(number) => {
                self.0 = None;
                (i64::from(number), 0)
            }
            Err(Errno::ENOENT) => return Ok(true),
            // Its own limit of open files.
            Err(Errno::EMFILE) => (0, -libc::EMFILE),
            Err(errno) => return Err(failed(errno)),
        };
        if error == 0 && answered {
            return Ok(true);
        }
        let mut reply = Reply { id: notification.id, value, error, flags: 0 };
        // SAFETY: the struct is the kernel's and outlives the call.
        match unsafe { send_reply(listener.as_raw_fd(), &mut reply) } {
            Ok(_) | Err(Errno::ENOENT) => Ok(true),
            Err(errno) => Err(failed(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(number: libc::c_long, arguments: [u64; 6]) -> Notification {
        Notification { number: i32::try_from(number).unwrap_or(-1), arguments, ..Notification::default() }
    }

    #[test]
    fn test_wanted_is_an_opening_for_reading_and_writing_alone() {
        let by_openat = |flags: i32| notification(libc::SYS_openat, [0, 7, flags as u64, 0, 0, 0]);
        let usual = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
        assert_eq!(wanted(&by_openat(usual)), Some((usual, 7)));
        assert_eq!(wanted(&notification(libc::SYS_open, [7, 0o100_002, 0, 0, 0, 0])), Some((0o100_002, 7)));
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_CREAT, libc::O_RDWR | libc::O_PATH, 3] {
            assert_eq!(wanted(&by_openat(flags)), None, "{flags:#o}");
        }
        assert_eq!(wanted(&notification(libc::SYS_openat2, [0, 7, libc::O_RDWR as u64, 0, 0, 0])), None);
    }
}
