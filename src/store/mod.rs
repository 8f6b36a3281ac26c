//! What this program keeps on disk: the only code that sweeps, removes, locks or believes files.
//!
//! Architecture invariant: a folder is opened once, component by component and without following links that another user
//! could have made; owner, mode and mark are checked on the descriptor, and all work goes through it ([`Dir`]). What fails
//! a check is refused with the reason; it is neither used nor removed. Paths are absolute ([`path`]).

mod base;
mod dir;
pub mod disk;
pub mod lease;
mod lock;
mod mark;
pub mod path;
mod remove;
pub mod runtime;
mod walk;

pub use base::{check_apart, default_cache, default_runtime, Base, Kind, Root};
#[cfg(test)]
pub(crate) use dir::tests::private_dir;
pub use dir::{Dir, Entry, Id};
pub use lock::{Lock, Turn};
pub use runtime::{Existing, Folders, VmDir};
pub use walk::{to_socket, Refusal};
