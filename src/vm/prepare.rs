//! Everything of a VM that can be refused or made before a process runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm_protocol::identity::{
    GuestNetwork, Identity, Key, KeyPair, CONFIG_SERIAL, DISK_SERIAL, DRIVE_BYTES, ROOTFS_SERIAL,
};

use super::network::{self, Connection};
use super::{Settings, Spec};
use crate::error::{Error, Result};
use crate::host::clock;
use crate::host::runtime_dir::VmDir;
use crate::image;
use crate::image::template::Template;
use crate::model::{ResourceLimits, VmId};
use crate::vmm::{self, Drive, LaunchPlan, Vmm};

/// What stands ready before the VM's drives are written.
pub struct Prepared {
    pub dir: VmDir,
    pub vmm: Box<dyn Vmm>,
    pub plan: LaunchPlan,
    pub limits: ResourceLimits,
    pub network: Option<Network>,
}

/// What a connected VM has beside its device.
pub struct Network {
    pub connection: Connection,
    guest: GuestNetwork,
}

/// Checks what was asked for and takes the VM's directory, off the runtime's threads.
pub async fn prepare(spec: &Spec, settings: &Settings) -> Result<Prepared> {
    let (spec, settings) = (spec.clone(), settings.clone());
    let vm_id = spec.vm_id.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare_blocking(&spec, &settings)).await;
    prepared.map_err(|error| Error::host("prepare", vm_id, error))?
}

impl Prepared {
    /// Writes the drives: who the guest is, and a disk, which is the template's where there is one. Returns the guest's
    /// key.
    pub async fn write_drives(self, settings: &Settings, template: Option<Arc<Template>>) -> Result<(Self, Key)> {
        let (vm_id, image) = (self.plan.vm_id.clone(), settings.image.disk_template.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let network = self.network.as_ref().map(|network| network.guest.clone());
            let (identity, key) = identity(&self.plan.vm_id, &self.limits, network)?;
            image::write_config_drive(&identity, &self.dir.path().join(CONFIG_SERIAL))?;
            let disk = self.dir.path().join(DISK_SERIAL);
            match template {
                Some(template) => image::copy_disk(&template.disk, &disk)?,
                None => image::write_disk(&image, &disk, self.limits.disk_size_mb)?,
            }
            Ok((self, key))
        });
        writing.await.map_err(|error| Error::host("write the drives of", vm_id, error))?
    }
}

/// A new identity, and the key that is part of it.
pub fn identity(vm_id: &VmId, limits: &ResourceLimits, network: Option<GuestNetwork>) -> Result<(Identity, Key)> {
    let key = Key(clock::random()?);
    let identity = Identity {
        key: key.clone(),
        ephemeral: KeyPair::of(Key(clock::random()?)),
        seed: Key(clock::random()?),
        machine_id: clock::random()?,
        boot_id: clock::random()?,
        max_file_handles: limits.max_file_handles,
        max_processes: limits.max_processes,
        vm_id: vm_id.to_string(),
        hostname: vm_id.hostname(),
        network,
    };
    Ok((identity, key))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::host("absolute path", path.display(), error))
}

fn prepare_blocking(spec: &Spec, settings: &Settings) -> Result<Prepared> {
    let vm_id = &spec.vm_id;
    if let Some(path) = &spec.kernel_path {
        image::check_kernel(path)?;
    }
    if let Some(path) = &spec.rootfs_path {
        image::check_rootfs(path)?;
    }
    settings.image.check()?;
    let vmm = vmm::select(vm_id, spec.backend, settings.min_isolation, &settings.binaries)?;
    let dir = VmDir::create(&settings.base, vm_id)?;
    let path = |name: &str| dir.path().join(name);
    let mut drives = vec![
        Drive { serial: CONFIG_SERIAL, path: path(CONFIG_SERIAL), read_only: true, size: DRIVE_BYTES as u64 },
        Drive { serial: DISK_SERIAL, path: path(DISK_SERIAL), read_only: false, size: spec.limits.disk_size_mb << 20 },
    ];
    if let Some(rootfs) = &spec.rootfs_path {
        let path = absolute(rootfs)?;
        let size = path.metadata().map_err(|error| Error::host("stat", path.display(), error))?.len();
        drives.push(Drive { serial: ROOTFS_SERIAL, path, read_only: true, size });
    }
    let (network, nic) = match spec.network.isolated_network {
        true => (None, None),
        false => {
            let limit = spec.limits.network_bandwidth_mbps;
            let (connection, nic, guest) = network::connect(vm_id, &spec.network, settings.network_range, limit)?;
            (Some(Network { connection, guest }), Some(nic))
        }
    };
    let plan = LaunchPlan {
        vm_id: vm_id.clone(),
        vcpu_count: spec.limits.vcpu_count,
        memory_mib: spec.limits.memory_mb,
        kernel: absolute(spec.kernel_path.as_ref().unwrap_or(&settings.image.kernel))?,
        initramfs: settings.image.initramfs.clone(),
        drives,
        nic,
        launcher: settings.image.launcher.clone(),
    };
    Ok(Prepared { dir, vmm, plan, limits: spec.limits.clone(), network })
}
