//! How a VM is doing: one look at it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::running::Running;
use crate::channel::Answer;
use crate::error::Error;
use crate::host::cgroup::{self, GroupUse};
use crate::host::{clock, procfs};
use crate::model::{judge, GuestUse, Look, Sign, Verdict, VmState};

/// How many looks are kept.
const HISTORY: usize = 60;

/// One look at a VM. CPU time, memory and disk traffic are the VMM's, network traffic is the tap's.
#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    /// Since the last look, in per cent of one CPU.
    pub cpu_usage_percent: f64,
    /// CPU time of the VMM, seconds.
    pub cpu_s: f64,
    /// Resident memory of the VMM, MiB.
    pub memory_usage_mb: u64,
    pub disk_io_bytes: u64,
    /// Writes of the guest that the host could not do.
    pub failed_writes: u64,
    pub network_rx_bytes: u64,
    pub network_tx_bytes: u64,
    pub uptime_seconds: f64,
    /// Unix seconds.
    pub last_health_check: f64,
    pub verdict: Verdict,
    /// How long the agent's answer took; `None` when there was none.
    pub round_trip_s: Option<f64>,
    /// The guest's clock minus the host's.
    pub clock_offset_s: Option<f64>,
    pub guest: Option<GuestUse>,
    pub group: GroupUse,
}

impl Health {
    /// What can be said of a VM that does not run.
    #[must_use]
    pub fn of_state(state: VmState) -> Self {
        Self {
            cpu_usage_percent: 0.0,
            cpu_s: 0.0,
            memory_usage_mb: 0,
            disk_io_bytes: 0,
            failed_writes: 0,
            network_rx_bytes: 0,
            network_tx_bytes: 0,
            uptime_seconds: 0.0,
            last_health_check: clock::unix_time_ns() as f64 / 1e9,
            verdict: Verdict::of_state(state),
            round_trip_s: None,
            clock_offset_s: None,
            guest: None,
            group: GroupUse::default(),
        }
    }
}

/// One look, as it is kept.
#[derive(Debug, Clone)]
struct Brief {
    unix_time_s: f64,
    status: &'static str,
    reason: &'static str,
    cpu_percent: f64,
    memory_mib: u64,
    guest_memory_available_bytes: Option<u64>,
    round_trip_s: Option<f64>,
}

/// What the watch over a running VM has seen so far.
#[derive(Debug, Default)]
pub struct Watch {
    groups: Option<Vec<PathBuf>>,
    /// Heartbeats so far, and the records heard until the last one.
    pub beats: u32,
    pub heard: u64,
    pub last: Option<Health>,
    /// Since when the verdict is what it is, Unix seconds.
    pub since_unix_s: f64,
    history: VecDeque<Brief>,
}

impl Watch {
    /// Keeps a look; returns the one before.
    pub fn note(&mut self, health: Health) -> Option<Health> {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Brief {
            unix_time_s: health.last_health_check,
            status: health.verdict.status.as_str(),
            reason: health.verdict.reason.as_str(),
            cpu_percent: health.cpu_usage_percent,
            memory_mib: health.memory_usage_mb,
            guest_memory_available_bytes: health.guest.as_ref().map(|guest| guest.memory_available_bytes),
            round_trip_s: health.round_trip_s,
        });
        let same = self.last.as_ref().is_some_and(|last| {
            (last.verdict.status, last.verdict.reason) == (health.verdict.status, health.verdict.reason)
        });
        if !same {
            self.since_unix_s = health.last_health_check;
        }
        self.last.replace(health)
    }

    fn missed(&self) -> u32 {
        self.last.as_ref().map_or(0, |last| last.verdict.missed)
    }

    pub fn history_json(&self) -> Value {
        let one = |brief: &Brief| {
            json!({
                "time": brief.unix_time_s,
                "status": brief.status,
                "reason": brief.reason,
                "cpu_usage_percent": brief.cpu_percent,
                "memory_usage_mb": brief.memory_mib,
                "guest_memory_available_bytes": brief.guest_memory_available_bytes,
                "round_trip_seconds": brief.round_trip_s,
            })
        };
        self.history.iter().map(one).collect()
    }
}

