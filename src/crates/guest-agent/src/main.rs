//! PID 1 of the guest.
//!
//! Architecture invariant: blocking code on threads; knows the protocol and nothing of the host's core. It never exits
//! and never panics on purpose: the end of PID 1 is the end of the VM.

mod actions;
mod boot;
mod children;
mod network;
mod port;
mod random;
mod resolve;
mod serve;

use std::time::Duration;

use microvm_protocol::message::Event;

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
    // HELLO before anything else: it is the host's readiness event, and the host works while we do.
    let mut port = port::open()?;
    port.say_hello()?;
    let identity = boot::read_identity()?;
    boot::become_identity(&identity)?;
    children::start().map_err(|error| format!("the reaper: {error}"))?;
    let link = port.shake_hands(&identity.key)?;
    let event = match boot::set_up(&identity) {
        Ok(()) => Event::Ready,
        Err((stage, message)) => Event::StartFailed { stage: stage.into(), message },
    };
    link.send_event(&event)?;
    serve::serve(link, actions::Guest::new(identity))
}
