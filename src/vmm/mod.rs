//! The VMMs that can be driven, behind one trait.
//!
//! Architecture invariant: a backend turns a [`LaunchPlan`] into a jailed process, a byte stream to the agent and a
//! [`VmmControl`]. It owns no files, holds no state of a VM's life, and nobody above knows which backend it is.

mod cloud_hypervisor;
mod error;
mod firecracker;
mod http;
mod install;
mod jail;
mod line;
mod program;
mod qemu;
mod rest;
mod select;
#[cfg(test)]
mod testing;
mod transport;

use std::fmt::Debug;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Result, Tails};
use crate::host::net::Tap;
use crate::host::process::Jailed;
use crate::host::tail::Tail;
use crate::host::zygote::Zygotes;
use crate::model::{Backend, Grade, ResourceLimits, VmId};
use microvm_jail::{Layer, Seccomp};

pub use install::{probe, Binaries, Installed};
pub use jail::{host_jail, HostJail, JailPlan};
pub use qemu::QemuBinary;
pub use select::{find, select, BackendRequest, Selection};
pub use transport::Transport;

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
    pub plug: Plug,
}

/// What the network device is plugged into.
#[derive(Debug, Clone)]
pub enum Plug {
    /// Nothing, as in a template.
    Unplugged,
    /// The host's end of the wire, open: the VMM needs no right to open one.
    Tap(Arc<Tap>),
    /// A stream of frames, each with its length before it, whose other end a gateway in user mode has.
    Stream(Arc<OwnedFd>),
}

impl Plug {
    #[must_use]
    pub fn tap(&self) -> Option<&Arc<Tap>> {
        match self {
            Plug::Tap(tap) => Some(tap),
            Plug::Unplugged | Plug::Stream(_) => None,
        }
    }
}

impl Nic {
    /// The device of all VMs that have one, without what is one VM's own.
    #[must_use]
    pub fn unplugged() -> Self {
        Self { mac: "02:00:00:00:00:00".into(), plug: Plug::Unplugged }
    }
}

/// Everything a backend must know to launch one VM.
#[derive(Debug, Clone)]
pub struct LaunchPlan {
    pub vm_id: VmId,
    /// Of these, the machine has vCPUs, memory, and bytes and operations per second for each drive that can be written.
    pub limits: ResourceLimits,
    /// As the VMM finds it, like every path here.
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub drives: Vec<Drive>,
    /// `None`: the VM is on no network.
    pub nic: Option<Nic>,
    /// Where the VMM makes its sockets, if it said that it makes any.
    pub sockets: Option<Sockets>,
    pub jail: JailPlan,
    /// For a backend whose VMM takes long to load; `None`: it is executed.
    pub zygotes: Option<Arc<Zygotes>>,
}

impl LaunchPlan {
    /// The same with drives as fast as they are: how fast they may be is each clone's own.
    #[must_use]
    pub fn without_disk_rates(&self) -> Self {
        Self { limits: self.limits.without_disk_rates(), ..self.clone() }
    }
}

/// A folder for a VMM's sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sockets {
    pub host: PathBuf,
    /// As the VMM finds it.
    pub inside: PathBuf,
    /// Whom the VMM runs as; `None`: as this user.
    pub owner: Option<u32>,
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
    /// A folder in which it can make sockets.
    pub sockets: bool,
    /// Descriptors beyond those that QEMU was measured to need.
    pub open_files: u64,
    /// It opens its tap itself, by name.
    pub opens_tap: bool,
    /// The filter of system calls that it gets.
    pub seccomp: Seccomp,
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

/// Where a VMM finds the memory of the template that it makes.
pub const RAM_PLACE: &str = "/vm/ram";

/// How a VMM comes to run a guest.
#[derive(Debug, Clone)]
pub enum Origin {
    /// The kernel boots.
    Boot,
    /// The kernel boots with its memory in this file, and [`VmmControl::save`] makes a template of it.
    Record { ram: PathBuf },
    /// A clone of a template, whose memory it maps copy-on-write; it waits for [`VmmControl::load`].
    Clone { ram: Arc<OwnedFd> },
}

