//! Copies of a running VM's state: templates of the users' own, and suspended VMs.

pub mod copy;
pub mod suspend;
pub mod take;
