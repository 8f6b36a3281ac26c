//! The machine underneath: processes, `/proc`, files with modes, sockets, KVM, control groups, network links.
//!
//! Architecture invariant: the only module of the core that makes system calls beyond plain file I/O, and the only one
//! with `unsafe`. It knows nothing of VMs or VMMs: it launches, watches and measures whatever it is given.

pub mod acl;
pub mod async_file;
pub mod binary;
pub mod cgroup;
pub mod clock;
pub mod destination;
pub mod elf;
pub mod fork;
#[cfg(feature = "python")]
mod heap;
pub mod kernel;
pub mod kvm;
pub mod memfd;
pub mod memory;
pub mod messages;
pub mod net;
#[cfg(feature = "python")]
pub mod notifier;
pub mod pidfd;
pub mod privileges;
pub mod process;
pub mod process_memory;
pub mod procfs;
pub mod reflink;
pub mod remedy;
pub mod rights;
pub mod rlimit;
pub mod socket_dir;
pub mod stream_socket;
pub mod tail;
pub mod tsc;
pub mod zygote;