/// A VMM process and the ways to talk to it.
pub struct Launched {
    pub jailed: Jailed,
    pub agent: Transport,
    pub control: Box<dyn VmmControl>,
    pub tails: LiveTails,
    /// The host's end of the port that delivers the guest's identity; `None`: by its config drive.
    pub identity: Option<UnixStream>,
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
pub trait VmmControl: Send + Sync {
    /// Waits until the VMM listens: it has opened all its files then.
    fn connect(&self) -> BoxFuture<'_, Result<()>>;
    /// Has a VMM that was launched with [`Origin::Boot`] or [`Origin::Record`] boot its guest; nothing for one whose
    /// arguments said so.
    fn boot(&self) -> BoxFuture<'_, Result<()>>;
    /// Stops the vCPUs.
    fn pause(&self) -> BoxFuture<'_, Result<()>>;
    /// Lets the vCPUs go on.
    fn resume(&self) -> BoxFuture<'_, Result<()>>;
    /// Writes the device state of a VM to a file that is open for writing only; its vCPUs are stopped first.
    fn save(&self, state: OwnedFd) -> BoxFuture<'_, Result<()>>;
    /// Restores a VMM launched with [`Origin::Clone`] from what `save` wrote and, if asked to, lets it run.
    fn load(&self, state: OwnedFd, run: bool) -> BoxFuture<'_, Result<()>>;
    /// Ends the VMM without asking the guest; `false`: it has no such request, and is to be killed.
    fn quit(&self) -> BoxFuture<'_, Result<bool>>;
    fn disk_io(&self) -> BoxFuture<'_, Result<DiskIo>>;
    /// The VMM's own word for why the vCPUs stand still (`io-error`, `paused`, ...); `None` while they run, and from a VMM
    /// that does not tell.
    fn why_stopped(&self) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

/// How a VMM takes its end of a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// An open descriptor, of plain frames.
    Plain,
    /// An open descriptor, of frames with a virtio header before each.
    WithHeaders,
    /// A name: it opens the tap itself, in the network namespace where that is.
    Named,
}

/// What a backend can do, where backends differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// VMs can be clones of a template: they start in a twentieth of the time.
    pub clones: bool,
    /// A VM that runs can be copied: its state is written while it stands still, and it goes on.
    pub copies: bool,
    /// A guest reads its identity from a drive; else by [`Launched::identity`].
    pub config_drive: bool,
    pub wire: Wire,
    /// It takes a stream of frames in place of a tap: [`Plug::Stream`].
    pub streams_frames: bool,
    pub max_vcpus: u64,
    /// It takes one vCPU or an even number.
    pub even_vcpus: bool,
}

/// A backend that was found on this host.
pub trait Vmm: Send + Sync + Debug {
    fn backend(&self) -> Backend;
    /// The boundary that a VM of this backend gets on this host.
    fn grade(&self) -> Grade;
    /// The accelerator's name as the VMM calls it.
    fn accelerator(&self) -> &'static str;
    fn binary(&self) -> &Path;
    /// What the binary says of its version.
    fn version(&self) -> Option<&str>;
    /// Its version and path, and the releases that the packaged guest was tried with; for people.
    fn pairing(&self) -> String;
    /// The machine that `plan` describes, without the names of its files: what a template of it depends on.
    fn machine(&self, plan: &LaunchPlan) -> Vec<String>;
    /// `connected`: for a VM that is on a network.
    fn needs(&self, connected: bool) -> VmmNeeds;
    fn capabilities(&self) -> Capabilities;
    /// Whether this VM can be a clone; `Err` says why not.
    fn can_clone(&self, plan: &LaunchPlan) -> std::result::Result<(), String>;
    /// Launches the VMM; call on the runtime. Dropping what it returns kills the VMM; `held` is dropped once no process
    /// of it is left.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::ImageUnreadable`].
    fn launch(&self, plan: &LaunchPlan, origin: &Origin, held: Box<dyn Send>) -> Result<Launched>;
}
