//! What this host can run, and what to do about what is missing.
//!
//! Architecture invariant: it asks what a start asks, by the same code, and decides nothing that a start would decide
//! otherwise.

use microvm_jail::{Layer, Seccomp};
use serde_json::{json, Map, Value};

use crate::error::{Error, Result};
use crate::host::cgroup::{self, Controller};
use crate::host::privileges::{self, Privileges};
use crate::host::{kvm, net};
use crate::image::GuestImage;
use crate::manager::{self, CreateRequest, Manager};
use crate::model::{Grade, IsolationType, ManagerConfig, SpecPatch};
use crate::store;
use crate::vm::{self, network, Settings, Tried};
use crate::vmm::{self, Installed};

/// Something that is missing, and the way out.
struct Finding {
    what: String,
    remedy: Option<String>,
}

impl Finding {
    fn new(what: String, remedy: Option<String>) -> Self {
        Self { what, remedy }
    }

    fn json(&self) -> Value {
        json!({"what": self.what, "remedy": self.remedy})
    }
}

/// Looks at backends, accelerators and privileges, and makes and removes all that a start makes before its VMM runs. Only
/// the package's two folders stay, which a start would make, too. Blocking.
#[must_use]
pub fn report(image: &GuestImage) -> Value {
    let config = ManagerConfig::default();
    let settings = manager::settings(&config, image.clone());
    let (kvm, privileges, backends) = (kvm::probe(), privileges::probe(), vmm::probe(&settings.binaries));
    let (cpu, flag) = kvm::cpu();
    let tried = try_a_start(&config, &settings);
    let layers = match &tried {
        Ok(tried) => tried.layers.clone(),
        Err(_) => layers_of_the_host(image, &config),
    };
    let network = network::ready(None, true, network::Age::Now);
    let is_given =
        |wanted: &str| layers.iter().any(|(name, layer)| *name == wanted && matches!(layer, Layer::Given(_)));

    let (mut problems, mut hints) = (Vec::new(), Vec::new());
    match &tried {
        Ok(Tried { no_clone: Some(why), .. }) => {
            problems.push(Finding::new("VMs boot instead of being cloned".into(), Some(why.clone())));
        }
        Ok(_) => {}
        Err(error) => problems.push(Finding::new(format!("no VM starts: {error}"), None)),
    }
    if !kvm.usable {
        problems.push(Finding::new(format!("no hardware virtualization: {}", kvm.reason), kvm.remedy.clone()));
    }
    for found in backends.iter().filter(|found| found.grade.is_none()) {
        let finding = Finding::new(format!("{}: {}", found.backend, found.reason), found.remedy.clone());
        // One backend is enough.
        if tried.is_ok() { &mut hints } else { &mut problems }.push(finding);
    }
    let mut jail = Map::new();
    for (name, layer) in &layers {
        let (given, how) = match layer {
            // Each VM has another one.
            Layer::Given(_) if *name == "uid" && privileges.root => (true, "a uid of its own"),
            Layer::Given(how) => (true, how.as_str()),
            // Where v2 has no such controller, the jail's root does its work.
            Layer::Missing(_) if *name == "cgroup_devices" && is_given("root") => continue,
            Layer::Missing(why) => (false, why.as_str()),
        };
        if !given {
            problems.push(Finding::new(format!("the jail lacks {name}: {how}"), remedy(name, &privileges)));
        }
        jail.insert((*name).to_owned(), json!({"given": given, "how": how}));
    }
    match &network {
        Err(refusal) => {
            let what = format!("VMs cannot be connected: {}", refusal.reason);
            problems.push(Finding::new(what, Some(refusal.remedy.clone())));
        }
        Ok(found) => problems.extend(found.iter().map(|one| {
            let what = format!("connected VMs may reach nothing: {}", one.what);
            Finding::new(what, Some(one.remedy.clone()))
        })),
    }
    let listed: Vec<Value> = backends.iter().map(|found| backend_json(found, &settings)).collect();
    json!({
        "verdict": verdict(&tried, network.is_ok()),
        "platform": {"arch": std::env::consts::ARCH, "cpu": cpu, "virtualization_flag": flag},
        "privileges": {
            "root": privileges.root,
            "user_namespaces": is_given("namespaces"),
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
        "runtime_dir": store::default_runtime(),
        "problems": problems.iter().map(Finding::json).collect::<Vec<_>>(),
        "hints": hints.iter().map(Finding::json).collect::<Vec<_>>(),
    })
}

/// Creates the default VM and does what its start would, up to the VMM.
fn try_a_start(config: &ManagerConfig, settings: &Settings) -> Result<Tried> {
    let manager = Manager::new(config.clone(), settings.image.clone())?;
    let (isolation_type, patch) = (IsolationType::BrowserTab, SpecPatch::default());
    let vm = manager.create(CreateRequest { vm_id: None, isolation_type, patch })?;
    vm::try_out(vm.id(), vm.spec(), settings)
}

fn verdict(tried: &Result<Tried>, connected: bool) -> Value {
    let (starts, text) = match tried {
        Ok(tried) => {
            let networks = if connected { "isolated and connected" } else { "isolated only" };
            (true, format!("VMs start here: yes ({}; {networks})", tried.vmm.grade()))
        }
        Err(_) => (false, "VMs start here: no".to_owned()),
    };
    let chosen = tried.as_ref().ok().map(|tried| (tried.vmm.backend().as_str(), &tried.chosen));
    json!({
        "starts": starts,
        "text": text,
        "backend": chosen.map(|(backend, _)| backend),
        "backend_reason": chosen.map(|(_, reason)| reason),
        "error": tried.as_ref().err().map(Error::code),
    })
}

fn backend_json(found: &Installed, settings: &Settings) -> Value {
    let accelerator = match found.grade {
        Some(Grade::Hardware) => Some("kvm"),
        Some(Grade::Emulated) => Some("tcg"),
        None => None,
    };
    let vmm = found.grade.and_then(|_| vmm::find(found.backend, &settings.binaries).ok());
    // A connected VM's: it may lack one more.
    let lacks = vmm.as_ref().map(|vmm| {
        let missing = |(name, layer): (&str, Layer)| match layer {
            Layer::Missing(why) => Some((name.to_owned(), json!(why))),
            Layer::Given(_) => None,
        };
        vmm.needs(true).layers.into_iter().filter_map(missing).collect::<Map<_, _>>()
    });
    json!({
        "backend": found.backend.as_str(),
        "available": found.grade.is_some(),
        "path": found.path,
        "version": found.version,
        "accelerator": accelerator,
        "isolation_grade": found.grade.map(Grade::as_str),
        "reason": found.reason,
        "remedy": found.remedy,
        "snapshots": vmm.as_ref().map(|vmm| vmm.capabilities().copies),
        "lacks_layers": lacks,
    })
}

/// What would give a layer, where the reason does not say it.
fn remedy(layer: &str, privileges: &Privileges) -> Option<String> {
    let remedy = match layer {
        _ if layer.starts_with("cgroup_") && privileges.root => {
            "let this process make control groups, or name a group that it may divide in config[\"cgroup_parent\"]"
        }
        // Only there a user may have one.
        _ if layer.starts_with("cgroup_") && privileges.cgroup == "v2" => {
            "start the process in a group of its own: systemd-run --user --scope -p Delegate=yes COMMAND"
        }
        "landlock" => "a kernel from 5.13 on that has landlock among its security modules (boot parameter lsm=)",
        "seccomp_allow_list" => "none is needed but for jail=\"strict\"; use a release that was measured",
        _ => return None,
    };
    Some(remedy.into())
}

/// What this host can give to any jail, where no VM starts: found out by making one, and groups for it.
fn layers_of_the_host(image: &GuestImage, config: &ManagerConfig) -> Vec<(&'static str, Layer)> {
    let host = image.check().and_then(|()| vmm::host_jail(&image.launcher, config.uid_range.0, Seccomp::AllowList));
    let Ok(host) = host else { return Vec::new() };
    let mut layers = vm::layers(&host, None);
    let outcomes = cgroup::probe(None);
    layers.extend(outcomes.iter().filter(|(controller, _)| *controller != Controller::Io).map(vm::cgroup_layer));
    layers
}
