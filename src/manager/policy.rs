//! What a manager does with VMs by itself: the policies of their isolation types.
//!
//! Architecture invariant: driven by events and by the time of the next deadline, never by polling VMs. A remediation
//! is a task of its own, so a slow VM does not keep the others waiting; the manager's stop ends it. Each lineage, a VM and
//! those that took its place one after the other, has one count of failures.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{CreateRequest, Manager};
use crate::error::Error;
use crate::model::{Event, EventKind, OnFailure, Policy, VmId, VmState};
use crate::mutex::Mutex;
use crate::vm::{MicroVm, Subscriber};

/// Restarts or replacements of one lineage within [`WINDOW`], after which it is left alone.
const MOST_RESTARTS: usize = 5;
const WINDOW: Duration = Duration::from_secs(600);
/// Before the second restart or replacement; doubled each time.
const BACK_OFF: Duration = Duration::from_millis(500);
/// When no deadline is known, one may still come into being without an event: a VM of use becomes idle.
const FAR: Duration = Duration::from_secs(3600);

/// Which VMs are under remediation, and when each was remedied before.
#[derive(Debug, Default)]
pub struct Remediations(Mutex<HashMap<VmId, Remediation>>);

#[derive(Debug, Default)]
struct Remediation {
    begun: Vec<Instant>,
    is_under_way: bool,
}

impl Remediations {
    pub fn is_under_way(&self, vm_id: &VmId) -> bool {
        self.0.lock().get(vm_id).is_some_and(|remediation| remediation.is_under_way)
    }

    /// Begins a remediation; returns how many there were within the window, `None` when one is under way.
    fn begin(&self, vm_id: &VmId) -> Option<usize> {
        let mut map = self.0.lock();
        let remediation = map.entry(vm_id.clone()).or_default();
        if remediation.is_under_way {
            return None;
        }
        remediation.is_under_way = true;
        remediation.begun.retain(|begun| begun.elapsed() < WINDOW);
        let before = remediation.begun.len();
        remediation.begun.push(Instant::now());
        Some(before)
    }

    fn end(&self, vm_id: &VmId) {
        if let Some(remediation) = self.0.lock().get_mut(vm_id) {
            remediation.is_under_way = false;
        }
    }

    fn forget(&self, vm_id: &VmId) {
        self.0.lock().remove(vm_id);
    }

    pub fn forget_all(&self) {
        self.0.lock().clear();
    }

    /// Continues the count of failures under the id of the replacement.
    fn hand_over(&self, remediation: Remediation, vm_id: &VmId) {
        self.0.lock().insert(vm_id.clone(), remediation);
    }

    fn take(&self, vm_id: &VmId) -> Remediation {
        self.0.lock().remove(vm_id).unwrap_or_default()
    }
}

