//! The launcher, L: prepares what needs the manager's own namespaces, forks the supervisor, and waits for it.
//!
//! The crate's documentation has the whole picture.
//!
//! Architecture invariant: no thread is ever started here, so `fork` copies the whole program and the child may do
//! anything; and no `fork` leaves two processes with duties for long: L after its fork
//! writes C's maps, gives up its privileges and waits.

mod audit;
mod confine;
mod control;
mod descriptors;
mod failure;
mod identity;
mod landlock;
mod policy;
mod process;
mod program;
mod root;
mod seccomp;
mod supervisor;
mod tap;
mod vmm;

use std::os::fd::OwnedFd;

use crate::{LaunchSpec, Stage, SETUP_FAILED};
use nix::sys::stat::{umask, Mode};
use nix::unistd::ForkResult;

use confine::Cgroups;
use control::ControlSocket;
use identity::{MapRequest, MapService};
use tap::Tap;

pub use failure::Failure;
pub use process::shield;
pub use program::{Become, ExecImage};

/// What L hands on to C, and C to V.
struct Prepared {
    spec: LaunchSpec,
    program: ExecImage,
    /// In the order of `spec.fds`, numbered above all targets.
    passed: Vec<OwnedFd>,
    cgroups: Cgroups,
    /// Where the maps of the user namespace come from that C enters; `None` when L has entered one, or there is none.
    maps: Option<MapRequest>,
    /// Opened in the manager's network namespace.
    tap: Option<Tap>,
    become_vmm: Become,
}

/// Launches what the control socket, stdin, asks for; answers with the exit code of the calling process, which has one
/// thread. C and V are made in here, and V comes back only when it could not become the VMM.
#[must_use]
pub fn run(become_vmm: Become) -> i32 {
    let control = match descriptors::close_inherited().and_then(|()| ControlSocket::take_stdin()) {
        Ok(control) => control,
        Err(failure) => {
            // Without a control socket, stderr is the only place left; the exit code is EX_USAGE of sysexits.h.
            eprintln!("microvm-jail: {failure}");
            return 64;
        }
    };
    if let Err(failure) = isolate() {
        return control.report(&failure);
    }
    let (spec, passed) = match control.receive_spec() {
        Ok(received) => received,
        Err(failure) => return control.report(&failure),
    };
    let lowest = descriptors::first_free_above(&spec.fds);
    let control = match control.raise(lowest) {
        Ok(control) => control,
        Err((control, errno)) => {
            let what = format!("moving the control socket above descriptor {lowest} (raise RLIMIT_NOFILE)");
            return control.report(&Failure::errno(Stage::Fds, errno, what));
        }
    };
    match prepare(spec, passed, become_vmm) {
        Ok((prepared, service)) => launch(control, prepared, service),
        Err(failure) => control.report(&failure),
    }
}

/// Cuts what ties the launcher to the manager's process, except the control socket.
fn isolate() -> Result<(), Failure> {
    descriptors::null_standard_streams()?;
    // Whatever the manager's is, the folders of the VMM's root are open to the VMM's user, who need not be this one.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    process::shield()?;
    process::leave_session_if_possible()
}

fn prepare(
    spec: LaunchSpec,
    passed: Vec<OwnedFd>,
    become_vmm: Become,
) -> Result<(Prepared, Option<MapService>), Failure> {
    let program = ExecImage::new(&spec)?;
    let passed = descriptors::raise(passed, program.first_free_fd)?;
    descriptors::reserve(program.first_free_fd)?;
    let cgroups = confine::open_cgroups(&spec.cgroup_procs)?;
    let tap = if spec.tap { Some(tap::open()?) } else { None };
    // For an ordinary user it comes first, because it gives the right to the others. Root, with a user for the VMM,
    // enters it last: then the others are out of its power.
    let (maps, service) = match (spec.namespaces.user, spec.identity) {
        (true, Some(_)) => identity::map_by_launcher().map(|(request, service)| (Some(request), Some(service)))?,
        (true, None) => {
            identity::enter_own_user_namespace()?;
            (None, None)
        }
        (false, _) => (None, None),
    };
    if spec.namespaces.pid {
        confine::prepare_pid_namespace()?;
    }
    Ok((Prepared { spec, program, passed, cgroups, maps, tap, become_vmm }, service))
}

fn launch(control: ControlSocket, mut prepared: Prepared, service: Option<MapService>) -> i32 {
    let birthplace = confine::birthplace(&prepared.spec.cgroup_procs);
    // SAFETY: this process has one thread, so the child's copy of it holds no lock and no half-done state.
    match unsafe { process::fork_into(birthplace.as_ref()) } {
        Ok((ForkResult::Child, in_group)) => {
            drop((service, birthplace));
            if in_group {
                prepared.cgroups.clear();
            }
            supervisor::run(&control, prepared)
        }
        Ok((ForkResult::Parent { child }, _)) => {
            let identity = prepared.spec.identity;
            // Of all that was prepared L needs nothing any more; C must see the end of the pipes if L fails.
            drop(prepared);
            let mapped = service.zip(identity).map_or(Ok(()), |(service, identity)| service.serve(child, identity));
            if let Err(failure) = mapped.and_then(|()| identity::renounce()) {
                control.report(&failure);
            }
            // The manager must read end-of-file when C is gone, and the other ends of the passed descriptors when V is.
            drop(control);
            process::wait(child).map_or(SETUP_FAILED, process::Ended::exit_code)
        }
        Err(errno) => control.report(&Failure::fork(errno, "forking the supervisor")),
    }
}
