//! C: forks the VMM, then watches it and the manager until one of them is gone.
//!
//! Architecture invariant: single-threaded, and the only process of the jail that waits for more than one thing. Once
//! the VMM exists, every way out of here goes through its death.

use std::os::fd::AsFd;

use crate::{JailEvent, Layer, Stage, SETUP_FAILED};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{fork, getpid, ForkResult, Pid};

use super::audit::Audit;
use super::control::{ControlSocket, Incoming};
use super::failure::Failure;
use super::process::{self, Ended};
use super::vmm::{self, FromSupervisor};
use super::{audit, confine, identity, root, Prepared};

/// Runs to the end of the VMM, and gives the exit code.
pub fn run(control: &ControlSocket, mut prepared: Prepared) -> i32 {
    let (children, told, audit) = match confine(control, &mut prepared) {
        Ok(confined) => confined,
        Err(failure) => return control.report(&failure),
    };
    // SAFETY: this process has one thread, so the child's copy of it holds no lock and no half-done state.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            drop(audit);
            vmm::run(control, &prepared, told)
        }
        Ok(ForkResult::Parent { child }) => {
            let vmm = Vmm { pid: child, whole_group: !prepared.spec.namespaces.pid };
            // The VMM's descriptors are the VMM's: their other ends must read end-of-file when it dies.
            drop(prepared);
            drop(told);
            supervise(control, &children, &vmm, audit)
        }
        Err(errno) => control.report(&Failure::fork(errno, "forking the VMM")),
    }
}

/// C's own stages, up to the point where the jail follows the control socket.
fn confine(
    control: &ControlSocket,
    prepared: &mut Prepared,
) -> Result<(SignalFd, FromSupervisor, Option<Audit>), Failure> {
    process::leave_session()?;
    confine::join_cgroups(std::mem::take(&mut prepared.cgroups))?;
    confine::enter_supervisor_namespaces(prepared.spec.namespaces)?;
    let proc = identity::open_proc();
    if prepared.spec.new_root {
        root::enter(&prepared.spec.files, prepared.spec.proc)?;
    }
    if let Some(identity) = prepared.spec.identity {
        identity::become_user(identity, prepared.maps.take())?;
    }
    let namespace_limits = match prepared.spec.namespaces.user {
        true => identity::forbid_namespaces(proc.as_ref()),
        false => Layer::Missing("it has no user namespace of its own".into()),
    };
    let keyring = identity::leave_keyring();
    identity::renounce()?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|errno| Failure::errno(Stage::Supervise, errno, "signalfd"))?;
    let (audit, listener_end) = match (prepared.spec.audit, prepared.tap.take()) {
        (false, None) => (None, None),
        (_, tap) => audit::prepare(&prepared.spec, tap).map(|(audit, end)| (Some(audit), Some(end)))?,
    };
    control.send(&JailEvent::Supervising)?;
    let told = FromSupervisor { supervisor: getpid(), keyring, namespace_limits, audit: listener_end };
    Ok((children, told, audit))
}

/// The VMM as its supervisor knows it.
struct Vmm {
    pid: Pid,
    /// No PID namespace takes the VMM's own children along: its process group has to.
    whole_group: bool,
}

impl Vmm {
    fn kill(&self) -> Result<(), Failure> {
        let killed = process::kill(self.pid.as_raw(), libc::SIGKILL).and_then(|()| self.kill_group());
        killed.map_err(|errno| Failure::errno(Stage::Supervise, errno, "killing the VMM"))
    }

    /// The group exists once V has called setsid; before, there is nobody in it either.
    fn kill_group(&self) -> Result<(), Errno> {
        if self.whole_group {
            process::kill(-self.pid.as_raw(), libc::SIGKILL)
        } else {
            Ok(())
        }
    }

    fn signal(&self, signal: i32) -> Result<(), Failure> {
        process::kill(self.pid.as_raw(), signal)
            .map_err(|errno| Failure::errno(Stage::Supervise, errno, format_args!("sending signal {signal}")))
    }

    /// Reaps all that has ended; says how the VMM did, if it did.
    fn reap(&self) -> Result<Option<Ended>, Errno> {
        // A PID namespace's first process inherits all orphans, so there may be others.
        while let Some(pid) = process::ended_child()? {
            if pid == self.pid {
                // Until it is reaped, its number and its group's cannot have become somebody else's.
                self.kill_group()?;
                return process::wait(pid).map(Some);
            }
            process::wait(pid)?;
        }
        Ok(None)
    }
}

fn supervise(control: &ControlSocket, children: &SignalFd, vmm: &Vmm, mut audit: Option<Audit>) -> i32 {
    // Held: the manager is there and C listens. Once let go, C only waits for the VMM's death.
    let mut lifeline_held = true;
    loop {
        match step(control, children, vmm, lifeline_held, &mut audit) {
            Ok(Step::Watching) => {}
            Ok(Step::Released) => lifeline_held = false,
            Ok(Step::Ended(how)) => {
                return match control.send(&how.to_event()) {
                    Ok(()) => how.exit_code(),
                    // The manager is gone. It was the one to be told; the launcher's parent still reads the exit code.
                    Err(_manager_gone) => how.exit_code(),
                };
            }
            Err(failure) => {
                control.report(&failure);
                if !lifeline_held || vmm.kill().is_err() {
                    // Twice in a row, or a kill that fails: what remains is to die, and have the kernel do the rest (the
                    // PID namespace's end, or the VMM's parent-death signal).
                    return SETUP_FAILED;
                }
                lifeline_held = false;
            }
        }
    }
}

enum Step {
    Watching,
    /// The manager let go: the VMM has been killed and remains to be reaped.
    Released,
    Ended(Ended),
}

/// Waits for something to happen, and does what it calls for.
fn step(
    control: &ControlSocket,
    children: &SignalFd,
    vmm: &Vmm,
    lifeline_held: bool,
    audit: &mut Option<Audit>,
) -> Result<Step, Failure> {
    let failed = |errno, what: &str| Failure::errno(Stage::Supervise, errno, what);
    let mut fds = vec![PollFd::new(children.as_fd(), PollFlags::POLLIN)];
    // A closed socket is ready for ever: once let go, it is not asked any more.
    fds.extend(lifeline_held.then(|| PollFd::new(control.as_fd(), PollFlags::POLLIN)));
    fds.extend(audit.as_ref().map(Audit::source).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(Step::Watching),
        Err(errno) => return Err(failed(errno, "poll")),
    }
    // Anything that poll says is a reason to look; nothing below waits for what is not there.
    let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect::<Vec<_>>().into_iter();
    let child_ready = ready.next().unwrap_or(true);
    let control_ready = lifeline_held && ready.next().unwrap_or(true);
    let audit_ready = ready.next().unwrap_or(false);
    if let Some(audit) = audit.as_mut().filter(|_| audit_ready) {
        for would_deny in audit.answer()? {
            control.send(&would_deny)?;
        }
    }
    if child_ready {
        while children.read_signal().map_err(|errno| failed(errno, "reading the signalfd"))?.is_some() {}
        if let Some(how) = vmm.reap().map_err(|errno| failed(errno, "waiting for the VMM"))? {
            return Ok(Step::Ended(how));
        }
    }
    if control_ready {
        loop {
            match control.receive_request()? {
                Incoming::Request(request) => vmm.signal(request.signal)?,
                Incoming::Drained => break,
                Incoming::Closed => {
                    vmm.kill()?;
                    return Ok(Step::Released);
                }
            }
        }
    }
    Ok(Step::Watching)
}
