//! One VM: its life, what it owns, and the order in which that is torn down.
//!
//! Architecture invariant: knows [`crate::vmm::Vmm`], never a backend. Two locks: `operation` (asynchronous) is held
//! through start, stop, pause, resume and destroy, so they come one after the other; `cell` guards the state for a few
//! instructions at a time and is never held across an await or a log call. `operation` is taken first; events are told
//! under `cell`.

pub mod attached;
mod boot;
pub mod connections;
mod events;
mod health;
mod ids;
pub mod info;
pub mod janitor;
pub mod network;
pub mod ports;
mod running;
mod settings;
mod snapshot;
mod start;
mod streams;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use tokio::sync::watch;

use crate::channel::{patience, Answer, SessionError};
use crate::error::{Error, Result};
use crate::host::{clock, process};
use crate::model::{EventKind, Reservation, VmId, VmSpec, VmState};
use crate::mutex::Mutex;
use crate::store::runtime;
use crate::vmm::COST_MIB;

pub use events::{Events, Recv, Subscriber};
pub use health::history::Health;
pub use ids::new_id;
use running::Running;
pub use settings::{Facts, Heartbeat, Settings};
pub use snapshot::suspend::forget as forget_suspended;
pub use snapshot::take::{check_clone, differences_here};
pub use start::confine::{cgroup_layer, layers};
pub use start::preparation::Preparation;
pub use start::prepare::{try_out, Tried};
pub use start::warm::WarmVm;
pub use streams::{Live, Machine};

/// The pool in which starts find warm VMs.
pub trait VmPool: Send + Sync {
    /// A warm VM that can become the VM of `spec`.
    fn take(&self, spec: &VmSpec) -> Option<WarmVm>;
    /// A start has begun, or ended: the pool makes no VM while a caller waits for a start.
    fn starting(&self, begins: bool);
}

/// The manager, as its VMs know it: the quota that they reserve from, and the registry that they are in.
pub trait Registry: Send + Sync {
    /// Reserves what a VM of `spec` needs.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`].
    fn reserve(&self, vm_id: &VmId, spec: &VmSpec) -> Result<Reservation>;
    /// Destroys a VM and forgets it.
    fn destroy(self: Arc<Self>, vm: Arc<MicroVm>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>>;
}

/// What runs, and the entry that it is counted by: there is no one without the other.
struct Counted {
    running: Arc<Running>,
    _reservation: Arc<Reservation>,
}

struct Cell {
    state: VmState,
    /// PAUSED, and its state is on disk.
    suspended: bool,
    /// From its making on; a suspended VM has none.
    reservation: Option<Arc<Reservation>>,
    counted: Option<Counted>,
    last_error: Option<Error>,
    /// When a VM that ran was found dead.
    died: Option<Instant>,
}

impl Cell {
    fn running(&self) -> Option<&Arc<Running>> {
        self.counted.as_ref().map(|counted| &counted.running)
    }

    fn is_running(&self, running: &Arc<Running>) -> bool {
        self.running().is_some_and(|current| Arc::ptr_eq(current, running))
    }
}

/// A VM.
pub struct MicroVm {
    id: VmId,
    spec: Arc<VmSpec>,
    settings: Arc<Settings>,
    pool: Option<Arc<dyn VmPool>>,
    registry: Option<Weak<dyn Registry>>,
    operation: tokio::sync::Mutex<()>,
    cell: Mutex<Cell>,
    destroying: watch::Sender<bool>,
    ports: Arc<ports::Ports>,
}

impl MicroVm {
    #[must_use]
    pub fn new(
        id: VmId,
        spec: VmSpec,
        settings: Arc<Settings>,
        pool: Option<Arc<dyn VmPool>>,
        registry: Option<Weak<dyn Registry>>,
    ) -> Arc<Self> {
        let cell = Cell {
            state: VmState::Created,
            suspended: false,
            reservation: None,
            counted: None,
            last_error: None,
            died: None,
        };
        Arc::new(Self {
            id,
            spec: Arc::new(spec),
            settings,
            pool,
            registry,
            operation: tokio::sync::Mutex::new(()),
            cell: Mutex::new(cell),
            destroying: watch::Sender::new(false),
            ports: Arc::default(),
        })
    }

