//! The network of one VM, as a plan: addresses, the host's end of the wire, the rules, the names it may ask for.
//!
//! Architecture invariant: pure. Configuration, what the host has, and random numbers go in; messages for rtnetlink,
//! text for `tc` and `nft`, and answers about DNS messages, come out. Nothing here is done: [`crate::host::net`] does it.

mod address;
mod dns;
mod firewall;
mod fitness;
mod links;
mod rules;
mod user;
mod vm_network;

pub use address::{choose, conflict, Addresses};
pub use dns::{Decision, Question, Relayed, Transport};
pub use firewall::Firewall;
pub use fitness::{problems, HostNetwork, Problem};
pub use links::{abandoned_down, abandoned_end, ifb_removed, Interface, GENERATED_TAP, IFB_PREFIX};
pub use rules::{is_never, Pinned, Rules, MAX_PINNED};
pub use user::{UserNetwork, UserReport, MAX_USER_NETWORK};
pub use vm_network::{Before, Resolution, Upstream, VmNetwork};

/// Compares with a file of `tests/golden`, so that a change shows as lines. `MICROVM_BLESS=1` writes it anew.
#[cfg(test)]
fn assert_golden(name: &str, text: &str) {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("MICROVM_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{path}");
}
