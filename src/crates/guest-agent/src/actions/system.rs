//! The guest as a whole.

use std::fs;

use microvm_protocol::message::{Code, Failure};
use serde::Deserialize;
use serde_json::{json, Value};

use super::{kernel_log, read_params, Outcome};
use crate::boot::{DATA, MEMORY_EVENTS, PROCESS_EVENTS};
use crate::identity::{self, GuestIdentity, Names};

fn proc(path: &str) -> String {
    fs::read_to_string(format!("/proc/{path}")).unwrap_or_default()
}

/// A value of /proc/meminfo or of a control group's events.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split([':', ' ']).next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn counted(path: &str, name: &str) -> Option<u64> {
    field(&fs::read_to_string(path).ok()?, name)
}

pub fn info(guest: &GuestIdentity) -> Outcome {
    let (identity, names) = (&guest.identity, guest.names());
    let memory = proc("meminfo");
    let uptime = proc("uptime").split_whitespace().next().and_then(|text| text.parse::<f64>().ok());
    let load: Vec<f64> = proc("loadavg").split_whitespace().take(3).filter_map(|text| text.parse().ok()).collect();
    let disk = nix::sys::statvfs::statvfs(DATA).ok();
    let mib = |blocks: u64, size: u64| (blocks * size) >> 20;
    let is_pid = |name: &std::ffi::OsStr| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
    let processes =
        fs::read_dir("/proc").map_or(0, |entries| entries.flatten().filter(|e| is_pid(&e.file_name())).count());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(json!({
        "vm_id": names.vm_id,
        "hostname": names.hostname,
        "machine_id": identity::hex(&identity.machine_id),
        "kernel": proc("sys/kernel/osrelease").trim(),
        "agent_version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": uptime,
        "time_unix": now.as_secs_f64(),
        "cpus": proc("cpuinfo").lines().filter(|line| line.starts_with("processor")).count(),
        "load": load,
        "processes": processes,
        "memory_total_mb": field(&memory, "MemTotal").map(|kib| kib >> 10),
        "memory_available_mb": field(&memory, "MemAvailable").map(|kib| kib >> 10),
        "oom_kills": counted(MEMORY_EVENTS, "oom_kill"),
        "disk_total_mb": disk.as_ref().map(|disk| mib(disk.blocks(), disk.fragment_size())),
        "disk_free_mb": disk.as_ref().map(|disk| mib(disk.blocks_available(), disk.fragment_size())),
        "network": identity.network.is_some(),
    }))
}

/// What the host's heartbeat asks for: little work, as it is asked for ever; names and units are those of `GuestUse`.
pub fn health() -> Outcome {
    let (memory, stat) = (proc("meminfo"), proc("stat"));
    let bytes = |name: &str| field(&memory, name).unwrap_or(0) << 10;
    let uptime = proc("uptime").split_whitespace().next().and_then(|text| text.parse::<f64>().ok());
    let loadavg = proc("loadavg");
    let mut loads = loadavg.split_whitespace();
    let mut load = || loads.next().and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    let load = [load(), load(), load()];
    // "running/all".
    let processes = loads.next().and_then(|text| text.split_once('/')?.1.parse::<u64>().ok());
    let disk = nix::sys::statvfs::statvfs(DATA).ok().map(|disk| {
        let size = disk.fragment_size();
        (disk.blocks() * size, disk.blocks_available() * size)
    });
    let (disk_total, disk_free) = disk.unwrap_or((0, 0));
    let pressure = ["cpu", "memory", "io"].map(|what| stalled(&proc(&format!("pressure/{what}"))));
    let pressure = match pressure {
        [Some(cpu), Some(memory), Some(io)] => Some([cpu, memory, io]),
        _ => None,
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(json!({
        "unix_time_ns": u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        "uptime_s": uptime.unwrap_or(0.0),
        "cpu_s": worked(&stat).unwrap_or(0.0),
        "load": load,
        "processes": processes.unwrap_or(0),
        "memory_total_bytes": bytes("MemTotal"),
        "memory_available_bytes": bytes("MemAvailable"),
        "disk_total_bytes": disk_total,
        "disk_free_bytes": disk_free,
        "oom_kills": counted(MEMORY_EVENTS, "oom_kill").unwrap_or(0),
        "process_limit_hits": counted(PROCESS_EVENTS, "max").unwrap_or(0),
        "disk_write_errors": kernel_log::disk_write_errors(),
        "pressure": pressure,
    }))
}

/// proc_stat(5): user, nice, system, idle, iowait, irq, softirq; USER_HZ is 100.
fn worked(stat: &str) -> Option<f64> {
    let fields: Vec<u64> =
        stat.lines().next()?.split_whitespace().skip(1).filter_map(|text| text.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else { return None };
    Some((user + nice + system + irq + softirq) as f64 / 100.0)
}

/// Documentation/accounting/psi.rst: `some avg10=0.12 ...`; a kernel without PSI has no such file.
fn stalled(pressure: &str) -> Option<f64> {
    pressure.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?.parse().ok()
}

pub fn set_clock(params: Value) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        unix_time_ns: u64,
    }
    let params: Params = read_params(params)?;
    identity::set_clock(params.unix_time_ns).map_err(|message| Failure { code: Code::IoError, message })?;
    Ok(json!({}))
}

/// What a manager tells a VM of its pool that is taken; it is not among the listed actions.
pub fn adopt(params: Value, guest: &GuestIdentity) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        vm_id: String,
        hostname: String,
        unix_time_ns: u64,
    }
    let Params { vm_id, hostname, unix_time_ns } = read_params(params)?;
    guest.adopt(Names { vm_id, hostname }, unix_time_ns).map_err(|message| Failure { code: Code::IoError, message })?;
    Ok(json!({}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_worked_leaves_idle_time_out() {
        assert_eq!(worked("cpu  100 0 50 9999 77 10 40 0 0 0\ncpu0 1 2\n"), Some(2.0));
        assert_eq!(worked("cpu 1 2"), None);
    }

    #[test]
    fn test_stalled_takes_the_first_line_and_absence_is_none() {
        assert_eq!(stalled("some avg10=1.50 avg60=2.00\nfull avg10=0.00\n"), Some(1.5));
        assert_eq!(stalled(""), None);
    }

    #[test]
    fn test_health_of_this_machine_is_plausible() {
        let health = health().unwrap();
        assert!(health["memory_total_bytes"].as_u64() >= health["memory_available_bytes"].as_u64());
        assert!(health["uptime_s"].as_f64() > Some(0.0) && health["processes"].as_u64() > Some(0));
    }
}
