//! What Cloud Hypervisor tells of a VM's life on its own (docs/logging.md, `--event-monitor`).
//!
//! One event matters: a guest that reboots, a panic included, is booted again in the same process. It would come up as
//! a VM that nobody has a session with, so its process is ended instead, as with the other VMMs.

use std::os::fd::OwnedFd;

use libc::SIGKILL;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use serde::Deserialize;
use tokio::io::BufReader;
use tokio::net::unix::pipe;

use crate::error::{Cause, Error, Result};
use crate::host::process::Signals;
use crate::model::VmId;
use crate::vmm::line::{self, read_line};

/// Events are some hundred bytes.
const MAX_EVENT_BYTES: usize = 64 * 1024;

#[derive(Debug, Deserialize)]
struct Event {
    source: String,
    event: String,
}

/// The pipe that it writes its events into.
pub struct Events {
    reader: pipe::Receiver,
}

impl Events {
    /// The reading end, and the one that is the VMM's.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn pipe() -> Result<(Self, OwnedFd)> {
        let failed = |cause: Cause| Error::host("pipe", "a VMM's events", cause);
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| failed(e.into()))?;
        let reader = pipe::Receiver::from_owned_fd(reader).map_err(|e| failed(e.into()))?;
        Ok((Self { reader }, writer))
    }

    /// Ends the VMM when its guest reboots; returns when the VMM has ended.
    pub async fn watch(self, vm_id: VmId, signals: Signals) {
        let mut lines = BufReader::new(self.reader);
        let mut told = Vec::new();
        loop {
            let before = told.len();
            match read_line(&mut lines, &mut told, MAX_EVENT_BYTES).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) if told.len() > MAX_EVENT_BYTES => {
                    return line::end(&vm_id, "its events", MAX_EVENT_BYTES, Some(&signals));
                }
                Err(error) => return log::warn!("{vm_id}: Cloud Hypervisor's events cannot be read: {error}"),
            }
            // An empty line ends an event.
            if told[before..].iter().all(u8::is_ascii_whitespace) {
                if is_reboot(&told) {
                    log::info!("{vm_id}: its guest reboots, which ends it");
                    signals.send(SIGKILL);
                }
                told.clear();
            }
        }
    }
}

fn is_reboot(told: &[u8]) -> bool {
    let event: Option<Event> = serde_json::from_slice(told).ok();
    event.is_some_and(|event| event.source == "vm" && event.event == "rebooting")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_only_the_vms_reboot_is_one() {
        let event = |source: &str, event: &str| {
            format!("{{\n  \"timestamp\": {{\"secs\": 1, \"nanos\": 2}},\n  \"source\": \"{source}\",\n  \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n")
        };
        assert!(is_reboot(event("vm", "rebooting").as_bytes()));
        assert!(!is_reboot(event("vm", "booted").as_bytes()));
        assert!(!is_reboot(event("virtio-device", "rebooting").as_bytes()));
        assert!(!is_reboot(b"\"rebooting\"\n"));
    }
}
