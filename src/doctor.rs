//! What this host can run, and what to do about what is missing.
//!
//! Architecture invariant: it asks what a start asks, and decides nothing of its own that a start would decide otherwise.

use microvm_jail::Layer;
use serde_json::{json, Map, Value};

use crate::host::cgroup::{self, Controller};
use crate::host::{kvm, net, privileges, runtime_dir};
use crate::image::GuestImage;
use crate::model::{Grade, ManagerConfig};
use crate::vm::network;
use crate::vmm::{self, Binaries};

/// Looks at backends, accelerators and privileges; changes nothing. Blocking.
#[must_use]
pub fn report(image: &GuestImage) -> Value {
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
    let mut jail = Map::new();
    match image.check().and_then(|()| vmm::host_jail(&image.launcher, ManagerConfig::default().uid_range.0)) {
        Ok(host) => {
            if let Some(why) = &host.no_proc {
                problem("VMs boot instead of being cloned: their jail can have no /proc".into(), Some(why.clone()));
            }
            for (name, layer) in layers(&host) {
                let (given, how) = match layer {
                    Layer::Given(how) => (true, how),
                    Layer::Missing(why) => {
                        problem(format!("the jail lacks {name}"), Some(why.clone()));
                        (false, why)
                    }
                };
                jail.insert(name, json!({"given": given, "how": how}));
            }
        }
        Err(error) => problem(error.to_string(), None),
    }
    let network = network::ready(None, true, network::Age::Now);
    match &network {
        Err(refusal) => {
            problem(format!("VMs cannot be connected: {}", refusal.reason), Some(refusal.remedy.clone()));
        }
        Ok(found) => found.iter().for_each(|one| {
            problem(format!("connected VMs may reach nothing: {}", one.what), Some(one.remedy.clone()));
        }),
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
            "uplinks": net::uplinks(),
            "reason": network.as_ref().err().map(|refusal| &refusal.reason),
            "remedy": network.as_ref().err().map(|refusal| &refusal.remedy),
        },
        "jail": jail,
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
}

/// What this host can give to any jail: found out by making one, and groups for it.
fn layers(host: &vmm::HostJail) -> Vec<(String, Layer)> {
    let mut layers =
        vec![("namespaces".to_owned(), host.namespaces.clone()), ("uid".to_owned(), host.identity.clone())];
    if let Some(confined) = host.confined.clone() {
        layers.push(("landlock".into(), confined.landlock));
        layers.push(("seccomp".into(), confined.seccomp));
        layers.push(("keyring".into(), confined.keyring));
        layers.push(("namespace_limits".into(), confined.namespace_limits));
    }
    for (controller, outcome) in cgroup::probe(None) {
        // Where v2 has no such controller, the jail's root does its work.
        if controller == Controller::Devices && outcome.is_err() && host.own_root() {
            continue;
        }
        layers.push((format!("cgroup_{controller}"), outcome.map_or_else(Layer::Missing, Layer::Given)));
    }
    layers
}
