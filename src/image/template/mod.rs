//! Templates: a booted guest with a ready agent and no identity, of which every VM of its shape is a clone.
//!
//! ```text
//! <cache directory>/templates/        0700, owned by the effective user, in a cache with our mark (store/)
//!   <key>.lock                        held by the one process that makes the template
//!   <key>/                            appears whole, by a rename
//!     manifest                        JSON: what it fits, what the agent said, the digests of the three files
//!     ram                             guest memory, sparse
//!     disk                            the VM's own disk, mounted in the guest, sparse; each clone begins with a copy
//!     state                           device state, in the VMM's own format
//!     used                            empty; its time of change is that of the last use
//!   <key>.new/                        being made; whoever holds the lock removes the remains of a dead maker
//! ```
//! The key is the digest of all that the template depends on, so a template of something else is never found. What is
//! found is read once per process into sealed memory, and its digests are checked on the way; from there clones map it.
//! The files are looked at again before each clone: once one of them has changed, the template is not used any more.

mod digest;
mod files;
mod fit;
mod folder;
mod manifest;
mod snapshots;
mod store;

pub use digest::{Digest, Digests, FileId};
pub use files::{untouched_bytes, Template, DISK, RAM, STATE};
pub use fit::differences;
pub use manifest::{Fit, FitDrive, Manifest};
pub use snapshots::{
    clean_up_folder, NameLock, PendingSnapshot, Snapshot, SnapshotManifest, SnapshotMetadata, SnapshotStore,
};
pub use store::{remove_unfinished, Store, StoreLimits};
