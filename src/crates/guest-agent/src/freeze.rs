//! Standing still while the host takes this guest's state, and waking: as the VM that it was, or as another one.
//!
//! Architecture invariant: no program of the user's takes a step between FREEZE and [`UnprovisionedGuest::settle`]; a clone's first
//! step is taken with the clone's own entropy, time and names.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use microvm_protocol::message::{Code, Failure, Outcome};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::actions::Guest;
use crate::boot::CGROUPS;
use crate::children::FORK_GATE;
use crate::fork_gate::ClosedGate;
use crate::identity::{HostTime, UnprovisionedGuest};
use crate::network::Device;
use crate::port::Link;
use crate::serve::Server;
use crate::{encode, failed};

/// How long the kernel may take to stop every program: one that waits for a disk is stopped when that has answered.
const STOP_DEADLINE: Duration = Duration::from_secs(2);
/// How long the disk may take to be written; the host waits longer for the answer to FREEZE (vm/snapshot.rs).
const WRITE_DEADLINE: Duration = Duration::from_secs(20);
const WRITER_STACK_BYTES: usize = 64 << 10;
/// The root group, where the agent is, cannot be frozen: programs that moved there wait in this one.
const STRAYS: &str = "strays";
/// include/linux/sched.h: a thread of the kernel's, which draws no numbers for anyone.
const PF_KTHREAD: u64 = 0x0020_0000;

/// No program runs, and none is begun, for as long as this lives.
pub struct Standstill {
    _closed: ClosedGate<'static>,
    /// The groups that ran before: what the guest's own user froze stays so.
    frozen: Vec<PathBuf>,
}

impl Drop for Standstill {
    fn drop(&mut self) {
        let strays = Path::new(CGROUPS).join(STRAYS);
        let returned = if strays.is_dir() { return_strays(&strays) } else { Ok(()) };
        let thawed = self.frozen.iter().try_for_each(|group| write_state(group, "0"));
        if let Err(error) = returned.and(thawed) {
            eprintln!("microvm-agent: {CGROUPS}: {error}");
        }
    }
}

/// A group that was removed meanwhile holds no program.
fn unless_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

fn write_state(group: &Path, state: &str) -> io::Result<()> {
    unless_gone(fs::write(group.join("cgroup.freeze"), state))
}

/// Stops everything but the agent, and returns when it stands: what runs on request, and what has left its group.
pub fn stop_programs() -> Result<Standstill, Failure> {
    let busy = |message| Failure { code: Code::Busy, message };
    let late = |what| busy(format!("{what} within {} s", STOP_DEADLINE.as_secs()));
    let closed = FORK_GATE.close(STOP_DEADLINE).ok_or_else(|| late("a program could not be begun".into()))?;
    let mut standstill = Standstill { _closed: closed, frozen: Vec::new() };
    let end = Instant::now() + STOP_DEADLINE;
    let failed = |error: io::Error| busy(format!("{CGROUPS}: {error}"));
    // A program that still runs may move, make groups or thaw them: done is a round that found all of them standing.
    loop {
        let mut stood = gather_strays().map_err(failed)? == 0;
        for group in groups().map_err(failed)? {
            if stands(&group).map_err(failed)? {
                continue;
            }
            stood = false;
            write_state(&group, "1").map_err(failed)?;
            standstill.frozen.push(group.clone());
            if !wait_until_frozen(&group, end).map_err(failed)? {
                return Err(late(format!("a program of {} could not be stopped", group.display())));
            }
        }
        if stood {
            return Ok(standstill);
        }
        if Instant::now() >= end {
            return Err(late("the programs that move between control groups could not be stopped".into()));
        }
    }
}

/// Writes what is cached to the disk, so that the disk has it without the memory. A disk that takes longer does not keep the
/// guest from being frozen: the rest is written when it wakes.
pub fn write_disk() {
    let (done, written) = mpsc::channel();
    let write = move || {
        nix::unistd::sync();
        // The other end is gone when the time was over.
        done.send(()).unwrap_or_default();
    };
    let begun = std::thread::Builder::new().name("sync".into()).stack_size(WRITER_STACK_BYTES).spawn(write);
    let waited = begun.map_err(|error| error.to_string());
    if let Err(error) = waited.and_then(|_| written.recv_timeout(WRITE_DEADLINE).map_err(|error| error.to_string())) {
        eprintln!("microvm-agent: the disk was not written: {error}");
    }
}

/// The groups below the root group; each is frozen with all that are below it.
fn groups() -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(CGROUPS)?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries.iter().map(fs::DirEntry::path).filter(|path| path.is_dir()).collect())
}

