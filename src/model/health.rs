//! Evaluates a sample of a VM's health. Pure.

use serde::Deserialize;
use serde_json::{json, Value};

use super::VmState;

/// Below this share of the guest's memory or disk the VM is unhealthy, in per cent.
const NEARLY_GONE_PERCENT: u64 = 5;
/// A guest's clock may be this far from the host's: commands wait as long on a busy host.
const CLOCK_TOLERANCE_S: f64 = 2.0;
/// A VM that waited for a CPU for this share of the time could not have answered.
const STARVED_SHARE: f64 = 0.5;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HealthStatus {
    Unknown,
    Healthy,
    Unhealthy,
    Dead,
}

impl HealthStatus {
    pub const ALL: [Self; 4] = [Self::Unknown, Self::Healthy, Self::Unhealthy, Self::Dead];

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

/// Why a report has its status; one word for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Ok,
    /// It was not started, or is not any more.
    NotRunning,
    /// Its vCPUs do not run because a caller paused it.
    Paused,
    /// It was silent, but had no CPU to answer with: its status stays what it was.
    HostSlow,
    /// It has missed a beat, or a few, but not as many as make it unhealthy.
    Late,
    /// It had the CPU and was silent.
    AgentSilent,
    ChannelClosed,
    /// The VMM's process was stopped by a signal.
    VmmStopped,
    /// The VMM has stopped the vCPUs by itself; the detail has its word for why.
    VcpusStopped,
    MemoryLow,
    DiskLow,
    ClockOff,
    /// The gateway of its user-mode network has ended.
    NetworkLost,
    VmmDead,
}

impl Reason {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Ok => "ok",
            Reason::NotRunning => "not_running",
            Reason::Paused => "paused",
            Reason::HostSlow => "host_slow",
            Reason::Late => "late",
            Reason::AgentSilent => "agent_silent",
            Reason::ChannelClosed => "channel_closed",
            Reason::VmmStopped => "vmm_stopped",
            Reason::VcpusStopped => "vcpus_stopped",
            Reason::MemoryLow => "memory_low",
            Reason::DiskLow => "disk_low",
            Reason::ClockOff => "clock_off",
            Reason::NetworkLost => "network_lost",
            Reason::VmmDead => "vmm_dead",
        }
    }

    /// Whether the VM is of no use any more and does not get better by itself: what `on_failure` is for.
    #[must_use]
    pub fn is_failure(self) -> bool {
        matches!(self, Reason::AgentSilent | Reason::ChannelClosed | Reason::VmmStopped | Reason::VmmDead)
    }
}

/// What the guest says of itself; all of it is a guest's word.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GuestUse {
    pub unix_time_ns: u64,
    pub uptime_s: f64,
    /// Time that its CPUs worked, seconds of one.
    pub cpu_s: f64,
    pub load: [f64; 3],
    pub processes: u64,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    pub disk_total_bytes: u64,
    pub disk_free_bytes: u64,
    pub oom_kills: u64,
    /// How often a program was refused a process for `max_processes`.
    pub process_limit_hits: u64,
    /// Writes to its disk of which its kernel has logged the failure; an agent of an earlier version tells none.
    pub disk_write_errors: u64,
    /// The share of the last 10 s in which some task stalled for cpu, memory or io, per cent; `None` without PSI.
    pub pressure: Option<[f64; 3]>,
}

impl GuestUse {
    #[must_use]
    pub fn to_json(&self) -> Value {
        let pressure = self.pressure.map(|[cpu, memory, io]| json!({"cpu": cpu, "memory": memory, "io": io}));
        json!({
            "uptime_seconds": self.uptime_s,
            "cpu_seconds": self.cpu_s,
            "load": self.load,
            "processes": self.processes,
            "memory_total_bytes": self.memory_total_bytes,
            "memory_available_bytes": self.memory_available_bytes,
            "disk_total_bytes": self.disk_total_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "oom_kills": self.oom_kills,
            "process_limit_hits": self.process_limit_hits,
            "pressure_percent": pressure,
        })
    }
}

/// The outcome of a probe for a sign of life.
#[derive(Debug, Clone, PartialEq)]
pub enum Liveness {
    /// Not probed: its vCPUs are paused on request.
    NotProbed,
    /// Alive; the longest that an answer took, seconds.
    Alive(f64),
    /// Silent; the share of the time that the VM waited for a CPU.
    Silent {
        starved_share: f64,
    },
    Closed(String),
}

