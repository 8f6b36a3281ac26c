//! QEMU's `microvm` machine, on KVM where a probe proves it, else on TCG.

mod api;
mod args;
mod program;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::UnixStream;

use crate::error::{Error, Result};
use crate::host::kvm;
use crate::host::process::Jailed;
use crate::host::tail::Tail;
use crate::model::{Backend, Grade};
use crate::vmm::{Binaries, LaunchPlan, Launched, LiveTails, Vmm, VmmNeeds};
use api::Qmp;
use args::{Accelerator, Options, AGENT_FD, QMP_FD};
pub use program::Program;

/// QEMU on this host.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: Arc<Program>,
    accelerator: Accelerator,
}

impl Qemu {
    /// # Errors
    /// [`Error::BackendUnavailable`], [`Error::Host`].
    pub fn find(binaries: &Binaries) -> Result<Self> {
        let program = Program::inspect(&binaries.locate(Backend::Qemu)?)?;
        let accelerator = if kvm::probe().usable { Accelerator::Kvm } else { Accelerator::Tcg };
        Ok(Self { program, accelerator })
    }
}

/// A connected pair: ours for tokio, theirs for the VMM.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let failed = |error: std::io::Error| Error::host("socketpair", "a VMM's socket", error);
    let (ours, theirs) = StdStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    Ok((UnixStream::from_std(ours).map_err(failed)?, OwnedFd::from(theirs)))
}

impl Vmm for Qemu {
    fn backend(&self) -> Backend {
        Backend::Qemu
    }

    fn grade(&self) -> Grade {
        match self.accelerator {
            Accelerator::Kvm => Grade::Hardware,
            Accelerator::Tcg => Grade::Emulated,
        }
    }

    fn accelerator(&self) -> &'static str {
        self.accelerator.as_str()
    }

    fn needs(&self) -> VmmNeeds {
        let devices = match self.accelerator {
            Accelerator::Kvm => vec![PathBuf::from("/dev/kvm")],
            Accelerator::Tcg => Vec::new(),
        };
        VmmNeeds { devices, layers: self.program.layers() }
    }

    fn launch(&self, plan: &LaunchPlan, held: Box<dyn Send>) -> Result<Launched> {
        let mut jail = plan.jail.clone();
        let shown = self.program.show(&mut jail)?;
        let mut argv = vec![shown.program.display().to_string()];
        let options = Options { firmware: shown.firmware, sandbox: self.program.has_sandbox() };
        argv.extend(args::arguments(plan, self.accelerator, options));
        let mut spec = jail.spec(argv, shown.env, self.program.seccomp());
        spec.fds = vec![1, 2, AGENT_FD, QMP_FD];
        let (console, console_end) = Tail::pipe()?;
        let (vmm_stderr, stderr_end) = Tail::pipe()?;
        let (agent, agent_end) = pair()?;
        let (qmp, qmp_end) = pair()?;
        let fds = [console_end, stderr_end, agent_end, qmp_end];
        let jailed = Jailed::launch(&jail.launcher, &spec, &fds, held)?;
        let control = Box::new(Qmp::new(plan.vm_id.clone(), qmp));
        Ok(Launched { jailed, agent, control, tails: LiveTails { console, vmm_stderr } })
    }
}
