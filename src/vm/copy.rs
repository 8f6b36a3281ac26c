//! Copying a VM that runs into the files of a template.
//!
//! ```text
//! runs            | frozen, its vCPUs stand still                                | wakes: the same VM, with new keys;
//! what its memory | the pages that it wrote since (host/process_memory.rs), its  | what was under way goes on
//! began as        | devices' state, its disk                                     |
//! ```
//! The VM's memory is a private mapping, of its template's if it is a clone: only what it wrote is copied while it stands
//! still.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::prepare::prepare;
use super::running::Running;
use super::template::fit;
use super::{Settings, Spec};
use crate::error::{Error, Result};
use crate::host::clock;
use crate::host::process_memory::ProcessMemory;
use crate::image;
use crate::image::template::{Fit, DISK, RAM, STATE};
use crate::model::{NetworkConfig, ResourceLimits, VmId};
use crate::vmm::Nic;

/// The files of a copy; what does not change any more is in them before the VM stands still.
pub struct Copy {
    ram: File,
    memory: ProcessMemory,
    dir: PathBuf,
}

impl Copy {
    /// Writes what the VM's memory and disk began as.
    pub async fn begin(running: &Running, limits: &ResourceLimits, dir: &Path) -> Result<Self> {
        let (base, pid, dir) =
            (running.base.as_ref().map(|base| base.ram.clone()), running.pid().unwrap_or(0), dir.to_owned());
        let (memory_bytes, disk_bytes) = (limits.memory_mb << 20, limits.disk_size_mb << 20);
        let beginning = tokio::task::spawn_blocking(move || {
            let path = dir.join(RAM);
            image::create_drive(&path, memory_bytes, None)?;
            if let Some(base) = base {
                image::copy_disk(&base, &path)?;
            }
            image::create_drive(&dir.join(DISK), disk_bytes, None)?;
            let ram = File::options().write(true).open(&path).map_err(|e| Error::host("open", path.display(), e))?;
            let memory = ProcessMemory::find(pid, memory_bytes);
            let memory =
                memory.map_err(|error| Error::host("look into", format!("the VMM's memory ({pid})"), error))?;
            Ok(Self { ram, memory, dir })
        });
        beginning.await.map_err(|error| Error::host("begin", "a copy of a VM", error))?
    }

    /// Copies the rest of a VM whose vCPUs stand still.
    pub async fn take(self, running: &Running) -> Result<()> {
        let disk = running.disk().ok_or_else(|| Error::host("copy", "a VM", "its files are gone"))?;
        let path = self.dir.join(STATE);
        let state = File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| Error::host("create", path.display(), error))?;
        let copying = tokio::task::spawn_blocking(move || {
            let pages = self.memory.copy_own_pages(&self.ram);
            let pages = pages.map_err(|error| Error::host("copy", "a VM's memory", error))?;
            let from = File::open(&disk).map_err(|error| Error::host("open", disk.display(), error))?;
            image::copy_disk(&from.into(), &self.dir.join(DISK))?;
            log::debug!("{pages} pages of memory copied");
            Ok(())
        });
        // Both to their ends: neither may go on while the VM does.
        let (saved, copied) = tokio::join!(running.control().save(state.into()), copying);
        saved?;
        copied.map_err(|error| Error::host("copy", "a VM", error))?
    }
}

/// What a copy of a VM depends on: what its template did, or what one would, had it not booted.
pub async fn fit_of(running: &Running, spec: &Spec, settings: &Settings) -> Result<Fit> {
    if !running.capabilities.copies {
        let reason = format!("a VM on {} cannot be copied while it runs; use backend=\"qemu\"", running.backend);
        return Err(Error::Vmm { vm_id: spec.vm_id.clone(), operation: "copy", reason });
    }
    if let Some(base) = &running.base {
        return Ok(base.fit.clone());
    }
    let vm_id = VmId::parse(&format!("fit-{}", clock::hex(&clock::random::<6>()?)))?;
    let own = Spec { vm_id, network: NetworkConfig::default(), template: None, ..spec.clone() };
    let mut prepared = prepare(&own, settings).await?;
    // The same device, on no wire.
    prepared.plan.nic = (!spec.network.isolated_network).then(Nic::unplugged);
    let cannot = |reason| Error::Vmm { vm_id: spec.vm_id.clone(), operation: "copy", reason };
    prepared.vmm.can_clone(&prepared.plan).map_err(cannot)?;
    fit(settings, &prepared).await
}
