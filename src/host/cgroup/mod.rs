//! Control groups: one group per VM and hierarchy, under cgroup v2 and v1 alike.
//!
//! Architecture invariant: a group is made below the group of this process or, where the kernel wants that one empty
//! (v2), below the nearest ancestor that this user may divide; nothing that we did not make is ever removed. What could
//! not be had is an answer, not an error: whoever asked decides.

mod hierarchy;
mod usage;
mod v1;
mod v2;

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use hierarchy::Hierarchies;
pub use usage::{recorded, usage, GroupUse};

/// Every group of ours begins with this; the sweep touches no other.
const PREFIX: &str = "tw-microvm-";
/// A group can be removed a moment after its last process was reaped.
const REMOVE_TRIES: u32 = 100;
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// What a group can limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Controller {
    Cpu,
    Memory,
    Pids,
    Devices,
    Io,
}

impl Controller {
    pub const ALL: [Self; 5] = [Self::Cpu, Self::Memory, Self::Pids, Self::Devices, Self::Io];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Devices => "devices",
            Self::Io => "io",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A device node that a group's processes may open, by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    pub major: u64,
    pub minor: u64,
}

/// What one VM's processes together may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// CPU time per period, both in microseconds.
    pub cpu_quota_us: u64,
    pub cpu_period_us: u64,
    pub memory_bytes: u64,
    pub tasks: u64,
    /// Character devices; all others are denied.
    pub devices: Vec<Device>,
    /// Bytes and operations per second on the block device that holds the VM's files.
    pub io: Option<(Device, Option<u64>, Option<u64>)>,
}

/// What became of one controller: where and how it limits, or why it does not.
pub type Outcome = (Controller, std::result::Result<String, String>);

/// One VM's groups; killed, emptied and removed when dropped. Blocking.
#[derive(Debug)]
pub struct Groups {
    folders: Vec<PathBuf>,
    outcomes: Vec<Outcome>,
}

impl Groups {
    /// Makes the groups called `name`, below `parent` (a folder of a v2 hierarchy) or where this process may.
    ///
    /// # Errors
    /// [`Error::Host`] when `parent` is given and is no group; everything else is an [`Outcome`].
    pub fn create(name: &str, parent: Option<&Path>, limits: &Limits) -> Result<Self> {
        let name = format!("{PREFIX}{name}");
        let hierarchies = Hierarchies::read();
        if let Some(parent) = parent.filter(|parent| !parent.join("cgroup.procs").is_file()) {
            let reason = "it is not a folder of a mounted cgroup hierarchy; set config[\"cgroup_parent\"] to one";
            return Err(Error::host("cgroup_parent", parent.display(), reason));
        }
        let mut groups = Self { folders: Vec::new(), outcomes: Vec::new() };
        let wanted = Controller::ALL.into_iter().filter(|c| *c != Controller::Io || limits.io.is_some());
        let (mut on_v2, mut missing) = (Vec::new(), Vec::new());
        for controller in wanted {
            if let Some(own) = hierarchies.v1(controller) {
                let made = v1::create(&own, &name, controller, limits);
                groups.folders.extend(made.folder.filter(|folder| !groups.folders.contains(folder)));
                groups.outcomes.push((controller, made.outcome));
            } else if hierarchies.v2().is_some_and(|v2| v2.has(controller)) {
                on_v2.push(controller);
            } else {
                missing.push(controller);
            }
        }
        if let Some(v2) = hierarchies.v2().filter(|_| !on_v2.is_empty()) {
            let made = v2::create(v2, parent, &name, &on_v2, limits);
            groups.folders.extend(made.folder);
            groups.outcomes.extend(made.outcomes);
        }
        let absent = |controller| {
            let reason = match controller {
                Controller::Devices if hierarchies.v2().is_some() => {
                    "cgroup v2 restricts devices by BPF programs alone; the jail's root has no other device nodes"
                        .into()
                }
                other => format!("no cgroup hierarchy here has the {other} controller"),
            };
            (controller, Err(reason))
        };
        groups.outcomes.extend(missing.into_iter().map(absent));
        groups.outcomes.sort_by_key(|(controller, _)| *controller);
        Ok(groups)
    }

    /// The files by which a process with a single thread joins the groups. v1's `tasks` takes 10 us, where its
    /// `cgroup.procs` waits for a grace period of RCU, 15 ms: the kernel need not hold other threads still.
    #[must_use]
    pub fn procs(&self) -> Vec<PathBuf> {
        let file = |folder: &PathBuf| match folder.join("tasks") {
            tasks if tasks.exists() => tasks,
            _ => folder.join("cgroup.procs"),
        };
        self.folders.iter().map(file).collect()
    }

    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// Raises the limit on memory to `bytes`; nothing where there is none.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn raise_memory(&self, bytes: u64) -> Result<()> {
        // The sum of memory and swap first: it is never below the limit on memory alone.
        for file in ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.max"] {
            for folder in self.folders.iter().filter(|folder| folder.join(file).exists()) {
                set(folder, file, &bytes.to_string())
                    .map_err(|reason| Error::host("raise the memory limit of", folder.display(), reason))?;
            }
        }
        Ok(())
    }

    /// Notes the groups in a file, for whoever finds it after this process has died.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn record(&self, file: &Path) -> Result<()> {
        record(&self.folders, file)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for folder in &self.folders {
            if let Err(error) = remove(folder) {
                log::warn!("{}: the group was not removed: {error}", folder.display());
            }
        }
    }
}

