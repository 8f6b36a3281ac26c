//! Standing still while the host takes this guest's state, and waking: as the VM that it was, or as another one.
//!
//! Architecture invariant: no program of the user's takes a step between FREEZE and [`Blank::settle`]; a clone's first
//! step is taken with the clone's own entropy, time and names.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::message::{Code, Failure, Outcome};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::actions::Guest;
use crate::boot::WORK_CGROUP;
use crate::children::DOOR;
use crate::door::Shut;
use crate::identity::{Blank, HostTime};
use crate::network::Device;
use crate::port::Link;
use crate::serve::Server;
use crate::{encode, failed};

/// How long the kernel may take to stop every program: one that waits for a disk is stopped when that has answered.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// No program runs, and none is begun, for as long as this lives.
pub struct Standstill {
    _shut: Shut<'static>,
}

impl Drop for Standstill {
    fn drop(&mut self) {
        if let Err(error) = write_state("0") {
            eprintln!("microvm-agent: {WORK_CGROUP}: {error}");
        }
    }
}

fn write_state(state: &str) -> io::Result<()> {
    fs::write(format!("{WORK_CGROUP}/cgroup.freeze"), state)
}

/// Stops everything that runs on request, and returns when it stands.
pub fn stop_programs() -> Result<Standstill, Failure> {
    let busy = |message| Failure { code: Code::Busy, message };
    let late = |what| busy(format!("a program could not be {what} within {} s", STOP_DEADLINE.as_secs()));
    let shut = DOOR.shut(STOP_DEADLINE).ok_or_else(|| late("begun"))?;
    let standstill = Standstill { _shut: shut };
    match write_state("1").and_then(|()| wait_until_frozen()) {
        Ok(true) => Ok(standstill),
        Ok(false) => Err(late("stopped")),
        Err(error) => Err(busy(format!("{WORK_CGROUP}: {error}"))),
    }
}

/// cgroup.events can be polled for a change (Documentation/admin-guide/cgroup-v2.rst).
fn wait_until_frozen() -> io::Result<bool> {
    let mut events = File::open(format!("{WORK_CGROUP}/cgroup.events"))?;
    let end = Instant::now() + STOP_DEADLINE;
    let mut text = String::new();
    loop {
        text.clear();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if says_frozen(&text) {
            return Ok(true);
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
    blank: &Arc<Blank>,
    device: Option<&Device>,
) -> Result<(Link, Arc<Server>), String> {
    let mut port = link.port()?;
    let (offer, arrived) = port.wait_for_offer(|| ())?;
    let identity = blank.read_identity()?;
    let half = port.take_offer(&offer, &identity)?;
    let time = HostTime { unix_time_ns: half.unix_time_ns(), arrived };
    blank.settle(&identity, time)?;
    if identity.keeps_exchanges {
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
    let server = Server::new(link.sender(), Guest::new(blank.become_one(identity, time, true)));
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
}
