//! Which backend a VM gets, and why.

use super::{cloud_hypervisor, firecracker, qemu, Binaries, Capabilities, Vmm};
use crate::error::{Error, Result, Shortfall};
use crate::host::kvm;
use crate::model::{Backend, Grade, VmId};

/// What a VM asks of its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// `None`: the best one that can do the rest.
    pub backend: Option<Backend>,
    pub min_isolation: Option<Grade>,
    pub vcpu_count: u64,
}

/// A backend, and in words why it is this one.
pub struct Chosen {
    pub vmm: Box<dyn Vmm>,
    pub reason: String,
}

/// Most able first. A VM does not say beforehand whether it will be copied, so one whose maker left the choice gets the
/// backend that can do all of it, although isolated clones of Firecracker start sooner; the others by what a guest faces.
const ORDER: [Backend; 3] = [Backend::Qemu, Backend::Firecracker, Backend::CloudHypervisor];

impl Wish {
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

/// Finds `backend` and holds the wish against what it can.
fn suitable(backend: Backend, wish: &Wish, binaries: &Binaries) -> Result<Box<dyn Vmm>> {
    let vmm = find(backend, binaries)?;
    match wish.refusal(vmm.capabilities()) {
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
pub fn select(vm_id: &VmId, wish: &Wish, binaries: &Binaries) -> Result<Chosen> {
    let Chosen { vmm, reason } = match wish.backend {
        Some(backend) => Chosen { vmm: suitable(backend, wish, binaries)?, reason: "it was asked for".into() },
        None => best(wish, binaries)?,
    };
    if let Some(min) = wish.min_isolation.filter(|min| *min > vmm.grade()) {
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
    Ok(Chosen { vmm, reason })
}

/// The first that can do it; the error, when none can, is the first one's, with the others' reasons.
fn best(wish: &Wish, binaries: &Binaries) -> Result<Chosen> {
    let mut passed_over: Vec<(Backend, Error)> = Vec::new();
    for backend in ORDER {
        match suitable(backend, wish, binaries) {
            Ok(vmm) if passed_over.is_empty() => {
                let reason =
                    "no backend was asked for, and only its VMs can be snapshotted, suspended, cloned with a network \
                              and jailed strictly";
                return Ok(Chosen { vmm, reason: reason.into() });
            }
            Ok(vmm) => return Ok(Chosen { vmm, reason: format!("the next best: {}", told(&passed_over)) }),
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

    const WISH: Wish = Wish { backend: None, min_isolation: None, vcpu_count: 3 };
    const CAN: Capabilities = Capabilities {
        clones: false,
        copies: false,
        config_drive: true,
        wire: Wire::Named,
        max_vcpus: 32,
        even_vcpus: true,
    };

    #[test]
    fn test_refusal_names_what_the_backend_cannot_do() {
        let refusal = |wish: Wish, can| wish.refusal(can).unwrap_or_default();
        assert!(refusal(WISH, CAN).contains("even number, 3 were"));
        assert_eq!(refusal(WISH, Capabilities { even_vcpus: false, ..CAN }), "");
        assert!(refusal(Wish { vcpu_count: 34, ..WISH }, CAN).contains("at most 32"));
        assert_eq!(refusal(Wish { vcpu_count: 1, ..WISH }, CAN), "");
    }

    #[test]
    fn test_select_without_any_binary_tells_of_all() {
        let nowhere = || Some("/nowhere/at/all".to_owned());
        let binaries = Binaries { qemu: nowhere(), firecracker: nowhere(), cloud_hypervisor: nowhere() };
        let error = select(&VmId::parse("vm").unwrap(), &WISH, &binaries).err().unwrap();
        let text = error.to_string();
        assert_eq!(error.code(), "backend_unavailable");
        assert!(
            text.contains("backend qemu") && text.contains("firecracker:") && text.contains("cloud-hypervisor:"),
            "{text}"
        );
    }
}
