//! QEMU's `microvm` machine, on KVM where a probe proves it, else on TCG.

mod api;
mod args;
mod program;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

use crate::error::{Error, Result};
use crate::host::process::{Jailed, Launcher};
use crate::host::tail::Tail;
use crate::host::{kvm, tsc};
use crate::model::{Backend, Grade};
use crate::vmm::{
    Binaries, Capabilities, Drive, LaunchPlan, Launched, LiveTails, Nic, Origin, Plug, Transport, Vmm, VmmNeeds, Wire,
};
use api::Qmp;
use args::{Accelerator, Host, AGENT_FD, IDENTITY_FD, NETWORK_FD, QMP_FD, RAM_FD};
pub use program::QemuBinary;

/// QEMU on this host.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: QemuBinary,
    accelerator: Accelerator,
}

impl Qemu {
    /// # Errors
    /// [`Error::BackendUnavailable`], [`Error::Host`].
    pub fn find(binaries: &Binaries) -> Result<Self> {
        tsc::begin();
        let program = QemuBinary::inspect(&binaries.locate(Backend::Qemu)?)?;
        let accelerator = if kvm::probe().usable { Accelerator::Kvm } else { Accelerator::Tcg };
        Ok(Self { program, accelerator })
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

    fn host(&self, firmware: Option<&'static str>) -> Host {
        let (accelerator, tsc_khz, sandbox) = (self.accelerator, self.tsc_khz(), self.program.has_sandbox());
        Host { accelerator, tsc_khz, firmware, sandbox, fsrm: self.program.has_cpu_flag("fsrm") }
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
        self.program.path()
    }

    fn version(&self) -> Option<&str> {
        self.program.version_line()
    }

    fn pairing(&self) -> String {
        self.program.pairing()
    }

    fn machine(&self, plan: &LaunchPlan) -> Vec<String> {
        let nameless = |drive: &Drive| Drive { path: PathBuf::new(), ..drive.clone() };
        let drives = plan.drives.iter().map(nameless).collect();
        // Two measurements of one counter differ a little, two counters of one CPU model a lot.
        let coarse = self.tsc_khz().map(|khz| khz / 5_000 * 5_000);
        let nameless = LaunchPlan {
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            drives,
            nic: plan.nic.as_ref().map(|_| Nic::unplugged()),
            ..plan.without_disk_rates()
        };
        args::arguments(&nameless, &Origin::Boot, Host { tsc_khz: coarse, ..self.host(None) })
    }

    fn needs(&self, _connected: bool) -> VmmNeeds {
        let devices = match self.accelerator {
            Accelerator::Kvm => vec![PathBuf::from("/dev/kvm")],
            Accelerator::Tcg => Vec::new(),
        };
        VmmNeeds { devices, seccomp: self.program.seccomp(), layers: self.program.layers(), ..VmmNeeds::default() }
    }

    fn capabilities(&self) -> Capabilities {
        // hw/i386/microvm.c: max_cpus.
        Capabilities {
            clones: true,
            copies: true,
            config_drive: false,
            wire: Wire::Plain,
            streams_frames: true,
            max_vcpus: 288,
            even_vcpus: false,
        }
    }

    fn can_clone(&self, plan: &LaunchPlan) -> std::result::Result<(), String> {
        // QEMU opens the memory by a name, and a sealed one has no other.
        let why = |reason: &String| Err(format!("a clone's memory needs a /proc in its jail: {reason}"));
        plan.jail.no_proc.as_ref().map_or(Ok(()), why)
    }

    fn launch(&self, plan: &LaunchPlan, origin: &Origin, held: Box<dyn Send>) -> Result<Launched> {
        let mut jail = plan.jail.clone();
        let is_clone = matches!(origin, Origin::Clone { .. });
        if is_clone {
            jail.hide(&plan.kernel);
            jail.hide(&plan.initramfs);
        }
        let (console, console_end) = Tail::pipe()?;
        let (vmm_stderr, stderr_end) = Tail::pipe()?;
        let (agent, agent_end) = pair()?;
        let (qmp, qmp_end) = pair()?;
        let failed = |error: std::io::Error| Error::host("socketpair", "the identity's port", error);
        let (identity, identity_end) = StdStream::pair().map_err(failed)?;
        // What it is told fits the socket.
        identity.set_nonblocking(true).map_err(failed)?;
        let mut targets = vec![1, 2, AGENT_FD, QMP_FD, IDENTITY_FD];
        let mut fds =
            vec![console_end.as_fd(), stderr_end.as_fd(), agent_end.as_fd(), qmp_end.as_fd(), identity_end.as_fd()];
        if let Origin::Clone { ram } = origin {
            targets.push(RAM_FD);
            fds.push(ram.as_fd());
        }
        match plan.nic.as_ref().map(|nic| &nic.plug) {
            Some(Plug::Tap(tap)) => {
                targets.push(NETWORK_FD);
                fds.push(tap.fd.as_fd());
            }
            Some(Plug::Stream(stream)) => {
                targets.push(NETWORK_FD);
                fds.push(stream.as_fd());
            }
            Some(Plug::Unplugged) | None => {}
        }
        let zygotes = plan.zygotes.as_ref().filter(|_| self.program.can_preload());
        let zygote = zygotes.map(|zygotes| (zygotes, self.binary()));
        let launcher = jail.launcher.clone();
        let spec = |is_forked: bool| {
            let shown = self.program.show(&mut jail, is_forked)?;
            let mut argv = vec![shown.program.display().to_string()];
            argv.extend(args::arguments(plan, origin, self.host(shown.firmware)));
            let mut spec = jail.spec(argv, shown.env, self.program.seccomp());
            spec.proc = jail.own_root && is_clone;
            // TCG asks for them for its translations: a clone that fills a quarter of one would wait until it is zeroed.
            spec.huge_pages = self.accelerator == Accelerator::Kvm;
            spec.fds = targets;
            Ok(spec)
        };
        let jailed = Jailed::launch_by(&Launcher { program: &launcher, zygote }, spec, &fds, held)?;
        let control = Box::new(Qmp::new(plan.vm_id.clone(), qmp, self.program.restore(), Some(jailed.signals())));
        let (agent, tails) = (Transport::Open(agent), LiveTails { console, vmm_stderr });
        Ok(Launched { jailed, agent, control, tails, identity: Some(identity) })
    }
}
