//! PID 1 of the guest.
//!
//! Architecture invariant: blocking code on threads; knows the protocol and nothing of the host's core. It never exits
//! and never panics on purpose: the end of PID 1 is the end of the VM.

mod actions;
mod boot;
mod checksum;
mod children;
mod environment;
mod fork_gate;
mod freeze;
mod identity;
mod job;
mod memory;
mod network;
mod notifier;
mod pool;
mod port;
mod serve;
mod signals;
mod users;
mod vfork;
mod warm_up;

use std::sync::Arc;
use std::time::Duration;

use identity::{HostTime, UnprovisionedGuest};
use microvm_protocol::message::Outcome;
use network::Device;
use serve::{End, Server};

fn main() {
    // Before there is another thread.
    if let Err(error) = signals::block() {
        eprintln!("microvm-agent: the signals of poweroff: {error}");
    }
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
    let device = boot::set_up().and_then(|()| Device::open().map_err(|message| ("network", message)));
    let (device, outcome) = match device {
        Ok(device) => (device, Outcome::Ready),
        Err((stage, message)) => (None, failed(stage, &message)),
    };
    let guest = Arc::new(UnprovisionedGuest::open()?);
    children::start().map_err(|error| format!("the reaper: {error}"))?;
    signals::start().map_err(|error| format!("the thread for signals: {error}"))?;
    actions::watch_kernel_log();
    // Beside the boot: nobody waits for it.
    drop(
        std::thread::Builder::new()
            .name("cgroups".into())
            .stack_size(64 << 10)
            .spawn(boot::favor_moves_between_cgroups),
    );
    let mut port = port::open(outcome != Outcome::Ready)?;
    serve::keep_freed_memory();
    let (is_ready, mut outcome) = (outcome == Outcome::Ready, encode(&outcome)?);
    // Up to here every guest is like every other. HELLO is the host's readiness event; what follows is one VM's own.
    port.say_hello()?;
    let (offer, arrived) = port.wait_for_offer(|| warm_up::warm_up(&guest))?;
    let identity = guest.read_identity()?;
    if let Some(network) = identity.network.as_ref().filter(|_| is_ready) {
        let joined = device.as_ref().map_or(Err("there is no network device".into()), |device| device.join(network));
        outcome = joined.map_or_else(|message| encode(&failed("network", &message)), |()| Ok(outcome))?;
    }
    let half = port.take_offer(&offer, &identity)?;
    let time = HostTime { unix_time_ns: half.unix_time_ns(), arrived };
    let mut link = half.accept(&outcome)?;
    let mut server = Server::new(link.sender(), actions::Guest::new(guest.become_one(identity, time, false)));
    while let End::Frozen(standstill) = serve::serve(&mut link, &server)? {
        (link, server) = freeze::wake(standstill, link, server, &guest, device.as_ref())?;
    }
    Ok(())
}

fn encode(outcome: &Outcome) -> Result<Vec<u8>, String> {
    serde_json::to_vec(outcome).map_err(|error| error.to_string())
}

fn failed(stage: &str, message: &str) -> Outcome {
    Outcome::Failed { stage: stage.into(), message: message.chars().take(1000).collect() }
}
