//! Hard isolation for browser tabs, extensions, sessions and plugins: each in a microVM of its own.
//!
//! Architecture invariant: arrows point down. `py -> {doctor, manager} -> vm -> {vmm, channel, image, net} -> store ->
//! {host, model}`; only `py` knows Python, only `host` and `store` make system calls, `model` does no I/O at all.

pub mod channel;
pub mod doctor;
pub mod error;
pub mod host;
pub mod image;
pub mod manager;
pub mod model;
mod mutex;
pub mod net;
#[cfg(feature = "python")]
mod py;
pub mod store;
pub mod vm;
pub mod vmm;
