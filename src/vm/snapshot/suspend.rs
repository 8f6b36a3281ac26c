//! A suspended VM: its state is on disk, and no process of it is left.
//!
//! The state is there once: it is used under a lock, and gone when the VM runs again. A resume that fails, or whose
//! process dies, leaves it as it was, for another try: what runs has copies.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy::{fit_of, Copy};
use super::take::{finish, run_snapshot};
use crate::error::{Error, Result};
use crate::image::template::{NameLock, PendingSnapshot, Snapshot};
use crate::model::{VmId, VmState};
use crate::vm::ids::Ids;
use crate::vm::running::Running;
use crate::vm::settings::Settings;
use crate::vm::start::attempt::Progress;
use crate::vm::MicroVm;

/// How long requests that are under way may take to end before a VM is suspended.
const IDLE_DEADLINE: Duration = Duration::from_secs(5);

impl MicroVm {
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        let cell = self.cell.lock();
        cell.suspended && cell.state == VmState::Paused
    }

    /// Whether the state on disk under this VM's name is its own.
    #[must_use]
    pub fn has_suspended_state(&self) -> bool {
        self.cell.lock().suspended
    }

    /// Makes a VM one that was suspended before this process knew it.
    pub(crate) fn set_suspended(&self) {
        let mut cell = self.cell.lock();
        (cell.state, cell.suspended) = (VmState::Paused, true);
    }

    /// Writes the VM's state to disk and ends its VMM: it is PAUSED then, and its reservation is given back. Waits up to
    /// 5 s for what is under way.
    ///
    /// # Errors
    /// [`Error::InvalidState`] unless RUNNING or PAUSED, [`Error::Guest`] with the code `busy` when requests or streams do
    /// not end or a program cannot be stopped, [`Error::NotSupported`], [`Error::Vmm`], [`Error::Host`]; the VM goes on then.
    pub async fn suspend(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        if self.is_suspended() {
            return Ok(());
        }
        let (running, state) = self.live("suspend")?;
        let begun = Instant::now();
        // From here on nothing new is asked of it.
        if state == VmState::Running {
            self.become_state("suspend", VmState::Paused)?;
        }
        if let Err(error) = self.save_state(&running, state).await {
            // Not if it died meanwhile.
            if state == VmState::Running && self.state() == VmState::Paused {
                self.become_state("suspend", VmState::Running)?;
            }
            return Err(error.of(self.id()));
        }
        let reserved = {
            let mut cell = self.cell.lock();
            // The VM may have died at the last moment: its state is on disk all the same.
            if cell.state != VmState::Paused {
                self.enter(&mut cell, VmState::Paused, "suspend");
            }
            cell.suspended = true;
            (cell.counted.take(), cell.reservation.take())
        };
        running.kill();
        running.reaped().await;
        running.release().await;
        // What it had reserved is free when nothing of it is left.
        drop(reserved);
        log::info!("{}: suspended in {} ms", self.id(), begun.elapsed().as_millis());
        Ok(())
    }

    /// Writes the VM's state to disk; its vCPUs are paused then. After an error it runs on.
    async fn save_state(&self, running: &Running, state: VmState) -> Result<()> {
        let pending = self.begin_suspending().await?;
        let fit = fit_of(running, self.spec_of(running), &self.settings, "suspend()").await?;
        let copy = Copy::begin(running, &self.spec.limits, pending.path()).await?;
        // What waits in a VM that stands still would wait for ever.
        self.ports.break_connections();
        let open = if state == VmState::Running { running.agent().idle(IDLE_DEADLINE).await } else { 0 };
        if open > 0 {
            let limit = IDLE_DEADLINE.as_secs();
            let message =
                format!("{open} requests or streams are under way and did not end within {limit} s; end them");
            return Err(Error::Guest { vm_id: self.id().to_string(), what: "suspend".into(), code: "busy", message });
        }
        // The disk alone is what is left of a VM that cannot be resumed any more: export_disk().
        let hello = self.freeze(running, state, true).await?;
        let saved = async {
            copy.take(running).await?;
            finish(pending, fit, hello.clone(), self.metadata(running)).await
        };
        let saved = saved.await;
        if saved.is_err() {
            self.thaw(running, &hello, state).await?;
        }
        saved
    }

    async fn begin_suspending(&self) -> Result<PendingSnapshot> {
        let (store, name) = (self.settings.suspended.clone(), self.id().to_string());
        let beginning = tokio::task::spawn_blocking(move || {
            let taken = || Error::host("suspend", &name, "a suspended VM of this name exists; destroy_vm() it");
            let held = store.lock(&name)?.ok_or_else(taken)?;
            match store.has(&name) {
                true => Err(taken()),
                false => store.make(held, &name),
            }
        });
        beginning.await.map_err(|error| Error::host("suspend", self.id(), error))?
    }

    /// Brings the VM back from disk; `operation` is held.
    pub(in crate::vm) async fn restore(self: &Arc<Self>) -> Result<()> {
        let begun = Instant::now();
        let claim = Claim::take(&self.settings, self.id()).await.inspect_err(|error| {
            if matches!(error, Error::VmNotFound { .. }) {
                // Someone else resumed or destroyed it.
                self.fail(error);
                self.cell.lock().suspended = false;
            }
        })?;
        // Given back by whatever ends this before the VM runs.
        let reservation = self.reserve()?;
        let mut destroying = self.destroying.subscribe();
        let resumed = tokio::select! {
            resumed = self.run_again(&claim) => resumed,
            _ = destroying.wait_for(|destroying| *destroying) => Err(self.cancelled("resume")),
        };
        let running = resumed?;
        claim.consume().await;
        self.runs(running, reservation, "resume");
        log::info!("{}: resumed in {} ms", self.id(), begun.elapsed().as_millis());
        Ok(())
    }

    async fn run_again(&self, claim: &Claim) -> Result<Running> {
        let (what, snapshot) = (format!("suspended VM \"{}\"", self.id()), claim.snapshot.clone());
        let ids = Ids { machine_id: snapshot.metadata.machine_id, boot_id: snapshot.metadata.boot_id };
        let progress = Progress::begin("prepare");
        let running = run_snapshot(&what, self.id(), &self.spec, &self.settings, progress, snapshot, Some(ids)).await?;
        Ok(Running { origin: "resume", ..running })
    }

    /// Removes the state of a VM that is not to come back.
    pub(in crate::vm) async fn throw_away(&self) {
        self.cell.lock().suspended = false;
        if let Err(error) = forget(&self.settings, self.id()).await {
            log::warn!("{}: its suspended state was not removed: {error}", self.id());
        }
    }
}

