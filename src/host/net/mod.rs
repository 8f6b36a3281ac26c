//! Network interfaces, addresses, routes, rules and the kernel's settings for them.
//!
//! Architecture invariant: the only place that changes the host's network, and it decides nothing: what is to be done
//! comes in as text, messages or plain values, and what was done comes out as guards that undo it when dropped. What goes
//! wrong while undoing is logged. It changes what it made, and nothing else of the host's.

mod facts;
mod route;
mod rtnetlink;
mod socket;
mod table;
mod tap;
mod tool;
mod undo;
mod watch;

pub use facts::{
    counters, forwards, index_of, interfaces, is_cut_off, networks, ruleset, set_setting, setting, uplinks, Counters,
};
pub use route::{Destination, Routes};
pub use rtnetlink::{apply, apply_all, link, links, without_link_addresses, Change, Link, Rejected};
pub use socket::{listen_on, Listening};
pub use table::{Part, Table};
pub use tap::Tap;
pub use tool::Tool;
pub use undo::{Step, Undo};

use crate::error::Cause;

/// Why the host's network was not changed, and what to do about that.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub cause: Cause,
    pub remedy: String,
}

impl Refusal {
    pub(crate) fn new(cause: impl Into<Cause>, remedy: impl Into<String>) -> Self {
        Self { cause: cause.into(), remedy: remedy.into() }
    }

    /// The process may not do it.
    pub(crate) fn denied(what: impl Into<Cause>) -> Self {
        let what = what.into();
        let text = format!("{what}: this process lacks CAP_NET_ADMIN");
        Self::new(Cause::explained(what, text), PRIVILEGE_REMEDY)
    }
}

/// What gives a process the right to change the host's network.
pub const PRIVILEGE_REMEDY: &str =
    "run as root, or give the process CAP_NET_ADMIN in a way that the programs it starts \
                                    inherit (systemd: AmbientCapabilities=CAP_NET_ADMIN; a container: --cap-add \
                                    NET_ADMIN), or use isolated_network=True";
