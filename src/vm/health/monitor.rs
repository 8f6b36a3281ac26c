//! The monitor of a running VM: its heartbeat, the events of its health, and what is repaired.

use std::sync::{Arc, Weak};
use std::time::Duration;

use serde_json::{json, Value};

use super::history::Health;
use super::sample::sample;
use crate::host::{clock, process};
use crate::model::{EventKind, HealthStatus, Reason, VmState};
use crate::vm::running::Running;
use crate::vm::MicroVm;

/// How long an agent may take to answer; an emulated guest on a busy host is slow, not ill.
const PATIENCE: Duration = Duration::from_secs(2);
/// Every so many heartbeats the guest is asked for its figures; in between a sign of life will do, which costs an
/// emulated guest a third (docs/reliability.md). Not at the first one: a guest that has just shaken hands is healthy, and an
/// emulated one needs as long for its first figures as for its start.
const FULL_SAMPLE_EVERY: u32 = 3;
const FIRST_FULL_SAMPLE: u32 = 2;
/// For short intervals.
const LEAST_PATIENCE: Duration = Duration::from_millis(500);
/// How long a VMM whose guest seems to have failed is given to end by itself.
const EXIT_GRACE: Duration = Duration::from_secs(1);
/// How long after the kernel's last line its vCPUs may go on.
const HALT_DELAY: Duration = Duration::from_millis(200);
/// How long a guest whose console says that it has halted may take to give a sign of life all the same: the line can be
/// written by its root, too.
const HALT_PATIENCE: Duration = Duration::from_millis(500);
/// How long a repair may take.
const REPAIR_DEADLINE: Duration = Duration::from_secs(2);

const FAILED_WRITES: fn(&Health) -> Option<u64> = |health| Some(health.failed_writes);

/// By how much a count has grown since the sample before. A guest can count as it likes, but only up.
fn grew(before: Option<&Health>, now: &Health, count: fn(&Health) -> Option<u64>) -> Option<u64> {
    let before = before.and_then(count).unwrap_or(0);
    count(now).and_then(|now| now.checked_sub(before)).filter(|more| *more > 0)
}

/// Samples the VM once an interval, until it ends.
pub async fn watch(vm: Weak<MicroVm>, running: Weak<Running>, interval: Duration) {
    let Some(mut exit) = running.upgrade().map(|running| running.exit_receiver()) else { return };
    // VMs that were started together are not sampled together.
    let phase = clock::random::<2>().map_or(0.5, |random| f64::from(u16::from_ne_bytes(random)) / 65_536.0);
    let mut pause = interval.mul_f64(phase);
    loop {
        tokio::select! {
            _ = process::wait_exit(exit.clone()) => return,
            () = tokio::time::sleep(pause) => {}
        }
        let (Some(vm), Some(running)) = (vm.upgrade(), running.upgrade()) else { return };
        if exit.borrow_and_update().is_some() {
            return;
        }
        vm.beat(&running, interval).await;
        pause = interval;
    }
}

/// Stops the VM when its guest halts, which is no end of its VMM; returns when the VM ends.
pub async fn watch_for_halt(vm: Weak<MicroVm>, running: Weak<Running>) {
    let Some(mut console) = running.upgrade().map(|running| running.console().clone()) else { return };
    while console.has_grown().await {
        if !running.upgrade().is_some_and(|running| running.is_halted()) {
            continue;
        }
        tokio::time::sleep(HALT_DELAY).await;
        let (Some(vm), Some(running)) = (vm.upgrade(), running.upgrade()) else { return };
        let is_silent = running.agent().sign_of_life(HALT_PATIENCE).await.is_err();
        // The vCPUs of a paused VM stand still on request: its silence says nothing.
        if is_silent && vm.state() == VmState::Running {
            return vm.on_shutdown(&running).await;
        }
    }
}

impl MicroVm {
    /// A fresh sample of the VM: its process, its drives and its agent.
    pub async fn health(&self) -> Health {
        let (state, running) = self.now();
        match running {
            // A caller asks about now: no miss is allowed.
            Some(running) => sample(&running, state, PATIENCE, 0).await,
            None => Health::of_state(state),
        }
    }

    /// The last sample of the monitor, if there is one yet.
    #[must_use]
    pub fn last_health(&self) -> Option<Health> {
        self.now().1.and_then(|running| running.health_history.lock().last.clone())
    }

    /// The history: since when status and reason are the same, and the last samples.
    #[must_use]
    pub fn history_json(&self) -> (Option<f64>, Value) {
        match self.now().1 {
            None => (None, json!([])),
            Some(running) => {
                let history = running.health_history.lock();
                (history.last.as_ref().map(|_| history.since_unix_s), history.history_json())
            }
        }
    }

