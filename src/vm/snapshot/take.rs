//! Templates of a user's own: a running VM is copied with all its programs, and clones of it start like any others.
//!
//! A clone of the copy settles as one of a booted template does; its guest is frozen where it was copied, so that
//! no program takes a step before that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy::{fit_of, Copy};
use crate::error::{Error, Result};
use crate::host::clock;
use crate::image::template::{
    differences, Fit, PendingSnapshot, Snapshot, SnapshotManifest, SnapshotMetadata, SnapshotStore,
};
use crate::model::{SpecPatch, TemplateName, VmId, VmSpec, VmState};
use crate::vm::ids::Ids;
use crate::vm::running::Running;
use crate::vm::settings::Settings;
use crate::vm::start::attempt::Progress;
use crate::vm::start::launching::run;
use crate::vm::start::prepare::{self, prepare};
use crate::vm::start::template::{fit, look};
use crate::vm::MicroVm;

/// How long a guest may take to stop its programs, and to shake hands once it is woken.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
/// How much longer it may take when it writes its disk as well; it gives that up after 20 s (guest-agent/src/freeze.rs).
const WRITE_DEADLINE: Duration = Duration::from_secs(25);

/// Starts a clone of a template of the user's own. Nothing else will do in its place: it does not boot.
pub async fn clone_of(name: &TemplateName, vm_id: &VmId, spec: &Arc<VmSpec>, settings: &Settings) -> Result<Running> {
    let progress = Progress::begin("template");
    let not_found = || Error::TemplateNotFound { name: name.to_string() };
    let snapshot = settings.snapshots.load(name.as_str()).await?.ok_or_else(not_found)?;
    let what = as_clone(vm_id, name);
    fits(&what, spec.mismatches(&snapshot.metadata.spec))?;
    // A VM that no manager made still lacks what its template has.
    let patch = SpecPatch::from(VmSpec::clone(spec)).or(snapshot.metadata.spec.as_template());
    let spec = Arc::new(VmSpec::new(spec.isolation_type, patch));
    run_snapshot(&what, vm_id, &spec, settings, progress, snapshot, None).await
}

/// A clone of a user's own template, for messages.
fn as_clone(vm_id: &VmId, name: &TemplateName) -> String {
    format!("{vm_id}, as a clone of template \"{name}\",")
}

/// # Errors
/// [`Error::StateMismatch`] naming all that a clone of the template `name` cannot have otherwise.
pub fn check_clone(vm_id: &VmId, spec: &VmSpec, name: &TemplateName, template: &VmSpec) -> Result<()> {
    fits(&as_clone(vm_id, name), spec.mismatches(template))
}

/// Starts a VM from a snapshot, if this host can still resume it.
pub async fn run_snapshot(
    what: &str,
    vm_id: &VmId,
    spec: &Arc<VmSpec>,
    settings: &Settings,
    progress: Progress,
    snapshot: Snapshot,
    ids: Option<Ids>,
) -> Result<Running> {
    progress.at("prepare");
    let mut prepared = prepare(vm_id, spec, settings).await?;
    let can = prepared.vmm.can_clone(&prepared.plan);
    fits(what, can.err().into_iter().collect())?;
    let taken = (&snapshot.template.manifest.fit, snapshot.metadata.vmm_version.as_deref());
    fits(what, differences(taken, (&fit(settings, &prepared).await?, prepared.vmm.version())))?;
    prepared.ids = ids;
    run(prepared, settings, progress, Some(snapshot.template)).await
}