/// Removes the state of a suspended VM; false when there is none.
///
/// # Errors
/// [`Error::VmIdTaken`] while someone resumes it, [`Error::Host`].
pub async fn forget(settings: &Settings, vm_id: &VmId) -> Result<bool> {
    let (store, vm_id) = (settings.suspended.clone(), vm_id.clone());
    let name = vm_id.to_string();
    let forgetting = tokio::task::spawn_blocking(move || {
        if !store.has(vm_id.as_str()) {
            return Ok(false);
        }
        let held = store.lock(vm_id.as_str())?.ok_or_else(|| under_way(&vm_id))?;
        store.remove(&held, vm_id.as_str()).map(|gone| gone.is_some())
    });
    forgetting.await.map_err(|error| Error::host("remove", name, error))?
}

fn under_way(vm_id: &VmId) -> Error {
    Error::VmIdTaken { vm_id: vm_id.clone(), owner: "someone who suspends, resumes or destroys it now".into() }
}

/// A suspended VM's state, which nobody else can use meanwhile.
struct Claim {
    settings: Settings,
    vm_id: VmId,
    held: NameLock,
    snapshot: Snapshot,
}

impl Claim {
    async fn take(settings: &Settings, vm_id: &VmId) -> Result<Self> {
        let (settings, vm_id) = (settings.clone(), vm_id.clone());
        let name = vm_id.to_string();
        let taking = tokio::task::spawn_blocking(move || {
            let store = &settings.suspended;
            let not_found = || Error::VmNotFound { vm_id: vm_id.to_string() };
            if !store.has(vm_id.as_str()) {
                return Err(not_found());
            }
            let held = store.lock(vm_id.as_str())?.ok_or_else(|| under_way(&vm_id))?;
            let snapshot = store.read(vm_id.as_str())?.ok_or_else(not_found)?;
            Ok(Self { settings, vm_id, held, snapshot })
        });
        taking.await.map_err(|error| Error::host("resume", name, error))?
    }

    /// The VM runs: its state is the past.
    async fn consume(self) {
        let name = self.vm_id.to_string();
        let Self { settings, vm_id, held, .. } = self;
        let store = settings.suspended.clone();
        let removing = tokio::task::spawn_blocking(move || settings.suspended.remove(&held, vm_id.as_str()));
        match removing.await {
            // Nobody waits for the file system.
            Ok(Ok(Some(gone))) => store.remove_later(gone).await,
            Ok(Ok(None)) => log::warn!("{name}: it runs, and its suspended state was gone already"),
            Ok(Err(error)) => log::error!("{name}: it runs, but its suspended state was not removed: {error}"),
            Err(error) => log::error!("{name}: it runs, but its suspended state was not removed: {error}"),
        }
    }
}