/// Every folder that [`Groups::create`] may make for `name`.
#[must_use]
pub fn candidates(name: &str, parent: Option<&Path>) -> Vec<PathBuf> {
    let (hierarchies, name) = (Hierarchies::read(), format!("{PREFIX}{name}"));
    let v1 = Controller::ALL.into_iter().filter_map(|controller| hierarchies.v1(controller));
    let v2 = hierarchies.v2().map_or_else(Vec::new, |v2| v2::candidates(v2, parent));
    let mut folders: Vec<PathBuf> = v1.chain(v2).map(|own| own.join(&name)).collect();
    folders.sort();
    folders.dedup();
    folders
}

/// Notes the folders of groups in a file.
///
/// # Errors
/// [`Error::Host`].
pub fn record(folders: &[PathBuf], file: &Path) -> Result<()> {
    let lines: String = folders.iter().map(|folder| format!("{}\n", folder.display())).collect();
    fs::write(file, lines).map_err(|error| Error::host("write", file.display(), error))
}

/// Removes the groups that are noted in `file`, killing what may be left in them; whether none of them is there any more.
pub fn sweep(file: &Path) -> bool {
    let mut all_gone = true;
    for folder in recorded(file) {
        let ours = folder.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX));
        if !ours || !folder.join("cgroup.procs").exists() {
            continue;
        }
        if let Err(error) = remove(&folder) {
            log::warn!("{}: the group was not removed: {error}", folder.display());
            all_gone = false;
        }
    }
    all_gone
}

/// Others may be at it at the same time.
fn remove(folder: &Path) -> std::io::Result<()> {
    let mut tries = 0;
    loop {
        match fs::remove_dir(folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            // EBUSY: processes, or what the kernel still has to clear away of them.
            Err(error) if tries == REMOVE_TRIES => return Err(error),
            Err(_) => kill_all(folder).or_else(|error| if folder.exists() { Err(error) } else { Ok(()) })?,
        }
        tries += 1;
        std::thread::sleep(REMOVE_PAUSE);
    }
}

