//! Control groups: one group per VM and hierarchy, under cgroup v2 and v1 alike.
//!
//! Architecture invariant: a group is made below the group of this process or, where the kernel wants that one empty
//! (v2), below the nearest ancestor that this user may divide; nothing that we did not make is ever removed. What could
//! not be had is an answer, not an error: whoever asked decides.

mod hierarchy;
mod usage;
mod v1;
mod v2;

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{open, openat, Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;
use nix::sys::statfs::{fstatfs, CGROUP2_SUPER_MAGIC, CGROUP_SUPER_MAGIC};
use nix::unistd::{unlinkat, Pid, UnlinkatFlags};

use super::fork::{self, ForkGuard};
use super::pidfd;
use super::remedy::{self, Place};
use crate::error::{Cause, Error, Result};
use hierarchy::Hierarchies;
pub use usage::{recorded, usage, GroupUse};

/// Every group of ours begins with this; the sweep touches no other.
const PREFIX: &str = "tw-microvm-";
/// A group can be removed a moment after its last process was reaped.
const REMOVE_TRIES: u32 = 100;
const REMOVE_PAUSE: Duration = Duration::from_millis(5);
/// A group without a lock is an orphan after this time.
const ORPHAN_AGE: Duration = Duration::from_secs(60);

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
pub type Outcome = (Controller, std::result::Result<String, Cause>);

/// One VM's groups; killed, emptied and removed when dropped. Blocking.
#[derive(Debug)]
pub struct Groups {
    folders: Vec<PathBuf>,
    outcomes: Vec<Outcome>,
    held: Option<(ForkGuard, Flock<File>)>,
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
        let mut groups = Self { folders: Vec::new(), outcomes: Vec::new(), held: None };
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
                        .to_owned()
                }
                other => format!("no cgroup hierarchy here has the {other} controller"),
            };
            (controller, Err(Cause::from(reason)))
        };
        groups.outcomes.extend(missing.into_iter().map(absent));
        groups.outcomes.sort_by_key(|(controller, _)| *controller);
        groups.hold();
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

    #[must_use]
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Says to other processes' sweeps that the groups have an owner; no fork takes the lock along.
    fn hold(&mut self) {
        let first = self.folders.first().and_then(|folder| File::open(folder).ok());
        let lock = first.and_then(|folder| Flock::lock(folder, FlockArg::LockExclusiveNonblock).ok());
        self.held = lock.map(|lock| (fork::guard(&*lock), lock));
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

/// What makes groups possible: in a container its options, elsewhere `otherwise`.
fn remedy_here(version: &str, otherwise: &str) -> String {
    let place = Place::look();
    if place.is_in_container {
        remedy::cgroups(version, &place)
    } else {
        otherwise.to_owned()
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

/// The folders of groups as text, for whoever finds it after this process has died.
#[must_use]
pub fn record(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| format!("{}\n", folder.display())).collect()
}

/// Removes groups of ours, killing what may be left in them; whether none of them is there any more. What is not a control
/// group, or has not our name, is not touched.
pub fn sweep(folders: &[PathBuf]) -> bool {
    let mut all_gone = true;
    for folder in folders {
        if let Err(error) = remove(folder) {
            log::warn!("{}: the group was not removed: {error}", folder.display());
            all_gone = false;
        }
    }
    all_gone
}

/// Removes the empty groups of processes that died and whose records went before they could be swept, as those of a container
/// do with its `/dev/shm`. Nothing is killed: a group with processes in it stays.
pub fn sweep_orphans(parent: Option<&Path>) {
    for folder in ours(parent) {
        match Open::group(&folder).and_then(|group| group.map_or(Ok(false), |group| group.remove_orphan(ORPHAN_AGE))) {
            Ok(true) => log::info!("{}: removed, its owner is dead", folder.display()),
            Ok(false) => {}
            Err(error) => log::debug!("{}: left alone: {error}", folder.display()),
        }
    }
}

/// What has our name where this process would make groups.
fn ours(parent: Option<&Path>) -> Vec<PathBuf> {
    let places = candidates("", parent);
    let entries = places.iter().filter_map(|place| fs::read_dir(place.parent()?).ok()).flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)));
    named.map(|entry| entry.path()).collect()
}