/// What was measured of a VM at one time.
#[derive(Debug, Clone)]
pub struct HealthSample {
    pub state: VmState,
    pub is_vmm_alive: bool,
    /// Whether the VMM's process was stopped by a signal.
    pub is_vmm_stopped: bool,
    pub liveness: Liveness,
    /// The VMM's word for why its vCPUs do not run, when it was asked and they do not.
    pub vcpus_stopped: Option<String>,
    /// How its network was lost that it had.
    pub network_lost: Option<String>,
    /// The guest's clock minus the host's, seconds.
    pub clock_offset_s: Option<f64>,
    pub guest: Option<GuestUse>,
    /// Beats missed in a row before this one, and how many make the VM unhealthy.
    pub missed: u32,
    pub allowed: u32,
}

/// A status and its reason, for programs and for people.
#[derive(Debug, Clone, PartialEq)]
pub struct HealthReport {
    pub status: HealthStatus,
    pub reason: Reason,
    pub detail: String,
    /// Beats missed in a row.
    pub missed: u32,
}

impl HealthReport {
    fn of(status: HealthStatus, reason: Reason, detail: impl Into<String>) -> Self {
        Self { status, reason, detail: detail.into(), missed: 0 }
    }

    /// The report on a VM that does not run.
    #[must_use]
    pub fn of_state(state: VmState) -> Self {
        match state {
            VmState::Error => Self::of(HealthStatus::Dead, Reason::VmmDead, "it ended without being asked to"),
            _ => Self::of(HealthStatus::Unknown, Reason::NotRunning, format!("it is {state}")),
        }
    }
}

