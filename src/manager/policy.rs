//! What a manager does with VMs by itself: the policies of their isolation types.
//!
//! Architecture invariant: driven by events and by the time of the next deadline; it looks at no VM in between. A treatment
//! is a task of its own, so a slow VM does not keep the others waiting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::{CreateRequest, Manager};
use crate::error::Error;
use crate::model::{Event, Happening, OnFailure, Policy, VmId, VmState};
use crate::vm::{Hearer, MicroVm};

/// Restarts of one VM within [`WINDOW`], after which it is left alone.
const MOST_RESTARTS: usize = 5;
const WINDOW: Duration = Duration::from_secs(600);
/// Before the second restart; doubled each time.
const BACK_OFF: Duration = Duration::from_millis(500);
/// When no deadline is known, one may still come into being without an event: a VM of use becomes idle.
const FAR: Duration = Duration::from_secs(3600);

/// Which VMs are under treatment, and when each was treated before.
#[derive(Debug, Default)]
pub struct Treatments(Mutex<HashMap<VmId, Treatment>>);

#[derive(Debug, Default)]
struct Treatment {
    begun: Vec<Instant>,
    is_under_way: bool,
}

impl Treatments {
    fn map(&self) -> MutexGuard<'_, HashMap<VmId, Treatment>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_under_way(&self, vm_id: &VmId) -> bool {
        self.map().get(vm_id).is_some_and(|treatment| treatment.is_under_way)
    }

    /// Begins one: how many there were before within the window; `None` when one is under way.
    fn begin(&self, vm_id: &VmId) -> Option<usize> {
        let mut map = self.map();
        let treatment = map.entry(vm_id.clone()).or_default();
        if treatment.is_under_way {
            return None;
        }
        treatment.is_under_way = true;
        treatment.begun.retain(|begun| begun.elapsed() < WINDOW);
        let before = treatment.begun.len();
        treatment.begun.push(Instant::now());
        Some(before)
    }

    fn end(&self, vm_id: &VmId) {
        if let Some(treatment) = self.map().get_mut(vm_id) {
            treatment.is_under_way = false;
        }
    }

    fn forget(&self, vm_id: &VmId) {
        self.map().remove(vm_id);
    }
}

/// Enforces the policies, until the manager is gone or stopped.
pub async fn enforce(manager: Weak<Manager>, hearer: Arc<Hearer>) {
    loop {
        let next = {
            let Some(manager) = manager.upgrade() else { return };
            destroy_what_is_due(&manager)
        };
        tokio::select! {
            event = hearer.next() => {
                let (Some(event), Some(manager)) = (event, manager.upgrade()) else { return };
                on_event(&manager, &event);
            }
            () = tokio::time::sleep(next) => {}
        }
    }
}

/// Destroys the VMs whose time is over; how long until the next one's may be.
fn destroy_what_is_due(manager: &Arc<Manager>) -> Duration {
    let mut next = FAR;
    for vm in manager.list(None, None) {
        let policy = policy_of(manager, &vm);
        let left = |limit_s: Option<f64>, spent: Option<Duration>| {
            let (limit, spent) = (Duration::from_secs_f64(limit_s?), spent?);
            Some((limit.checked_sub(spent).unwrap_or_default(), limit))
        };
        let deadline = left(policy.deadline_s, vm.running_for()).map(|(left, limit)| ("deadline", left, limit));
        let idle = left(policy.idle_limit_s, vm.idle_for()).map(|(left, limit)| ("idle_limit", left, limit));
        for (action, left, limit) in [deadline, idle].into_iter().flatten() {
            if !left.is_zero() {
                next = next.min(left);
                continue;
            }
            if manager.treatments().begin(vm.id()).is_none() {
                break;
            }
            let said = match action {
                "deadline" => format!("it has run for {} s, as its type may", limit.as_secs_f64()),
                _ => format!("nobody has used it for {} s", limit.as_secs_f64()),
            };
            log::info!("{}: destroyed: {said}", vm.id());
            vm.tell(Happening::Policy { action, replacement: None }, said);
            let manager = manager.clone();
            tokio::spawn(async move {
                manager.remove(&vm).await;
                manager.treatments().forget(vm.id());
            });
            break;
        }
    }
    // Timers are of whole milliseconds.
    next + Duration::from_millis(1)
}

