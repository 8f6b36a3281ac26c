//! The unified hierarchy (Documentation/admin-guide/cgroup-v2.rst of the kernel).

use std::fs;
use std::path::{Path, PathBuf};

use super::hierarchy::Unified;
use super::{set, Controller, Device, Limits, Outcome};

pub struct Made {
    pub folder: Option<PathBuf>,
    pub outcomes: Vec<Outcome>,
}

/// Makes the group below `parent`, or below the nearest group from this process's own upwards that can be divided.
///
/// A group with processes in it cannot give controllers to its children ("no internal processes"), except the root: so
/// the process's own group seldom serves, and its siblings are next.
pub fn create(v2: &Unified, parent: Option<&Path>, name: &str, wanted: &[Controller], limits: &Limits) -> Made {
    let candidates: Vec<&Path> = match parent {
        Some(parent) => vec![parent],
        None => v2.own.ancestors().take_while(|folder| folder.starts_with(&v2.mount)).collect(),
    };
    let mut reason = "there is no group to divide".to_owned();
    for candidate in candidates {
        if let Err(why) = divide(candidate, wanted) {
            reason = why;
            continue;
        }
        let folder = candidate.join(name);
        match fs::create_dir(&folder) {
            Ok(()) => {
                let outcomes = wanted.iter().map(|controller| (*controller, limit(&folder, *controller, limits)));
                return Made { outcomes: outcomes.collect(), folder: Some(folder) };
            }
            Err(error) => reason = format!("mkdir {}: {error}", folder.display()),
        }
    }
    let remedy =
        "delegate a group to this user (systemd: Delegate=yes, or systemd-run --user --scope -p Delegate=yes) \
                  and name it in config[\"cgroup_parent\"]";
    let refused = |controller: &Controller| (*controller, Err(format!("{reason}; {remedy}")));
    Made { folder: None, outcomes: wanted.iter().map(refused).collect() }
}

/// Gives a group's children the controllers that they do not have yet; fails when none of them can be given.
fn divide(folder: &Path, wanted: &[Controller]) -> Result<(), String> {
    let enabled = || fs::read_to_string(folder.join("cgroup.subtree_control")).unwrap_or_default();
    let has =
        |enabled: &str, controller: &Controller| enabled.split(' ').any(|name| name.trim() == controller.as_str());
    let before = enabled();
    let mut reason = None;
    for controller in wanted.iter().filter(|controller| !has(&before, controller)) {
        if let Err(why) = set(folder, "cgroup.subtree_control", &format!("+{controller}")) {
            reason = Some(why);
        }
    }
    let after = enabled();
    match (wanted.iter().any(|controller| has(&after, controller)), reason) {
        (true, _) => Ok(()),
        (false, reason) => Err(reason.unwrap_or_else(|| format!("{} has no controllers to give", folder.display()))),
    }
}

fn limit(folder: &Path, controller: Controller, limits: &Limits) -> Result<String, String> {
    match controller {
        Controller::Cpu => {
            let value = format!("{} {}", limits.cpu_quota_us, limits.cpu_period_us);
            set(folder, "cpu.max", &value).map(|()| format!("cgroup v2: cpu.max {value}"))
        }
        Controller::Memory => {
            set(folder, "memory.max", &limits.memory_bytes.to_string())?;
            // A guest's secrets do not go to swap, and swap does not stretch the limit. Absent without swap.
            if folder.join("memory.swap.max").exists() {
                set(folder, "memory.swap.max", "0")?;
            }
            set(folder, "memory.oom.group", "1")?;
            Ok(format!("cgroup v2: memory.max {}", limits.memory_bytes))
        }
        Controller::Pids => {
            set(folder, "pids.max", &limits.tasks.to_string()).map(|()| format!("cgroup v2: pids.max {}", limits.tasks))
        }
        Controller::Io => {
            let Some((Device { major, minor }, bytes, operations)) = limits.io else {
                return Err("nothing to limit".into());
            };
            let keys = [("bps", bytes), ("iops", operations)];
            let value: String = keys
                .into_iter()
                .filter_map(|(key, value)| value.map(|value| format!(" r{key}={value} w{key}={value}")))
                .collect();
            set(folder, "io.max", &format!("{major}:{minor}{value}")).map(|()| format!("cgroup v2: io.max{value}"))
        }
        Controller::Devices => Err("cgroup v2 has no such controller".into()),
    }
}
