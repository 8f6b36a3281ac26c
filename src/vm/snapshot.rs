//! Templates of a user's own: a running VM is copied with all its programs, and clones of it start like any others.
//!
//! A clone of the copy settles as one of a booted template does; its guest is frozen where it was copied, so that
//! no program takes a step before that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::boot::{run, Progress};
use super::copy::{fit_of, Copy};
use super::prepare::{self, prepare, Ids};
use super::running::Running;
use super::template::{fit, Machine};
use super::{MicroVm, Settings, Spec};
use crate::error::{Error, Result};
use crate::host::clock;
use crate::image::template::{differences, Fit, Kept, Making, Outline, Shelf, Written};
use crate::model::{Backend, NetworkConfig, TemplateName, VmId, VmState};

/// How long a guest may take to stop its programs, and to shake hands once it is woken.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// Starts a clone of a template of the user's own. Nothing else will do in its place: it does not boot.
pub async fn clone_of(name: &TemplateName, spec: &Spec, settings: &Settings) -> Result<Running> {
    let progress = Progress::begin("template");
    let not_found = || Error::TemplateNotFound { name: name.to_string() };
    let kept = settings.snapshots.load(name.as_str()).await?.ok_or_else(not_found)?;
    let what = format!("{}, as a clone of template \"{name}\",", spec.vm_id);
    fits(&what, mismatches(&kept.outline, spec))?;
    let spec = Spec {
        backend: spec.backend.or(Backend::parse(&kept.outline.backend).ok()),
        kernel_path: spec.kernel_path.clone().or_else(|| kept.outline.kernel_path.clone()),
        rootfs_path: spec.rootfs_path.clone().or_else(|| kept.outline.rootfs_path.clone()),
        ..spec.clone()
    };
    run_kept(&what, &spec, settings, progress, kept, None).await
}

/// Starts a VM from what was kept, if this host can still go on with that.
pub async fn run_kept(
    what: &str,
    spec: &Spec,
    settings: &Settings,
    progress: Progress,
    kept: Kept,
    ids: Option<Ids>,
) -> Result<Running> {
    progress.at("prepare");
    let mut prepared = prepare(spec, settings).await?;
    let can = prepared.vmm.can_clone(&prepared.plan);
    fits(what, can.err().into_iter().collect())?;
    let taken = (&kept.template.manifest.fit, kept.outline.vmm_version.as_deref());
    fits(what, differences(taken, (&fit(settings, &prepared).await?, prepared.vmm.version())))?;
    prepared.ids = ids;
    run(prepared, settings, progress, Some(kept.template)).await
}

fn fits(what: &str, differences: Vec<String>) -> Result<()> {
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Error::StateMismatch { what: what.to_owned(), differences }),
    }
}

/// In what a VM is to be other than the one that a template was taken of, where a clone has no choice.
#[must_use]
pub fn mismatches(outline: &Outline, spec: &Spec) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |field: &str, taken: String, wanted: String| {
        if taken != wanted {
            found.push(format!("{field}: the template has {taken}, not {wanted}"));
        }
    };
    let (taken, wanted) = (&outline.limits, &spec.limits);
    compare("vcpu_count", taken.vcpu_count.to_string(), wanted.vcpu_count.to_string());
    compare("memory_mb", taken.memory_mb.to_string(), wanted.memory_mb.to_string());
    compare("disk_size_mb", taken.disk_size_mb.to_string(), wanted.disk_size_mb.to_string());
    let isolated = |network: &NetworkConfig| if network.isolated_network { "True" } else { "False" }.to_owned();
    compare("isolated_network", isolated(&outline.network), isolated(&spec.network));
    if let Some(backend) = spec.backend {
        compare("backend", outline.backend.clone(), backend.to_string());
    }
    for (field, taken, wanted) in [
        ("kernel_path", &outline.kernel_path, &spec.kernel_path),
        ("rootfs_path", &outline.rootfs_path, &spec.rootfs_path),
    ] {
        if wanted.is_some() {
            compare(field, format!("{taken:?}"), format!("{wanted:?}"));
        }
    }
    found
}

