//! What a VM owns while it runs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::watch;

use super::health::history::HealthHistory;
use super::ids::Ids;
use super::network::Connection;
use super::settings::{Facts, Settings, VmmFacts};
use super::start::confine::Confinement;
use super::start::identity_delivery::IdentityDelivery;
use super::start::prepare::Seen;
use crate::channel::{Agent, Broker, Owner};
use crate::error::{Error, Result, Tails};
use crate::host::net::Counters;
use crate::host::process::{Exit, Jailed};
use crate::host::procfs::Usage;
use crate::host::tail::Tail;
use crate::image::template::Fit;
use crate::model::{Backend, Grade, VmId};
use crate::mutex::Mutex;
use crate::store::disk::Disk;
use crate::store::VmDir;
use crate::vmm::{Capabilities, LiveTails, VmmControl};

/// How long the guest may take to answer that it shuts down, and then to do it.
const GUEST_DEADLINE: Duration = Duration::from_secs(3);
/// How long the VMM may take to end when told to.
const QUIT_DEADLINE: Duration = Duration::from_secs(2);
/// How long the kernel may take to reap a killed jail.
const REAP_DEADLINE: Duration = Duration::from_secs(5);

/// How long the rest of an ended guest's console is waited for.
const CONSOLE_DEADLINE: Duration = Duration::from_secs(1);
/// The last line that Linux writes to its console when it ends on purpose (kernel/reboot.c); after a panic it is another one.
const LAST_WORDS: [&str; 2] = ["reboot: Restarting system", "reboot: Power down"];
/// The last line of a Linux that halts, as it does for `poweroff -f` where it cannot switch the power off: its VMM goes on.
const HALTED: [&str; 2] = ["reboot: System halted", "reboot: Power off not available: System halted instead"];
/// The last line is found in so many bytes of the console.
const LAST_LINE_BYTES: usize = 256;

/// What a clone's memory began as, and what that depends on. Not its template's disk: that may be removed by now.
pub struct Base {
    pub ram: Arc<OwnedFd>,
    pub fit: Fit,
}

/// The parts of a running VM; fields drop in this order.
pub struct Running {
    pub(super) vm_id: VmId,
    pub(super) backend: Backend,
    /// Why it is that one.
    pub(super) chosen: String,
    pub(super) capabilities: Capabilities,
    pub(super) grade: Grade,
    pub(super) accelerator: &'static str,
    pub(super) program: VmmFacts,
    /// What it goes on using, as it was when the VM started.
    pub(super) seen: Vec<Seen>,
    pub(super) confinement: Confinement,
    pub(super) ids: Ids,
    pub(super) identity_delivery: IdentityDelivery,
    /// `None`: it booted.
    pub(super) base: Option<Box<Base>>,
    /// `boot`, `clone`, `pool` or `resume`.
    pub(super) origin: &'static str,
    pub(super) stages: Vec<(&'static str, Duration)>,
    pub(super) since: Instant,
    pub(super) cpu_sample: Mutex<(Instant, Usage)>,
    pub(super) health_history: Mutex<HealthHistory>,
    pub(super) broker: Mutex<Option<Broker>>,
    pub(super) agent: Arc<Agent>,
    pub(super) control: Box<dyn VmmControl>,
    pub(super) jailed: Jailed,
    pub(super) tails: LiveTails,
    pub(super) connection: Mutex<Option<Connection>>,
    pub(super) dir: Mutex<Option<VmDir>>,
    pub(super) disk: Mutex<Option<Disk>>,
}

impl Running {
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    pub fn control(&self) -> &dyn VmmControl {
        self.control.as_ref()
    }

    pub fn pid(&self) -> Option<i32> {
        self.jailed.pid()
    }

    pub fn is_alive(&self) -> bool {
        self.jailed.is_alive()
    }

