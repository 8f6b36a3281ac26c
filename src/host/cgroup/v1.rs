//! One controller's hierarchy of cgroup v1 (Documentation/admin-guide/cgroup-v1 of the kernel).

use std::path::{Path, PathBuf};

use super::{make, remedy_here, set, Controller, Device, Limits};
use crate::error::Cause;

pub struct Made {
    pub folder: Option<PathBuf>,
    pub outcome: Result<String, Cause>,
}

/// Makes the group below `own` and sets what the controller limits.
pub fn create(own: &Path, name: &str, controller: Controller, limits: &Limits) -> Made {
    let folder = own.join(name);
    // Controllers may share a hierarchy (cpu,cpuacct): then the folder is there already, and ours.
    if let Err(error) = make(&folder) {
        if error.kind() != std::io::ErrorKind::AlreadyExists {
            let remedy = "an administrator can delegate a group: mkdir, chown, and start this process in it";
            let remedy = remedy_here("v1", remedy);
            let text = format!("mkdir {}: {error}; {remedy}", folder.display());
            return Made { folder: None, outcome: Err(Cause::explained(error, text)) };
        }
    }
    let outcome = match controller {
        Controller::Cpu => cpu(&folder, limits),
        Controller::Memory => memory(&folder, limits),
        Controller::Pids => set(&folder, "pids.max", &limits.tasks.to_string())
            .map(|()| format!("cgroup v1 pids: pids.max {}", limits.tasks)),
        Controller::Devices => devices(&folder, &limits.devices),
        Controller::Io => io(&folder, limits),
    };
    Made { folder: Some(folder), outcome }
}

fn cpu(folder: &Path, limits: &Limits) -> Result<String, Cause> {
    set(folder, "cpu.cfs_period_us", &limits.cpu_period_us.to_string())?;
    set(folder, "cpu.cfs_quota_us", &limits.cpu_quota_us.to_string())?;
    // On a busy host a group weighs as much as one process, however many CPUs it may use: 1024 for each of them.
    let shares = (1024 * limits.cpu_quota_us / limits.cpu_period_us).max(1024);
    set(folder, "cpu.shares", &shares.to_string())?;
    Ok(format!("cgroup v1 cpu: {} us of every {} us", limits.cpu_quota_us, limits.cpu_period_us))
}

fn memory(folder: &Path, limits: &Limits) -> Result<String, Cause> {
    let bytes = limits.memory_bytes.to_string();
    // A guest's secrets do not go to swap, and swap does not stretch the limit.
    set(folder, "memory.swappiness", "0")?;
    set(folder, "memory.limit_in_bytes", &bytes)?;
    // There only with swap accounting.
    if folder.join("memory.memsw.limit_in_bytes").exists() {
        set(folder, "memory.memsw.limit_in_bytes", &bytes)?;
    }
    Ok(format!("cgroup v1 memory: memory.limit_in_bytes {bytes}"))
}

fn devices(folder: &Path, allowed: &[Device]) -> Result<String, Cause> {
    set(folder, "devices.deny", "a")?;
    for Device { major, minor } in allowed {
        set(folder, "devices.allow", &format!("c {major}:{minor} rw"))?;
    }
    Ok(format!("cgroup v1 devices: {} character devices, all others denied", allowed.len()))
}

fn io(folder: &Path, limits: &Limits) -> Result<String, Cause> {
    let Some((Device { major, minor }, bytes, operations)) = limits.io else { return Err("nothing to limit".into()) };
    for (what, value) in [("bps", bytes), ("iops", operations)] {
        let Some(value) = value else { continue };
        for direction in ["read", "write"] {
            set(folder, &format!("blkio.throttle.{direction}_{what}_device"), &format!("{major}:{minor} {value}"))?;
        }
    }
    Ok("cgroup v1 blkio: blkio.throttle on direct and read traffic (v1 does not see buffered writes)".into())
}
