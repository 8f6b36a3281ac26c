//! Samples the health of one VM.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::history::Health;
use crate::channel::Answer;
use crate::error::{Cause, Error};
use crate::host::cgroup;
use crate::host::{clock, procfs};
use crate::model::{evaluate, GuestUse, HealthSample, Liveness, VmState};
use crate::vm::running::Running;

/// What the guest answered; why it did not, where it did not.
#[derive(Default)]
struct ProbeResult {
    guest: Option<GuestUse>,
    clock_offset_s: Option<f64>,
    is_vmm_stopped: bool,
    vcpus_stopped: Option<String>,
}

/// Samples a VM; the agent may take `deadline` to answer, and when it does not, twice that is waited to find out why.
/// `allowed` is how many samples in a row may pass without a sign of life.
pub async fn sample(running: &Running, state: VmState, deadline: Duration, allowed: u32) -> Health {
    let mut health = Health::of_state(state);
    health.uptime_seconds = running.since.elapsed().as_secs_f64();
    let usage = running.pid().and_then(procfs::usage).filter(|_| running.is_alive());
    let groups = running.health_history.lock().groups.clone();
    let groups = groups.unwrap_or_else(|| {
        let groups = running.groups();
        running.health_history.lock().groups = Some(groups.clone());
        groups
    });
    health.group = cgroup::usage(&groups);
    if let Some(usage) = usage {
        health.memory_usage_mb = usage.rss_bytes >> 20;
        health.cpu_s = usage.cpu_s;
        let mut sample = running.cpu_sample.lock();
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
    let (liveness, probed) = match (usage, state) {
        // The vCPUs of a paused VM stand still on request: its silence says nothing.
        (Some(_), VmState::Running) => {
            let (asked, disk) = tokio::join!(probe(running, deadline), disk_io(running, deadline));
            let last = running.health_history.lock().last.as_ref().map(|last| (last.disk_io_bytes, last.failed_writes));
            // A VMM that does not answer has moved what it had.
            (health.disk_io_bytes, health.failed_writes) = disk.or(last).unwrap_or_default();
            asked
        }
        _ => (Liveness::NotProbed, ProbeResult::default()),
    };
    let failed_before = running.health_history.lock().last.as_ref().map_or(0, |last| last.failed_writes);
    health.failed_writes = failed_writes(health.failed_writes, probed.guest.as_ref(), failed_before);
    if let Liveness::Alive(round_trip_s) = liveness {
        health.round_trip_s = Some(round_trip_s);
    }
    let (before, missed) = {
        let history = running.health_history.lock();
        let before = history.last.as_ref().map_or(crate::model::HealthStatus::Unknown, |last| last.report.status);
        (before, history.missed())
    };
    health.clock_offset_s = probed.clock_offset_s;
    let sample = HealthSample {
        state,
        is_vmm_alive: usage.is_some(),
        is_vmm_stopped: probed.is_vmm_stopped,
        liveness,
        vcpus_stopped: probed.vcpus_stopped,
        network_lost: running.network_lost(),
        clock_offset_s: probed.clock_offset_s,
        guest: probed.guest,
        missed,
        allowed,
    };
    health.report = evaluate(&sample, before);
    health.guest = sample.guest;
    health
}

/// Not every VMM counts the writes that failed: then the guest's kernel, which saw each, is believed. A sample without
/// an answer forgets none, else the next one would report them again.
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

async fn probe(running: &Running, deadline: Duration) -> (Liveness, ProbeResult) {
    let agent = running.agent();
    let (begun, received_before, unix_time_ns) = (Instant::now(), agent.records_received(), clock::unix_time_ns());
    match agent.probe("health", Value::Null, deadline).await {
        Some(Ok(Answer::Ok { result })) => {
            let round_trip = begun.elapsed();
            // A guest may answer anything.
            let guest = serde_json::from_value::<GuestUse>(result).ok();
            let middle_ns = unix_time_ns + u64::try_from(round_trip.as_nanos() / 2).unwrap_or(0);
            let offset_s = |guest: &GuestUse| (i128::from(guest.unix_time_ns) - i128::from(middle_ns)) as f64 / 1e9;
            let clock_offset_s = guest.as_ref().map(offset_s);
            return (
                Liveness::Alive(round_trip.as_secs_f64()),
                ProbeResult { guest, clock_offset_s, ..ProbeResult::default() },
            );
        }
        Some(Ok(Answer::Error { .. })) => {
            return (Liveness::Alive(begun.elapsed().as_secs_f64()), ProbeResult::default())
        }
        Some(Err(Error::ChannelClosed { source, .. })) => return closed(&source),
        // No answer in time, or no place to ask for one.
        Some(Err(_)) | None => {}
    }
    if agent.records_received() != received_before {
        return (Liveness::Alive(begun.elapsed().as_secs_f64()), ProbeResult::default());
    }
    wait_for_life(running, deadline).await
}

fn closed(why: &Cause) -> (Liveness, ProbeResult) {
    (Liveness::Closed(why.to_string()), ProbeResult::default())
}

/// Waits once more, and measures meanwhile whether the VM gets to run at all.
async fn wait_for_life(running: &Running, deadline: Duration) -> (Liveness, ProbeResult) {
    let groups = running.health_history.lock().groups.clone().unwrap_or_default();
    // Waiting for a CPU and being held back at the quota alike.
    let starved_s = || {
        let scheduling = running.pid().and_then(procfs::scheduling).unwrap_or_default();
        let throttled_us = cgroup::usage(&groups).throttled_us.unwrap_or(0);
        (scheduling.waited_s + throttled_us as f64 / 1e6, scheduling.is_stopped)
    };
    let (begun, (before_s, _)) = (Instant::now(), starved_s());
    match running.agent().sign_of_life(deadline).await {
        Ok(()) => return (Liveness::Alive(begun.elapsed().as_secs_f64()), ProbeResult::default()),
        Err(Error::ChannelClosed { source, .. }) => return closed(&source),
        Err(_) => {}
    }
    let (after_s, is_vmm_stopped) = starved_s();
    let starved_share = ((after_s - before_s) / begun.elapsed().as_secs_f64()).clamp(0.0, 1.0);
    let mut probed = ProbeResult { is_vmm_stopped, ..ProbeResult::default() };
    if !is_vmm_stopped {
        if let Ok(Ok(why)) = tokio::time::timeout(deadline, running.control().why_stopped()).await {
            probed.vcpus_stopped = why;
        }
    }
    (Liveness::Silent { starved_share }, probed)
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
