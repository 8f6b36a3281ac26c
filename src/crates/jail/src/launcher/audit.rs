//! The audit: C answers for the kernel what the filter would have refused, and tells the manager.
//!
//! Architecture invariant: everything that is asked is allowed; what was asked for is reported once. The kernel stops
//! the caller until it has its answer, so nothing here waits. A process has one listener at most, so the one opening that C
//! does answer itself ([`super::tap`]) is asked here, too, audit or not.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use crate::{JailEvent, LaunchSpec, Stage, Visible};
use nix::errno::Errno;
use nix::sys::socket::{
    recvmsg, sendmsg, socketpair, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
};

use super::failure::Failure;
use super::landlock;
use super::policy::OPENS;
use super::tap::Tap;

/// Characters of a path in a finding: JSON turns one into at most six bytes, and an event has to stay below
/// `MAX_EVENT_BYTES`.
const MAX_SHOWN: usize = 256;
/// Distinct findings of one VM; a VMM that tries them all says nothing new after that.
const MAX_FINDINGS: usize = 256;

/// seccomp_unotify(2): struct seccomp_notif and struct seccomp_notif_resp.
#[repr(C)]
#[derive(Default)]
pub struct Notification {
    pub id: u64,
    pub pid: u32,
    pub flags: u32,
    pub number: i32,
    pub architecture: u32,
    pub instruction_pointer: u64,
    pub arguments: [u64; 6],
}

#[repr(C)]
pub struct Reply {
    pub id: u64,
    pub value: i64,
    pub error: i32,
    pub flags: u32,
}

const CONTINUE: u32 = 1;
nix::ioctl_readwrite!(receive_notification, b'!', 0, Notification);
nix::ioctl_readwrite!(send_reply, b'!', 1, Reply);