/// Reports on a sample; `before` is the last status.
#[must_use]
pub fn evaluate(sample: &HealthSample, before: HealthStatus) -> HealthReport {
    use HealthStatus::{Dead, Healthy, Unhealthy};
    if !sample.is_vmm_alive {
        return HealthReport::of(Dead, Reason::VmmDead, "its VMM's process has ended");
    }
    let missed = sample.missed + 1;
    let silent = |status, reason, detail: String| HealthReport { missed, ..HealthReport::of(status, reason, detail) };
    match &sample.liveness {
        Liveness::NotProbed => return HealthReport::of(Healthy, Reason::Paused, "it is paused"),
        Liveness::Closed(why) => return HealthReport::of(Unhealthy, Reason::ChannelClosed, why.clone()),
        Liveness::Silent { .. } if sample.is_vmm_stopped => {
            return silent(Unhealthy, Reason::VmmStopped, "its VMM's process is stopped by a signal".into());
        }
        Liveness::Silent { starved_share } if *starved_share >= STARVED_SHARE => {
            let detail = format!("it waited for a CPU for {:.0} % of the time", 100.0 * starved_share);
            // Neither better nor worse than it was.
            return HealthReport { missed: sample.missed, ..HealthReport::of(before, Reason::HostSlow, detail) };
        }
        Liveness::Silent { .. } => {
            if let Some(why) = &sample.vcpus_stopped {
                return silent(Unhealthy, Reason::VcpusStopped, format!("the VMM says: {why}"));
            }
            let detail = format!("{missed} times in a row it gave no sign of life, {} are allowed", sample.allowed);
            return match missed > sample.allowed {
                true => silent(Unhealthy, Reason::AgentSilent, detail),
                false => silent(before, Reason::Late, detail),
            };
        }
        Liveness::Alive(_) => {}
    }
    if let Some(how) = &sample.network_lost {
        return HealthReport::of(Unhealthy, Reason::NetworkLost, how.clone());
    }
    if let Some(offset) = sample.clock_offset_s.filter(|offset| offset.abs() > CLOCK_TOLERANCE_S) {
        return HealthReport::of(Unhealthy, Reason::ClockOff, format!("its clock is {offset:+.1} s from the host's"));
    }
    let Some(guest) = &sample.guest else { return HealthReport::of(Healthy, Reason::Ok, "") };
    let short = |what: &str, left: u64, of: u64| {
        let is_short = of > 0 && left < of / 100 * NEARLY_GONE_PERCENT;
        is_short.then(|| format!("{} of {} MiB {what} are left", left >> 20, of >> 20))
    };
    if let Some(detail) = short("memory", guest.memory_available_bytes, guest.memory_total_bytes) {
        return HealthReport::of(Unhealthy, Reason::MemoryLow, detail);
    }
    if let Some(detail) = short("disk", guest.disk_free_bytes, guest.disk_total_bytes) {
        return HealthReport::of(Unhealthy, Reason::DiskLow, detail);
    }
    HealthReport::of(Healthy, Reason::Ok, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(liveness: Liveness) -> HealthSample {
        HealthSample {
            state: VmState::Running,
            is_vmm_alive: true,
            is_vmm_stopped: false,
            liveness,
            vcpus_stopped: None,
            network_lost: None,
            clock_offset_s: None,
            guest: None,
            missed: 0,
            allowed: 2,
        }
    }

    fn report(sample: &HealthSample) -> (HealthStatus, Reason, u32) {
        let HealthReport { status, reason, missed, .. } = evaluate(sample, HealthStatus::Healthy);
        (status, reason, missed)
    }

    #[test]
    fn test_evaluate_silence_counts_only_when_the_vm_had_a_cpu() {
        use HealthStatus::{Healthy, Unhealthy};
        let silent = |starved_share, missed| HealthSample { missed, ..sample(Liveness::Silent { starved_share }) };
        assert_eq!(report(&silent(0.1, 0)), (Healthy, Reason::Late, 1));
        assert_eq!(report(&silent(0.1, 1)), (Healthy, Reason::Late, 2));
        assert_eq!(report(&silent(0.1, 2)), (Unhealthy, Reason::AgentSilent, 3));
        assert_eq!(report(&silent(0.9, 7)), (Healthy, Reason::HostSlow, 7));
    }

    #[test]
    fn test_evaluate_a_paused_vm_is_healthy_and_a_stopped_one_is_not() {
        assert_eq!(report(&sample(Liveness::NotProbed)), (HealthStatus::Healthy, Reason::Paused, 0));
        let stopped = HealthSample { is_vmm_stopped: true, ..sample(Liveness::Silent { starved_share: 0.0 }) };
        assert_eq!(report(&stopped), (HealthStatus::Unhealthy, Reason::VmmStopped, 1));
        let io =
            HealthSample { vcpus_stopped: Some("io-error".into()), ..sample(Liveness::Silent { starved_share: 0.0 }) };
        assert_eq!(report(&io), (HealthStatus::Unhealthy, Reason::VcpusStopped, 1));
    }

    #[test]
    fn test_evaluate_a_vm_without_its_network_lives_and_is_unhealthy() {
        let lost = HealthSample { network_lost: Some("it ended".into()), ..sample(Liveness::Alive(0.1)) };
        assert_eq!(report(&lost), (HealthStatus::Unhealthy, Reason::NetworkLost, 0));
        assert!(!Reason::NetworkLost.is_failure());
    }

    #[test]
    fn test_evaluate_nearly_gone_resources_are_reported_and_enough_is_healthy() {
        let guest = GuestUse {
            memory_total_bytes: 100 << 20,
            memory_available_bytes: 50 << 20,
            disk_total_bytes: 100 << 20,
            disk_free_bytes: 50 << 20,
            ..GuestUse::default()
        };
        let of =
            |guest: &GuestUse| report(&HealthSample { guest: Some(guest.clone()), ..sample(Liveness::Alive(0.1)) }).1;
        assert_eq!(of(&guest), Reason::Ok);
        assert_eq!(of(&GuestUse { memory_available_bytes: 4 << 20, ..guest.clone() }), Reason::MemoryLow);
        assert_eq!(of(&GuestUse { disk_free_bytes: 4 << 20, ..guest.clone() }), Reason::DiskLow);
        // A guest without a disk.
        assert_eq!(of(&GuestUse { disk_total_bytes: 0, disk_free_bytes: 0, ..guest }), Reason::Ok);
    }

    #[test]
    fn test_evaluate_a_clock_may_be_two_seconds_off() {
        let off = |offset| report(&HealthSample { clock_offset_s: Some(offset), ..sample(Liveness::Alive(0.1)) }).1;
        assert_eq!(
            [off(1.9), off(-1.9), off(2.1), off(-86_400.0)],
            [Reason::Ok, Reason::Ok, Reason::ClockOff, Reason::ClockOff]
        );
    }

    #[test]
    fn test_guest_use_hostile_documents_are_refused_or_harmless() {
        assert!(serde_json::from_value::<GuestUse>(json!({"load": [1]})).is_err());
        assert!(serde_json::from_value::<GuestUse>(json!({"oom_kills": -1})).is_err());
        let odd: GuestUse = serde_json::from_value(json!({"disk_total_bytes": u64::MAX, "new": 1})).unwrap();
        assert_eq!(report(&HealthSample { guest: Some(odd), ..sample(Liveness::Alive(0.0)) }).1, Reason::DiskLow);
    }
}