    async fn beat(&self, running: &Arc<Running>, interval: Duration) {
        let patience = interval.clamp(LEAST_PATIENCE, PATIENCE);
        let misses = self.settings().heartbeat.misses;
        if self.is_alive_as_before(running, patience).await {
            return;
        }
        for is_second_sample in [false, true] {
            let (state, current) = self.now();
            let is_current =
                |current: &Option<Arc<Running>>| current.as_ref().is_some_and(|current| Arc::ptr_eq(current, running));
            if !is_current(&current) || !matches!(state, VmState::Running | VmState::Paused) {
                return;
            }
            let health = sample(running, state, patience, misses).await;
            // A VMM that ends closes the channel a moment before its exit is known: `on_exit` says what that was.
            if health.report.reason.is_failure() && tokio::time::timeout(EXIT_GRACE, running.exited()).await.is_ok() {
                return;
            }
            // A guest that has halted is no VM that hangs: it is stopped, and no policy treats it.
            if health.report.reason.is_failure() && running.is_halted() {
                return self.on_shutdown(running).await;
            }
            // Paused, stopped or dead meanwhile: the sample mixes two states.
            let (after, current) = self.now();
            if after != state || !is_current(&current) {
                return;
            }
            let report = health.report.clone();
            let before = running.health_history.lock().note(health.clone());
            self.publish_health(before.as_ref(), &health);
            if is_second_sample || !self.repair(running, report.reason).await {
                return;
            }
        }
    }

    /// A sign of life, where no full sample is due and the last one was well. An agent that talks anyway is not probed.
    async fn is_alive_as_before(&self, running: &Running, patience: Duration) -> bool {
        let received = running.agent().records_received();
        let (is_due, has_talked) = {
            let mut history = running.health_history.lock();
            history.beats = history.beats.wrapping_add(1);
            let is_due = history.beats % FULL_SAMPLE_EVERY == FIRST_FULL_SAMPLE;
            let was_well = history.last.as_ref().is_none_or(|last| last.round_trip_s.is_some());
            (is_due || !was_well, std::mem::replace(&mut history.records_received, received) != received)
        };
        if is_due || self.state() != VmState::Running {
            return false;
        }
        has_talked || {
            let is_alive = running.agent().sign_of_life(patience).await.is_ok();
            running.health_history.lock().records_received = running.agent().records_received();
            is_alive
        }
    }

    fn publish_health(&self, before: Option<&Health>, now: &Health) {
        let (from, was) = before
            .map_or((HealthStatus::Unknown, Reason::NotRunning), |health| (health.report.status, health.report.reason));
        let (to, reason) = (now.report.status, now.report.reason);
        if from != to || (to == HealthStatus::Unhealthy && was != reason) {
            let detail = now.report.detail.clone();
            match to {
                HealthStatus::Healthy if from == HealthStatus::Unknown => {}
                HealthStatus::Healthy => log::info!("{}: healthy again", self.id()),
                _ => log::warn!("{}: {} ({}): {detail}", self.id(), to.as_str(), reason.as_str()),
            }
            self.publish(EventKind::Health { from, to, reason }, detail);
        }
        let grew = |count| grew(before, now, count);
        if let Some(kills) = grew(|health| Some(health.guest.as_ref()?.oom_kills)) {
            self.publish(
                EventKind::Oom { place: "guest", kills },
                "the guest's kernel killed programs for want of memory",
            );
        }
        if let Some(kills) = grew(|health| health.group.oom_kills) {
            self.publish(
                EventKind::Oom { place: "host", kills },
                "the host's kernel killed a process of the VM's group",
            );
        }
        if let Some(refused) = grew(|health| Some(health.guest.as_ref()?.process_limit_hits)) {
            let detail = format!("max_processes: programs of the guest were refused a process {refused} times");
            self.publish(EventKind::Limit { what: "processes" }, detail);
        }
        if let Some(failed) = grew(FAILED_WRITES) {
            let detail = format!(
                "the host could not do {failed} writes to its disk, as when there is no room; the guest was told"
            );
            self.publish(EventKind::Limit { what: "host_disk" }, detail);
        }
    }

    /// Repairs what it can; returns whether another sample is worth taking.
    async fn repair(&self, running: &Running, reason: Reason) -> bool {
        match reason {
            Reason::ClockOff => {
                let now = json!({"unix_time_ns": clock::unix_time_ns()});
                let set = running.agent().probe("set_clock", now, REPAIR_DEADLINE).await;
                log::info!("{}: its clock was set to the host's", self.id());
                matches!(set, Some(Ok(_)))
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_failed_writes_are_reported_once_and_only_new_ones() {
        let after = |failed_writes| Health { failed_writes, ..Health::of_state(VmState::Running) };
        assert_eq!(grew(None, &after(3), FAILED_WRITES), Some(3));
        assert_eq!(grew(Some(&after(3)), &after(3), FAILED_WRITES), None);
        assert_eq!(grew(Some(&after(3)), &after(4), FAILED_WRITES), Some(1));
        assert_eq!(grew(Some(&after(3)), &after(0), FAILED_WRITES), None);
    }
}
