//! Templates of the user's own and suspended VMs, as the manager deals in them.

use std::fs::File;
use std::future::Future;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use super::Manager;
use crate::error::{Error, Result};
use crate::image;
use crate::image::template::{SnapshotMetadata, SnapshotStore};
use crate::model::{Reservation, TemplateName, VmId, VmSpec, VmState};
use crate::vm::{self, MicroVm, Registry};

/// A snapshot in a list: a template of the user's or a suspended VM.
#[derive(Debug)]
pub struct SnapshotEntry {
    pub name: String,
    pub disk_bytes: u64,
    /// What it is; damaged, if that cannot be read.
    pub metadata: Result<SnapshotMetadata>,
    /// Why it cannot be started on this host as the host is now; empty where it can.
    pub differences: Vec<String>,
}

/// A disk that was copied out of a suspended VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportedDisk {
    pub bytes: u64,
    /// Whether it has the digest that was noted when the VM was suspended.
    pub verified: bool,
}

/// How many there are, and their bytes on disk. Blocking.
pub fn usage(store: &SnapshotStore) -> (usize, u64) {
    let snapshots = store.list();
    (snapshots.len(), snapshots.iter().map(|(_, bytes)| bytes).sum())
}

impl Registry for Manager {
    fn reserve(&self, vm_id: &VmId, spec: &VmSpec) -> Result<Reservation> {
        Manager::reserve(self, vm_id, &spec.limits, |_, reserve| reserve())
    }

    fn destroy(self: Arc<Self>, vm: Arc<MicroVm>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> {
        Box::pin(async move { Manager::destroy(&self, vm.id().as_str()).await })
    }
}

impl Manager {
    /// The VM that a template of the user's own was taken of.
    pub(super) fn template(&self, name: &TemplateName) -> Result<VmSpec> {
        let written = self.settings.snapshots.manifest(name.as_str())?;
        written.map(|written| written.metadata.spec).ok_or_else(|| Error::TemplateNotFound { name: name.to_string() })
    }

    /// The templates of the user's own. Blocking.
    #[must_use]
    pub fn list_templates(&self) -> Vec<SnapshotEntry> {
        self.entries(&self.settings.snapshots)
    }

    /// The suspended VMs of this user, whichever manager they were of. Blocking.
    #[must_use]
    pub fn list_suspended(&self) -> Vec<SnapshotEntry> {
        self.entries(&self.settings.suspended)
    }

    /// Removes a template of the user's own; its clones run on.
    ///
    /// # Errors
    /// [`Error::TemplateNotFound`], [`Error::TemplateTaken`] while it is made, [`Error::Host`].
    pub async fn delete_template(&self, name: &TemplateName) -> Result<()> {
        let (store, name) = (self.settings.snapshots.clone(), name.to_string());
        let deleting = tokio::task::spawn_blocking(move || {
            let not_found = || Error::TemplateNotFound { name: name.clone() };
            let taken = || Error::TemplateTaken { name: name.clone(), reason: "is being made or deleted" };
            if !store.has(&name) {
                return Err(not_found());
            }
            let held = store.lock(&name)?.ok_or_else(taken)?;
            store.remove(&held, &name)?.map(drop).ok_or_else(not_found)
        });
        deleting.await.map_err(|error| Error::host("delete", "a template", error))?
    }

    /// Lets a paused VM go on, and brings a suspended one back, also one that another manager suspended.
    ///
    /// # Errors
    /// [`Error::VmNotFound`], and [`MicroVm::resume`]'s.
    pub async fn resume(&self, vm_id: &str) -> Result<Arc<MicroVm>> {
        if let Some(vm) = self.get(vm_id) {
            let resumed = vm.resume().await;
            // Destroyed meanwhile, or disowned by a caller who resumed it in vain: then it may still be on disk.
            if resumed.is_ok() || vm.state() != VmState::Destroyed {
                return resumed.inspect_err(|error| vm.set_last_error(error.clone())).map(|()| vm);
            }
        }
        let vm = self.adopt(vm_id)?;
        let resumed = vm.resume().await;
        if resumed.is_err() {
            // Unless another caller has found it in the registry and resumed it since.
            vm.disown(|| self.registry.lock().vms.retain(|other| !Arc::ptr_eq(other, &vm))).await;
        }
        resumed.map(|()| vm)
    }

