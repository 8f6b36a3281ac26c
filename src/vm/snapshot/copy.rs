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

use crate::error::{Error, Result};
use crate::host::process_memory::ProcessMemory;
use crate::image;
use crate::image::template::{differences, Fit, DISK, RAM, STATE};
use crate::model::{Backend, ResourceLimits, VmId, VmSpec};
use crate::vm::running::Running;
use crate::vm::settings::Settings;
use crate::vm::start::prepare::Seen;
use crate::vm::start::template;
use crate::vmm::Capabilities;

/// The files of a copy; what does not change any more is in them before the VM stands still.
pub struct Copy {
    ram: File,
    disk: File,
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
            let ram = image::create_drive(&dir.join(RAM), memory_bytes, None)?;
            if let Some(base) = base {
                let copied = base.try_clone().and_then(|base| image::copy_disk(&base.into(), &ram));
                copied.map_err(|error| Error::host("copy", "a template's memory", error))?;
            }
            let disk = image::create_drive(&dir.join(DISK), disk_bytes, None)?;
            let memory = ProcessMemory::find(pid, memory_bytes);
            let memory =
                memory.map_err(|error| Error::host("look into", format!("the VMM's memory ({pid})"), error))?;
            Ok(Self { ram, disk, memory, dir })
        });
        beginning.await.map_err(|error| Error::host("begin", "a copy of a VM", error))?
    }

    /// Copies the rest of a VM whose vCPUs stand still.
    pub async fn take(self, running: &Running) -> Result<()> {
        let disk = running.disk_reader()?;
        let state = image::create_state(&self.dir.join(STATE))?;
        let copying = tokio::task::spawn_blocking(move || {
            let pages = self.memory.copy_own_pages(&self.ram);
            let pages = pages.map_err(|error| Error::host("copy", "a VM's memory", error))?;
            image::copy_disk(&disk, &self.disk).map_err(|error| Error::host("copy", "a VM's disk", error))?;
            log::debug!("{pages} pages of memory copied");
            Ok(())
        });
        // Both to their ends: neither may go on while the VM does.
        let (saved, copied) = tokio::join!(running.control().save(state.into()), copying);
        saved?;
        copied.map_err(|error| Error::host("copy", "a VM", error))?
    }
}

fn check_copies(vm_id: &VmId, backend: Backend, able: Capabilities, operation: &'static str) -> Result<()> {
    match able.copies {
        true => Ok(()),
        false => Err(Error::NotSupported {
            vm_id: vm_id.clone(),
            operation,
            backend,
            reason: "a VM on it cannot be copied while it runs".into(),
            remedy: "use backend=\"qemu\"",
        }),
    }
}

/// What a copy of a VM of `spec` depends on: what its template did, or what one would, had it not booted.
///
/// # Errors
/// [`Error::StateMismatch`] where this host could not go on with the copy, because a file that the VM uses was replaced since
/// it started; [`Error::NotSupported`] for `operation` where its backend
/// cannot copy.
pub async fn fit_of(running: &Running, spec: VmSpec, settings: &Settings, operation: &'static str) -> Result<Fit> {
    let (vm_id, backend) = (&running.vm_id, running.backend);
    check_copies(vm_id, backend, running.capabilities, operation)?;
    let (id, settings) = (vm_id.clone(), settings.clone());
    let looking = tokio::task::spawn_blocking(move || template::look(&id, &spec, &settings, operation));
    let here = looking.await.map_err(|error| Error::host("look at", "what a copy depends on", error))?;
    let refused = |differences: Vec<String>| {
        let what = format!("a copy of {vm_id} could not be started, because what it needs");
        // Putting it back changes the file's ctime, too, which is all that is known of it where there is no template.
        let remedy = match running.base {
            Some(_) => "put the former file back, or stop() and start() the VM",
            None => "stop() and start() the VM",
        };
        let remedy = remedy.to_owned();
        Error::StateMismatch { what, differences: differences.into_iter().chain([remedy]).collect() }
    };
    let here = match here {
        Ok(here) => here,
        Err(error @ Error::NotSupported { .. }) => return Err(error),
        Err(error) => return Err(refused(vec![error.to_string()])),
    };
    // Where the content of what a template depended on is unknown, any change of the file counts.
    let mut differences = match &running.base {
        Some(base) => {
            differences((&base.fit, running.program.version.as_deref()), (&here.fit, here.vmm_version.as_deref()))
        }
        None => Vec::new(),
    };
    let replaced = |seen: &&Seen| !seen.is_unchanged() && (running.base.is_none() || !differences.is_empty());
    let files = running.seen.iter().filter(replaced);
    let files: Vec<String> = files
        .map(|seen| format!("{} {:?} was replaced or changed after the VM had started", seen.field, seen.path))
        .collect();
    differences.extend(files);
    match differences.is_empty() {
        true => Ok(here.fit),
        false => Err(refused(differences)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Wire;

    #[test]
    fn test_a_backend_without_copies_is_not_supported_by_its_name_and_the_way_out_is_told() {
        let able = |copies| Capabilities {
            clones: true,
            copies,
            config_drive: true,
            wire: Wire::Named,
            streams_frames: false,
            max_vcpus: 32,
            even_vcpus: false,
        };
        let vm_id = VmId::parse("plugin-1").unwrap();
        for operation in ["snapshot()", "suspend()"] {
            let refused = check_copies(&vm_id, Backend::CloudHypervisor, able(false), operation).unwrap_err();
            assert_eq!(refused.code(), "not_supported");
            assert_eq!(
                refused.details(),
                serde_json::json!({
                    "operation": operation,
                    "backend": "cloud-hypervisor",
                    "reason": "a VM on it cannot be copied while it runs",
                    "remedy": "use backend=\"qemu\"",
                })
            );
            let message = refused.to_string();
            assert!(message.starts_with(&format!("plugin-1: {operation} is not supported by backend")), "{message}");
            check_copies(&vm_id, Backend::Qemu, able(true), operation).unwrap();
        }
    }
}
