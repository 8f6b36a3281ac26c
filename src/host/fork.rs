//! Descriptors that a forked child must not keep open.
//!
//! Close-on-exec does not help against a child that never executes anything (multiprocessing): it would hold a VM's
//! leash and lock for as long as it lives, and the VM would outlive its owner. So a handler that runs in every forked
//! child puts `/dev/null` in their place. It may do only what is async-signal-safe: the table is an array of atomics.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Once;

/// Two for each VM; one more VM than that is still closed on exec, only not on a bare fork.
const SLOTS: usize = 4096;
const FREE: i32 = -1;

static TABLE: [AtomicI32; SLOTS] = [const { AtomicI32::new(FREE) }; SLOTS];
static INSTALL: Once = Once::new();

/// Keeps a descriptor from forked children until it is dropped; drop it before the descriptor is closed.
#[derive(Debug)]
pub struct Concealed(Option<usize>);

/// Notes `fd`.
#[must_use]
pub fn conceal(fd: &impl AsRawFd) -> Concealed {
    INSTALL.call_once(|| {
        // SAFETY: the handler calls open, dup2 and close only, and is never unloaded.
        let installed = unsafe { libc::pthread_atfork(None, None, Some(close_in_child)) };
        if installed != 0 {
            log::warn!("pthread_atfork failed ({installed}): forked children keep VMs alive");
        }
    });
    let fd = fd.as_raw_fd();
    let take = |slot: &AtomicI32| slot.compare_exchange(FREE, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    Concealed(TABLE.iter().position(take))
}

impl Drop for Concealed {
    fn drop(&mut self) {
        if let Some(slot) = self.0.and_then(|index| TABLE.get(index)) {
            slot.store(FREE, Ordering::Release);
        }
    }
}

/// Has a program that will live as long as this process keep no descriptor but its standard ones: what others in this
/// process have left open for children of their own would stay open as long.
pub fn inherit_nothing(command: &mut Command) -> &mut Command {
    let close = || {
        // An old kernel does not know the flag: there they stay open.
        // SAFETY: one system call, which takes three integers.
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    };
    // SAFETY: the closure is async-signal-safe.
    unsafe { command.pre_exec(close) }
}

extern "C" fn close_in_child() {
    // SAFETY: a constant path; open(2) is async-signal-safe.
    let null: RawFd = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    for slot in &TABLE {
        let fd = slot.load(Ordering::Acquire);
        if fd == FREE {
            continue;
        }
        // The number stays taken, so that its owner's copy in the child closes nothing of someone else's.
        // SAFETY: both are plain numbers of this process's descriptors; dup3(2) is a bare system call.
        unsafe {
            if libc::dup3(null, fd, libc::O_CLOEXEC) < 0 {
                libc::close(fd);
            }
        }
    }
    if null >= 0 {
        // SAFETY: opened above, used by nobody else.
        unsafe { libc::close(null) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn test_conceal_a_forked_child_does_not_hold_the_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let concealed = conceal(&ours);
        // SAFETY: the child only sleeps and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: async-signal-safe calls.
            unsafe {
                libc::sleep(5);
                libc::_exit(0);
            }
        }
        drop(concealed);
        drop(ours);
        theirs.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let read = theirs.read(&mut [0]);
        // SAFETY: our own child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert_eq!(read.unwrap(), 0);
    }
}