    #[must_use]
    pub fn spec(&self) -> &Arc<VmSpec> {
        &self.spec
    }

    #[must_use]
    pub fn id(&self) -> &VmId {
        &self.id
    }

    #[must_use]
    pub fn state(&self) -> VmState {
        self.cell.lock().state
    }

    #[must_use]
    pub fn last_error(&self) -> Option<Error> {
        self.cell.lock().last_error.clone()
    }

    /// Host memory, MiB, that this VM's VMM has touched; never more than what it may.
    #[must_use]
    pub fn memory_taken_mib(&self) -> u64 {
        let pid = self.cell.lock().running().and_then(|running| running.pid());
        let taken = pid.and_then(crate::host::procfs::private_bytes).map_or(0, |bytes| bytes >> 20);
        taken.min(self.spec.limits.memory_mb + COST_MIB)
    }

    pub fn set_last_error(&self, error: Error) {
        self.cell.lock().last_error = Some(error);
    }

    /// How long ago a VM that ran was found dead; `None` when it is not in ERROR for that reason.
    #[must_use]
    pub fn dead_for(&self) -> Option<Duration> {
        let cell = self.cell.lock();
        cell.died.filter(|_| cell.state == VmState::Error).map(|died| died.elapsed())
    }

    #[must_use]
    pub fn facts(&self) -> Facts {
        let running = self.cell.lock().running().cloned();
        let socket = runtime::socket_path(self.settings.folders.runtime.path(), self.id());
        match running {
            Some(running) => Facts { socket, ..running.facts() },
            None => Facts { socket, backend: self.spec.backend, ..Facts::default() },
        }
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn now(&self) -> (VmState, Option<Arc<Running>>) {
        let cell = self.cell.lock();
        (cell.state, cell.running().cloned())
    }

    /// For how long it has run; `None` when it does not.
    #[must_use]
    pub fn running_for(&self) -> Option<Duration> {
        self.now().1.map(|running| running.since.elapsed())
    }

    /// For how long nobody has used it; `None` when it does not run.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        self.now().1.map(|running| running.agent().idle_for().min(running.since.elapsed()))
    }

    /// Publishes an event of this VM.
    pub fn publish(&self, kind: EventKind, detail: impl Into<String>) {
        self.settings.events.publish(self.id(), &self.spec, kind, detail);
    }

    /// Has it hold what was reserved for it.
    pub(crate) fn hold(&self, reservation: Reservation) {
        self.cell.lock().reservation = Some(Arc::new(reservation));
    }

    /// Whether it is counted in its manager's quota.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.cell.lock().reservation.is_some()
    }

    /// Reserves from its manager's quota. A VM whose manager is gone is not counted.
    fn reserve(&self) -> Result<Arc<Reservation>> {
        let registry = self.registry.as_ref().and_then(Weak::upgrade);
        let reserved =
            registry.map_or_else(|| Ok(Reservation::uncounted()), |registry| registry.reserve(&self.id, &self.spec));
        reserved.map(Arc::new)
    }

    /// The entry that it holds; a new one where that was given back.
    fn reserved(&self) -> Result<Arc<Reservation>> {
        if let Some(reservation) = self.cell.lock().reservation.clone() {
            return Ok(reservation);
        }
        let reservation = self.reserve()?;
        self.cell.lock().reservation = Some(reservation.clone());
        Ok(reservation)
    }

    /// # Errors
    /// [`Error::InvalidState`] when the table does not allow `next` from here.
    fn check_state(&self, operation: &'static str, next: VmState) -> Result<()> {
        let state = self.state();
        if state.can_become(next) {
            return Ok(());
        }
        let allowed = VmState::predecessors_of(next);
        Err(Error::InvalidState { vm_id: self.id().clone(), operation, state, allowed })
    }