/// Moves the programs of the root group into one that can be frozen; says how many there were.
fn gather_strays() -> io::Result<usize> {
    let mut moved = 0;
    for pid in pids(Path::new(CGROUPS))? {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if pid == 1 || !is_program(&stat) {
            continue;
        }
        let strays = Path::new(CGROUPS).join(STRAYS);
        if !strays.is_dir() {
            fs::create_dir(&strays)?;
        }
        move_to(pid, &strays)?;
        moved += 1;
    }
    Ok(moved)
}

/// Back to the root group, where they go on.
fn return_strays(strays: &Path) -> io::Result<()> {
    for pid in pids(strays)? {
        move_to(pid, Path::new(CGROUPS))?;
    }
    // It stays while a process that was begun meanwhile is in it.
    match fs::remove_dir(strays) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        other => unless_gone(other),
    }
}

fn pids(group: &Path) -> io::Result<Vec<u32>> {
    Ok(fs::read_to_string(group.join("cgroup.procs"))?.lines().filter_map(|line| line.parse().ok()).collect())
}

/// A process that has ended meanwhile needs no place.
fn move_to(pid: u32, group: &Path) -> io::Result<()> {
    match fs::write(group.join("cgroup.procs"), pid.to_string()) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

/// proc_pid_stat(5): the state is the first field after the name, the flags the seventh. A zombie takes no step.
fn is_program(stat: &str) -> bool {
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or_else(Vec::new, |(_, rest)| rest.split(' ').collect());
    let flags = fields.get(6).and_then(|flags| flags.parse::<u64>().ok());
    fields.first().is_some_and(|state| !matches!(*state, "Z" | "X"))
        && flags.is_some_and(|flags| flags & PF_KTHREAD == 0)
}

fn stands(group: &Path) -> io::Result<bool> {
    match fs::read_to_string(group.join("cgroup.events")) {
        Ok(events) => Ok(says_frozen(&events)),
        Err(error) => unless_gone(Err(error)).map(|()| true),
    }
}

/// cgroup.events can be polled for a change (Documentation/admin-guide/cgroup-v2.rst).
fn wait_until_frozen(group: &Path, end: Instant) -> io::Result<bool> {
    let mut events = match File::open(group.join("cgroup.events")) {
        Ok(events) => events,
        Err(error) => return unless_gone(Err(error)).map(|()| true),
    };
    let mut text = String::new();
    loop {
        text.clear();
        events.rewind()?;
        match events.read_to_string(&mut text) {
            Ok(_) if says_frozen(&text) => return Ok(true),
            Ok(_) => {}
            Err(error) => return unless_gone(Err(error)).map(|()| true),
        }
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if left.is_zero() || poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout)? == 0 {
            return Ok(false);
        }
    }
}

fn says_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

/// Waits for the host's next OFFER. In the guest that was frozen the requests under way go on; in any other one nobody
/// waits for them: they are cancelled, and their programs with them.
pub fn wake(
    standstill: Standstill,
    link: Link,
    server: Arc<Server>,
    guest: &Arc<UnprovisionedGuest>,
    device: Option<&Device>,
) -> Result<(Link, Arc<Server>), String> {
    let mut port = link.port()?;
    let (offer, arrived) = port.wait_for_offer(|| ())?;
    let identity = guest.read_identity()?;
    let half = port.take_offer(&offer, &identity)?;
    let time = HostTime { unix_time_ns: half.unix_time_ns(), arrived };
    guest.settle(&identity, time)?;
    if identity.keeps_calls {
        half.accept_for(&link, &encode(&Outcome::Ready)?)?;
        drop(standstill);
        return Ok((link, server));
    }
    server.cancel_all();
    let joined = match (&identity.network, device) {
        (None, _) => Ok(()),
        (Some(_), None) => Err("there is no network device".into()),
        (Some(network), Some(device)) => device.rejoin(network),
    };
    let outcome = joined.map_or_else(|message| failed("network", &message), |()| Outcome::Ready);
    let link = half.accept(&encode(&outcome)?)?;
    drop(standstill);
    let server = Server::new(link.sender(), Guest::new(guest.become_one(identity, time, true)));
    Ok((link, server))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_says_frozen_only_of_a_group_that_stands() {
        assert!(says_frozen("populated 1\nfrozen 1\n"));
        assert!(!says_frozen("populated 1\nfrozen 0\n"));
        assert!(!says_frozen(""));
    }

    #[test]
    fn test_is_program_leaves_out_the_kernels_threads_and_the_dead() {
        let stat = |state: &str, flags: u64| format!("7 (a) b) {state} 1 7 7 0 -1 {flags} 0 0");
        assert!(is_program(&stat("S", 0x0040_0100)));
        assert!(!is_program(&stat("I", PF_KTHREAD | 0x40)));
        assert!(!is_program(&stat("Z", 0)));
        assert!(!is_program(""));
    }
}
