//! What this host can run, and what to do about what is missing.

use pyo3::prelude::*;
use serde_json::{json, Value};

use super::convert;
use crate::host::{kvm, net, privileges, runtime_dir};
use crate::model::Grade;
use crate::vm::network;
use crate::vmm::{self, Binaries};

/// Looks at backends, accelerators and privileges; changes nothing.
#[pyfunction]
pub fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let image = convert::guest_image(py)?;
    let report = py.detach(move || {
        let (kvm, privileges, backends) = (kvm::probe(), privileges::probe(), vmm::probe(&Binaries::default()));
        let (cpu, flag) = kvm::cpu();
        let mut problems: Vec<Value> = Vec::new();
        let mut problem = |what: String, remedy: Option<String>| problems.push(json!({"what": what, "remedy": remedy}));
        if !kvm.usable {
            problem(format!("no hardware virtualization: {}", kvm.reason), kvm.remedy.clone());
        }
        for backend in backends.iter().filter(|backend| backend.grade.is_none()) {
            problem(format!("{}: {}", backend.backend, backend.reason), backend.remedy.clone());
        }
        if !privileges.user_namespaces {
            let remedy = "allow them: sysctl user.max_user_namespaces=10000 (and, where they exist, \
                          kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)";
            problem("user namespaces are not available, the jail needs them".into(), Some(remedy.into()));
        }
        if let Err(error) = image.check() {
            problem(error.to_string(), None);
        }
        let network = network::ready();
        if let Err(refusal) = &network {
            problem(format!("VMs cannot be connected: {}", refusal.reason), Some(refusal.remedy.clone()));
        }
        let accelerator = |grade: Option<Grade>| match grade {
            Some(Grade::Hardware) => Some("kvm"),
            Some(Grade::Emulated) => Some("tcg"),
            None => None,
        };
        let listed: Vec<Value> = backends
            .iter()
            .map(|found| {
                json!({
                    "backend": found.backend.as_str(),
                    "available": found.grade.is_some(),
                    "path": found.path,
                    "version": found.version,
                    "accelerator": accelerator(found.grade),
                    "isolation_grade": found.grade.map(Grade::as_str),
                    "reason": found.reason,
                    "remedy": found.remedy,
                })
            })
            .collect();
        json!({
            "platform": {"arch": std::env::consts::ARCH, "cpu": cpu, "virtualization_flag": flag},
            "privileges": {
                "root": privileges.root,
                "user_namespaces": privileges.user_namespaces,
                "net_admin": privileges.net_admin,
                "cgroup": privileges.cgroup,
            },
            "network": {
                "connected_vms": network.is_ok(),
                "uplinks": net::default_routes(),
                "reason": network.as_ref().err().map(|refusal| &refusal.reason),
                "remedy": network.as_ref().err().map(|refusal| &refusal.remedy),
            },
            "kvm": {"device": kvm.device, "usable": kvm.usable, "reason": kvm.reason, "remedy": kvm.remedy},
            "backends": listed,
            "guest_image": {
                "kernel": image.kernel,
                "initramfs": image.initramfs,
                "launcher": image.launcher,
                "complete": image.check().is_ok(),
            },
            "runtime_dir": runtime_dir::default_base(),
            "problems": problems,
        })
    });
    convert::from_json(py, &report)
}