    /// Changes the state if the table allows it.
    fn become_state(&self, operation: &'static str, next: VmState) -> Result<()> {
        let mut cell = self.cell.lock();
        if cell.state.can_become(next) {
            self.enter(&mut cell, next, operation);
            return Ok(());
        }
        let allowed = VmState::predecessors_of(next);
        Err(Error::InvalidState { vm_id: self.id().clone(), operation, state: cell.state, allowed })
    }

    fn fail(&self, error: &Error) {
        let mut cell = self.cell.lock();
        if cell.state.can_become(VmState::Error) {
            cell.last_error = Some(error.clone());
            self.enter(&mut cell, VmState::Error, error.to_string());
        }
    }

    /// Sets the state and publishes it under the lock, so that the events keep the order of the states.
    fn enter(&self, cell: &mut Cell, next: VmState, why: impl Into<String>) {
        let from = std::mem::replace(&mut cell.state, next);
        self.publish(EventKind::State { from, to: next }, why);
    }

    /// Ends a running VM that failed: its state is ERROR then, for `error`, and its resources are released.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when it does not run.
    pub async fn mark_failed(&self, error: Error) -> Result<()> {
        let _operation = self.operation.lock().await;
        if !matches!(self.state(), VmState::Running | VmState::Paused) {
            return self.become_state("mark as failed", VmState::Error);
        }
        self.fail(&error);
        self.tear_down(false).await;
        self.cell.lock().died = Some(Instant::now());
        Ok(())
    }

    /// Boots the VM and waits until its agent is ready; `Ok` at once when it runs already.
    ///
    /// # Errors
    /// [`Error::InvalidState`], [`Error::QuotaExceeded`] and nothing changed; any other leaves the VM in ERROR, where
    /// nothing of it runs.
    pub async fn start(self: &Arc<Self>) -> Result<()> {
        let operation = self.operation.lock().await;
        if self.state() == VmState::Running {
            return Ok(());
        }
        self.check_state("start", VmState::Starting)?;
        let reservation = self.reserved()?;
        self.become_state("start", VmState::Starting)?;
        let abandoned = Abandoned(self);
        // It died a moment ago, and what it held is not gone yet.
        let remains = self.cell.lock().counted.take();
        if let Some(Counted { running: remains, .. }) = remains {
            remains.reaped().await;
            remains.release().await;
        }
        let mut destroying = self.destroying.subscribe();
        let begun = Instant::now();
        let under_way = self.pool.as_ref().map(UnderWay::new);
        let warm = self.pool.as_ref().and_then(|pool| pool.take(&self.spec));
        let in_turn = async {
            // Resuming a warm VM is little work.
            let _turn = match warm {
                Some(_) => None,
                None => self.settings.starts.acquire().await.ok(),
            };
            boot::boot(&self.id, &self.spec, &self.settings, warm).await
        };
        let booted = tokio::select! {
            booted = in_turn => booted,
            _ = destroying.wait_for(|destroying| *destroying) => Err(self.cancelled("start")),
        };
        std::mem::forget(abandoned);
        drop(under_way);
        self.runs(booted.inspect_err(|error| self.fail(error))?, reservation, "start");
        drop(operation);
        log::info!("{}: started in {} ms", self.id(), begun.elapsed().as_millis());
        Ok(())
    }

    fn runs(self: &Arc<Self>, running: Running, reservation: Arc<Reservation>, why: &'static str) {
        let running = Arc::new(running);
        running.set_owner(Arc::new(attached::OwnerOf(Arc::downgrade(self))));
        {
            let mut cell = self.cell.lock();
            self.enter(&mut cell, VmState::Running, why);
            cell.suspended = false;
            cell.reservation = Some(reservation.clone());
            cell.counted = Some(Counted { running: running.clone(), _reservation: reservation });
            cell.died = None;
        }
        if let Some(interval) = self.settings.heartbeat.interval {
            tokio::spawn(health::monitor::watch(Arc::downgrade(self), Arc::downgrade(&running), interval));
        }
        tokio::spawn(health::monitor::watch_for_halt(Arc::downgrade(self), Arc::downgrade(&running)));
        tokio::spawn(watch_over(Arc::downgrade(self), Arc::downgrade(&running), running.exit_receiver()));
    }

