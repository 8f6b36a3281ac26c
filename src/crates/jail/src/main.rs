//! The launcher, L: prepares what needs the manager's own namespaces, forks the supervisor, and waits for it.
//!
//! The crate's documentation (`lib.rs`) has the whole picture.
//!
//! Architecture invariant: no thread is ever started here, so `fork` copies the whole program and the child may do
//! anything; and no `fork` leaves two processes with duties: L after its fork only waits.

mod confine;
mod control;
mod descriptors;
mod failure;
mod process;
mod program;
mod supervisor;
mod vmm;

use std::os::fd::OwnedFd;

use microvm_jail::{LaunchSpec, Stage, SETUP_FAILED};
use nix::unistd::{fork, ForkResult};

use crate::confine::Cgroups;
use crate::control::Control;
use crate::failure::Failure;
use crate::program::Program;

/// What L hands on to C, and C to V.
struct Prepared {
    spec: LaunchSpec,
    program: Program,
    /// In the order of `spec.fds`, numbered above all targets.
    passed: Vec<OwnedFd>,
    cgroups: Cgroups,
}

fn main() {
    std::process::exit(run());
}

fn run() -> i32 {
    let control = match descriptors::close_inherited().and_then(|()| Control::take_stdin()) {
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
    match prepare(spec, passed) {
        Ok(prepared) => launch(control, prepared),
        Err(failure) => control.report(&failure),
    }
}

/// Cuts what ties the launcher to the manager's process, except the control socket.
fn isolate() -> Result<(), Failure> {
    descriptors::null_standard_streams()?;
    process::shield()?;
    process::leave_session_if_possible()
}

fn prepare(spec: LaunchSpec, passed: Vec<OwnedFd>) -> Result<Prepared, Failure> {
    let program = Program::new(&spec)?;
    let passed = descriptors::raise(passed, descriptors::first_free_above(&spec.fds))?;
    let cgroups = confine::open_cgroups(&spec.cgroup_procs)?;
    // First of the namespaces: it gives an ordinary user the right to the others.
    if spec.namespaces.user {
        confine::enter_user_namespace()?;
    }
    if spec.namespaces.pid {
        confine::prepare_pid_namespace()?;
    }
    Ok(Prepared { spec, program, passed, cgroups })
}

fn launch(control: Control, prepared: Prepared) -> i32 {
    // SAFETY: this process has one thread, so the child's copy of it holds no lock and no half-done state.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => supervisor::run(&control, prepared),
        Ok(ForkResult::Parent { child }) => {
            // The manager must read end-of-file when C is gone, and the other ends of the passed descriptors when V is.
            drop(control);
            drop(prepared);
            process::wait(child).map_or(SETUP_FAILED, process::Ended::exit_code)
        }
        Err(errno) => control.report(&Failure::errno(Stage::Fork, errno, "forking the supervisor")),
    }
}
