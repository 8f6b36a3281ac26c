//! Firecracker, on KVM.
//!
//! It gets its machine over its API (`bodies`), makes that socket and its vsock's in a folder of the jail, and writes its
//! counters into a pipe there. docs/api_requests and src/firecracker/swagger of its repository describe all of it.

mod api;
mod bodies;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use microvm_jail::{Layer, Seccomp};

use crate::error::{Error, Result};
use crate::host::process::Jailed;
use crate::host::socket_dir::SocketDir;
use crate::host::tail::Tail;
use crate::model::{Backend, Grade};
use crate::vmm::install::needs_kvm;
use crate::vmm::program::{library_path, parse_version, VmmBinary};
use crate::vmm::transport::Awaited;
use crate::vmm::{Binaries, Capabilities, LaunchPlan, Launched, LiveTails, Origin, Transport, Vmm, VmmNeeds, Wire};
use api::Api;
use bodies::RAM_FD;

/// Firecracker on this host.
#[derive(Debug, Clone)]
pub struct Firecracker {
    program: Arc<VmmBinary>,
}

impl Firecracker {
    /// # Errors
    /// [`Error::BackendUnavailable`], [`Error::Host`].
    pub fn find(binaries: &Binaries) -> Result<Self> {
        let path = binaries.locate(Backend::Firecracker)?;
        needs_kvm(Backend::Firecracker)?;
        Ok(Self { program: VmmBinary::inspect(&path, |_| Vec::new(), &[])? })
    }

    /// Whether the vsock is deaf for ever after a pause and a resume by the API: so in 1.16.0 and 1.16.1
    /// (firecracker#6100, mended behind those).
    fn wedges_on_resume(&self) -> bool {
        let version = self.program.version_line.as_deref();
        version.and_then(|line| parse_version(line, "Firecracker v")) == Some((1, 16))
    }
}

impl Vmm for Firecracker {
    fn backend(&self) -> Backend {
        Backend::Firecracker
    }

    fn grade(&self) -> Grade {
        Grade::Hardware
    }

    fn accelerator(&self) -> &'static str {
        "kvm"
    }

    fn binary(&self) -> &Path {
        &self.program.binary
    }

    fn version(&self) -> Option<&str> {
        self.program.version_line.as_deref()
    }

    fn pairing(&self) -> String {
        self.program.pairing("1.16.1")
    }

    fn machine(&self, plan: &LaunchPlan) -> Vec<String> {
        bodies::machine(&plan.without_disk_rates()).into_iter().map(|call| format!("{call:?}")).collect()
    }

    fn needs(&self, connected: bool) -> VmmNeeds {
        let layer = Layer::Missing("its system calls were not measured: it gets the deny-list".into());
        VmmNeeds {
            devices: vec!["/dev/kvm".into()],
            sockets: true,
            seccomp: Seccomp::DenyListForRustVmms,
            layers: vec![("seccomp_allow_list", layer)],
            opens_tap: connected,
            ..VmmNeeds::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        // src/vmm/src/vmm_config/machine_config.rs: MAX_SUPPORTED_VCPUS, and either 1 or an even number.
        Capabilities {
            clones: true,
            copies: false,
            config_drive: true,
            wire: Wire::Named,
            streams_frames: false,
            max_vcpus: 32,
            even_vcpus: true,
        }
    }

    fn can_clone(&self, plan: &LaunchPlan) -> std::result::Result<(), String> {
        plan.jail.has_fixed_places()?;
        match plan.nic {
            None => Ok(()),
            Some(_) => Err("Firecracker's templates have no network device: it knows none without a tap".into()),
        }
    }

    fn launch(&self, plan: &LaunchPlan, origin: &Origin, held: Box<dyn Send>) -> Result<Launched> {
        let missing = || Error::host("launch", "Firecracker", "the plan has no folder for its sockets");
        let folder = plan.sockets.as_ref().ok_or_else(missing)?;
        let sockets = Arc::new(SocketDir::open(&folder.host, folder.owner)?);
        let agent = Transport::Awaited(Awaited::listen(sockets.clone())?);
        let metrics = sockets.pipe(bodies::METRICS)?;
        let mut jail = plan.jail.clone();
        let is_clone = matches!(origin, Origin::Clone { .. });
        if is_clone {
            jail.hide(&plan.kernel);
            jail.hide(&plan.initramfs);
        }
        if let Origin::Record { .. } = origin {
            jail.allow_files_of(plan.limits.memory_mb << 20);
        }
        let program = self.program.show(&mut jail, false)?;
        let argv = bodies::arguments(&program, &folder.inside);
        let env = if jail.own_root { vec![library_path()] } else { Vec::new() };
        let mut spec = jail.spec(argv, env, Seccomp::DenyListForRustVmms);
        spec.proc = is_clone;
        spec.fds = vec![1, 2];
        if let Some(tap) = plan.nic.as_ref().and_then(|nic| nic.plug.tap()) {
            // It opens its tap by name, where that is: there itself, or by what the jail hands it.
            spec.tap = jail.hands_tap;
            spec.namespaces.net &= jail.hands_tap;
            let owner = folder.owner.unwrap_or_else(|| nix::unistd::geteuid().as_raw());
            tap.hand_over(owner).map_err(|error| Error::host("hand over", &tap.name, error))?;
        }
        let (console, console_end) = Tail::pipe()?;
        let (vmm_stderr, stderr_end) = Tail::pipe()?;
        let mut fds = vec![console_end.as_fd(), stderr_end.as_fd()];
        if let Origin::Clone { ram } = origin {
            spec.fds.push(RAM_FD);
            fds.push(ram.as_fd());
        }
        let jailed = Jailed::launch(&jail.launcher, &spec, &fds, held)?;
        let (inside, signals) = (folder.inside.clone(), Some(jailed.signals()));
        let control = Box::new(Api::new(plan, origin, sockets, inside, metrics, signals, self.wedges_on_resume()));
        Ok(Launched { jailed, agent, control, tails: LiveTails { console, vmm_stderr }, identity: None })
    }
}
