//! V: from fork to exec.
//!
//! Architecture invariant: everything V changes dies with it or is the VMM's own. The control socket stays open (and
//! close-on-exec) until exec, because V is the one who knows why exec failed.

use std::convert::Infallible;

use microvm_jail::JailEvent;
use nix::unistd::Pid;

use crate::control::Control;
use crate::failure::Failure;
use crate::{confine, descriptors, process, Prepared};

/// Becomes the VMM; comes back with an exit code only when that failed, after reporting why.
pub fn run(control: &Control, prepared: &Prepared, supervisor: Pid) -> i32 {
    match become_vmm(control, prepared, supervisor) {
        Ok(never) => match never {},
        Err(failure) => control.report(&failure),
    }
}

fn become_vmm(control: &Control, prepared: &Prepared, supervisor: Pid) -> Result<Infallible, Failure> {
    let Prepared { spec, program, passed, .. } = prepared;
    process::leave_session()?;
    process::reset_signals()?;
    descriptors::place(passed, &spec.fds)?;
    confine::enter_cwd(&spec.cwd)?;
    confine::apply_rlimits(&spec.rlimits)?;
    if spec.no_new_privs {
        confine::set_no_new_privs()?;
    }
    if !spec.namespaces.pid {
        confine::die_with(supervisor)?;
    }
    control.send(&JailEvent::Started)?;
    program.exec()
}
