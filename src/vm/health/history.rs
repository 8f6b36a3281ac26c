//! The health of a VM as data: a sample, and the samples of a running VM so far.

use std::collections::VecDeque;
use std::path::PathBuf;

use serde_json::{json, Value};

use crate::host::cgroup::GroupUse;
use crate::host::clock;
use crate::model::{GuestUse, HealthReport, VmState};

/// How many samples are kept.
const HISTORY: usize = 60;

/// One sample of a VM. CPU time, memory and disk traffic are the VMM's, network traffic is the tap's.
#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    /// Since the last sample, in per cent of one CPU.
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
    pub report: HealthReport,
    /// How long the agent's answer took; `None` when there was none.
    pub round_trip_s: Option<f64>,
    /// The guest's clock minus the host's.
    pub clock_offset_s: Option<f64>,
    pub guest: Option<GuestUse>,
    pub group: GroupUse,
}

impl Health {
    /// The health of a VM that does not run.
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
            report: HealthReport::of_state(state),
            round_trip_s: None,
            clock_offset_s: None,
            guest: None,
            group: GroupUse::default(),
        }
    }
}

/// A sample as the history keeps it.
#[derive(Debug, Clone)]
struct HealthRecord {
    unix_time_s: f64,
    status: &'static str,
    reason: &'static str,
    cpu_percent: f64,
    memory_mib: u64,
    guest_memory_available_bytes: Option<u64>,
    round_trip_s: Option<f64>,
}

/// The health of a running VM so far.
#[derive(Debug, Default)]
pub struct HealthHistory {
    pub groups: Option<Vec<PathBuf>>,
    /// Heartbeats so far, and the records received until the last one.
    pub beats: u32,
    pub records_received: u64,
    pub last: Option<Health>,
    /// Since when status and reason are the same, Unix seconds.
    pub since_unix_s: f64,
    records: VecDeque<HealthRecord>,
}

impl HealthHistory {
    /// Keeps a sample; returns the one before.
    pub fn note(&mut self, health: Health) -> Option<Health> {
        if self.records.len() == HISTORY {
            self.records.pop_front();
        }
        self.records.push_back(HealthRecord {
            unix_time_s: health.last_health_check,
            status: health.report.status.as_str(),
            reason: health.report.reason.as_str(),
            cpu_percent: health.cpu_usage_percent,
            memory_mib: health.memory_usage_mb,
            guest_memory_available_bytes: health.guest.as_ref().map(|guest| guest.memory_available_bytes),
            round_trip_s: health.round_trip_s,
        });
        let same = self.last.as_ref().is_some_and(|last| {
            (last.report.status, last.report.reason) == (health.report.status, health.report.reason)
        });
        if !same {
            self.since_unix_s = health.last_health_check;
        }
        self.last.replace(health)
    }

    pub fn missed(&self) -> u32 {
        self.last.as_ref().map_or(0, |last| last.report.missed)
    }

    pub fn history_json(&self) -> Value {
        let one = |record: &HealthRecord| {
            json!({
                "time": record.unix_time_s,
                "status": record.status,
                "reason": record.reason,
                "cpu_usage_percent": record.cpu_percent,
                "memory_usage_mb": record.memory_mib,
                "guest_memory_available_bytes": record.guest_memory_available_bytes,
                "round_trip_seconds": record.round_trip_s,
            })
        };
        self.records.iter().map(one).collect()
    }
}
