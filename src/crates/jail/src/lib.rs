//! The jail: a small launcher that confines and supervises one VMM process, and the types it speaks.
//!
//! What the core needs to talk to the launcher: [`LaunchSpec`], [`JailEvent`] and [`JailRequest`]. The launcher itself is
//! the feature `launcher`.
//!
//! Architecture invariant: the jail is single-threaded, knows no tokio and nothing of the core, and reads no file, no
//! argument and no environment variable of its own: all it acts on comes over the control socket. The VMM never
//! outlives the manager's end of that socket.
//!
//! # Processes
//!
//! ```text
//! manager ── posix_spawn ──> L  launcher: new session; opens the cgroups; an ordinary user's user namespace; forks C;
//!    │                       │            drops every descriptor; waits for C and exits with C's status
//!    │                       └─> C  supervisor: PID 1 of the PID namespace; joins the cgroups; enters the other
//!    │                           │              namespaces; builds the root; becomes the VM's user; drops every
//!    │                           │              privilege; forks V; watches V and the control socket
//!    └──── control socket ───────┤
//!                                └─> V  the VMM: own session, its descriptors, limits, Landlock, seccomp, exec
//! ```
//!
//! The files of `launcher` follow the stages: `confine` (namespaces, cgroups, limits), `root`, `identity`, `landlock`,
//! `seccomp` with its `policy`, `audit`. V's last step is its caller's: the program `microvm-jail` executes the VMM, and a
//! zygote, which is the VMM, loaded and linked, goes on in it.
//!
//! Root enters the user namespace last, when the others are made and the root is in place: they belong to the host's
//! user namespace, so even a VMM that won every capability of its own could change none of them. L writes the maps,
//! which nobody inside may. An ordinary user enters it first, because it is what gives the right to the others.
//!
//! Who dies takes the others along: the manager's end of the control socket reads as end-of-file in C, which kills V;
//! C's death ends the PID namespace (without one, V has a parent-death signal, safe because C has a single thread); V's
//! death is reported and ends C. L's death harms nobody: C goes on and still watches the manager. Without a PID
//! namespace C kills V and V's process group; a descendant that has moved itself to another session is out of reach,
//! and so are all of V's descendants when C itself is killed, which is why `namespaces.pid` is on unless switched off.
//!
//! # Control socket
//!
//! An `AF_UNIX` `SOCK_SEQPACKET` pair; the launcher's end is its stdin. One JSON document a packet:
//!
//! 1. manager to launcher: a [`LaunchSpec`], with the descriptors that [`LaunchSpec::fds`] places as `SCM_RIGHTS` of
//!    the same packet, and at most [`MAX_PACKET_BYTES`] long.
//! 2. launcher to manager: [`JailEvent`]s, at most [`MAX_EVENT_BYTES`] each. With `SO_PASSCRED` set on the manager's
//!    end **before** it sends the spec, `SCM_CREDENTIALS` tells the sender's pid as the manager sees it: the
//!    supervisor's for `supervising`, the VMM's for `started`.
//! 3. manager to launcher: [`JailRequest`]s.
//!
//! Closing the manager's end, `shutdown(SHUT_WR)` and an empty packet all mean: kill everything. After a
//! `shutdown(SHUT_WR)` the last events can still be read.
//!
//! # Order of events
//!
//! `supervising`, `started`, `exited` when all goes well. `failed` takes the place of whatever would have come next.
//! `started` is sent right before `exec`, because afterwards there is nobody left to send it, so a **`failed` that
//! follows `started` means that `exec` failed** and the VMM never ran. When the failure was in V, C still reports V's
//! end with `exited` (code [`SETUP_FAILED`]): the `failed` before it is the truth. End-of-file after the events means
//! that C is on its way out; the launcher's exit, that no process is left in the PID namespace.
//!
//! # Exit status of the launcher
//!
//! The VMM's exit code; 128 + signal when it was killed; [`SETUP_FAILED`] when the jail could not be set up;
//! 128 + signal as well when C itself was killed.

mod event;
#[cfg(feature = "launcher")]
pub mod launcher;
mod spec;

pub use event::{Confined, JailEvent, Layer, Stage, MAX_EVENT_BYTES, SETUP_FAILED};
pub use spec::{
    Access, Identity, JailRequest, LaunchSpec, Namespaces, Resource, Rlimit, Seccomp, SpecError, Visible, MAX_FDS,
    MAX_PACKET_BYTES, MAX_TARGET_FD,
};
