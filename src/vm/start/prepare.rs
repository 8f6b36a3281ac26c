//! Everything of a VM that can be refused or made before a process runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm_jail::{Access, Layer};
use microvm_protocol::identity::{
    Credentials, GuestNetwork, Identity, Key, CONFIG_SERIAL, DISK_SERIAL, DRIVE_BYTES, ROOTFS_SERIAL,
};

use super::confine::{check_limits, confine, Confinement, HostResources};
use crate::error::{Error, Result};
use crate::host::clock;
use crate::image;
use crate::image::template::{FileId, Template};
use crate::model::{BootImage, ResourceLimits, VmId, VmSpec};
use crate::store::disk::Disk;
use crate::store::VmDir;
use crate::vm::ids::Ids;
use crate::vm::janitor;
use crate::vm::network::{self, Connection};
use crate::vm::settings::Settings;
use crate::vmm::{self, BackendRequest, Drive, JailPlan, LaunchPlan, Selection, Sockets, Vmm};

/// The folder of a VMM's sockets in the VM's folder.
const SOCKETS: &str = "run";

/// What stands ready before the VM's drives are written.
pub struct Prepared {
    pub dir: VmDir,
    pub disk: Disk,
    pub vmm: Box<dyn Vmm>,
    /// Why it is this backend.
    pub chosen: String,
    pub plan: LaunchPlan,
    pub sources: Sources,
    pub seen: Vec<Seen>,
    pub spec: Arc<VmSpec>,
    pub network: Option<Network>,
    /// Those of a VM that was suspended; `None`: new ones.
    pub ids: Option<Ids>,
    /// Shared with every VMM that is launched in this jail.
    pub held: Arc<HostResources>,
    pub confinement: Confinement,
}

/// What a VM is made of, as this host names it.
#[derive(Debug, Clone)]
pub struct Sources {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub rootfs: Option<PathBuf>,
}

impl Sources {
    /// The files of a VM, each of which can be one. Blocking.
    ///
    /// # Errors
    /// [`Error::ImageUnreadable`], [`Error::ImageInvalid`].
    pub fn checked(BootImage { kernel_path, rootfs_path }: &BootImage, settings: &Settings) -> Result<Self> {
        kernel_path.as_deref().map_or(Ok(()), image::check_kernel)?;
        rootfs_path.as_deref().map_or(Ok(()), image::check_rootfs)?;
        settings.image.check()?;
        Ok(Self {
            kernel: kernel_path.as_ref().unwrap_or(&settings.image.kernel).clone(),
            initramfs: settings.image.initramfs.clone(),
            rootfs: rootfs_path.clone(),
        })
    }
}

/// Bytes of an image.
pub fn file_size(path: &Path) -> Result<u64> {
    path.metadata().map(|meta| meta.len()).map_err(|error| Error::host("stat", path.display(), error))
}

/// A file that a VM goes on using, as it was when the VM started.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The configuration's name for it.
    pub field: &'static str,
    pub path: PathBuf,
    id: FileId,
}

impl Seen {
    fn look(field: &'static str, path: &Path) -> Result<Self> {
        let id = FileId::of(path).map_err(|error| Error::host("stat", path.display(), error))?;
        Ok(Self { field, path: path.to_owned(), id })
    }

    /// Whether it is still that file with that content.
    pub fn is_unchanged(&self) -> bool {
        FileId::of(&self.path).is_ok_and(|now| now == self.id)
    }
}

/// What a connected VM has beside its device.
pub struct Network {
    pub connection: Connection,
    guest: GuestNetwork,
}

/// Checks what was asked for and takes the VM's directory, off the runtime's threads.
pub async fn prepare(vm_id: &VmId, spec: &Arc<VmSpec>, settings: &Settings) -> Result<Prepared> {
    let (id, spec, settings) = (vm_id.clone(), spec.clone(), settings.clone());
    let prepare =
        move || prepare_blocking(&id, &spec, &settings, janitor::keep).map_err(|error| settings.with_key(error));
    let prepared = tokio::task::spawn_blocking(prepare).await;
    prepared.map_err(|error| Error::host("prepare", vm_id, error))?
}

