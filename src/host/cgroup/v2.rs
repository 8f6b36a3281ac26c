//! The unified hierarchy (Documentation/admin-guide/cgroup-v2.rst of the kernel).

use std::fs;
use std::path::{Path, PathBuf};

use super::hierarchy::Unified;
use super::{make, remedy_here, set, Controller, Device, Limits, Outcome};
use crate::error::Cause;

pub struct Made {
    pub folder: Option<PathBuf>,
    pub outcomes: Vec<Outcome>,
}

/// Makes the group below `parent`, or below the nearest group from this process's own upwards that can be divided: what
/// limits this process should limit its VMs.
///
/// A group with processes in it cannot give controllers to its children ("no internal processes"), except the root: so
/// the process's own group seldom serves, and its siblings are next.
pub fn create(v2: &Unified, parent: Option<&Path>, name: &str, wanted: &[Controller], limits: &Limits) -> Made {
    let candidates = candidates(v2, parent);
    let (mut best, mut reason) = (None, Cause::from("there is no group to divide"));
    for candidate in &candidates {
        let (given, why) = divide(&v2.mount, candidate, wanted);
        reason = why.unwrap_or(reason);
        if given > best.map_or(0, |(_, most)| most) {
            best = Some((candidate, given));
        }
        if given == wanted.len() {
            break;
        }
    }
    let made = best.map(|(candidate, _)| candidate.join(name)).and_then(|folder| match make(&folder) {
        Ok(()) => Some(folder),
        Err(error) => {
            let text = format!("mkdir {}: {error}", folder.display());
            reason = Cause::explained(error, text);
            None
        }
    });
    let remedy =
        "delegate a group to this user (systemd: Delegate=yes, or systemd-run --user --scope -p Delegate=yes) \
                  and name it in config[\"cgroup_parent\"]";
    let remedy = if made.is_some() { String::new() } else { remedy_here("v2", remedy) };
    let outcome = |controller: &Controller| match &made {
        Some(folder) => limit(folder, *controller, limits),
        None => Err(Cause::explained(reason.clone(), format!("{reason}; {remedy}"))),
    };
    let outcomes = wanted.iter().map(|controller| (*controller, outcome(controller))).collect();
    Made { folder: made, outcomes }
}

/// Below which groups one may be made, the first choice first.
pub fn candidates(v2: &Unified, parent: Option<&Path>) -> Vec<PathBuf> {
    match parent {
        Some(parent) => vec![parent.to_owned()],
        None => v2.own.ancestors().take_while(|folder| folder.starts_with(&v2.mount)).map(Path::to_owned).collect(),
    }
}

/// Gives a group's children the controllers that they do not have yet, and its ancestors' children before; answers with
/// how many of the wanted ones they have then, and why not all.
fn divide(mount: &Path, folder: &Path, wanted: &[Controller]) -> (usize, Option<Cause>) {
    let has = |folder: &Path, controller: &Controller| {
        let enabled = fs::read_to_string(folder.join("cgroup.subtree_control")).unwrap_or_default();
        enabled.split_whitespace().any(|name| name == controller.as_str())
    };
    let mut path: Vec<&Path> = folder.ancestors().take_while(|ancestor| ancestor.starts_with(mount)).collect();
    path.reverse();
    let mut reason = None;
    for controller in wanted {
        for step in &path {
            if !has(step, controller) {
                reason = set(step, "cgroup.subtree_control", &format!("+{controller}")).err().or(reason);
            }
        }
    }
    let given = wanted.iter().filter(|controller| has(folder, controller)).count();
    (given, reason.filter(|_| given < wanted.len()))
}

fn limit(folder: &Path, controller: Controller, limits: &Limits) -> Result<String, Cause> {
    match controller {
        Controller::Cpu => {
            let value = format!("{} {}", limits.cpu_quota_us, limits.cpu_period_us);
            set(folder, "cpu.max", &value)?;
            // On a busy host a group weighs as much as one process, however many CPUs it may use: 100 for each of them.
            let weight = (100 * limits.cpu_quota_us / limits.cpu_period_us).clamp(100, 10_000);
            set(folder, "cpu.weight", &weight.to_string())?;
            Ok(format!("cgroup v2: cpu.max {value}"))
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