fn fits(what: &str, differences: Vec<String>) -> Result<()> {
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Error::StateMismatch { what: what.to_owned(), differences }),
    }
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
            let pending = begin(&self.settings.snapshots, name).await?;
            let fit = fit_of(&running, self.spec_of(&running), &self.settings, "snapshot()").await?;
            let copy = Copy::begin(&running, &self.spec.limits, pending.path()).await?;
            let hello = self.freeze(&running, state, false).await?;
            let stopped = Instant::now();
            let taken = copy.take(&running).await;
            // Whatever became of the copy, the VM goes on.
            self.thaw(&running, &hello, state).await?;
            let still = stopped.elapsed();
            taken?;
            finish(pending, fit, hello, self.metadata(&running)).await?;
            Ok(still)
        };
        let still: Duration = work.await.map_err(|error: Error| error.of(self.id()))?;
        let (all, still) = (begun.elapsed().as_millis(), still.as_millis());
        log::info!("{}: template {name} taken in {all} ms; it stood still for {still} ms of them", self.id());
        Ok(())
    }

    /// The VM's processes, where they are there: RUNNING or PAUSED and not suspended.
    pub(in crate::vm) fn live(&self, operation: &'static str) -> Result<(Arc<Running>, VmState)> {
        let cell = self.cell.lock();
        match (cell.running(), cell.state) {
            (Some(running), state @ (VmState::Running | VmState::Paused)) => Ok((running.clone(), state)),
            (_, state) => {
                let allowed = "running, paused (and not suspended)".to_owned();
                Err(Error::InvalidState { vm_id: self.id().clone(), operation, state, allowed })
            }
        }
    }

    /// Stops the programs, the session and then the vCPUs of a VM in `state`; `writes_disk`: its disk is to have every file.
    ///
    /// # Errors
    /// [`Error::Guest`], and nothing has changed; after any other the VMM is ended.
    pub(in crate::vm) async fn freeze(&self, running: &Running, state: VmState, writes_disk: bool) -> Result<Vec<u8>> {
        let deadline = FREEZE_DEADLINE + if writes_disk { WRITE_DEADLINE } else { Duration::ZERO };
        let frozen = async {
            if state == VmState::Paused {
                running.control().resume().await?;
            }
            let frozen = running.agent().freeze(writes_disk, deadline).await;
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
    pub(in crate::vm) async fn thaw(&self, running: &Running, hello: &[u8], state: VmState) -> Result<()> {
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

    /// The spec with the backend that the VM got.
    pub(in crate::vm) fn spec_of(&self, running: &Running) -> VmSpec {
        VmSpec { backend: Some(running.backend), ..VmSpec::clone(&self.spec) }
    }

    pub(in crate::vm) fn metadata(&self, running: &Running) -> SnapshotMetadata {
        SnapshotMetadata {
            vm_id: self.id().clone(),
            spec: self.spec_of(running),
            machine_id: running.ids.machine_id,
            boot_id: running.ids.boot_id,
            created_unix_s: clock::unix_time_ns() / 1_000_000_000,
            vmm_version: running.program.version.clone(),
        }
    }
}

/// In what this host differs from the host of a snapshot, or why it could not start such a VM at all: empty where it can
/// resume it.
/// Blocking.
#[must_use]
pub fn differences_here(written: &SnapshotManifest, settings: &Settings) -> Vec<String> {
    let metadata = &written.metadata;
    match look(&metadata.vm_id, &metadata.spec, settings, "resume") {
        Ok(here) => differences(
            (&written.manifest.fit, metadata.vmm_version.as_deref()),
            (&here.fit, here.vmm_version.as_deref()),
        ),
        Err(error) => vec![error.to_string()],
    }
}

/// Locks a name in the store of templates.
async fn begin(store: &Arc<SnapshotStore>, name: &TemplateName) -> Result<PendingSnapshot> {
    let (store, name) = (store.clone(), name.to_string());
    let beginning = tokio::task::spawn_blocking(move || {
        let taken = |reason| Error::TemplateTaken { name: name.clone(), reason };
        let held = store.lock(&name)?.ok_or_else(|| taken("is being made or deleted"))?;
        if store.has(&name) {
            return Err(taken("exists already"));
        }
        store.make(held, &name)
    });
    beginning.await.map_err(|error| Error::host("begin", "a template", error))?
}

/// Puts what was made in its place.
pub async fn finish(pending: PendingSnapshot, fit: Fit, hello: Vec<u8>, metadata: SnapshotMetadata) -> Result<()> {
    let finishing = tokio::task::spawn_blocking(move || pending.finish(fit, hello, metadata));
    finishing.await.map_err(|error| Error::host("keep", "a VM's state", error))?
}
