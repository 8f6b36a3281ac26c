//! What a forked child must not have of its parent's: descriptors, and state behind locks.
//!
//! Close-on-exec does not help against a child that never executes anything (multiprocessing): it would hold a VM's
//! lifeline and lock for as long as it lives, and the VM would outlive its owner. So a handler that runs in every forked
//! child puts `/dev/null` in their place. It may do only what is async-signal-safe: the table is an array of atomics.
//!
//! A lock that another thread holds at the fork is never let go in the child. So a static that has locks or threads is a
//! [`PerProcess`]: each process makes its own and never touches its parent's.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering};

/// Three for each VM; one more VM than that is still closed on exec, only not on a bare fork.
const SLOTS: usize = 6144;
const FREE: i32 = -1;

static TABLE: [AtomicI32; SLOTS] = [const { AtomicI32::new(FREE) }; SLOTS];
/// No `Once`: a fork in the middle of one would block the child for ever.
static IS_INSTALLED: AtomicBool = AtomicBool::new(false);
/// How many forks lie between the first process and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Has the handler run in all children from now on.
pub fn install() {
    if IS_INSTALLED.swap(true, Ordering::AcqRel) {
        return;
    }
    // SAFETY: the handler calls open, dup3 and close only, and is never unloaded.
    let installed = unsafe { libc::pthread_atfork(None, None, Some(begin_in_child)) };
    if installed != 0 {
        log::warn!("pthread_atfork failed ({installed}): forked children keep VMs alive");
    }
}

/// Which process this is. Its number alone does not tell: a descendant may get that of an ancestor that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incarnation {
    pub pid: u32,
    forks: u32,
}

impl Incarnation {
    /// This process.
    #[must_use]
    pub fn now() -> Self {
        install();
        Self { pid: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }
}

/// A static that each process makes for itself when it first needs it. What a forked child inherits is neither used nor
/// freed there.
pub struct PerProcess<T> {
    current: AtomicPtr<Made<T>>,
}

struct Made<T> {
    by: Incarnation,
    value: T,
}

impl<T> PerProcess<T> {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "statics need a constant")]
    pub const fn new() -> Self {
        Self { current: AtomicPtr::new(ptr::null_mut()) }
    }
}

impl<T: Send + Sync + 'static> PerProcess<T> {
    /// This process's, made by default.
    pub fn get(&'static self) -> &'static T
    where
        T: Default,
    {
        self.get_or_init(T::default)
    }

    /// This process's. Two threads may both make one at first; the same is used by both then.
    pub fn get_or_init(&'static self, make: impl FnOnce() -> T) -> &'static T {
        match self.get_or_try_init(|| Ok::<T, std::convert::Infallible>(make())) {
            Ok(value) => value,
            Err(never) => match never {},
        }
    }

    /// As [`PerProcess::get_or_init`].
    ///
    /// # Errors
    /// Those of `make`; the next caller tries again.
    pub fn get_or_try_init<E>(&'static self, make: impl FnOnce() -> Result<T, E>) -> Result<&'static T, E> {
        let by = Incarnation::now();
        let found = self.current.load(Ordering::Acquire);
        // SAFETY: it is null, or came out of a box that is never freed.
        if let Some(made) = unsafe { found.as_ref() }.filter(|made| made.by == by) {
            return Ok(&made.value);
        }
        let new = Box::into_raw(Box::new(Made { by, value: make()? }));
        let placed = self.current.compare_exchange(found, new, Ordering::AcqRel, Ordering::Acquire);
        let current = match placed {
            Ok(_) => new,
            Err(faster) => {
                // SAFETY: it came out of a box just now, and no other thread has seen it.
                drop(unsafe { Box::from_raw(new) });
                faster
            }
        };
        // SAFETY: it came out of a box that is never freed; only a thread of this process has put it there.
        Ok(unsafe { &(*current).value })
    }
}

/// Keeps a descriptor from forked children until it is dropped; drop it before the descriptor is closed.
#[derive(Debug)]
pub struct ForkGuard(Option<usize>);

/// Guards `fd`.
#[must_use]
pub fn guard(fd: &impl AsRawFd) -> ForkGuard {
    install();
    let fd = fd.as_raw_fd();
    let take = |slot: &AtomicI32| slot.compare_exchange(FREE, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    ForkGuard(TABLE.iter().position(take))
}

impl Drop for ForkGuard {
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

extern "C" fn begin_in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
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
        // The child may close the number and give it to a file of its own, which its children keep.
        slot.store(FREE, Ordering::Release);
    }
    if null >= 0 {
        // SAFETY: opened above, used by nobody else.
        unsafe { libc::close(null) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutex::Mutex;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn test_guard_a_forked_child_does_not_hold_the_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guard = guard(&ours);
        // SAFETY: the child only sleeps and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: async-signal-safe calls.
            unsafe {
                libc::sleep(5);
                libc::_exit(0);
            }
        }
        drop(guard);
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

    /// What `child` exits with in a forked child; -1 when it hangs.
    fn exit_code_of(child: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child takes no lock of its parent's but those that the test is about.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: async-signal-safe calls.
            unsafe {
                libc::alarm(10);
                libc::_exit(child());
            }
        }
        let mut status = 0;
        // SAFETY: our own child.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            -1
        }
    }

    #[test]
    fn test_per_process_a_forked_child_has_its_own_though_the_parents_is_locked() {
        static NUMBER: PerProcess<Mutex<i32>> = PerProcess::new();
        let mut held = NUMBER.get().lock();
        *held = 7;
        assert_eq!(exit_code_of(|| *NUMBER.get().lock()), 0);
        drop(held);
        assert_eq!(*NUMBER.get().lock(), 7);
    }

    #[test]
    fn test_per_process_is_made_once_for_all_threads_and_again_after_a_failure() {
        static MADE: PerProcess<usize> = PerProcess::new();
        assert_eq!(MADE.get_or_try_init(|| Err::<usize, &str>("not yet")), Err("not yet"));
        let threads: Vec<_> = (0..8).map(|number| std::thread::spawn(move || *MADE.get_or_init(|| number))).collect();
        let seen: Vec<usize> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(seen.iter().all(|value| value == MADE.get_or_init(|| 99)), "{seen:?}");
    }

    #[test]
    fn test_incarnation_differs_in_a_child_even_under_the_same_number() {
        let before = Incarnation::now();
        let differs = move || i32::from(Incarnation { pid: before.pid, ..Incarnation::now() } != before);
        assert_eq!(exit_code_of(differs), 1);
        assert_eq!(Incarnation::now(), before);
    }
}