fn policy_of(manager: &Manager, vm: &MicroVm) -> Policy {
    manager.config().policies.get(&vm.spec().isolation_type).copied().unwrap_or_default()
}

fn on_event(manager: &Arc<Manager>, event: &Event) {
    let has_failed = match &event.happening {
        Happening::State { from: VmState::Running | VmState::Paused, to: VmState::Error } => true,
        Happening::Health { reason, .. } => reason.is_failure(),
        Happening::Removed => {
            manager.treatments().forget(&event.vm_id);
            false
        }
        _ => false,
    };
    if !has_failed {
        return;
    }
    let Some(vm) = manager.get(event.vm_id.as_str()) else { return };
    let policy = policy_of(manager, &vm);
    if policy.on_failure == OnFailure::Leave {
        return;
    }
    let Some(before) = manager.treatments().begin(vm.id()) else { return };
    let (manager, why) = (manager.clone(), event.detail.clone());
    tokio::spawn(async move {
        treat(&manager, &vm, policy.on_failure, before, &why).await;
        manager.treatments().end(vm.id());
    });
}

async fn treat(manager: &Arc<Manager>, vm: &Arc<MicroVm>, on_failure: OnFailure, before: usize, why: &str) {
    if before >= MOST_RESTARTS {
        let said = format!("it failed {before} times within {} s: it is left alone", WINDOW.as_secs());
        log::error!("{}: {said}", vm.id());
        return vm.tell(Happening::Policy { action: "give_up", replacement: None }, said);
    }
    if before > 0 {
        tokio::time::sleep(back_off(before)).await;
    }
    if matches!(vm.state(), VmState::Running | VmState::Paused) {
        let error = Error::VmDied { vm_id: vm.id().clone(), how: format!("ended: {why}"), tails: Box::default() };
        if let Err(error) = vm.give_up(error).await {
            // Somebody else was faster.
            return log::debug!("{error}");
        }
    }
    // Its owner may have stopped, destroyed or restarted it meanwhile.
    if vm.state() != VmState::Error {
        return;
    }
    match on_failure {
        OnFailure::Leave => {}
        OnFailure::Restart => {
            log::warn!("{}: started again, as its policy says", vm.id());
            vm.tell(Happening::Policy { action: "restart", replacement: None }, why);
            for attempt in before.. {
                let Err(error) = vm.start().await else { return };
                log::error!("{}: could not be started again: {error}", vm.id());
                // Destroyed or started by its owner, or tried often enough.
                if attempt >= MOST_RESTARTS || vm.state() != VmState::Error {
                    return;
                }
                tokio::time::sleep(back_off(attempt)).await;
            }
        }
        OnFailure::Replace => replace(manager, vm, why).await,
    }
}

fn back_off(attempts: usize) -> Duration {
    BACK_OFF * 2u32.pow(u32::try_from(attempts.min(MOST_RESTARTS)).unwrap_or(0))
}

async fn replace(manager: &Arc<Manager>, vm: &Arc<MicroVm>, why: &str) {
    // First: what it has reserved is what the other one needs.
    manager.remove(vm).await;
    let other = match manager.create(CreateRequest::like(vm.spec())) {
        Ok(other) => other,
        Err(error) => return log::error!("{}: could not be replaced: {error}", vm.id()),
    };
    log::warn!("{}: replaced by {}, as its policy says", vm.id(), other.id());
    vm.tell(Happening::Policy { action: "replace", replacement: Some(other.id().clone()) }, why);
    if let Err(error) = other.start().await {
        log::error!("{}: could not be started: {error}", other.id());
    }
}