impl Prepared {
    /// Fills the disk, which is the template's where there is one. Returns who the guest is to be.
    pub async fn write_drives(self, settings: &Settings, template: Option<Arc<Template>>) -> Result<(Self, Identity)> {
        let (vm_id, image) = (self.plan.vm_id.clone(), settings.image.disk_template.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let network = self.network.as_ref().map(|network| network.guest.clone());
            let ids = self.ids.map_or_else(Ids::generate, Ok)?;
            let identity = identity(&self.plan.vm_id, &self.spec.limits, network, ids)?;
            let disk = self.disk.file();
            match template {
                Some(template) => {
                    let copied = image::copy_disk(&template.disk, disk);
                    copied
                        .map_err(|error| Error::host("copy a template's disk to", self.disk.path().display(), error))?;
                    if !template.is_unchanged() {
                        return Err(Error::host("copy", "a template's disk", "the template changed meanwhile"));
                    }
                }
                None => image::write_disk(&image, disk)?,
            }
            Ok((self, identity))
        });
        let written = writing.await.map_err(|error| Error::host("write the drives of", vm_id, error))?;
        written.map_err(|error| settings.with_key(error))
    }
}

/// An identity with new keys and a new seed.
pub fn identity(vm_id: &VmId, limits: &ResourceLimits, network: Option<GuestNetwork>, ids: Ids) -> Result<Identity> {
    Ok(Identity {
        credentials: Credentials::agree(Key(clock::random()?), &Key(clock::random()?), &Key(clock::random()?)),
        seed: Key(clock::random()?),
        machine_id: ids.machine_id,
        boot_id: ids.boot_id,
        max_file_handles: limits.max_file_handles,
        max_processes: limits.max_processes,
        vm_id: vm_id.to_string(),
        hostname: vm_id.hostname(),
        network,
        keeps_calls: false,
    })
}

/// The folder in which the VMM makes its sockets.
fn make_sockets(dir: &VmDir, jail: &mut JailPlan, owner: Option<u32>) -> Result<Sockets> {
    let (folder, host) = (dir.dir(), dir.dir().at(SOCKETS));
    let made = folder.make_dir(SOCKETS).and_then(|_| owner.map_or(Ok(()), |owner| folder.give(SOCKETS, owner)));
    made.map_err(|error| Error::host("create", host.display(), error))?;
    let inside = jail.show("sockets", &host, "/run", Access::Sockets)?;
    Ok(Sockets { host, inside, owner })
}

