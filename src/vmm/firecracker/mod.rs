//! Firecracker: looked up and checked; VMs are not yet driven on it.

use crate::error::{Error, Result};
use crate::host::kvm;
use crate::model::Backend;
use crate::vmm::qemu::Qemu;
use crate::vmm::Binaries;

/// # Errors
/// Always [`Error::BackendUnavailable`]: the binary is missing, the host has no usable KVM, or this release does not
/// drive the VMM.
pub fn find(binaries: &Binaries) -> Result<Qemu> {
    let backend = Backend::Firecracker;
    binaries.locate(backend)?;
    let kvm = kvm::probe();
    if !kvm.usable {
        let remedy = format!("{}; or use backend=\"qemu\", which runs without KVM", kvm.remedy.unwrap_or_default());
        return Err(Error::BackendUnavailable { backend, reason: format!("it needs KVM: {}", kvm.reason), remedy });
    }
    let reason = "this release does not drive it yet".into();
    Err(Error::BackendUnavailable { backend, reason, remedy: "use backend=\"qemu\"".into() })
}
