//! From a spec to a running VM, in the order of a start: what can be refused or made before a process runs, the jail, the
//! template, the launch, and the guest's identity. Whatever is made on the way is undone when a step fails.

pub mod attempt;
pub mod confine;
pub mod identity_delivery;
pub mod launching;
pub mod preparation;
pub mod prepare;
pub mod template;
pub mod warm;
