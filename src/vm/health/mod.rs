//! The health of a running VM: the data, one sample of it, and the monitor that takes samples.

pub mod history;
pub mod monitor;
pub mod sample;