impl MicroVm {
    /// Makes a template of this VM as it is now, which goes on; it stands still meanwhile for as long as its memory takes
    /// to be copied.
    ///
    /// # Errors
    /// [`Error::InvalidState`] unless RUNNING or PAUSED, [`Error::TemplateTaken`], [`Error::Guest`] with the code `busy`
    /// when a program cannot be stopped, [`Error::NotSupported`], [`Error::Vmm`], [`Error::Host`]; nothing is left of the template then.
    pub async fn snapshot(&self, name: &TemplateName) -> Result<()> {
        let _operation = self.operation.lock().await;
        let (running, state) = self.live("take a snapshot of")?;
        let begun = Instant::now();
        let work = async {
            let making = begin(&self.settings.snapshots, name).await?;
            let fit = fit_of(&running, &self.spec, &self.settings, "snapshot()").await?;
            let copy = Copy::begin(&running, &self.spec.limits, making.path()).await?;
            let hello = self.freeze(&running, state).await?;
            let stopped = Instant::now();
            let taken = copy.take(&running).await;
            // Whatever became of the copy, the VM goes on.
            self.thaw(&running, &hello, state).await?;
            let still = stopped.elapsed();
            taken?;
            finish(making, fit, hello, self.outline(&running)).await?;
            Ok(still)
        };
        let still: Duration = work.await.map_err(|error: Error| error.of(self.id()))?;
        let (all, still) = (begun.elapsed().as_millis(), still.as_millis());
        log::info!("{}: template {name} taken in {all} ms; it stood still for {still} ms of them", self.id());
        Ok(())
    }

    /// The VM's processes, where they are there: RUNNING or PAUSED and not suspended.
    pub(super) fn live(&self, operation: &'static str) -> Result<(Arc<Running>, VmState)> {
        let cell = self.cell();
        match (cell.running(), cell.state) {
            (Some(running), state @ (VmState::Running | VmState::Paused)) => Ok((running.clone(), state)),
            (_, state) => {
                let allowed = "running, paused (and not suspended)".to_owned();
                Err(Error::InvalidState { vm_id: self.id().clone(), operation, state, allowed })
            }
        }
    }

    /// Stops the programs, the session and then the vCPUs of a VM in `state`.
    ///
    /// # Errors
    /// [`Error::Guest`], and nothing has changed; after any other the VMM is ended.
    pub(super) async fn freeze(&self, running: &Running, state: VmState) -> Result<Vec<u8>> {
        let frozen = async {
            if state == VmState::Paused {
                running.control().resume().await?;
            }
            let frozen = running.agent().freeze(FREEZE_DEADLINE).await;
            if frozen.is_ok() || state == VmState::Paused {
                running.control().pause().await?;
            }
            frozen
        };
        let frozen = frozen.await;
        if frozen.as_ref().is_err_and(|error| !matches!(error, Error::Guest { .. })) {
            running.kill();
        }
        frozen
    }

    /// Wakes a VM that was frozen, as the same VM with new keys; it is in `state` again.
    ///
    /// # Errors
    /// Any: the VMM is ended then.
    pub(super) async fn thaw(&self, running: &Running, hello: &[u8], state: VmState) -> Result<()> {
        let thawed = async {
            let mut identity = prepare::identity(self.id(), &self.spec.limits, None, running.ids)?;
            identity.keeps_calls = true;
            let gone = || Error::host("deliver the identity of", self.id(), "the VM's files are gone");
            let folder = running.folder().ok_or_else(gone)?;
            running.identity_delivery.deliver(&identity, &folder)?;
            running.control().resume().await?;
            running.agent().thaw(identity.credentials.of_peer(), hello, FREEZE_DEADLINE).await?;
            running.identity_delivery.wipe(&folder)?;
            match state {
                VmState::Paused => running.control().pause().await,
                _ => Ok(()),
            }
        };
        let thawed = thawed.await;
        if thawed.is_err() {
            running.kill();
        }
        thawed
    }

    pub(super) fn outline(&self, running: &Running) -> Outline {
        let Spec { vm_id, isolation_type, limits, network, kernel_path, rootfs_path, .. } = self.spec.clone();
        Outline {
            vm_id: vm_id.to_string(),
            backend: running.backend.as_str().to_owned(),
            isolation_type: isolation_type.as_str().to_owned(),
            limits,
            network,
            kernel_path,
            rootfs_path,
            machine_id: running.ids.machine_id,
            boot_id: running.ids.boot_id,
            created_unix_s: clock::unix_time_ns() / 1_000_000_000,
            vmm_version: running.vmm_version.clone(),
        }
    }
}