/// C's end.
pub struct Audit {
    /// Where V's listener arrives.
    delivery: OwnedFd,
    listener: Option<OwnedFd>,
    tap: Option<Tap>,
    /// Whether anything is to be reported.
    reports: bool,
    /// Landlock's rules, which are not enforced.
    files: Vec<Visible>,
    /// Whether `/proc` is the jail's own.
    proc: bool,
    found: BTreeSet<(&'static str, String)>,
}

/// C's end and V's end of the way that the listener takes.
pub fn prepare(spec: &LaunchSpec, tap: Option<Tap>) -> Result<(Audit, OwnedFd), Failure> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (delivery, end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(|errno| Failure::errno(Stage::Seccomp, errno, "making a socket pair"))?;
    let (files, found) = (spec.files.clone(), BTreeSet::new());
    Ok((Audit { delivery, listener: None, tap, reports: spec.audit, files, proc: spec.proc, found }, end))
}

/// V's half: gives C the listener.
pub fn hand_over(listener: &OwnedFd, end: &OwnedFd) -> Result<(), Failure> {
    let fds = [listener.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(end.as_raw_fd(), &[std::io::IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(|errno| Failure::errno(Stage::Seccomp, errno, "handing the audit's listener to the supervisor"))
}

impl Audit {
    /// What to wait for next.
    pub fn source(&self) -> BorrowedFd<'_> {
        self.listener.as_ref().unwrap_or(&self.delivery).as_fd()
    }

    /// Takes what there is, and says what is new in it.
    pub fn answer(&mut self) -> Result<Vec<JailEvent>, Failure> {
        let Some(listener) = &self.listener else {
            self.listener = receive_listener(&self.delivery)?;
            return Ok(Vec::new());
        };
        let mut notification = Notification::default();
        // SAFETY: the struct is the kernel's, zeroed as seccomp_unotify(2) asks, and outlives the call.
        match unsafe { receive_notification(listener.as_raw_fd(), &mut notification) } {
            Ok(_) => {}
            // The caller was killed while it waited; or the last one under the filter has ended.
            Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => return Ok(Vec::new()),
            Err(errno) => return Err(Failure::errno(Stage::Seccomp, errno, "receiving a question of the audit")),
        }
        if let Some(tap) = &mut self.tap {
            if tap.answer(listener.as_fd(), &notification)? {
                return Ok(Vec::new());
            }
        }
        // While the caller waits: afterwards its memory may say something else.
        let finding = if self.reports { self.finding_of(&notification) } else { None };
        let mut reply = Reply { id: notification.id, value: 0, error: 0, flags: CONTINUE };
        // SAFETY: as above.
        match unsafe { send_reply(listener.as_raw_fd(), &mut reply) } {
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(Failure::errno(Stage::Seccomp, errno, "answering a question of the audit")),
        }
        let Some((layer, what)) = finding else { return Ok(Vec::new()) };
        if self.found.len() >= MAX_FINDINGS || !self.found.insert((layer, what.clone())) {
            return Ok(Vec::new());
        }
        Ok(vec![JailEvent::WouldDeny { layer: layer.into(), what }])
    }

    /// Which layer would have denied it, and what it was. Opening a file is no matter of seccomp's, but only there can
    /// it be seen what Landlock would have said.
    fn finding_of(&self, notification: &Notification) -> Option<(&'static str, String)> {
        let number = libc::c_long::from(notification.number);
        if !OPENS.contains(&number) {
            return Some(("seccomp", describe(notification)));
        }
        let [first, second, third, ..] = notification.arguments;
        let (folder, address, flags) = match number {
            libc::SYS_openat => (first as i32, second, third),
            _ => (libc::AT_FDCWD, first, second),
        };
        let path = read_path(notification.pid, address)?;
        // Relative to a descriptor: which folder that is, is not known here.
        let path =
            if folder == libc::AT_FDCWD || path.is_absolute() { Path::new("/").join(path) } else { return None };
        // In a jail that has a /proc for its descriptors the rest of it might as well not be there, as in any other.
        if self.proc && path.starts_with("/proc") {
            return None;
        }
        let flags = i32::try_from(flags).unwrap_or(0);
        landlock::would_deny(&self.files, &path, flags).then(|| {
            let how = if landlock::is_write(flags) { "writing" } else { "reading" };
            let shown: String = path.display().to_string().chars().take(MAX_SHOWN).collect();
            ("landlock", format!("{how} {shown}"))
        })
    }
}

/// A path in the memory of V, which is C's child and has its uid.
pub fn read_path(pid: u32, address: u64) -> Option<PathBuf> {
    const PAGE: usize = 4096;
    let start = usize::try_from(address).ok()?;
    let mut bytes = [0u8; PAGE];
    // To the end of the page at most: the next one may not be there.
    let length = PAGE - start % PAGE;
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: length };
    let remote = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: length };
    // SAFETY: `bytes` has room for `length`; the remote address is the kernel's to check.
    let read = unsafe { libc::process_vm_readv(i32::try_from(pid).ok()?, &local, 1, &remote, 1, 0) };
    let read = bytes.get(..usize::try_from(read).ok()?)?;
    let end = read.iter().position(|byte| *byte == 0)?;
    Some(PathBuf::from(std::str::from_utf8(read.get(..end)?).ok()?))
}

/// The call by its number, with those arguments that decide over it.
fn describe(notification: &Notification) -> String {
    let [first, second, ..] = notification.arguments;
    match i64::from(notification.number) {
        libc::SYS_ioctl => format!("ioctl (16), request {second:#x}"),
        libc::SYS_prctl => format!("prctl (157), option {first}"),
        libc::SYS_clone => format!("clone (56), flags {first:#x}"),
        libc::SYS_socket => format!("socket (41), family {first}"),
        number => format!("system call {number}"),
    }
}

fn receive_listener(delivery: &OwnedFd) -> Result<Option<OwnedFd>, Failure> {
    let failed = |errno| Failure::errno(Stage::Seccomp, errno, "receiving the audit's listener");
    let mut byte = [0];
    let mut slices = [std::io::IoSliceMut::new(&mut byte)];
    let mut ancillary = nix::cmsg_space!([RawFd; 1]);
    let message = match recvmsg::<()>(
        delivery.as_raw_fd(),
        &mut slices,
        Some(&mut ancillary),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
    ) {
        Ok(message) => message,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    let raw = message.cmsgs().map_err(failed)?.find_map(|cmsg| match cmsg {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(raw.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}
