//! Processes and signals: what nix does not offer, because it knows no real-time signals.
//!
//! Architecture invariant: nothing here keeps state; every function is one or two system calls.

use crate::{JailEvent, Stage};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{setsid, ForkResult, Pid};

use super::failure::Failure;

/// Signals that a terminal, a shell or a service manager sends to whole groups or sessions. The jail ends when its
/// control socket closes, not when somebody presses Ctrl-C.
const IGNORED: [libc::c_int; 8] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGPIPE,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// The kernel's `_NSIG`, and the size of a set of that many bits.
const LAST_SIGNAL: libc::c_int = 64;
const SIGSET_BYTES: usize = 8;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

impl Ended {
    fn from_status(status: libc::c_int) -> Self {
        if libc::WIFSIGNALED(status) {
            Self::Signal(libc::WTERMSIG(status))
        } else {
            Self::Code(libc::WEXITSTATUS(status))
        }
    }

    /// The exit code that stands for it, as a shell would say it.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }

    pub fn to_event(self) -> JailEvent {
        match self {
            Self::Code(code) => JailEvent::Exited { code: Some(code), signal: None },
            Self::Signal(signal) => JailEvent::Exited { code: None, signal: Some(signal) },
        }
    }
}

/// Signals as L and C need them: deaf to terminals, `SIGCHLD` pending until it is asked for.
pub fn shield() -> Result<(), Failure> {
    for signal in IGNORED {
        set_disposition(signal, libc::SIG_IGN)?;
    }
    // Inherited as ignored, it would have the kernel reap our children before we can.
    set_disposition(libc::SIGCHLD, libc::SIG_DFL)?;
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGCHLD);
    blocked.thread_set_mask().map_err(|errno| Failure::errno(Stage::Session, errno, "setting the signal mask"))
}

/// Whatever this process advises (madvise(2)), its memory comes in ordinary pages, and that of what it executes.
pub fn do_without_huge_pages() -> Result<(), Failure> {
    // SAFETY: it changes a flag of this process's memory.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) })
        .map(drop)
        .map_err(|errno| Failure::errno(Stage::Rlimits, errno, "PR_SET_THP_DISABLE"))
}

/// Signals as a program expects to find them: nothing ignored, nothing blocked.
pub fn reset_signals() -> Result<(), Failure> {
    // The kernel's struct sigaction (handler, flags, restorer, mask): all zeros is SIG_DFL on every architecture.
    let default = [0u64; 4];
    for signal in (1..=LAST_SIGNAL).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
        // Not through the C library: it hides signals 32 and 33, which it uses itself, but an ancestor may have had
        // them ignored all the same, and that is inherited.
        // SAFETY: `default` outlives the call and is as large as the kernel's struct; no old action is asked for.
        let reset = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), SIGSET_BYTES)
        };
        Errno::result(reset).map_err(|errno| {
            Failure::errno(Stage::Session, errno, format_args!("resetting the disposition of signal {signal}"))
        })?;
    }
    SigSet::empty().thread_set_mask().map_err(|errno| Failure::errno(Stage::Session, errno, "clearing the signal mask"))
}

fn set_disposition(signal: libc::c_int, disposition: libc::sighandler_t) -> Result<(), Failure> {
    // SAFETY: SIG_IGN and SIG_DFL, the only dispositions passed here, run no code of ours.
    if unsafe { libc::signal(signal, disposition) } == libc::SIG_ERR {
        let what = format!("setting the disposition of signal {signal}");
        return Err(Failure::errno(Stage::Session, Errno::last(), what));
    }
    Ok(())
}

/// Starts a session without a terminal. The caller may lead a process group already if the manager has made it so;
/// then the kernel refuses, and what is left of the shield are the ignored signals.
pub fn leave_session_if_possible() -> Result<(), Failure> {
    match setsid() {
        Ok(_) | Err(Errno::EPERM) => Ok(()),
        Err(errno) => Err(Failure::errno(Stage::Session, errno, "setsid")),
    }
}

/// Starts a session; for a process fresh from fork, which leads nothing yet.
pub fn leave_session() -> Result<(), Failure> {
    setsid().map(drop).map_err(|errno| Failure::errno(Stage::Session, errno, "setsid"))
}

/// clone3(2): struct clone_args up to and with `cgroup`, 11 words.
const CLONE_ARGS_CGROUP: usize = 10;
const CLONE_ARGS_EXIT_SIGNAL: usize = 4;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// fork(2), into a group of the unified hierarchy if one is given: a child that is born in its group spares the kernel
/// the wait, 15 ms, that moving a process costs. Answers with the child and whether it is in the group.
///
/// # Safety
/// As for fork: the caller has one thread.
pub unsafe fn fork_into(group: Option<&impl std::os::fd::AsRawFd>) -> Result<(ForkResult, bool), Errno> {
    if let Some(group) = group {
        let mut arguments = [0u64; CLONE_ARGS_CGROUP + 1];
        arguments[0] = CLONE_INTO_CGROUP;
        arguments[CLONE_ARGS_EXIT_SIGNAL] = libc::SIGCHLD as u64;
        arguments[CLONE_ARGS_CGROUP] = u64::try_from(group.as_raw_fd()).unwrap_or(u64::MAX);
        // SAFETY: the kernel's struct, as long as said; without CLONE_VM the child has a copy of everything.
        let child = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), std::mem::size_of_val(&arguments)) };
        match Errno::result(child) {
            Ok(0) => return Ok((ForkResult::Child, true)),
            Ok(child) => {
                let child = Pid::from_raw(i32::try_from(child).unwrap_or(-1));
                return Ok((ForkResult::Parent { child }, true));
            }
            // Before 5.7 the kernel does not know it; whatever else it objects to, joining the group will say better.
            Err(_) => {}
        }
    }
    // SAFETY: as the caller promises.
    unsafe { nix::unistd::fork() }.map(|forked| (forked, false))
}

/// Waits for `child` to end.
pub fn wait(child: Pid) -> Result<Ended, Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        match Errno::result(unsafe { libc::waitpid(child.as_raw(), &mut status, 0) }) {
            Ok(_) => return Ok(Ended::from_status(status)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// A child that has ended, if there is one. It is left unreaped, so that its number cannot go to another process.
pub fn ended_child() -> Result<Option<Pid>, Errno> {
    // SAFETY: all zeros is a valid siginfo_t, and waitid leaves si_pid so while nothing has ended.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` outlives the call.
    match Errno::result(unsafe { libc::waitid(libc::P_ALL, 0, &mut info, options) }) {
        Ok(_) => {}
        Err(Errno::ECHILD) => return Ok(None),
        Err(errno) => return Err(errno),
    }
    // SAFETY: waitid fills the fields of a child's end.
    let pid = unsafe { info.si_pid() };
    Ok(Some(pid).filter(|pid| *pid != 0).map(Pid::from_raw))
}

/// Sends a signal to a process, or with a negative number to a group. One that is gone needs no signal.
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill takes two integers.
    match Errno::result(unsafe { libc::kill(pid, signal) }) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno),
    }
}