    /// Takes a suspended VM that this manager does not know into its registry; nothing is reserved for it yet.
    fn adopt(&self, vm_id: &str) -> Result<Arc<MicroVm>> {
        let not_found = || Error::VmNotFound { vm_id: vm_id.to_owned() };
        let vm_id = VmId::parse(vm_id).map_err(|_| not_found())?;
        let metadata = self.settings.suspended.manifest(vm_id.as_str())?.ok_or_else(not_found)?.metadata;
        let vm = self.vm(vm_id.clone(), metadata.spec);
        vm.set_suspended();
        debug_assert_eq!(vm.state(), VmState::Paused);
        let mut registry = self.registry.lock();
        if registry.vms.iter().any(|other| *other.id() == vm_id) {
            return Err(Error::VmIdTaken { vm_id, owner: "this manager".into() });
        }
        registry.vms.push(vm.clone());
        Ok(vm)
    }

    /// Copies the disk of a suspended VM, whichever manager suspended it, to a new file `to`: raw ext4, holes kept. Works also
    /// where the VM cannot be resumed any more.
    ///
    /// # Errors
    /// [`Error::VmNotFound`], [`Error::InvalidState`] while the VM runs here, [`Error::InvalidValue`] when there is a file already,
    /// [`Error::VmIdTaken`] while another task resumes it, [`Error::StateDamaged`], [`Error::Host`].
    pub async fn export_disk(&self, vm_id: &str, to: PathBuf) -> Result<ExportedDisk> {
        let id = VmId::parse(vm_id).map_err(|_| Error::VmNotFound { vm_id: vm_id.to_owned() })?;
        if let Some(vm) = self.get(vm_id).filter(|vm| !vm.is_suspended()) {
            let allowed = "suspended (a running VM's files can be had by download())".into();
            return Err(Error::InvalidState { vm_id: id, operation: "export_disk", state: vm.state(), allowed });
        }
        let store = self.settings.suspended.clone();
        let exporting = tokio::task::spawn_blocking(move || {
            let name = id.as_str();
            if !store.has(name) {
                return Err(Error::VmNotFound { vm_id: name.to_owned() });
            }
            let owner = "another task that suspends, resumes or destroys it now".into();
            let held = store.lock(name)?.ok_or_else(|| Error::VmIdTaken { vm_id: id.clone(), owner })?;
            let made = image::create_private(&to, File::options().read(true).write(true));
            let file = made.map_err(|error| match error.kind() {
                ErrorKind::AlreadyExists => Error::InvalidValue {
                    field: "path".into(),
                    value: format!("{to:?}"),
                    allowed: "a path at which there is no file yet".into(),
                },
                _ => Error::host("create", to.display(), error),
            })?;
            let written = store.export_disk(&held, name, &file).and_then(|verified| {
                let bytes = file.metadata().map_err(|error| Error::host("stat", to.display(), error))?.len();
                Ok(ExportedDisk { bytes, verified })
            });
            if written.is_err() {
                if let Err(error) = std::fs::remove_file(&to) {
                    log::warn!("{}: the half of a disk was not removed: {error}", to.display());
                }
            }
            written
        });
        exporting.await.map_err(|error| Error::host("export", vm_id, error))?
    }

    fn entries(&self, store: &SnapshotStore) -> Vec<SnapshotEntry> {
        let entry = |(name, disk_bytes): (String, u64)| {
            let written = store.manifest(&name).transpose()?;
            let differences = written
                .as_ref()
                .map_or_else(|error| vec![error.to_string()], |written| vm::differences_here(written, &self.settings));
            Some(SnapshotEntry { name, disk_bytes, metadata: written.map(|written| written.metadata), differences })
        };
        store.list().into_iter().filter_map(entry).collect()
    }

    /// Removes the state of a suspended VM that this manager does not know.
    pub(super) async fn destroy_suspended(&self, vm_id: &str) -> Result<()> {
        let not_found = || Error::VmNotFound { vm_id: vm_id.to_owned() };
        let vm_id = VmId::parse(vm_id).map_err(|_| not_found())?;
        match vm::forget_suspended(&self.settings, &vm_id).await? {
            true => Ok(()),
            false => Err(not_found()),
        }
    }
}
