//! How a VM is doing.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::running::Running;
use crate::host::{clock, procfs};
use crate::model::VmState;

/// How long a healthy agent may take to answer a ping; an emulated guest on a busy host is slow, not ill.
const PING_DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthStatus {
    Unknown,
    Healthy,
    Unhealthy,
    Dead,
}

impl HealthStatus {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            HealthStatus::Unknown => "unknown",
            HealthStatus::Healthy => "healthy",
            HealthStatus::Unhealthy => "unhealthy",
            HealthStatus::Dead => "dead",
        }
    }
}

/// One look at a VM. CPU time, memory and disk traffic are the VMM's, network traffic is the tap's.
#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    /// Since the last look, in per cent of one CPU.
    pub cpu_usage_percent: f64,
    /// Resident memory of the VMM, MiB.
    pub memory_usage_mb: u64,
    pub disk_io_bytes: u64,
    pub network_rx_bytes: u64,
    pub network_tx_bytes: u64,
    pub uptime_seconds: f64,
    /// Unix seconds.
    pub last_health_check: f64,
    pub status: HealthStatus,
}

impl Health {
    /// What can be said of a VM that does not run.
    #[must_use]
    pub fn of_state(state: VmState) -> Self {
        let status = if state == VmState::Error { HealthStatus::Dead } else { HealthStatus::Unknown };
        Self {
            cpu_usage_percent: 0.0,
            memory_usage_mb: 0,
            disk_io_bytes: 0,
            network_rx_bytes: 0,
            network_tx_bytes: 0,
            uptime_seconds: 0.0,
            last_health_check: clock::unix_time_ns() as f64 / 1e9,
            status,
        }
    }
}

pub async fn of_running(running: &Running, state: VmState) -> Health {
    let mut health = Health::of_state(state);
    health.uptime_seconds = running.since.elapsed().as_secs_f64();
    let Some(usage) = running.pid().and_then(procfs::usage) else {
        health.status = HealthStatus::Dead;
        return health;
    };
    health.memory_usage_mb = usage.rss_bytes >> 20;
    if let Some(counters) = running.network_counters() {
        // What the host sent is what the VM received.
        (health.network_rx_bytes, health.network_tx_bytes) = (counters.sent_bytes, counters.received_bytes);
    }
    {
        let mut sample = running.cpu_sample.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (before, used) = *sample;
        let elapsed = (now - before).as_secs_f64().max(0.001);
        health.cpu_usage_percent = (100.0 * (usage.cpu_s - used.cpu_s) / elapsed).max(0.0);
        *sample = (now, usage);
    }
    let (disk, pong) = tokio::join!(running.control().disk_io(), async {
        // The vCPUs of a paused VM stand still on request: its silence says nothing.
        match state {
            VmState::Running => running.agent().request("ping", Value::Null, PING_DEADLINE).await.map(drop),
            _ => Ok(()),
        }
    });
    match disk {
        Ok(disk) => health.disk_io_bytes = disk.read_bytes + disk.written_bytes,
        Err(error) => log::debug!("{error}"),
    }
    health.status = match pong {
        Ok(()) => HealthStatus::Healthy,
        Err(error) => {
            log::warn!("health check: {error}");
            HealthStatus::Unhealthy
        }
    };
    health
}
