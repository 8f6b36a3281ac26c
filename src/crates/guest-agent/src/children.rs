//! The processes of the guest: PID 1 reaps them all, in one place.
//!
//! Spawning holds the table's lock until the child is noted in it, so the reaper can't meet a child it does not know;
//! a child is signalled under the same lock, so its pid can't have gone to another process.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{killpg, Signal};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::Pid;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

static TABLE: Mutex<Option<HashMap<i32, Option<Ended>>>> = Mutex::new(None);
static CHANGED: Condvar = Condvar::new();

fn table() -> MutexGuard<'static, Option<HashMap<i32, Option<Ended>>>> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the reaper.
pub fn start() {
    std::thread::spawn(|| loop {
        match waitpid(None::<Pid>, None) {
            Ok(WaitStatus::Exited(pid, code)) => note(pid, Ended::Code(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) => note(pid, Ended::Signal(signal as i32)),
            Ok(_) => {}
            Err(Errno::ECHILD) => {
                // No children: the next ones come by `spawn`.
                let guard = table();
                drop(CHANGED.wait_timeout(guard, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner));
            }
            Err(_) => {}
        }
    });
}

fn note(pid: Pid, ended: Ended) {
    if let Some(slot) = table().get_or_insert_default().get_mut(&pid.as_raw()) {
        *slot = Some(ended);
    }
    CHANGED.notify_all();
}

/// A child that leads its own process group.
pub struct Spawned {
    pid: i32,
}

/// Spawns `command`, which must put the child into a group of its own.
pub fn spawn(command: &mut Command) -> io::Result<(Child, Spawned)> {
    let mut table = table();
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    table.get_or_insert_default().insert(pid, None);
    drop(table);
    CHANGED.notify_all();
    Ok((child, Spawned { pid }))
}

impl Spawned {
    /// Waits until the child has ended, at most until `deadline`.
    pub fn wait_until(&self, deadline: Instant) -> Option<Ended> {
        let mut guard = table();
        loop {
            if let Some(ended) = guard.as_ref().and_then(|table| table.get(&self.pid)).copied().flatten() {
                return Some(ended);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            guard = CHANGED.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Kills the child's whole group, if the child still runs.
    pub fn kill(&self) {
        let guard = table();
        if guard.as_ref().and_then(|table| table.get(&self.pid)) == Some(&None) {
            if let Err(error) = killpg(Pid::from_raw(self.pid), Signal::SIGKILL) {
                eprintln!("microvm-agent: kill group {}: {error}", self.pid);
            }
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Some(table) = table().as_mut() {
            table.remove(&self.pid);
        }
    }
}