/// Enforces the policies, until the manager is gone or stopped.
pub async fn enforce(manager: Weak<Manager>, subscriber: Arc<Subscriber>) {
    loop {
        let next = {
            let Some(manager) = manager.upgrade() else { return };
            destroy_what_is_due(&manager)
        };
        tokio::select! {
            event = subscriber.next() => {
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
    for vm in manager.all() {
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
            if manager.remediations().begin(vm.id()).is_none() {
                break;
            }
            let said = match action {
                "deadline" => format!("it has run for {} s, as its type may", limit.as_secs_f64()),
                _ => format!("it was not used for {} s", limit.as_secs_f64()),
            };
            log::info!("{}: destroyed: {said}", vm.id());
            vm.publish(EventKind::Policy { action, replacement: None }, said);
            let destroying = manager.clone();
            manager.spawn(async move {
                destroying.remove(&vm).await;
                destroying.remediations().forget(vm.id());
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
    let has_failed = match &event.kind {
        EventKind::State { from: VmState::Running | VmState::Paused, to: VmState::Error } => true,
        EventKind::Health { reason, .. } => reason.is_failure(),
        EventKind::Removed => {
            manager.remediations().forget(&event.vm_id);
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
    let Some(before) = manager.remediations().begin(vm.id()) else { return };
    let (recovering, why) = (manager.clone(), event.detail.clone());
    manager.spawn(recover_until_running(recovering, vm, policy.on_failure, before, why));
}

/// Recovers a VM, and again the VM in its place if that one failed before the remediation was over: the event of that
/// failure found it under remediation and was ignored.
async fn recover_until_running(
    manager: Arc<Manager>,
    mut vm: Arc<MicroVm>,
    on_failure: OnFailure,
    mut before: usize,
    mut why: String,
) {
    loop {
        let (recovered, runs) = recover(&manager, &vm, on_failure, before, &why).await;
        vm = recovered;
        manager.remediations().end(vm.id());
        if !runs || vm.dead_for().is_none() {
            return;
        }
        let Some(so_often) = manager.remediations().begin(vm.id()) else { return };
        before = so_often;
        why = vm.last_error().map_or_else(String::new, |error| error.to_string());
    }
}

fn leave_failed(vm: &MicroVm, said: String) {
    log::error!("{}: {said}", vm.id());
    vm.publish(EventKind::Policy { action: "give_up", replacement: None }, said);
}

/// Recovers a VM by its policy; returns the VM in its place and whether that runs.
async fn recover(
    manager: &Arc<Manager>,
    vm: &Arc<MicroVm>,
    on_failure: OnFailure,
    before: usize,
    why: &str,
) -> (Arc<MicroVm>, bool) {
    let left_alone = (vm.clone(), false);
    if before >= MOST_RESTARTS {
        leave_failed(vm, format!("it failed {} times within {} s: it is left alone", before + 1, WINDOW.as_secs()));
        return left_alone;
    }
    if before > 0 {
        tokio::time::sleep(back_off(before)).await;
    }
    if matches!(vm.state(), VmState::Running | VmState::Paused) {
        let error = Error::VmDied { vm_id: vm.id().clone(), how: format!("ended: {why}"), tails: Box::default() };
        if let Err(error) = vm.mark_failed(error).await {
            // Another operation was faster.
            log::debug!("{error}");
            return left_alone;
        }
    }
    // Its owner may have stopped, destroyed or restarted it meanwhile.
    if vm.state() != VmState::Error {
        return left_alone;
    }
    match on_failure {
        OnFailure::Leave => left_alone,
        OnFailure::Restart => {
            log::warn!("{}: started again, as its policy says", vm.id());
            vm.publish(EventKind::Policy { action: "restart", replacement: None }, format!("started again: {why}"));
            let runs = start_at_last(vm, before).await;
            (vm.clone(), runs)
        }
        OnFailure::Replace => match replace(manager, vm, why).await {
            Some(other) => {
                let runs = start_at_last(&other, before).await;
                (other, runs)
            }
            None => left_alone,
        },
    }
}

/// Starts a VM, as often as the failures `before` leave it.
async fn start_at_last(vm: &Arc<MicroVm>, before: usize) -> bool {
    for attempt in before.. {
        let Err(error) = vm.start().await else { return true };
        let said = format!("it could not be started: {error}");
        // Destroyed or started by its owner.
        if vm.state() != VmState::Error && !matches!(error, Error::QuotaExceeded { .. }) {
            log::error!("{}: {said}", vm.id());
            return false;
        }
        if attempt >= MOST_RESTARTS {
            leave_failed(vm, said);
            return false;
        }
        log::error!("{}: {said}", vm.id());
        tokio::time::sleep(back_off(attempt)).await;
    }
    false
}

fn back_off(attempts: usize) -> Duration {
    BACK_OFF * 2u32.pow(u32::try_from(attempts.min(MOST_RESTARTS)).unwrap_or(0))
}

/// Puts another VM, which is yet to be started, in the place of one that failed.
async fn replace(manager: &Arc<Manager>, vm: &Arc<MicroVm>, why: &str) -> Option<Arc<MicroVm>> {
    // Before it is removed, which forgets what is known under its name.
    let remediation = manager.remediations().take(vm.id());
    // Before the other is made: what it has reserved is what the other one needs.
    manager.remove(vm).await;
    let other = match manager.create(CreateRequest::like(vm.spec())) {
        Ok(other) => other,
        Err(error) => {
            leave_failed(vm, format!("it could not be replaced: {error}"));
            return None;
        }
    };
    manager.remediations().hand_over(remediation, other.id());
    log::warn!("{}: replaced by {}, as its policy says", vm.id(), other.id());
    let said = format!("replaced by {}: {why}", other.id());
    vm.publish(EventKind::Policy { action: "replace", replacement: Some(other.id().clone()) }, said);
    Some(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_remediations_are_one_at_a_time_and_counted_until_forgotten() {
        let (remediations, vm_id) = (Remediations::default(), VmId::parse("vm").unwrap());
        assert_eq!((remediations.begin(&vm_id), remediations.begin(&vm_id)), (Some(0), None));
        assert!(remediations.is_under_way(&vm_id));
        remediations.end(&vm_id);
        assert!(!remediations.is_under_way(&vm_id));
        assert_eq!(remediations.begin(&vm_id), Some(1));
        remediations.forget(&vm_id);
        assert_eq!(remediations.begin(&vm_id), Some(0));
    }

    #[test]
    fn test_remediations_of_a_replaced_vm_pass_to_its_replacement() {
        let (remediations, first, second) =
            (Remediations::default(), VmId::parse("first").unwrap(), VmId::parse("second").unwrap());
        for before in 0..3 {
            assert_eq!(remediations.begin(&first), Some(before));
            remediations.end(&first);
        }
        assert_eq!(remediations.begin(&first), Some(3));
        let remediation = remediations.take(&first);
        remediations.forget(&first);
        remediations.hand_over(remediation, &second);
        assert!(remediations.is_under_way(&second));
        remediations.end(&second);
        assert_eq!((remediations.begin(&second), remediations.begin(&first)), (Some(4), Some(0)));
    }

    #[test]
    fn test_back_off_doubles_and_ends() {
        assert_eq!([1, 2, 3].map(back_off), [1, 2, 4].map(Duration::from_secs));
        assert_eq!(back_off(usize::MAX), back_off(MOST_RESTARTS));
    }
}
