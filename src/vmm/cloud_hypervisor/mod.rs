//! Cloud Hypervisor, on KVM.
//!
//! It is given the listening socket of its API, gets its machine over that (`bodies`), and makes its vsock's socket in a
//! folder of the jail. vmm/src/api/openapi and docs/api.md of its repository describe all of it.

mod api;
mod bodies;
mod events;
mod state;

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
use crate::vmm::program::{library_path, VmmBinary};
use crate::vmm::transport::{Awaited, Called};
use crate::vmm::{
    Binaries, Capabilities, LaunchPlan, Launched, LiveTails, Origin, Transport, Vmm, VmmNeeds, Wire, RAM_PLACE,
};
use api::{Api, API};
use bodies::{API_FD, EVENTS_FD, RAM_FD};
use events::Events;

/// Each of its PCI devices has event descriptors for every vector and queue: of six devices it held 230, and refused one
/// more at 200.
const MORE_FILES: u64 = 512;

/// Cloud Hypervisor on this host.
#[derive(Debug, Clone)]
pub struct CloudHypervisor {
    program: Arc<VmmBinary>,
}

impl CloudHypervisor {
    /// # Errors
    /// [`Error::BackendUnavailable`], [`Error::Host`].
    pub fn find(binaries: &Binaries) -> Result<Self> {
        let path = binaries.locate(Backend::CloudHypervisor)?;
        needs_kvm(Backend::CloudHypervisor)?;
        Ok(Self { program: VmmBinary::inspect(&path, |_| Vec::new(), &[])? })
    }
}

impl Vmm for CloudHypervisor {
    fn backend(&self) -> Backend {
        Backend::CloudHypervisor
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
        self.program.pairing("53.0")
    }

    fn machine(&self, plan: &LaunchPlan) -> Vec<String> {
        bodies::machine(&plan.without_disk_rates(), Some(Path::new(RAM_PLACE)))
            .into_iter()
            .map(|call| format!("{call:?}"))
            .collect()
    }

    fn needs(&self, _connected: bool) -> VmmNeeds {
        let layer =
            Layer::Missing("its system calls were not measured: it gets the deny-list, and its own filters".into());
        VmmNeeds {
            devices: vec!["/dev/kvm".into()],
            sockets: true,
            seccomp: Seccomp::DenyListForRustVmms,
            open_files: MORE_FILES,
            layers: vec![("seccomp_allow_list", layer)],
            ..VmmNeeds::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        // vmm/src/config.rs: what KVM can have; the guest's kernel ends earlier.
        Capabilities {
            clones: true,
            copies: false,
            config_drive: true,
            wire: Wire::WithHeaders,
            streams_frames: false,
            max_vcpus: 254,
            even_vcpus: false,
        }
    }

    fn can_clone(&self, plan: &LaunchPlan) -> std::result::Result<(), String> {
        plan.jail.has_fixed_places()?;
        match plan.nic {
            None => Ok(()),
            Some(_) => Err("Cloud Hypervisor's templates have no network device: it knows none without a tap".into()),
        }
    }

    fn launch(&self, plan: &LaunchPlan, origin: &Origin, held: Box<dyn Send>) -> Result<Launched> {
        let missing = || Error::host("launch", "Cloud Hypervisor", "the plan has no folder for its sockets");
        let folder = plan.sockets.as_ref().ok_or_else(missing)?;
        let sockets = Arc::new(SocketDir::open(&folder.host, folder.owner)?);
        let is_clone = matches!(origin, Origin::Clone { .. });
        let agent = match is_clone {
            // Its vsock forgets connections without a word to the guest.
            true => Transport::Called(Called::at(sockets.clone())),
            false => Transport::Awaited(Awaited::listen(sockets.clone())?),
        };
        let listening = sockets.bind(API)?;
        let mut jail = plan.jail.clone();
        if is_clone {
            jail.hide(&plan.kernel);
            jail.hide(&plan.initramfs);
        }
        if let Origin::Record { .. } = origin {
            jail.allow_files_in(&folder.inside);
        }
        let program = self.program.show(&mut jail, false)?;
        let env = if jail.own_root { vec![library_path()] } else { Vec::new() };
        let mut spec = jail.spec(bodies::arguments(&program), env, Seccomp::DenyListForRustVmms);
        spec.proc = is_clone;
        spec.fds = vec![1, 2, API_FD, EVENTS_FD];
        let (console, console_end) = Tail::pipe()?;
        let (vmm_stderr, stderr_end) = Tail::pipe()?;
        let (events, events_end) = Events::pipe()?;
        let mut fds = vec![console_end.as_fd(), stderr_end.as_fd(), listening.as_fd(), events_end.as_fd()];
        if let Origin::Clone { ram } = origin {
            spec.fds.push(RAM_FD);
            fds.push(ram.as_fd());
        }
        let jailed = Jailed::launch(&jail.launcher, &spec, &fds, held)?;
        // Ends with the VMM.
        tokio::spawn(events.watch(plan.vm_id.clone(), jailed.signals()));
        let control = Box::new(Api::new(plan, origin, sockets, folder.inside.clone()));
        Ok(Launched { jailed, agent, control, tails: LiveTails { console, vmm_stderr }, identity: None })
    }
}