    /// Gives clients of this user a socket to talk to the agent of `vm_id`.
    pub fn open_broker(&self, vm_id: &VmId, settings: &Settings) -> Result<()> {
        let dir = self.dir.lock();
        let Some(dir) = dir.as_ref() else { return Ok(()) };
        let broker = Broker::serve(vm_id.clone(), &dir.socket(), self.agent.clone(), settings.command_timeout)?;
        *self.broker.lock() = Some(broker);
        Ok(())
    }

    /// Names who does what attached clients ask of the VM's owner.
    pub fn set_owner(&self, owner: Arc<dyn Owner>) {
        if let Some(broker) = self.broker.lock().as_ref() {
            broker.set_owner(owner);
        }
    }

    /// Takes the directory and the disk of another name.
    pub fn rename(&self, vm_id: &VmId) -> Result<()> {
        let mut dir = self.dir.lock();
        let mut disk = self.disk.lock();
        // In place: to hand it to another thread would take longer than what it does.
        tokio::task::block_in_place(|| {
            dir.as_mut().map_or(Ok(()), |dir| dir.rename(vm_id))?;
            disk.as_mut().map_or(Ok(()), |disk| disk.rename(vm_id))
        })
    }

    /// Where its files are, as this host names it; `None` once they are gone.
    pub fn folder(&self) -> Option<PathBuf> {
        let dir = self.dir.lock();
        dir.as_ref().map(|dir| dir.path().to_owned())
    }

    /// Its disk, to be read.
    ///
    /// # Errors
    /// [`Error::Host`], also once it is gone.
    pub fn disk_reader(&self) -> Result<File> {
        let gone = || Error::host("open", &self.vm_id, "its disk is gone");
        let disk = self.disk.lock();
        let disk = disk.as_ref().ok_or_else(gone)?;
        disk.reader().map_err(|error| Error::host("open", disk.path().display(), error))
    }

    /// Ends the VMM by force; its end is noticed as any other.
    pub fn kill(&self) {
        self.jailed.kill();
    }

    pub fn exit_receiver(&self) -> watch::Receiver<Option<Exit>> {
        self.jailed.exit_receiver()
    }

    pub async fn exited(&self) -> Exit {
        self.jailed.exited().await
    }

    pub fn facts(&self) -> Facts {
        Facts {
            pid: self.pid(),
            backend: Some(self.backend),
            backend_reason: Some(self.chosen.clone()),
            grade: Some(self.grade),
            accelerator: Some(self.accelerator),
            vmm: Some(self.program.clone()),
            jail: Some(self.confinement.jail_json(&self.jailed)),
            limits: Some(self.confinement.limits_json()),
            origin: Some(self.origin),
            stages: self.stages.clone(),
            network: self.connection.lock().as_ref().map(|connection| connection.connected().clone()),
            ..Facts::default()
        }
    }

    /// Whether the VMM ended because its guest shut down or rebooted: not by a panic, nor by a fault of the VMM.
    pub async fn has_shut_down(&self, exit: &Exit) -> bool {
        if !matches!(exit, Exit::Code(0) | Exit::Signal(libc::SIGKILL)) {
            return false;
        }
        if tokio::time::timeout(CONSOLE_DEADLINE, self.tails.console.drained()).await.is_err() {
            log::debug!("{}: its console is still open", self.vm_id);
        }
        // A guest's reboot is ended by this process there: vmm/cloud_hypervisor/events.rs.
        let can_be = *exit == Exit::Code(0) || self.backend == Backend::CloudHypervisor;
        // The VMM of a halted guest is ended by this process.
        self.is_halted() || (can_be && ended_on_purpose(&self.end_of_console()))
    }

    /// Whether the guest's kernel has halted, as the console says: the VMM does not end by that.
    pub fn is_halted(&self) -> bool {
        is_halted(&self.end_of_console())
    }

    fn end_of_console(&self) -> String {
        self.tails.console.text_of_last(LAST_LINE_BYTES)
    }

    pub fn console(&self) -> &Tail {
        &self.tails.console
    }

    pub fn died(&self, exit: &Exit) -> Error {
        let tails: Tails = self.tails.read();
        Error::VmDied { vm_id: self.vm_id.clone(), how: exit.to_string(), tails: Box::new(tails) }
    }