impl Running {
    pub fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the guest answered, and by whom it was not.
#[derive(Default)]
struct Heard {
    guest: Option<GuestUse>,
    clock_offset_s: Option<f64>,
    is_vmm_stopped: bool,
    vcpus_stopped: Option<String>,
}

/// Looks at a VM; the agent may take `deadline` to answer, and when it does not, twice that is waited to find out why.
/// `allowed` is how many looks in a row may pass without a sign of life.
pub async fn look(running: &Running, state: VmState, deadline: Duration, allowed: u32) -> Health {
    let mut health = Health::of_state(state);
    health.uptime_seconds = running.since.elapsed().as_secs_f64();
    let usage = running.pid().and_then(procfs::usage).filter(|_| running.is_alive());
    let groups = running.watch().groups.clone();
    let groups = groups.unwrap_or_else(|| {
        let groups = running.groups();
        running.watch().groups = Some(groups.clone());
        groups
    });
    health.group = cgroup::usage(&groups);
    if let Some(usage) = usage {
        health.memory_usage_mb = usage.rss_bytes >> 20;
        health.cpu_s = usage.cpu_s;
        let mut sample = running.cpu_sample.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (before, used) = *sample;
        let elapsed = (now - before).as_secs_f64().max(0.001);
        health.cpu_usage_percent = (100.0 * (usage.cpu_s - used.cpu_s) / elapsed).max(0.0);
        *sample = (now, usage);
    }
    if let Some(counters) = running.network_counters() {
        // What the host sent is what the VM received.
        (health.network_rx_bytes, health.network_tx_bytes) = (counters.sent_bytes, counters.received_bytes);
    }
    let (sign, heard) = match (usage, state) {
        // The vCPUs of a paused VM stand still on request: its silence says nothing.
        (Some(_), VmState::Running) => {
            let (asked, disk) = tokio::join!(ask(running, deadline), disk_io(running, deadline));
            let last = running.watch().last.as_ref().map(|last| (last.disk_io_bytes, last.failed_writes));
            // A VMM that does not answer has moved what it had.
            (health.disk_io_bytes, health.failed_writes) = disk.or(last).unwrap_or_default();
            asked
        }
        _ => (Sign::NotAsked, Heard::default()),
    };
    let told_before = running.watch().last.as_ref().map_or(0, |last| last.failed_writes);
    health.failed_writes = failed_writes(health.failed_writes, heard.guest.as_ref(), told_before);
    if let Sign::Given(round_trip_s) = sign {
        health.round_trip_s = Some(round_trip_s);
    }
    let (before, missed) = {
        let watch = running.watch();
        let before = watch.last.as_ref().map_or(crate::model::HealthStatus::Unknown, |last| last.verdict.status);
        (before, watch.missed())
    };
    health.clock_offset_s = heard.clock_offset_s;
    let look = Look {
        state,
        is_vmm_alive: usage.is_some(),
        is_vmm_stopped: heard.is_vmm_stopped,
        sign,
        vcpus_stopped: heard.vcpus_stopped,
        clock_offset_s: heard.clock_offset_s,
        guest: heard.guest,
        missed,
        allowed,
    };
    health.verdict = judge(&look, before);
    health.guest = look.guest;
    health
}

/// Not every VMM counts the writes that failed: then the guest's kernel, which was told of each, is believed. A look without
/// an answer forgets none, else the next one would tell of them again.
fn failed_writes(by_vmm: u64, guest: Option<&GuestUse>, before: u64) -> u64 {
    by_vmm.max(guest.map_or(0, |guest| guest.disk_write_errors)).max(before)
}

/// Bytes that the drives moved, and writes that failed.
async fn disk_io(running: &Running, deadline: Duration) -> Option<(u64, u64)> {
    match tokio::time::timeout(deadline, running.control().disk_io()).await {
        Ok(Ok(disk)) => Some((disk.read_bytes + disk.written_bytes, disk.failed_writes)),
        Ok(Err(error)) => {
            log::debug!("{error}");
            None
        }
        Err(_) => None,
    }
}

async fn ask(running: &Running, deadline: Duration) -> (Sign, Heard) {
    let agent = running.agent();
    let (begun, heard_before, unix_time_ns) = (Instant::now(), agent.heard(), clock::unix_time_ns());
    match agent.probe("health", Value::Null, deadline).await {
        Some(Ok(Answer::Ok { result })) => {
            let round_trip = begun.elapsed();
            // A guest may answer anything.
            let guest = serde_json::from_value::<GuestUse>(result).ok();
            let middle_ns = unix_time_ns + u64::try_from(round_trip.as_nanos() / 2).unwrap_or(0);
            let offset_s = |guest: &GuestUse| (i128::from(guest.unix_time_ns) - i128::from(middle_ns)) as f64 / 1e9;
            let clock_offset_s = guest.as_ref().map(offset_s);
            return (Sign::Given(round_trip.as_secs_f64()), Heard { guest, clock_offset_s, ..Heard::default() });
        }
        Some(Ok(Answer::Error { .. })) => return (Sign::Given(begun.elapsed().as_secs_f64()), Heard::default()),
        Some(Err(Error::ChannelClosed { reason, .. })) => return (Sign::Closed(reason), Heard::default()),
        // No answer in time, or no place to ask for one.
        Some(Err(_)) | None => {}
    }
    if agent.heard() != heard_before {
        return (Sign::Given(begun.elapsed().as_secs_f64()), Heard::default());
    }
    listen(running, deadline).await
}

/// Waits once more, and looks meanwhile whether the VM gets to run at all.
async fn listen(running: &Running, deadline: Duration) -> (Sign, Heard) {
    let groups = running.watch().groups.clone().unwrap_or_default();
    // Waiting for a CPU and being held back at the quota alike.
    let starved_s = || {
        let scheduling = running.pid().and_then(procfs::scheduling).unwrap_or_default();
        let throttled_us = cgroup::usage(&groups).throttled_us.unwrap_or(0);
        (scheduling.waited_s + throttled_us as f64 / 1e6, scheduling.is_stopped)
    };
    let (begun, (before_s, _)) = (Instant::now(), starved_s());
    match running.agent().sign_of_life(deadline).await {
        Ok(()) => return (Sign::Given(begun.elapsed().as_secs_f64()), Heard::default()),
        Err(Error::ChannelClosed { reason, .. }) => return (Sign::Closed(reason), Heard::default()),
        Err(_) => {}
    }
    let (after_s, is_vmm_stopped) = starved_s();
    let starved_share = ((after_s - before_s) / begun.elapsed().as_secs_f64()).clamp(0.0, 1.0);
    let mut heard = Heard { is_vmm_stopped, ..Heard::default() };
    if !is_vmm_stopped {
        if let Ok(Ok(why)) = tokio::time::timeout(deadline, running.control().why_stopped()).await {
            heard.vcpus_stopped = why;
        }
    }
    (Sign::None { starved_share }, heard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_failed_writes_are_the_guests_where_the_vmm_counts_none_and_are_never_forgotten() {
        let told = |text: &str| serde_json::from_str::<GuestUse>(text).unwrap();
        let (guest, older) = (told(r#"{"disk_write_errors": 3}"#), told(r#"{"oom_kills": 1}"#));
        assert_eq!(failed_writes(0, Some(&guest), 0), 3);
        assert_eq!(failed_writes(5, Some(&guest), 0), 5);
        assert_eq!((failed_writes(2, Some(&older), 0), failed_writes(0, Some(&older), 0)), (2, 0));
        assert_eq!((failed_writes(0, None, 3), failed_writes(0, Some(&guest), 3)), (3, 3));
    }
}
