//! Everything of a VM that can be refused or made before a process runs.

use std::path::{Path, PathBuf};

use microvm_protocol::identity::{Identity, Key, CONFIG_SERIAL, DISK_SERIAL, ROOTFS_SERIAL};

use super::{Settings, Spec};
use crate::error::{Error, Result};
use crate::host::clock;
use crate::host::runtime_dir::VmDir;
use crate::image;
use crate::vmm::{self, Drive, LaunchPlan, Vmm};

/// What stands ready when the VMM is launched.
pub struct Prepared {
    pub dir: VmDir,
    pub vmm: Box<dyn Vmm>,
    pub plan: LaunchPlan,
    pub key: Key,
}

/// Checks what was asked for and makes the VM's files, off the runtime's threads.
pub async fn prepare(spec: &Spec, settings: &Settings) -> Result<Prepared> {
    let (spec, settings) = (spec.clone(), settings.clone());
    let vm_id = spec.vm_id.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare_blocking(&spec, &settings)).await;
    prepared.map_err(|error| Error::host("prepare", vm_id, error))?
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
    if !spec.network.isolated_network {
        return Err(Error::NetworkUnavailable {
            vm_id: vm_id.clone(),
            reason: "this release runs isolated VMs only".into(),
            remedy: "use isolated_network=True".into(),
        });
    }
    let vmm = vmm::select(vm_id, spec.backend, settings.min_isolation, &settings.binaries)?;
    let dir = VmDir::create(&settings.base, vm_id)?;
    let path = |name: &str| dir.path().join(name);
    let key = Key(clock::random()?);
    let identity = Identity {
        key: key.clone(),
        seed: Key(clock::random()?),
        vm_id: vm_id.to_string(),
        hostname: vm_id.hostname(),
        machine_id: clock::hex(&clock::random::<16>()?),
        unix_time_ns: clock::unix_time_ns(),
        disk: true,
        rootfs: spec.rootfs_path.is_some(),
        max_file_handles: spec.limits.max_file_handles,
        max_processes: spec.limits.max_processes,
        network: None,
    };
    image::write_config_drive(&identity, &path("config"))?;
    image::write_disk(&settings.image.disk_template, &path("disk"), spec.limits.disk_size_mb)?;
    let mut drives = vec![
        Drive { serial: CONFIG_SERIAL, path: path("config"), read_only: true },
        Drive { serial: DISK_SERIAL, path: path("disk"), read_only: false },
    ];
    if let Some(rootfs) = &spec.rootfs_path {
        drives.push(Drive { serial: ROOTFS_SERIAL, path: absolute(rootfs)?, read_only: true });
    }
    let plan = LaunchPlan {
        vm_id: vm_id.clone(),
        vcpu_count: spec.limits.vcpu_count,
        memory_mib: spec.limits.memory_mb,
        kernel: absolute(spec.kernel_path.as_ref().unwrap_or(&settings.image.kernel))?,
        initramfs: settings.image.initramfs.clone(),
        drives,
        launcher: settings.image.launcher.clone(),
    };
    Ok(Prepared { dir, vmm, plan, key })
}
