//! Which backend a VM gets, and why.

use super::{cloud_hypervisor, firecracker, qemu, Binaries, Capabilities, Vmm};
use crate::error::{Error, Result, Shortfall};
use crate::host::kvm;
use crate::model::{Backend, Grade, VmId, VmSpec};

/// What a VM asks of its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendRequest {
    /// `None`: the best one that can do the rest.
    pub backend: Option<Backend>,
    pub min_isolation: Option<Grade>,
    pub vcpu_count: u64,
}

/// A backend, and in words why it is this one.
pub struct Selection {
    pub vmm: Box<dyn Vmm>,
    pub reason: String,
}

/// Most able first. A VM does not say beforehand whether it will be copied, so one whose maker left the choice gets the
/// backend that can do all of it, although isolated clones of Firecracker start sooner; the others by what a guest faces.
const ORDER: [Backend; 3] = [Backend::Qemu, Backend::Firecracker, Backend::CloudHypervisor];

impl BackendRequest {
    #[must_use]
    pub fn of(spec: &VmSpec, min_isolation: Option<Grade>) -> Self {
        Self { backend: spec.backend, min_isolation, vcpu_count: spec.limits.vcpu_count }
    }

    /// Why a backend cannot do what is asked for.
    fn refusal(&self, can: Capabilities) -> Option<String> {
        let vcpus = self.vcpu_count;
        if vcpus > can.max_vcpus {
            return Some(format!("it has at most {} vCPUs, {vcpus} were asked for", can.max_vcpus));
        }
        let uneven = can.even_vcpus && vcpus != 1 && !vcpus.is_multiple_of(2);
        uneven.then(|| format!("it has one vCPU or an even number, {vcpus} were asked for"))
    }
}

/// # Errors
/// [`Error::BackendUnavailable`], [`Error::Host`].
pub fn find(backend: Backend, binaries: &Binaries) -> Result<Box<dyn Vmm>> {
    Ok(match backend {
        Backend::Qemu => Box::new(qemu::Qemu::find(binaries)?),
        Backend::Firecracker => Box::new(firecracker::Firecracker::find(binaries)?),
        Backend::CloudHypervisor => Box::new(cloud_hypervisor::CloudHypervisor::find(binaries)?),
    })
}

/// Finds `backend` and holds the request against what it can.
fn suitable(backend: Backend, request: &BackendRequest, binaries: &Binaries) -> Result<Box<dyn Vmm>> {
    let vmm = find(backend, binaries)?;
    match request.refusal(vmm.capabilities()) {
        None => Ok(vmm),
        Some(reason) => {
            let remedy = "ask for something else, or leave the backend out".to_owned();
            Err(Error::BackendUnavailable { backend, reason, remedy })
        }
    }
}

/// The backend asked for, or the best one that this host can run.
///
/// # Errors
/// [`Error::BackendUnavailable`] that says what to install; [`Error::IsolationUnavailable`].
pub fn select(vm_id: &VmId, request: &BackendRequest, binaries: &Binaries) -> Result<Selection> {
    let Selection { vmm, reason } = match request.backend {
        Some(backend) => Selection { vmm: suitable(backend, request, binaries)?, reason: "it was asked for".into() },
        None => best(request, binaries)?,
    };
    if let Some(min) = request.min_isolation.filter(|min| *min > vmm.grade()) {
        let kvm = kvm::probe();
        let shortfall = Box::new(Shortfall {
            wanted: format!("min_isolation={min}"),
            offered: vmm.grade().to_string(),
            limited_by: "this host".into(),
            reason: kvm.reason,
            remedy: kvm.remedy.unwrap_or_default(),
            missing: Vec::new(),
        });
        return Err(Error::IsolationUnavailable { vm_id: vm_id.clone(), shortfall });
    }
    Ok(Selection { vmm, reason })
}

/// The first that can do it; the error, when none can, is the first one's, with the others' reasons.
fn best(request: &BackendRequest, binaries: &Binaries) -> Result<Selection> {
    let mut passed_over: Vec<(Backend, Error)> = Vec::new();
    for backend in ORDER {
        match suitable(backend, request, binaries) {
            Ok(vmm) if passed_over.is_empty() => {
                let reason =
                    "no backend was asked for, and only its VMs can be snapshotted, suspended, cloned with a network \
                              and jailed strictly";
                return Ok(Selection { vmm, reason: reason.into() });
            }
            Ok(vmm) => return Ok(Selection { vmm, reason: format!("the next best: {}", told(&passed_over)) }),
            Err(error @ Error::BackendUnavailable { .. }) => passed_over.push((backend, error)),
            Err(error) => return Err(error),
        }
    }
    let first = passed_over.swap_remove(0).1;
    match first {
        Error::BackendUnavailable { backend, reason, remedy } => {
            let reason = format!("{reason} (nor the others: {})", told(&passed_over));
            Err(Error::BackendUnavailable { backend, reason, remedy })
        }
        other => Err(other),
    }
}

fn told(passed_over: &[(Backend, Error)]) -> String {
    let reason = |error: &Error| match error {
        Error::BackendUnavailable { reason, .. } => reason.clone(),
        other => other.to_string(),
    };
    let lines: Vec<String> =
        passed_over.iter().map(|(backend, error)| format!("{backend}: {}", reason(error))).collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Wire;

    const REQUEST: BackendRequest = BackendRequest { backend: None, min_isolation: None, vcpu_count: 3 };
    const CAN: Capabilities = Capabilities {
        clones: false,
        copies: false,
        config_drive: true,
        wire: Wire::Named,
        streams_frames: false,
        max_vcpus: 32,
        even_vcpus: true,
    };

    #[test]
    fn test_refusal_names_what_the_backend_cannot_do() {
        let refusal = |request: BackendRequest, can| request.refusal(can).unwrap_or_default();
        assert!(refusal(REQUEST, CAN).contains("even number, 3 were"));
        assert_eq!(refusal(REQUEST, Capabilities { even_vcpus: false, ..CAN }), "");
        assert!(refusal(BackendRequest { vcpu_count: 34, ..REQUEST }, CAN).contains("at most 32"));
        assert_eq!(refusal(BackendRequest { vcpu_count: 1, ..REQUEST }, CAN), "");
    }

    #[test]
    fn test_select_without_any_binary_tells_of_all() {
        let nowhere = || Some("/nowhere/at/all".to_owned());
        let binaries =
            Binaries { qemu: nowhere(), packaged_qemu: None, firecracker: nowhere(), cloud_hypervisor: nowhere() };
        let error = select(&VmId::parse("vm").unwrap(), &REQUEST, &binaries).err().unwrap();
        let text = error.to_string();
        assert_eq!(error.code(), "backend_unavailable");
        assert!(
            text.contains("backend qemu") && text.contains("firecracker:") && text.contains("cloud-hypervisor:"),
            "{text}"
        );
    }
}
