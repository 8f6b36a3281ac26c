//! The processes of the guest: PID 1 reaps them all, in one place.
//!
//! Spawning holds the table's lock until the child is noted in it, so the reaper can't meet a child it does not know.
//! Processes are killed by their control group: a pid might have gone to another process, and a group has no way out.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::fork_gate::ForkGate;
use crate::notifier::Notifier;
use crate::vfork::{self, Command, Steps};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

/// A child that someone waits for.
struct Child {
    ended: Option<Ended>,
    notifier: Arc<Notifier>,
}

/// The reaper calls little and keeps nothing.
const STACK_BYTES: usize = 64 << 10;

/// The children that someone waits for, how many were ever spawned, and whether a process is left beside PID 1.
struct Table {
    children: BTreeMap<i32, Child>,
    spawned: u64,
    is_alone: bool,
}

/// Closed while the guest is frozen.
pub static FORK_GATE: ForkGate = ForkGate::new();
static TABLE: Mutex<Table> = Mutex::new(Table { children: BTreeMap::new(), spawned: 0, is_alone: true });
/// There is a child to wait for.
static SPAWNED: Condvar = Condvar::new();
/// PID 1 is alone.
static ALONE: Condvar = Condvar::new();
/// How long the program that asked for the end of the machine may take to end by itself.
const ASKER_DEADLINE: Duration = Duration::from_millis(250);

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the reaper.
pub fn start() -> io::Result<()> {
    std::thread::Builder::new().name("reaper".into()).stack_size(STACK_BYTES).spawn(|| loop {
        let seen = table().spawned;
        match next_ended() {
            Ok(pid) => reap(pid),
            // No children. Orphans have parents that were spawned, so nothing happens before the next spawn.
            Err(Errno::ECHILD) => {
                let mut table = table();
                table.is_alone = table.spawned == seen;
                ALONE.notify_all();
                let idle = SPAWNED.wait_while(table, |table| table.spawned == seen);
                drop(idle.unwrap_or_else(PoisonError::into_inner));
            }
            Err(_) => {}
        }
    })?;
    Ok(())
}

/// Waits for a child that has ended, and leaves its status to be taken.
fn next_ended() -> Result<i32, Errno> {
    // SAFETY: zeros are a valid siginfo_t, which waitid(2) fills. Not nix's waitid: it fails on a child that a signal
    // without a name ended, for ever, as the child stays.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is writable for the length of the call.
    Errno::result(unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOWAIT) })?;
    // SAFETY: waitid(2) has filled in the fields of a child.
    Ok(unsafe { info.si_pid() })
}

/// Takes the status of `pid`, with the table held: a child whose exec failed is waited for by [`vfork::spawn`], which must
/// find it.
fn reap(pid: i32) {
    let mut guard = table();
    let mut status = 0;
    // SAFETY: waitpid(2) writes one number. Not nix's: that one fails on the signals that have no name, 32 to 64.
    if unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } != pid {
        return;
    }
    let ended = match libc::WIFSIGNALED(status) {
        true => Ended::Signal(libc::WTERMSIG(status)),
        false => Ended::Code(libc::WEXITSTATUS(status)),
    };
    if let Some(child) = guard.children.get_mut(&pid) {
        child.ended = Some(ended);
        child.notifier.notify();
    }
}

/// A control group for one request's processes, so that all of them can be ended, whatever they made of themselves.
pub struct Group {
    path: String,
}

static NEXT_GROUP: AtomicU64 = AtomicU64::new(0);
/// Groups whose request is over. They are removed once they are empty: a program may leave a service behind.
static FINISHED: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Group {
    pub fn create(parent: &str) -> io::Result<Self> {
        FINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| fs::remove_dir(path).is_err());
        let path = format!("{parent}/{}", NEXT_GROUP.fetch_add(1, Ordering::Relaxed));
        fs::create_dir(&path)?;
        Ok(Self { path })
    }

    /// The file that a process joins the group by.
    pub fn procs(&self) -> io::Result<File> {
        OpenOptions::new().write(true).open(format!("{}/cgroup.procs", self.path))
    }

    fn kill(&self) {
        if let Err(error) = fs::write(format!("{}/cgroup.kill", self.path), "1") {
            eprintln!("microvm-agent: {}/cgroup.kill: {error}", self.path);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if fs::remove_dir(&self.path).is_err() {
            FINISHED.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.path));
        }
    }
}

/// A child, and the group in which it and its descendants live.
pub struct Spawned {
    pid: i32,
    group: Group,
}

/// Spawns `command`, which must make the child join `group`, and notifies `notifier` when the child has ended.
pub fn spawn(command: &Command<'_>, steps: Steps<'_>, group: Group, notifier: &Arc<Notifier>) -> io::Result<Spawned> {
    let mut table = table();
    let pid = vfork::spawn(command, steps)?;
    table.children.insert(pid, Child { ended: None, notifier: notifier.clone() });
    table.spawned += 1;
    table.is_alone = false;
    drop(table);
    SPAWNED.notify_all();
    Ok(Spawned { pid, group })
}

/// Asks every process to end, and waits, at most `grace`, until none is left.
pub fn end_all(grace: Duration) {
    // The one that asked for it is to end as a program does, not by a signal.
    if is_alone_within(ASKER_DEADLINE) {
        return;
    }
    match kill(Pid::from_raw(-1), Signal::SIGTERM) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => eprintln!("microvm-agent: SIGTERM to all: {error}"),
    }
    is_alone_within(grace);
}

fn is_alone_within(deadline: Duration) -> bool {
    let waited = ALONE.wait_timeout_while(table(), deadline, |table| !table.is_alone);
    waited.unwrap_or_else(PoisonError::into_inner).0.is_alone
}

impl Spawned {
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How the child ended, once it has.
    pub fn ended(&self) -> Option<Ended> {
        table().children.get(&self.pid).and_then(|child| child.ended)
    }

    /// Kills the child and all its descendants.
    pub fn kill(&self) {
        self.group.kill();
    }

    /// Sends a signal to the child's process group; SIGKILL goes to all its descendants.
    pub fn signal(&self, signal: i32) {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        // Under the table's lock a child that was not reaped is not reaped now: the pid is its own.
        let table = table();
        let alive = table.children.get(&self.pid).is_some_and(|child| child.ended.is_none());
        if alive {
            // ESRCH: it has ended, and the reaper waits for the lock.
            // SAFETY: killpg(3) takes two numbers. Not nix's: that one knows no real-time signals.
            if let Err(error) = Errno::result(unsafe { libc::killpg(self.pid, signal) }) {
                eprintln!("microvm-agent: signal {signal} to {}: {error}", self.pid);
            }
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        table().children.remove(&self.pid);
    }
}
