//! The VMMs that can be driven, behind one trait.
//!
//! Architecture invariant: a backend turns a [`LaunchPlan`] into a jailed process, a byte stream to the agent and a
//! [`Control`]. It owns no files, holds no state of a VM's life, and nobody above knows which backend it is.

mod cloud_hypervisor;
mod firecracker;
mod install;
mod jail;
mod qemu;

use std::fmt::Debug;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use microvm_jail::Layer;
use tokio::net::UnixStream;

use crate::error::{Error, Result, Tails};
use crate::host::net::Tap;
use crate::host::process::Jailed;
use crate::host::tail::Tail;
use crate::model::{Backend, Grade, VmId};

pub use install::{probe, Binaries, Installed};
pub use jail::{host_jail, HostJail, JailPlan};
pub use qemu::Program as QemuProgram;

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How long a VMM may take to answer its control API.
pub const CONTROL_DEADLINE: Duration = Duration::from_secs(5);

/// A drive of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// The serial number by which the guest finds it.
    pub serial: &'static str,
    /// As the VMM finds it.
    pub path: PathBuf,
    pub read_only: bool,
    /// In bytes.
    pub size: u64,
}

/// The one network device of a VM.
#[derive(Debug, Clone)]
pub struct Nic {
    pub mac: String,
    /// The host's end of the wire, open: the VMM needs no right to open one. `None`: nothing is plugged in, as in a
    /// template.
    pub tap: Option<Arc<Tap>>,
}

impl Nic {
    /// The device of all VMs that have one, without what is one VM's own.
    #[must_use]
    pub fn unplugged() -> Self {
        Self { mac: "02:00:00:00:00:00".into(), tap: None }
    }
}

/// Everything a backend must know to launch one VM.
#[derive(Debug, Clone)]
pub struct LaunchPlan {
    pub vm_id: VmId,
    pub vcpu_count: u64,
    pub memory_mib: u64,
    /// As the VMM finds it, like every path here.
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub drives: Vec<Drive>,
    /// `None`: the VM is on no network.
    pub nic: Option<Nic>,
    /// Bytes and operations per second, for each drive that can be written.
    pub disk_bytes_per_s: Option<u64>,
    pub disk_ops_per_s: Option<u64>,
    pub jail: JailPlan,
}

/// Host memory that a VMM needs beyond its guest's at most, MiB: the manager's quota counts with it. docs/security.md has
/// the measurement.
pub const COST_MIB: u64 = 56;
/// How much it is allowed, MiB: its disk has pages in the host's cache besides.
pub const OVERHEAD_MIB: u64 = 128;

/// What a VMM needs beyond its VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmmNeeds {
    /// Device nodes beside those that every jail has.
    pub devices: Vec<PathBuf>,
    /// Layers of the jail that depend on the VMM.
    pub layers: Vec<(&'static str, Layer)>,
}

/// What a VMM said on its console and on stderr, still growing.
#[derive(Debug, Clone, Default)]
pub struct LiveTails {
    pub console: Tail,
    pub vmm_stderr: Tail,
}

impl LiveTails {
    #[must_use]
    pub fn read(&self) -> Tails {
        Tails { console: self.console.text(), vmm_stderr: self.vmm_stderr.text() }
    }
}

/// How a VMM comes to run a guest.
#[derive(Debug, Clone)]
pub enum Origin {
    /// The kernel boots.
    Boot,
    /// The kernel boots with its memory in this file, and [`Control::save`] makes a template of it.
    Record { ram: PathBuf },
    /// A clone of a template, whose memory it maps copy-on-write; it waits for [`Control::load`].
    Clone { ram: Arc<OwnedFd> },
}

/// A VMM process and the ways to talk to it.
pub struct Launched {
    pub jailed: Jailed,
    pub agent: UnixStream,
    pub control: Box<dyn Control>,
    pub tails: LiveTails,
}

/// Bytes that a VM's drives moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskIo {
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Writes that the host could not do, for want of room or otherwise; the guest was told.
    pub failed_writes: u64,
}

/// The control API of one running VMM; each call has [`CONTROL_DEADLINE`].
pub trait Control: Send + Sync {
    /// Waits until the VMM listens: it has opened all its files then.
    fn connect(&self) -> BoxFuture<'_, Result<()>>;
    /// Stops the vCPUs.
    fn pause(&self) -> BoxFuture<'_, Result<()>>;
    /// Lets the vCPUs go on.
    fn resume(&self) -> BoxFuture<'_, Result<()>>;
    /// Writes the device state of a VM to a file that is open for writing only; its vCPUs are stopped first.
    fn save(&self, state: OwnedFd) -> BoxFuture<'_, Result<()>>;
    /// Restores a VMM launched with [`Origin::Clone`] from what `save` wrote and, if asked to, lets it run.
    fn load(&self, state: OwnedFd, run: bool) -> BoxFuture<'_, Result<()>>;
    /// Ends the VMM without asking the guest.
    fn quit(&self) -> BoxFuture<'_, Result<()>>;
    fn disk_io(&self) -> BoxFuture<'_, Result<DiskIo>>;
    /// The VMM's own word for why the vCPUs stand still (`io-error`, `paused`, ...); `None` while they run, and from a VMM
    /// that does not tell.
    fn why_stopped(&self) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

/// A backend that was found on this host.
pub trait Vmm: Send + Sync + Debug {
    fn backend(&self) -> Backend;
    /// The boundary that a VM of this backend gets on this host.
    fn grade(&self) -> Grade;
    /// The accelerator's name as the VMM calls it.
    fn accelerator(&self) -> &'static str;
    fn binary(&self) -> &Path;
    /// The machine that `plan` describes, without the names of its files: what a template of it depends on.
    fn machine(&self, plan: &LaunchPlan) -> Vec<String>;
    fn needs(&self) -> VmmNeeds;
    /// Whether a VM in this jail can be a clone; `Err` says why not.
    fn can_clone(&self, jail: &JailPlan) -> std::result::Result<(), String>;
    /// Launches the VMM; call on the runtime. Dropping what it returns kills the VMM; `held` is dropped once no process
    /// of it is left.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::ImageUnreadable`].
    fn launch(&self, plan: &LaunchPlan, origin: &Origin, held: Box<dyn Send>) -> Result<Launched>;
}

/// The backend asked for, or the best one that this host can run.
///
/// # Errors
/// [`Error::BackendUnavailable`] that says what to install; [`Error::IsolationUnavailable`].
pub fn select(vm_id: &VmId, wanted: Option<Backend>, min: Option<Grade>, binaries: &Binaries) -> Result<Box<dyn Vmm>> {
    let backend = wanted.unwrap_or(Backend::Qemu);
    let vmm: Box<dyn Vmm> = match backend {
        Backend::Qemu => Box::new(qemu::Qemu::find(binaries)?),
        Backend::Firecracker => firecracker::find(binaries)?,
        Backend::CloudHypervisor => cloud_hypervisor::find(binaries)?,
    };
    if let Some(min) = min.filter(|min| *min > vmm.grade()) {
        let kvm = crate::host::kvm::probe();
        return Err(Error::IsolationUnavailable {
            vm_id: vm_id.clone(),
            wanted: format!("min_isolation={min}"),
            offered: vmm.grade().to_string(),
            reason: kvm.reason,
            remedy: kvm.remedy.unwrap_or_default(),
        });
    }
    Ok(vmm)
}
