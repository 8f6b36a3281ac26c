//! Hard isolation for browser tabs, extensions, sessions and plugins: each in a microVM of its own.
//!
//! Architecture invariant: arrows point down. `py -> manager -> vm -> {vmm, channel, image, net} -> {host, model}`; only
//! `py` knows Python, only `host` makes system calls, `model` does no I/O at all.

pub mod channel;
pub mod error;
pub mod host;
pub mod image;
pub mod manager;
pub mod model;
pub mod net;
#[cfg(feature = "python")]
mod py;
pub mod vm;
pub mod vmm;