    fn cancelled(&self, operation: &'static str) -> Error {
        Error::Cancelled { vm_id: self.id().clone(), operation }
    }

    /// Asks the guest to shut down, then the VMM, then kills it; `Ok` at once when nothing runs.
    ///
    /// # Errors
    /// [`Error::InvalidState`] from CREATED and DESTROYED.
    pub async fn stop(&self) -> Result<()> {
        self.stop_by(true).await
    }

    /// As [`MicroVm::stop`], without asking the guest.
    ///
    /// # Errors
    /// [`MicroVm::stop`]'s.
    pub async fn kill(&self) -> Result<()> {
        self.stop_by(false).await
    }

    async fn stop_by(&self, asks_guest: bool) -> Result<()> {
        let _operation = self.operation.lock().await;
        let state = self.state();
        if state == VmState::Stopped {
            return Ok(());
        }
        if state == VmState::Error {
            return self.become_state("stop", VmState::Stopped);
        }
        let was_suspended = self.is_suspended();
        self.become_state("stop", VmState::Stopping)?;
        self.tear_down(asks_guest && state == VmState::Running).await;
        if was_suspended {
            self.throw_away().await;
        }
        self.become_state("stop", VmState::Stopped)?;
        log::info!("{}: stopped", self.id());
        Ok(())
    }

