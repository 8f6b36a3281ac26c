//! QEMU's `microvm` machine, on KVM where a probe proves it, else on TCG.

mod api;
mod args;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use microvm_jail::LaunchSpec;
use tokio::net::UnixStream;

use crate::error::{Error, Result};
use crate::host::process::Jailed;
use crate::host::tail::Tail;
use crate::host::{kvm, tsc};
use crate::model::{Backend, Grade};
use crate::vmm::{Binaries, Drive, LaunchPlan, Launched, LiveTails, Nic, Origin, Vmm};
use api::Qmp;
use args::{Accelerator, AGENT_FD, QMP_FD, RAM_FD, TAP_FD};

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
        tsc::begin();
        let binary = binaries.locate(Backend::Qemu)?;
        let accelerator = if kvm::probe().usable { Accelerator::Kvm } else { Accelerator::Tcg };
        Ok(Self { binary, accelerator })
    }
}

impl Qemu {
    fn tsc_khz(&self) -> Option<u64> {
        // KVM has a clock of its own for its guests.
        if self.accelerator == Accelerator::Tcg {
            tsc::frequency_khz()
        } else {
            None
        }
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

    fn binary(&self) -> &Path {
        &self.binary
    }

    fn machine(&self, plan: &LaunchPlan) -> Vec<String> {
        let nameless = |drive: &Drive| Drive { path: PathBuf::new(), ..drive.clone() };
        let drives = plan.drives.iter().map(nameless).collect();
        // Two measurements of one counter differ a little, two counters of one CPU model a lot.
        let coarse = self.tsc_khz().map(|khz| khz / 5_000 * 5_000);
        let nic = plan.nic.as_ref().map(|_| Nic::unplugged());
        let nameless = LaunchPlan { kernel: PathBuf::new(), initramfs: PathBuf::new(), drives, nic, ..plan.clone() };
        args::arguments(&nameless, self.accelerator, &Origin::Boot, coarse)
    }

    fn launch(&self, plan: &LaunchPlan, origin: &Origin) -> Result<Launched> {
        let mut argv = vec![self.binary.display().to_string()];
        argv.extend(args::arguments(plan, self.accelerator, origin, self.tsc_khz()));
        let mut spec = LaunchSpec::new(argv);
        spec.fds = vec![1, 2, AGENT_FD, QMP_FD];
        let (console, console_end) = Tail::pipe()?;
        let (vmm_stderr, stderr_end) = Tail::pipe()?;
        let (agent, agent_end) = pair()?;
        let (qmp, qmp_end) = pair()?;
        let mut fds = vec![console_end.as_fd(), stderr_end.as_fd(), agent_end.as_fd(), qmp_end.as_fd()];
        if let Origin::Clone { ram } = origin {
            spec.fds.push(RAM_FD);
            fds.push(ram.as_fd());
        }
        if let Some(tap) = plan.nic.as_ref().and_then(|nic| nic.tap.as_ref()) {
            spec.fds.push(TAP_FD);
            fds.push(tap.fd.as_fd());
        }
        let jailed = Jailed::launch(&plan.launcher, &spec, &fds)?;
        let control = Box::new(Qmp::new(plan.vm_id.clone(), qmp));
        Ok(Launched { jailed, agent, control, tails: LiveTails { console, vmm_stderr } })
    }
}
