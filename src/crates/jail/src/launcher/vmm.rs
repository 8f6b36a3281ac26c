//! V: from fork to exec.
//!
//! Architecture invariant: everything V changes dies with it or is the VMM's own. The control socket stays open (and
//! close-on-exec) until exec, because V is the one who knows why exec failed.

use std::convert::Infallible;
use std::os::fd::OwnedFd;

use crate::{Confined, JailEvent, Layer};
use nix::unistd::Pid;

use super::control::ControlSocket;
use super::failure::Failure;
use super::{audit, confine, descriptors, landlock, process, seccomp, Prepared};

/// What C has found out for V to report, and whom V answers to.
pub struct FromSupervisor {
    pub supervisor: Pid,
    pub keyring: Layer,
    pub namespace_limits: Layer,
    /// Where the filter's listener goes, in an audit or for a tap.
    pub audit: Option<OwnedFd>,
}

/// Becomes the VMM; comes back with an exit code only when that failed, after reporting why.
pub fn run(control: &ControlSocket, prepared: &Prepared, told: FromSupervisor) -> i32 {
    match become_vmm(control, prepared, told) {
        Ok(never) => match never {},
        Err(failure) => control.report(&failure),
    }
}

fn become_vmm(control: &ControlSocket, prepared: &Prepared, told: FromSupervisor) -> Result<Infallible, Failure> {
    let Prepared { spec, program, passed, .. } = prepared;
    process::leave_session()?;
    process::reset_signals()?;
    descriptors::place(passed, &spec.fds)?;
    confine::enter_cwd(&spec.cwd)?;
    confine::apply_rlimits(&spec.rlimits)?;
    if !spec.huge_pages {
        process::do_without_huge_pages()?;
    }
    if !spec.namespaces.pid {
        confine::die_with(told.supervisor)?;
    }
    (prepared.become_vmm.prepare)(program)?;
    // Before seccomp, which does not know its calls.
    let landlock = landlock::restrict(spec)?;
    let installed = seccomp::install(spec)?;
    if let (Some(listener), Some(audit)) = (&installed.listener, &told.audit) {
        audit::hand_over(listener, audit)?;
    }
    let FromSupervisor { keyring, namespace_limits, .. } = told;
    let confined = Confined { landlock, seccomp: installed.layer, keyring, namespace_limits };
    control.send(&JailEvent::Started { confined })?;
    (prepared.become_vmm.enter)(program)
}
