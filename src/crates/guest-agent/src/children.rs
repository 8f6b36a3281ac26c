//! The processes of the guest: PID 1 reaps them all, in one place.
//!
//! Spawning holds the table's lock until the child is noted in it, so the reaper can't meet a child it does not know.
//! Processes are killed by their control group: a pid might have gone to another process, and a group has no way out.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::wait::{waitid, waitpid, Id, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

/// The children that someone waits for, and how many were ever spawned.
struct Table {
    children: BTreeMap<i32, Option<Ended>>,
    spawned: u64,
}

static TABLE: Mutex<Table> = Mutex::new(Table { children: BTreeMap::new(), spawned: 0 });
static CHANGED: Condvar = Condvar::new();

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the reaper.
pub fn start() -> io::Result<()> {
    std::thread::Builder::new().name("reaper".into()).spawn(|| loop {
        let seen = table().spawned;
        match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(ended) => ended.pid().into_iter().for_each(reap),
            // No children. Orphans have parents that were spawned, so nothing happens before the next spawn.
            Err(Errno::ECHILD) => {
                let idle = CHANGED.wait_while(table(), |table| table.spawned == seen);
                drop(idle.unwrap_or_else(PoisonError::into_inner));
            }
            Err(_) => {}
        }
    })?;
    Ok(())
}

/// Takes the status of `pid`, with the table held: a child whose exec failed is waited for by `Command::spawn` itself,
/// which must find it.
fn reap(pid: Pid) {
    let mut table = table();
    let ended = match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Ended::Code(code),
        Ok(WaitStatus::Signaled(_, signal, _)) => Ended::Signal(signal as i32),
        _ => return,
    };
    if let Some(slot) = table.children.get_mut(&pid.as_raw()) {
        *slot = Some(ended);
    }
    drop(table);
    CHANGED.notify_all();
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

/// Spawns `command`, which must make the child join `group`.
pub fn spawn(command: &mut Command, group: Group) -> io::Result<(Child, Spawned)> {
    let mut table = table();
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    table.children.insert(pid, None);
    table.spawned += 1;
    drop(table);
    CHANGED.notify_all();
    Ok((child, Spawned { pid, group }))
}

impl Spawned {
    /// Waits until the child has ended, at most until `deadline`.
    pub fn wait_until(&self, deadline: Instant) -> Option<Ended> {
        let mut guard = table();
        loop {
            if let Some(ended) = guard.children.get(&self.pid).copied().flatten() {
                return Some(ended);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            guard = CHANGED.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Kills the child and all its descendants.
    pub fn kill(&self) {
        self.group.kill();
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        table().children.remove(&self.pid);
    }
}
