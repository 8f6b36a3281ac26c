//! A zygote: a VMM that is loaded and linked once, and forked for each VM.
//!
//! To execute QEMU costs more than to restore a VM in it: a quarter of a million relocations, each page of which is
//! copied, fifty libraries. This library is preloaded (ld.so(8)) into the VMM by the manager and takes the place of
//! `__libc_start_main`, which runs when all of that is done and before any code of the VMM's own. There it waits. For
//! each VM it forks the jail's launcher (`microvm_jail::launcher`), whose V does not execute the VMM but goes on into it.
//!
//! ```text
//! manager ── exec ──> Z  zygote: the VMM's image, one thread, no file open but its socket
//!    │ control socket  │
//!    ├────────────────>├─> L ─> C ─> V   as in `microvm_jail`; L is the manager's child, not Z's (CLONE_PARENT)
//!    │<── L's pid ─────┤
//! ```
//!
//! Architecture invariant: nothing of any VM is ever in Z's memory. It reads one byte and one descriptor, forks, and
//! forgets both; what it cannot do it does not try: it exits, and the manager executes the VMM instead.
//!
//! # Its socket
//!
//! An `AF_UNIX` `SOCK_SEQPACKET` pair; Z's end is its stdin. Z sends one [`READY`] packet; then the manager sends one byte
//! with L's end of a control socket (`SCM_RIGHTS`), and Z answers with L's pid, or a negative errno, as an `i32` of the
//! host's byte order. End-of-file ends Z.
//!
//! # What forking instead of executing changes
//!
//! All VMs of a zygote have the same layout of code in memory, as apps on Android have: who has broken out of one guest
//! and read the VMM's memory knows where the code is in the others. The stack protector's canary is each VM's own. What
//! exec would have closed, reset or shown is done by hand in [`enter_main`].

mod main_entry;
mod title;

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use microvm_jail::launcher;
use nix::errno::Errno;
use nix::sys::socket::{recvmsg, sendmsg, ControlMessageOwned, MsgFlags};
use nix::unistd::Pid;

/// What the zygote says first.
const READY: [u8; 1] = [1];
const STDIN: i32 = 0;

/// Waits for requests; comes back, in a new process each time, to launch.
fn serve() -> Result<(), Errno> {
    // SAFETY: stdin is open for as long as this process runs.
    let socket = unsafe { BorrowedFd::borrow_raw(STDIN) };
    launcher::shield().map_err(|_| Errno::EINVAL)?;
    nix::sys::prctl::set_name(c"microvm-zygote")?;
    send(socket, &READY)?;
    loop {
        let Some(control) = receive(socket)? else { exit(0) };
        match fork_sibling() {
            Ok(None) => {
                // SAFETY: two numbers of this process's; stdin has no owner.
                Errno::result(unsafe { libc::dup2(control.as_raw_fd(), STDIN) })?;
                return Ok(());
            }
            Ok(Some(launcher)) => send(socket, &launcher.as_raw().to_ne_bytes())?,
            Err(errno) => send(socket, &(-(errno as i32)).to_ne_bytes())?,
        }
    }
}

fn exit(code: i32) -> ! {
    // Not exit(3): the VMM's libraries have handlers for the end of a program that never began.
    // SAFETY: it ends this process.
    unsafe { libc::_exit(code) }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &[], MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// The next control socket; `None` when the manager is gone.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut byte = [0];
    let mut ancillary = nix::cmsg_space!([i32; 1]);
    let mut slices = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut ancillary), MsgFlags::MSG_CMSG_CLOEXEC)?;
    if message.bytes == 0 {
        return Ok(None);
    }
    let descriptor = message.cmsgs()?.find_map(|cmsg| match cmsg {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    descriptor.map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) })).ok_or(Errno::EBADMSG)
}

/// fork(2), with the manager as the child's parent, which waits for it as it does for one that it has started itself;
/// `None` in the child. Not through the C library, which knows no such fork: its idea of the thread's id is stale in L,
/// which asks for none, and right again in C and V.
fn fork_sibling() -> Result<Option<Pid>, Errno> {
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child has a copy of everything; this process has one thread.
    let child = Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?;
    Ok(i32::try_from(child).ok().filter(|pid| *pid != 0).map(Pid::from_raw))
}
