//! What a guest does once before it is frozen, so that its clones need not.
//!
//! Everything that happens only the first time (lazy set-up, page faults, allocator arenas) is done once here, with
//! names and keys that are discarded.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use microvm_protocol::connection::Connection;
use microvm_protocol::handshake::{GuestHandshake, HostHandshake, HostStep};
use microvm_protocol::identity::{Credentials, Identity, Key};
use microvm_protocol::record::Decoder;
use microvm_protocol::ProtocolError;

use crate::identity::{HostTime, UnprovisionedGuest};

const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// How long the kernel may take to trust its clock: about a second after it has booted on QEMU's TCG.
const CLOCK_DEADLINE: Duration = Duration::from_secs(3);

/// Failures are ignored: a clone meets them, too, and reports them.
pub fn warm_up(guest: &UnprovisionedGuest) {
    settle_clock();
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
