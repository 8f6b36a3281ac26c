//! QEMU's `microvm` machine, on KVM where a probe proves it, else on TCG.

mod api;
mod args;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;

use microvm_jail::LaunchSpec;
use tokio::net::UnixStream;

use crate::error::{Error, Result};
use crate::host::kvm;
use crate::host::process::Jailed;
use crate::host::tail::Tail;
use crate::model::{Backend, Grade};
use crate::vmm::{Binaries, LaunchPlan, Launched, LiveTails, Vmm};
use api::Qmp;
use args::{Accelerator, AGENT_FD, QMP_FD, TAP_FD};

/// QEMU on this host.
#[derive(Debug, Clone)]
pub struct Qemu {
    binary: PathBuf,
    accelerator: Accelerator,
}

impl Qemu {
    /// # Errors
    /// [`Error::BackendUnavailable`].
    pub fn find(binaries: &Binaries) -> Result<Self> {
        let binary = binaries.locate(Backend::Qemu)?;
        let accelerator = if kvm::probe().usable { Accelerator::Kvm } else { Accelerator::Tcg };
        Ok(Self { binary, accelerator })
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

    fn launch(&self, plan: &LaunchPlan) -> Result<Launched> {
        let mut argv = vec![self.binary.display().to_string()];
        argv.extend(args::arguments(plan, self.accelerator));
        let mut spec = LaunchSpec::new(argv);
        spec.fds = vec![1, 2, AGENT_FD, QMP_FD];
        let (console, console_end) = Tail::pipe()?;
        let (vmm_stderr, stderr_end) = Tail::pipe()?;
        let (agent, agent_end) = pair()?;
        let (qmp, qmp_end) = pair()?;
        let mut fds = vec![console_end, stderr_end, agent_end, qmp_end];
        if let Some(nic) = &plan.nic {
            spec.fds.push(TAP_FD);
            fds.push(nic.tap.try_clone().map_err(|error| Error::host("dup", "a VM's tap", error))?);
        }
        let jailed = Jailed::launch(&plan.launcher, &spec, &fds)?;
        let control = Box::new(Qmp::new(plan.vm_id.clone(), qmp));
        Ok(Launched { jailed, agent, control, tails: LiveTails { console, vmm_stderr } })
    }
}