    async fn tear_down(&self, ask_guest: bool) {
        let running = self.cell.lock().running().cloned();
        if let Some(running) = running {
            running.shut_down(ask_guest).await;
            running.release().await;
        }
        self.cell.lock().counted = None;
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// [`Error::InvalidState`], [`Error::Vmm`].
    pub async fn pause(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        let running = self.running_in("pause", VmState::Running)?;
        running.control().pause().await.map_err(|error| error.of(self.id()))?;
        self.become_state("pause", VmState::Paused)
    }

    /// Lets the vCPUs go on and sets the guest's clock; brings a suspended VM back.
    ///
    /// # Errors
    /// [`Error::InvalidState`], [`Error::Vmm`]; for a suspended VM those of a start, which leave it suspended, and
    /// [`Error::VmNotFound`] when its state is gone.
    pub async fn resume(self: &Arc<Self>) -> Result<()> {
        let _operation = self.operation.lock().await;
        if self.is_suspended() {
            return self.restore().await;
        }
        let running = self.running_in("resume", VmState::Paused)?;
        running.control().resume().await.map_err(|error| error.of(self.id()))?;
        self.become_state("resume", VmState::Running)?;
        let now = json!({"unix_time_ns": clock::unix_time_ns()});
        if let Err(error) = running.agent().request("set_clock", now, Duration::from_secs(5)).await {
            log::warn!("{}: resumed, but the guest's clock was not set: {error}", self.id());
        }
        Ok(())
    }

    fn running_in(&self, operation: &'static str, state: VmState) -> Result<Arc<Running>> {
        let cell = self.cell.lock();
        match cell.running() {
            Some(running) if cell.state == state => Ok(running.clone()),
            _ => {
                let (vm_id, allowed) = (self.id().clone(), state.to_string());
                Err(Error::InvalidState { vm_id, operation, state: cell.state, allowed })
            }
        }
    }

    /// Removes every trace, from any state; a start that is under way is cancelled. One that was abandoned half-way is
    /// done to its end by the next.
    pub async fn destroy(&self) {
        self.destroying.send_replace(true);
        let _operation = self.operation.lock().await;
        let is_first = {
            let mut cell = self.cell.lock();
            let is_first = cell.state != VmState::Destroyed;
            if is_first {
                self.enter(&mut cell, VmState::Destroyed, "destroy");
            }
            is_first
        };
        self.ports.end();
        self.tear_down(false).await;
        // What was reserved is free when nothing of it is left.
        self.cell.lock().reservation = None;
        if is_first {
            log::info!("{}: destroyed", self.id());
        }
    }

    /// Makes a VM void that was not brought back from disk, where it stays, and has it forgotten; nothing when it runs
    /// after all.
    pub(crate) async fn disown(&self, forget: impl FnOnce()) {
        let _operation = self.operation.lock().await;
        {
            let mut cell = self.cell.lock();
            if cell.counted.is_some() {
                return;
            }
            (cell.state, cell.suspended) = (VmState::Destroyed, false);
        }
        // Before anyone who waits for its turn finds the VM void.
        forget();
    }

    /// Asks the agent; the deadline is `timeout`, or the configured one, or what `params` itself allows a program.
    ///
    /// # Errors
    /// [`Error::InvalidState`] unless RUNNING, [`Error::VmDied`], and the channel's.
    pub async fn command(&self, action: &str, params: Value, timeout: Option<Duration>) -> Result<Answer> {
        let running = self.running_in("send a command to", VmState::Running)?;
        let deadline = timeout.unwrap_or_else(|| patience(&params, self.settings.command_timeout));
        let answered = running.agent().request(action, params, deadline).await.map_err(|error| error.of(self.id()));
        match answered {
            Err(error) => Err(explain(&running, error).await),
            answered => answered,
        }
    }

    /// The guest ended itself: the VM is stopped, as if it had been asked to, and can be started again.
    async fn on_shutdown(&self, running: &Arc<Running>) {
        const WHY: &str = "the guest shut itself down";
        // What is under way ends first: it may be what shut the guest down.
        let _operation = self.operation.lock().await;
        {
            let mut cell = self.cell.lock();
            if !cell.is_running(running) || !matches!(cell.state, VmState::Running | VmState::Paused) {
                return;
            }
            self.enter(&mut cell, VmState::Stopping, WHY);
        }
        // The VMM of a guest that has halted goes on.
        running.shut_down(false).await;
        running.release().await;
        {
            let mut cell = self.cell.lock();
            cell.counted = None;
            self.enter(&mut cell, VmState::Stopped, WHY);
        }
        log::info!("{}: {WHY}", self.id());
    }

    /// The VMM ended without being asked to.
    async fn on_exit(&self, running: &Arc<Running>, exit: &process::Exit) {
        if running.has_shut_down(exit).await {
            return self.on_shutdown(running).await;
        }
        let error = {
            let mut cell = self.cell.lock();
            if !cell.is_running(running) || !matches!(cell.state, VmState::Running | VmState::Paused) {
                return;
            }
            cell.died = Some(Instant::now());
            let error = running.died(exit);
            cell.last_error = Some(error.clone());
            self.enter(&mut cell, VmState::Error, error.to_string());
            error
        };
        log::error!("{error}");
        // Whoever starts it again must find its name free.
        let _operation = self.operation.lock().await;
        running.reaped().await;
        running.release().await;
        let mut cell = self.cell.lock();
        if cell.is_running(running) {
            cell.counted = None;
        }
    }
}

/// A start that a caller waits for.
struct UnderWay(Arc<dyn VmPool>);

impl UnderWay {
    fn new(pool: &Arc<dyn VmPool>) -> Self {
        pool.starting(true);
        Self(pool.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.starting(false);
    }
}

/// The channel closes because the VM died, a moment before that is known: says the cause.
async fn explain(running: &Running, error: Error) -> Error {
    if !matches!(error, Error::ChannelClosed { .. }) {
        return error;
    }
    let Ok(exit) = tokio::time::timeout(Duration::from_secs(1), running.exited()).await else { return error };
    if running.has_shut_down(&exit).await {
        return Error::channel_closed(&running.vm_id, SessionError::GuestShutDown, true);
    }
    running.died(&exit)
}

/// Ends a start whose future was dropped half-way: what it held is gone by then.
struct Abandoned<'a>(&'a Arc<MicroVm>);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        self.0.fail(&self.0.cancelled("start"));
    }
}

async fn watch_over(vm: Weak<MicroVm>, running: Weak<Running>, exit: watch::Receiver<Option<process::Exit>>) {
    let exit = process::wait_exit(exit).await;
    if let (Some(vm), Some(running)) = (vm.upgrade(), running.upgrade()) {
        vm.on_exit(&running, &exit).await;
    }
}
