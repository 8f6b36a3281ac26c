//! The guest as a whole.

use std::fs;

use microvm_protocol::message::{Code, Failure};
use serde::Deserialize;
use serde_json::{json, Value};

use super::{read, Outcome};
use crate::boot::DATA;
use crate::identity::{self, Names, Own};

fn proc(path: &str) -> String {
    fs::read_to_string(format!("/proc/{path}")).unwrap_or_default()
}

/// A value of /proc/meminfo or /proc/vmstat.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split([':', ' ']).next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

pub fn info(own: &Own) -> Outcome {
    let (identity, names) = (&own.identity, own.names());
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
        "oom_kills": field(&proc("vmstat"), "oom_kill"),
        "disk_total_mb": disk.as_ref().map(|disk| mib(disk.blocks(), disk.fragment_size())),
        "disk_free_mb": disk.as_ref().map(|disk| mib(disk.blocks_available(), disk.fragment_size())),
        "network": identity.network.is_some(),
    }))
}

pub fn set_clock(params: Value) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        unix_time_ns: u64,
    }
    let params: Params = read(params)?;
    identity::set_clock(params.unix_time_ns).map_err(|message| Failure { code: Code::IoError, message })?;
    Ok(json!({}))
}

/// What a manager tells a VM of its pool that is taken; it is not among the listed actions.
pub fn adopt(params: Value, own: &Own) -> Outcome {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        vm_id: String,
        hostname: String,
        unix_time_ns: u64,
    }
    let Params { vm_id, hostname, unix_time_ns } = read(params)?;
    own.adopt(Names { vm_id, hostname }, unix_time_ns).map_err(|message| Failure { code: Code::IoError, message })?;
    Ok(json!({}))
}
