//! PID 1 of the guest.
//!
//! Architecture invariant: blocking code on threads; knows the protocol and nothing of the host's core. It never exits
//! and never panics on purpose: the end of PID 1 is the end of the VM.

mod actions;
mod boot;
mod checksum;
mod children;
mod identity;
mod job;
mod network;
mod pool;
mod port;
mod rehearsal;
mod resolve;
mod serve;

use std::time::Duration;

use identity::{Blank, HostTime};
use microvm_protocol::message::Outcome;

fn main() {
    let outcome = run();
    // Only a guest that cannot be talked to comes here; the console's tail is part of the host's error.
    eprintln!("microvm-agent: {}", outcome.err().unwrap_or_else(|| "the host closed the transport".into()));
    boot::power_off();
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn run() -> Result<(), String> {
    boot::mount_kernel_filesystems()?;
    let outcome = match boot::set_up() {
        Ok(()) => Outcome::Ready,
        Err((stage, message)) => Outcome::Failed { stage: stage.into(), message: message.chars().take(1000).collect() },
    };
    let blank = Blank::open()?;
    children::start().map_err(|error| format!("the reaper: {error}"))?;
    let mut port = port::open(outcome != Outcome::Ready)?;
    serve::keep_freed_memory();
    let encode = |outcome: &Outcome| serde_json::to_vec(outcome).map_err(|error| error.to_string());
    let (is_ready, mut outcome) = (outcome == Outcome::Ready, encode(&outcome)?);
    // Up to here every guest is like every other. HELLO is the host's readiness event; what follows is one VM's own.
    port.say_hello()?;
    let (offer, arrived) = port.wait_for_offer(|| rehearsal::rehearse(&blank))?;
    let identity = blank.read_identity()?;
    if let Some(Err(message)) = identity.network.as_ref().filter(|_| is_ready).map(network::set_up) {
        outcome = encode(&Outcome::Failed { stage: "network".into(), message })?;
    }
    let (link, unix_time_ns) = port.shake_hands(&offer, &identity, &outcome)?;
    serve::serve(link, actions::Guest::new(blank.become_one(identity, HostTime { unix_time_ns, arrived })))
}