    /// Ends the VMM: by the guest when `ask_guest`, else or when that takes too long by the VMM, else by force.
    pub async fn shut_down(&self, ask_guest: bool) {
        if ask_guest {
            match self.agent.request("shutdown", Value::Null, GUEST_DEADLINE).await {
                Ok(_) if self.ends_within(GUEST_DEADLINE).await => return self.reaped().await,
                Ok(_) => log::warn!("{}: the guest did not shut down in time; ending the VMM", self.vm_id),
                Err(error) => log::warn!("the guest could not be asked to shut down ({error}); ending the VMM"),
            }
        }
        match self.control.quit().await {
            Ok(true) if self.ends_within(QUIT_DEADLINE).await => return self.reaped().await,
            Ok(false) => log::debug!("{}: the VMM is killed, it has no other end", self.vm_id),
            Ok(true) => log::warn!("{}: the VMM did not end in time; killing it", self.vm_id),
            // The usual reason is that it has ended already.
            Err(error) => log::debug!("{error}"),
        }
        self.jailed.kill();
        self.reaped().await;
    }

    async fn ends_within(&self, deadline: Duration) -> bool {
        tokio::time::timeout(deadline, self.jailed.exited()).await.is_ok()
    }

    /// Waits until no process of the VM is left.
    pub async fn reaped(&self) {
        if tokio::time::timeout(REAP_DEADLINE, self.jailed.reaped()).await.is_err() {
            log::error!("{}: its processes were killed but not reaped within {REAP_DEADLINE:?}", self.vm_id);
        }
    }

    /// What the VM's network device moved, from the host's side; `None` without one.
    pub fn network_counters(&self) -> Option<Counters> {
        self.connection.lock().as_ref().map(Connection::counters)
    }

    /// How the VM's network ended that it had.
    pub fn network_lost(&self) -> Option<String> {
        self.connection.lock().as_ref().and_then(|connection| connection.connected().lost())
    }

    /// The folders of the VM's control groups.
    pub fn groups(&self) -> Vec<PathBuf> {
        let dir = self.dir.lock();
        dir.as_ref().map_or_else(Vec::new, |dir| dir.groups())
    }

    /// Removes the socket, the network and the files, even while someone still holds a reference.
    pub async fn release(&self) {
        drop(self.broker.lock().take());
        let connection = self.connection.lock().take();
        let dir = self.dir.lock().take();
        let disk = self.disk.lock().take();
        // They take some milliseconds, and others' work must not wait for that.
        let removed = tokio::task::spawn_blocking(move || {
            drop(connection);
            drop(dir);
            drop(disk);
        });
        if let Err(error) = removed.await {
            log::error!("{}: not all of it was removed: {error}", self.vm_id);
        }
    }
}

fn ended_on_purpose(console: &str) -> bool {
    LAST_WORDS.iter().any(|words| last_line(console).ends_with(words))
}

fn is_halted(console: &str) -> bool {
    HALTED.iter().any(|words| last_line(console).ends_with(words))
}

fn last_line(console: &str) -> &str {
    console.lines().map(str::trim_end).rfind(|line| !line.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_ended_on_purpose_goes_by_the_kernels_last_line() {
        assert!(ended_on_purpose("microvm-agent: x\n[   12.3] reboot: Restarting system\n\n"));
        assert!(ended_on_purpose("reboot: Power down"));
        let panic = "reboot: Restarting system\nKernel panic - not syncing: Fatal exception\n";
        for console in [panic, "", "reboot: System halted", "reboot: Restarting system, he said"] {
            assert!(!ended_on_purpose(console), "{console}");
        }
    }

    #[test]
    fn test_is_halted_goes_by_the_kernels_last_line() {
        assert!(is_halted("[    3.1] reboot: System halted\r\n"));
        assert!(is_halted("reboot: Power off not available: System halted instead"));
        for console in ["", "reboot: Power down", "reboot: System halted\nmicrovm-agent: x", "reboot: System halted?"] {
            assert!(!is_halted(console), "{console}");
        }
    }
}
