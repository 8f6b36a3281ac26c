//! Processes and signals: what nix does not offer, because it knows no real-time signals.
//!
//! Architecture invariant: nothing here keeps state; every function is one or two system calls.

use microvm_jail::{JailEvent, Stage};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{setsid, Pid};

use crate::failure::Failure;

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

/// Signals as a program expects to find them: nothing ignored, nothing blocked.
pub fn reset_signals() -> Result<(), Failure> {
    let catchable = |signal: &libc::c_int| {
        // 32 and 33 belong to the C library, which never ignores them and refuses to have them touched.
        ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(signal)
    };
    for signal in (1..=libc::SIGRTMAX()).filter(catchable) {
        set_disposition(signal, libc::SIG_DFL)?;
    }
    SigSet::empty()
        .thread_set_mask()
        .map_err(|errno| Failure::errno(Stage::Session, errno, "clearing the signal mask"))
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

/// Reaps one ended child, if there is one. A PID namespace's first process inherits all orphans.
pub fn reap_any() -> Result<Option<(Pid, Ended)>, Errno> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    match Errno::result(unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) }) {
        Ok(0) | Err(Errno::ECHILD) => Ok(None),
        Ok(pid) => Ok(Some((Pid::from_raw(pid), Ended::from_status(status)))),
        Err(errno) => Err(errno),
    }
}

/// Whether `child` has ended; it is left unreaped, so that its number cannot be given to another process.
pub fn has_ended(child: Pid) -> Result<bool, Errno> {
    // SAFETY: all zeros is a valid siginfo_t, and waitid leaves it so while nothing has ended.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    let id = libc::id_t::from(child.as_raw().unsigned_abs());
    // SAFETY: `info` outlives the call.
    Errno::result(unsafe { libc::waitid(libc::P_PID, id, &mut info, options) })?;
    // SAFETY: for waitid, the kernel fills the fields of a child's end.
    Ok(unsafe { info.si_pid() } == child.as_raw())
}

/// Sends a signal to a process, or with a negative number to a group. One that is gone needs no signal.
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill takes two integers.
    match Errno::result(unsafe { libc::kill(pid, signal) }) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno),
    }
}