/// A control group of ours, by descriptors: its name and its file system were checked.
struct Open {
    parent: OwnedFd,
    name: OsString,
    group: OwnedFd,
}

impl Open {
    /// Opens a group; `None` when there is none, or when it is not one of ours.
    fn group(folder: &Path) -> io::Result<Option<Self>> {
        let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else { return Ok(None) };
        let ours = name.to_str().is_some_and(|name| name.starts_with(PREFIX));
        if !ours || !folder.is_absolute() {
            return Ok(None);
        }
        let folders = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = || -> nix::Result<Self> {
            let parent = open(parent, folders | OFlag::O_PATH, Mode::empty())?;
            let group = openat(&parent, name, folders | OFlag::O_NOFOLLOW | OFlag::O_RDONLY, Mode::empty())?;
            Ok(Self { parent, name: name.to_owned(), group })
        };
        match opened() {
            Ok(open) => {
                let kind = fstatfs(&open.group)?.filesystem_type();
                Ok([CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&kind).then_some(open))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether it is gone.
    fn remove(&self) -> nix::Result<bool> {
        match unlinkat(&self.parent, self.name.as_os_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(true),
            // Processes, or what the kernel still has to clear away of them.
            Err(Errno::EBUSY) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    fn file(&self, name: &str, flags: OFlag) -> nix::Result<File> {
        openat(&self.group, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).map(File::from)
    }

    fn processes(&self) -> io::Result<Vec<Pid>> {
        let mut text = String::new();
        self.file("cgroup.procs", OFlag::O_RDONLY)?.read_to_string(&mut text)?;
        let pids = text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 1);
        Ok(pids.map(Pid::from_raw).collect())
    }

    /// Kills everything in it, at once where the kernel can (v2, 5.14), else one by one.
    fn kill(&self) -> io::Result<()> {
        if let Ok(mut at_once) = self.file("cgroup.kill", OFlag::O_WRONLY) {
            return at_once.write_all(b"1");
        }
        let mut opened = Vec::new();
        for pid in self.processes()? {
            match pidfd::open(pid) {
                Ok(process) => opened.extend(process.map(|process| (pid, Some(process)))),
                Err(error) if pidfd::are_missing(&error) => opened.push((pid, None)),
                Err(error) => return Err(error),
            }
        }
        // A number that was free for a moment may be another process's by now: only what is in the group still is killed.
        let still = self.processes()?;
        for (pid, process) in opened.into_iter().filter(|(pid, _)| still.contains(pid)) {
            match process {
                Some(process) => pidfd::kill(&process)?,
                None => match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(errno) => return Err(errno.into()),
                },
            }
        }
        Ok(())
    }

    /// Removes it if it is empty and no process holds its lock; whether it did.
    fn remove_orphan(self, age: Duration) -> io::Result<bool> {
        let file = File::from(self.group.try_clone()?);
        // A group has no lock between its making and its owner's next step.
        let old = file.metadata()?.modified()?.elapsed().is_ok_and(|since| since >= age);
        let free = old && Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok();
        Ok(free && self.remove()?)
    }
}

/// Others may be at it at the same time.
fn remove(folder: &Path) -> io::Result<()> {
    let Some(group) = Open::group(folder)? else { return Ok(()) };
    for _ in 0..REMOVE_TRIES {
        if group.remove()? {
            return Ok(());
        }
        match group.kill() {
            // It went meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
            killed => killed?,
        }
        std::thread::sleep(REMOVE_PAUSE);
    }
    match group.remove()? {
        true => Ok(()),
        false => Err(Errno::EBUSY.into()),
    }
}

/// Makes a group; its owner may use it, whatever the umask.
fn make(folder: &Path) -> io::Result<()> {
    fs::create_dir(folder)?;
    let opened = fs::set_permissions(folder, Permissions::from_mode(0o755));
    if opened.is_err() {
        fs::remove_dir(folder)?;
    }
    opened
}

/// Writes one control file of a group.
fn set(folder: &Path, file: &str, value: &str) -> std::result::Result<(), Cause> {
    let path = folder.join(file);
    fs::write(&path, value).map_err(|error| {
        let text = format!("writing {value:?} to {}: {error}", path.display());
        Cause::explained(error, text)
    })
}

/// What a group is asked for that only has to be there.
pub const PROBED: Limits = Limits {
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
        Err(error) => Controller::ALL.into_iter().map(|controller| (controller, Err(error.clone().into()))).collect(),
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

    /// Groups whose owner died without a word: no lock is held.
    fn abandoned(name: &str) -> Vec<PathBuf> {
        let mut groups = Groups::create(&format!("{name}-{}", std::process::id()), None, &limits()).unwrap();
        groups.held = None;
        let folders = groups.folders.clone();
        std::mem::forget(groups);
        folders
    }

    #[test]
    fn test_sweep_removes_recorded_groups_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("tw-microvm-fake");
        fs::create_dir(&fake).unwrap();
        fs::write(dir.path().join("kept"), "kept").unwrap();
        // An ordinary folder with a group's name and files is none, wherever its files lead.
        let child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        fs::write(fake.join("cgroup.procs"), format!("{}\n", child.id())).unwrap();
        std::os::unix::fs::symlink(dir.path().join("kept"), fake.join("cgroup.kill")).unwrap();
        let link = dir.path().join("tw-microvm-link");
        let mut folders = abandoned("swept");
        std::os::unix::fs::symlink(folders.first().map_or(Path::new("/sys"), PathBuf::as_path), &link).unwrap();
        let groups = folders.clone();
        folders.extend([
            fake.clone(),
            link.clone(),
            "/sys/fs/cgroup".into(),
            "tw-microvm-relative".into(),
            dir.path().to_owned(),
        ]);
        assert!(sweep(&recorded(record(&folders).as_bytes())));
        assert!(groups.iter().all(|folder| !folder.exists()), "{groups:?}");
        assert_eq!(fs::read(dir.path().join("kept")).unwrap(), b"kept");
        assert!(fake.exists() && link.symlink_metadata().is_ok());
        let mut child = child;
        assert_eq!(child.try_wait().unwrap(), None, "a process of no group was killed");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn test_orphans_are_old_empty_groups_whose_lock_is_free() {
        let owned = Groups::create(&format!("owned-{}", std::process::id()), None, &limits()).unwrap();
        let folders = abandoned("orphan");
        let (Some(first), Some(held)) = (folders.first(), owned.folders.first()) else {
            eprintln!("skipped: no control groups here");
            return;
        };
        let removed = |folder: &Path, age| Open::group(folder).unwrap().unwrap().remove_orphan(age).unwrap();
        assert!(folders.iter().all(|folder| ours(None).contains(folder)));
        assert!(!removed(first, ORPHAN_AGE) && !removed(held, Duration::ZERO));
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        fs::write(first.join("cgroup.procs"), child.id().to_string()).unwrap();
        assert!(!removed(first, Duration::ZERO));
        child.kill().unwrap();
        child.wait().unwrap();
        for folder in &folders {
            let tries = (0..REMOVE_TRIES).find(|_| {
                std::thread::sleep(REMOVE_PAUSE);
                removed(folder, Duration::ZERO)
            });
            assert!(tries.is_some() && !folder.exists(), "{}", folder.display());
        }
        assert!(held.exists());
    }

    /// Groups with every controller but devices, which v2 has not; only root gets them without a word to anyone.
    fn full_groups(name: &str, limits: &Limits) -> Option<Groups> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root, or delegated groups");
            return None;
        }
        let groups = Groups::create(&format!("{name}-{}", std::process::id()), None, limits).unwrap();
        let missing = |(controller, outcome): &&Outcome| outcome.is_err() && *controller != Controller::Devices;
        assert!(!groups.outcomes().iter().any(|outcome| missing(&outcome)), "{:?}", groups.outcomes());
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