/// Kills everything in a group, at once where the kernel can (v2, 5.14), else one by one.
fn kill_all(folder: &Path) -> std::io::Result<()> {
    let at_once = folder.join("cgroup.kill");
    if at_once.exists() {
        return fs::write(at_once, "1");
    }
    let processes = fs::read_to_string(folder.join("cgroup.procs"))?;
    for pid in processes.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 1) {
        match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL) {
            // It ended by itself meanwhile.
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Writes one control file of a group.
fn set(folder: &Path, file: &str, value: &str) -> std::result::Result<(), String> {
    let path = folder.join(file);
    fs::write(&path, value).map_err(|error| format!("writing {value:?} to {}: {error}", path.display()))
}

/// What a group is asked for that only has to be there.
pub(super) const PROBED: Limits = Limits {
    cpu_quota_us: 100_000,
    cpu_period_us: 100_000,
    memory_bytes: 1 << 30,
    tasks: 64,
    devices: Vec::new(),
    io: None,
};

/// Which controllers this process could use, and where; makes groups to find out, and removes them.
pub fn probe(parent: Option<&Path>) -> Vec<Outcome> {
    let name = format!("probe-{}-{:x}", std::process::id(), super::clock::unix_time_ns());
    match Groups::create(&name, parent, &PROBED) {
        Ok(groups) => groups.outcomes().to_vec(),
        Err(error) => Controller::ALL.into_iter().map(|controller| (controller, Err(error.to_string()))).collect(),
    }
}

/// How much memory the groups of this process leave it, in bytes; `None` when they set no limit.
#[must_use]
pub fn memory_left() -> Option<u64> {
    let hierarchies = Hierarchies::read();
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |folder: &Path, limit: &str, usage: &str| {
        // Page cache counts as used, although the kernel would give it back first: an estimate on the safe side.
        Some(number(folder.join(limit))?.saturating_sub(number(folder.join(usage))?))
    };
    let (own, files) = match (hierarchies.v1(Controller::Memory), hierarchies.v2()) {
        (Some(own), _) => (own, ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        (None, Some(v2)) => (v2.own.clone(), ("memory.max", "memory.current")),
        (None, None) => return None,
    };
    // Above the total of any machine: v1's way to say "unlimited".
    let unlimited = 1 << 60;
    own.ancestors().filter_map(|folder| left(folder, files.0, files.1)).filter(|left| *left < unlimited).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            cpu_quota_us: 110_000,
            cpu_period_us: 100_000,
            memory_bytes: 64 << 20,
            tasks: 20,
            devices: vec![Device { major: 1, minor: 3 }, Device { major: 1, minor: 5 }],
            io: None,
        }
    }

    #[test]
    fn test_create_tells_about_every_controller_and_drop_removes_the_groups() {
        let groups = Groups::create(&format!("test-{}", std::process::id()), None, &limits()).unwrap();
        let told: Vec<Controller> = groups.outcomes().iter().map(|(controller, _)| *controller).collect();
        assert_eq!(told, [Controller::Cpu, Controller::Memory, Controller::Pids, Controller::Devices]);
        assert!(groups.procs().iter().all(|procs| procs.is_file()), "{groups:?}");
        let folders = groups.folders.clone();
        let told = candidates(&format!("test-{}", std::process::id()), None);
        assert!(folders.iter().all(|folder| told.contains(folder)), "{folders:?} {told:?}");
        drop(groups);
        assert!(folders.iter().all(|folder| !folder.exists()), "{folders:?}");
    }

    #[test]
    fn test_sweep_removes_recorded_groups_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("cgroup-sweep-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("cgroup.procs"), "").unwrap();
        let groups = Groups::create(&format!("swept-{}", std::process::id()), None, &limits()).unwrap();
        let folders = groups.folders.clone();
        groups.record(&dir.join("record")).unwrap();
        // Its owner dies without a word.
        std::mem::forget(groups);
        let foreign = format!("{}\n/sys/fs/cgroup\n", dir.display());
        fs::write(dir.join("record"), fs::read_to_string(dir.join("record")).unwrap() + &foreign).unwrap();
        sweep(&dir.join("record"));
        assert!(folders.iter().all(|folder| !folder.exists()), "{folders:?}");
        assert!(dir.exists());
        fs::remove_dir_all(dir).unwrap();
    }

    /// Groups with every controller but devices, which v2 has not; only root gets them without a word to anyone.
    fn full_groups(name: &str, limits: &Limits) -> Option<Groups> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root, or delegated groups");
            return None;
        }
        let groups = Groups::create(&format!("{name}-{}", std::process::id()), None, limits).unwrap();
        let missing = |(controller, outcome): &&Outcome| outcome.is_err() && *controller != Controller::Devices;
        assert_eq!(groups.outcomes().iter().find(missing), None);
        Some(groups)
    }

    /// A shell in the groups.
    fn run(groups: &Groups, script: &str) -> std::process::Child {
        let join: String = groups.procs().iter().map(|procs| format!("echo 0 > {} && ", procs.display())).collect();
        let mut command = std::process::Command::new("/bin/sh");
        command.args(["-c", &format!("{join} {script}")]).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::null()).spawn().unwrap()
    }

    fn first_number(groups: &Groups, files: [&str; 2]) -> u64 {
        let paths = groups.folders.iter().flat_map(|folder| files.map(|file| folder.join(file)));
        let text = paths.filter_map(|path| fs::read_to_string(path).ok()).next().unwrap();
        text.trim().parse().unwrap()
    }

    #[test]
    fn test_cpu_quota_holds_within_a_tenth() {
        // So little that a busy host has it to give.
        let Some(groups) = full_groups("cpu", &Limits { cpu_quota_us: 20_000, ..limits() }) else { return };
        let mut child = run(&groups, "while :; do :; done");
        let pid = i32::try_from(child.id()).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let (begun, before) = (std::time::Instant::now(), super::super::procfs::usage(pid).unwrap());
        std::thread::sleep(Duration::from_secs(5));
        let used = super::super::procfs::usage(pid).unwrap().cpu_s - before.cpu_s;
        let share = used / begun.elapsed().as_secs_f64();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!((share - 0.2).abs() < 0.02, "{share} of a CPU instead of 0.2");
    }

    #[test]
    fn test_memory_limit_holds_within_a_tenth() {
        let Some(groups) = full_groups("memory", &limits()) else { return };
        let child = run(&groups, "exec dd if=/dev/zero of=/dev/null bs=200M count=1");
        let output = child.wait_with_output().unwrap();
        let peak = first_number(&groups, ["memory.max_usage_in_bytes", "memory.peak"]);
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(9));
        assert!((57 << 20..=64 << 20).contains(&peak), "{peak} bytes instead of 64 MiB");
    }

    #[test]
    fn test_memory_limit_that_was_raised_gives_what_was_asked_for() {
        let Some(groups) = full_groups("raised", &limits()) else { return };
        groups.raise_memory(256 << 20).unwrap();
        let output = run(&groups, "exec dd if=/dev/zero of=/dev/null bs=200M count=1").wait_with_output().unwrap();
        assert!(output.status.success(), "{}", output.status);
    }

    #[test]
    fn test_tasks_end_at_the_limit_and_drop_kills_them() {
        let Some(groups) = full_groups("pids", &limits()) else { return };
        let mut child = run(&groups, "for i in $(seq 40); do sleep 60 & done 2>/dev/null; sleep 60");
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(first_number(&groups, ["pids.current", "pids.current"]), 20);
        drop(groups);
        // The shell gave up, or was killed with the rest.
        child.wait().unwrap();
    }

    #[test]
    fn test_parent_that_is_no_group_is_an_error_that_names_the_key() {
        let error = Groups::create("x", Some(Path::new("/tmp")), &limits()).unwrap_err();
        assert!(error.to_string().contains("cgroup_parent"), "{error}");
    }
}
