//! What a guest does once before it is frozen, so that its clones need not.
//!
//! Everything that happens only the first time (lazy set-up, page faults, allocator arenas) is done once here, with
//! names and keys that are discarded.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use microvm_protocol::connection::Connection;
use microvm_protocol::handshake::{GuestHandshake, HostHandshake, HostStep};
use microvm_protocol::identity::{Credentials, Identity, Key};
use microvm_protocol::record::Decoder;
use microvm_protocol::ProtocolError;

use crate::boot;
use crate::children::{self, Group};
use crate::identity::{HostTime, UnprovisionedGuest};
use crate::notifier::Notifier;
use crate::pool::Pool;
use crate::vfork::{Command, Steps};

const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// How long the kernel may take to trust its clock: about a second after it has booted on QEMU's TCG.
const CLOCK_DEADLINE: Duration = Duration::from_secs(3);
/// In an image without it the steps up to the exec are warm.
const PROGRAM: &str = "/bin/true";
const PROGRAM_DEADLINE: Duration = Duration::from_secs(3);

/// Failures are ignored: a clone meets them, too, and reports them.
pub fn warm_up(guest: &UnprovisionedGuest, pool: &Arc<Pool>) {
    settle_clock();
    pool.warm_up();
    drop(program());
    drop(guest.read_identity());
    let credentials = Credentials { key: Key([0; 32]), public: [0; 32], peer: [0; 32], shared: Key([0; 32]) };
    drop(handshake(&credentials));
    let identity = Identity {
        seed: credentials.key.clone(),
        credentials,
        machine_id: [0; 16],
        boot_id: [0; 16],
        max_file_handles: 0,
        max_processes: 0,
        vm_id: "microvm".into(),
        hostname: "microvm".into(),
        network: None,
        keeps_calls: false,
    };
    drop(guest.settle(&identity, HostTime::local()));
    fault_in();
}

/// Without its final clock source the kernel counts ticks: a hundred a second, in every clone, for ever.
fn settle_clock() {
    let end = Instant::now() + CLOCK_DEADLINE;
    let counts_ticks =
        || fs::read_to_string(CLOCK_SOURCE).is_ok_and(|name| name.contains("jiffies") || name.contains("early"));
    while counts_ticks() && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
}

/// The whole life of a program, without one that runs: the kernel's first for each step.
fn program() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let group = Group::create(boot::TOOLS_CGROUP)?;
    let procs = group.procs()?;
    let join = || Ok(nix::unistd::write(&procs, b"0").map(drop)?);
    let env = BTreeMap::new();
    let stdio = [null.as_fd(), null.as_fd(), null.as_fd()];
    let command = Command { program: PROGRAM, args: &[], env: &env, cwd: "/", user: None, stdio };
    let notifier = Notifier::new().map_err(|failure| io::Error::other(failure.message))?;
    let spawned = children::spawn(&command, Steps { first: &|| Ok(()), last: &join }, group, &notifier)?;
    let end = Instant::now() + PROGRAM_DEADLINE;
    while spawned.ended().is_none() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    spawned.kill();
    Ok(())
}

/// A whole handshake with itself, and one call after it.
fn handshake(credentials: &Credentials) -> Result<(), ProtocolError> {
    let guest = GuestHandshake::new(false)?;
    let mut host = HostHandshake::new(credentials.of_peer());
    let HostStep::Send(offer) = host.receive(&record(&guest.hello()?)?, 0)? else { return Ok(()) };
    let (accept, session) = guest.receive(&record(&offer)?, credentials)?.accept(b"{}")?;
    let HostStep::Established(peer, _) = host.receive(&record(&accept)?, 0)? else { return Ok(()) };
    let (mut host, mut guest) = (Connection::new(*peer), Connection::new(session));
    let mut bytes = Vec::new();
    let Ok(id) = host.calls.request(b"{}".to_vec()) else { return Ok(()) };
    host.transmit(&mut bytes, usize::MAX)?;
    guest.receive(&record(&bytes)?)?;
    guest.calls.respond(id, b"{}".to_vec()).unwrap_or_default();
    guest.transmit(&mut bytes, usize::MAX)
}

/// Maps every page of this program, so that no clone faults on one. Unlocking them leaves them mapped.
fn fault_in() {
    // SAFETY: neither call touches memory that Rust knows of.
    unsafe {
        libc::mlockall(libc::MCL_CURRENT);
        libc::munlockall();
    }
}

fn record(bytes: &[u8]) -> Result<Vec<u8>, ProtocolError> {
    let mut decoder = Decoder::default();
    decoder.feed(bytes);
    Ok(decoder.next_record()?.unwrap_or_default().to_vec())
}