/// A VM that could start, as far as that shows before its VMM runs.
pub struct Tried {
    pub vmm: Box<dyn Vmm>,
    pub chosen: String,
    pub layers: Vec<(&'static str, Layer)>,
    /// Why it would boot instead of being cloned.
    pub no_clone: Option<String>,
}

/// Makes and takes all that a start of `spec` does before its VMM is launched, and lets it go again. Blocking.
///
/// # Errors
/// As a start's.
pub fn try_out(vm_id: &VmId, spec: &Arc<VmSpec>, settings: &Settings) -> Result<Tried> {
    // Nothing of it outlives this call, so there is nothing for a janitor.
    let prepared = prepare_blocking(vm_id, spec, settings, |_| Ok(())).map_err(|error| settings.with_key(error))?;
    let written = image::write_disk(&settings.image.disk_template, prepared.disk.file());
    written.map_err(|error| settings.with_key(error))?;
    let no_clone = prepared.vmm.can_clone(&prepared.plan).err();
    let Prepared { vmm, chosen, confinement, .. } = prepared;
    Ok(Tried { vmm, chosen, layers: confinement.layers().to_vec(), no_clone })
}

fn prepare_blocking(
    vm_id: &VmId,
    spec: &Arc<VmSpec>,
    settings: &Settings,
    keep: fn(&Settings) -> Result<()>,
) -> Result<Prepared> {
    let sources = Sources::checked(&spec.image, settings)?;
    let request = BackendRequest::of(spec, settings.min_isolation);
    let Selection { vmm, reason: chosen } = vmm::select(vm_id, &request, &settings.binaries)?;
    let level = if spec.backend.is_some() { log::Level::Debug } else { log::Level::Info };
    log::log!(level, "{vm_id}: backend {}: {chosen}", vmm.backend());
    check_limits(vm_id, spec, settings, vmm.as_ref())?;
    keep(settings)?;
    let dir = VmDir::create(&settings.folders, vm_id)?;
    let disk = Disk::create(&*settings.folders.cache.root()?, vm_id)?;
    let (mut jail, held, confinement) = confine(vm_id, spec, settings, &dir, &disk, vmm.as_ref())?;
    let mut drive = |serial: &'static str, path: &Path, size: u64, access: Access| {
        let path = jail.show(serial, path, &format!("/vm/{serial}"), access)?;
        Ok::<_, Error>(Drive { serial, path, read_only: access == Access::Read, size })
    };
    let mut drives: Vec<Drive> = Vec::new();
    if vmm.capabilities().config_drive {
        let (config, size) = (dir.path().join(CONFIG_SERIAL), DRIVE_BYTES as u64);
        image::create_drive(&config, size, held.uid())?;
        drives.push(drive(CONFIG_SERIAL, &config, size, Access::Read)?);
    }
    let size = spec.limits.disk_size_mb << 20;
    disk.file().set_len(size).map_err(|error| Error::host("enlarge", disk.path().display(), error))?;
    held.uid().map_or(Ok(()), |uid| disk.give_to(uid))?;
    drives.push(drive(DISK_SERIAL, disk.path(), size, Access::Write)?);
    let mut seen = vec![Seen::look("the VMM's binary", vmm.binary())?];
    if let Some(rootfs) = &spec.image.rootfs_path {
        seen.push(Seen::look("rootfs_path", rootfs)?);
        let path = jail.show("rootfs_path", rootfs, "/image/rootfs", Access::Read)?;
        let size = file_size(rootfs)?;
        drives.push(Drive { serial: ROOTFS_SERIAL, path, read_only: true, size });
    }
    let kernel_field = if spec.image.kernel_path.is_some() { "kernel_path" } else { "package data" };
    let (network, nic) = match spec.network.isolated_network {
        true => (None, None),
        false => {
            let limit = spec.limits.network_bandwidth_mbps;
            let host = network::Host {
                range: settings.network_range,
                can: vmm.capabilities(),
                jail: &jail,
                gateway: &settings.image.usernet,
            };
            let (connection, nic, guest) = network::connect(vm_id, &spec.network, limit, &host)?;
            (Some(Network { connection, guest }), Some(nic))
        }
    };
    let sockets = match vmm.needs(nic.is_some()).sockets {
        true => Some(make_sockets(&dir, &mut jail, held.uid())?),
        false => None,
    };
    let plan = LaunchPlan {
        vm_id: vm_id.clone(),
        limits: spec.limits.clone(),
        kernel: jail.show(kernel_field, &sources.kernel, "/image/kernel", Access::Read)?,
        initramfs: jail.show("package data", &sources.initramfs, "/image/initramfs", Access::Read)?,
        drives,
        nic,
        sockets,
        jail,
        zygotes: settings.zygotes.clone(),
    };
    let (spec, held) = (spec.clone(), Arc::new(held));
    Ok(Prepared { dir, disk, vmm, chosen, plan, sources, seen, spec, network, ids: None, held, confinement })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn test_identity_no_secret_or_name_is_given_twice() {
        let vm_id = VmId::parse("tab-1").unwrap();
        let mut seen = HashSet::new();
        for _ in 0..200 {
            let ids = Ids::generate().unwrap();
            let identity = identity(&vm_id, &ResourceLimits::default(), None, ids).unwrap();
            assert_eq!((identity.machine_id, identity.boot_id), (ids.machine_id, ids.boot_id));
            let own = &identity.credentials;
            let long = [own.key.0, own.public, own.peer, own.shared.0, identity.seed.0];
            let short = [identity.machine_id, identity.boot_id];
            let all = long.iter().map(|bytes| bytes.to_vec()).chain(short.iter().map(|bytes| bytes.to_vec()));
            all.for_each(|bytes| assert!(seen.insert(bytes)));
        }
        assert_eq!(seen.len(), 200 * 7);
    }
}