/// In what this host differs from what was kept, or why it could not start such a VM at all: empty where it can go on.
/// Blocking.
#[must_use]
pub fn differences_here(written: &Written, settings: &Settings) -> Vec<String> {
    let outline = &written.outline;
    let here = VmId::parse(&outline.vm_id).and_then(|vm_id| {
        let machine = Machine {
            vm_id,
            backend: Backend::parse(&outline.backend)?,
            limits: outline.limits.clone(),
            connected: !outline.network.isolated_network,
            kernel_path: outline.kernel_path.clone(),
            rootfs_path: outline.rootfs_path.clone(),
        };
        machine.look(settings)
    });
    match here {
        Ok(here) => differences(
            (&written.manifest.fit, outline.vmm_version.as_deref()),
            (&here.fit, here.vmm_version.as_deref()),
        ),
        Err(error) => vec![error.to_string()],
    }
}

/// Takes a name on the shelf of templates.
async fn begin(shelf: &Arc<Shelf>, name: &TemplateName) -> Result<Making> {
    let (shelf, name) = (shelf.clone(), name.to_string());
    let beginning = tokio::task::spawn_blocking(move || {
        let taken = |reason| Error::TemplateTaken { name: name.clone(), reason };
        let held = shelf.hold(&name)?.ok_or_else(|| taken("is being made or deleted"))?;
        if shelf.has(&name) {
            return Err(taken("exists already"));
        }
        shelf.make(held, &name)
    });
    beginning.await.map_err(|error| Error::host("begin", "a template", error))?
}

/// Puts what was made in its place.
pub async fn finish(making: Making, fit: Fit, hello: Vec<u8>, outline: Outline) -> Result<()> {
    let finishing = tokio::task::spawn_blocking(move || making.finish(fit, hello, outline));
    finishing.await.map_err(|error| Error::host("keep", "a VM's state", error))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IsolationType, ResourceLimits};

    fn spec() -> Spec {
        Spec {
            vm_id: VmId::parse("a").unwrap(),
            backend: None,
            isolation_type: IsolationType::Session,
            limits: ResourceLimits::default(),
            network: NetworkConfig::default(),
            kernel_path: None,
            rootfs_path: None,
            template: None,
        }
    }

    fn outline() -> Outline {
        let Spec { limits, network, .. } = spec();
        Outline {
            vm_id: "b".into(),
            backend: "qemu".into(),
            isolation_type: "browser_tab".into(),
            limits,
            network,
            kernel_path: None,
            rootfs_path: None,
            machine_id: [0; 16],
            boot_id: [0; 16],
            created_unix_s: 0,
            vmm_version: None,
        }
    }

    #[test]
    fn test_mismatches_name_the_field_and_both_values() {
        type Change = fn(&mut Spec);
        let changes: [(&str, Change); 6] = [
            ("vcpu_count: the template has 1, not 2", |spec| spec.limits.vcpu_count = 2),
            ("memory_mb: the template has 512, not 256", |spec| spec.limits.memory_mb = 256),
            ("disk_size_mb: the template has 1024, not 64", |spec| spec.limits.disk_size_mb = 64),
            ("isolated_network: the template has True, not False", |spec| spec.network.isolated_network = false),
            ("backend: the template has qemu, not firecracker", |spec| spec.backend = Some(Backend::Firecracker)),
            ("rootfs_path: the template has None", |spec| spec.rootfs_path = Some("/x".into())),
        ];
        for (expected, change) in changes {
            let mut spec = spec();
            change(&mut spec);
            let found = mismatches(&outline(), &spec);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
        }
    }

    #[test]
    fn test_mismatches_leave_to_a_clone_what_its_host_enforces() {
        let mut spec = spec();
        spec.limits =
            ResourceLimits { max_processes: 7, max_file_handles: 77, network_bandwidth_mbps: 3, ..spec.limits };
        spec.backend = Some(Backend::Qemu);
        assert_eq!(mismatches(&outline(), &spec), Vec::<String>::new());
    }
}
