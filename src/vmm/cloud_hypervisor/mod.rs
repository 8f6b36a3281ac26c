//! Cloud Hypervisor: looked up and checked; VMs are not yet driven on it.

use crate::error::Result;
use crate::model::Backend;
use crate::vmm::{install, Binaries, Vmm};

/// # Errors
/// [`crate::error::Error::BackendUnavailable`]: the binary is missing, the host has no usable KVM, or this release
/// does not drive the VMM.
pub fn find(binaries: &Binaries) -> Result<Box<dyn Vmm>> {
    Err(install::not_driven(binaries, Backend::CloudHypervisor))
}
