//! What this host can run, and what to do about what is missing.
//!
//! Architecture invariant: it asks what a start asks, by the same code, and decides nothing that a start would decide
//! otherwise.

use std::time::{Duration, Instant};

use microvm_jail::{Layer, Seccomp};
use serde_json::{json, Map, Value};

use crate::error::{Error, Result};
use crate::host::cgroup::{self, Controller};
use crate::host::kvm::{self, Kvm};
use crate::host::net::{self, Refusal};
use crate::host::privileges::{self, Privileges};
use crate::host::remedy::{self, Place};
use crate::image::GuestImage;
use crate::manager::{self, CreateRequest, Manager};
use crate::model::{
    Backend, Grade, IsolationType, ManagerConfig, NetworkConfig, NetworkMode, ResourceLimits, SpecPatch,
};
use crate::net::Problem;
use crate::store;
use crate::vm::{self, network, Facts, Settings, Tried};
use crate::vmm::{self, Installed};

/// What a VM that is started for the report has: enough to boot.
const MEMORY_MB: u64 = 128;
const DISK_MB: u64 = 64;
const LAYOUT: &str = "address_layout";

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

/// What the host is like and what a start would say, as far as that shows without one.
struct Look {
    config: ManagerConfig,
    settings: Settings,
    kvm: Kvm,
    privileges: Privileges,
    backends: Vec<Installed>,
    tried: Result<Tried>,
    layers: Vec<(&'static str, Layer)>,
    network: std::result::Result<Vec<Problem>, Refusal>,
    /// The suspended VMs that cannot be resumed any more, and why.
    lost: Vec<(String, String)>,
}

/// A VM that was started, answered, and is gone again.
struct Trial {
    /// What was asked for; `None`: the host's best one.
    backend: Option<Backend>,
    is_connected: bool,
    outcome: Result<Answered>,
}

struct Answered {
    facts: Facts,
    start: Duration,
}

/// Looks at backends, accelerators and privileges, and makes and removes all that a start makes before its VMM runs. With
/// `starts` it starts a small VM on each backend that is there, too, the first one connected where that can be. Only the
/// package's two folders stay, which a start would make, too.
///
/// # Errors
/// [`Error::Host`].
pub async fn report(image: GuestImage, starts: bool) -> Result<Value> {
    let of_host = image.clone();
    let looking = tokio::task::spawn_blocking(move || look(of_host));
    let look = looking.await.map_err(|error| Error::host("look at", "this host", error))?;
    let trials = if starts { start_all(&image, &look).await } else { Vec::new() };
    Ok(judge(&image, &look, &trials))
}

fn look(image: GuestImage) -> Look {
    let config = ManagerConfig::default();
    let settings = manager::settings(&config, image);
    let (kvm, privileges, backends) = (kvm::probe(), privileges::probe(), vmm::probe(&settings.binaries));
    let tried = try_a_start(&config, &settings);
    let layers = match &tried {
        Ok(tried) => tried.layers.clone(),
        Err(_) => layers_of_the_host(&settings.image, &config),
    };
    let network = network::ready(None, true, network::Age::Now);
    let lost = lost(&settings);
    Look { config, settings, kvm, privileges, backends, tried, layers, network, lost }
}

fn lost(settings: &Settings) -> Vec<(String, String)> {
    let store = &settings.suspended;
    let why = |(name, _): (String, u64)| {
        let why = match store.manifest(&name).transpose()? {
            Ok(written) => vm::differences_here(&written, settings).join("; "),
            Err(error) => error.to_string(),
        };
        (!why.is_empty()).then_some((name, why))
    };
    store.list().into_iter().filter_map(why).collect()
}

/// Creates the default VM and does what its start would, up to the VMM.
fn try_a_start(config: &ManagerConfig, settings: &Settings) -> Result<Tried> {
    let manager = Manager::new(config.clone(), settings.image.clone())?;
    let (isolation_type, patch) = (IsolationType::BrowserTab, SpecPatch::default());
    let vm = manager.create(CreateRequest { vm_id: None, isolation_type, patch })?;
    vm::try_out(vm.id(), vm.spec(), settings)
}

/// By what a VM would be connected that leaves the choice to the library; `None`: by nothing.
fn mode(look: &Look) -> Option<NetworkMode> {
    let streams = look.tried.as_ref().is_ok_and(|tried| tried.vmm.capabilities().streams_frames);
    match &look.network {
        Ok(_) => Some(NetworkMode::Tap),
        Err(_) => (streams && look.settings.image.usernet.is_file()).then_some(NetworkMode::User),
    }
}

/// A VM of the backend that a VM gets without asking for one, then one of each other.
async fn start_all(image: &GuestImage, look: &Look) -> Vec<Trial> {
    let mut trials = Vec::new();
    if mode(look).is_some() {
        trials.push(start(image, &look.config, None, true).await);
    }
    if trials.iter().all(|trial| trial.outcome.is_err()) {
        trials.push(start(image, &look.config, None, false).await);
    }
    let first = look.tried.as_ref().ok().map(|tried| tried.vmm.backend());
    for found in look.backends.iter().filter(|found| found.grade.is_some() && Some(found.backend) != first) {
        trials.push(start(image, &look.config, Some(found.backend), false).await);
    }
    trials
}

async fn start(image: &GuestImage, config: &ManagerConfig, backend: Option<Backend>, is_connected: bool) -> Trial {
    let limits = ResourceLimits { memory_mb: MEMORY_MB, disk_size_mb: DISK_MB, ..ResourceLimits::default() };
    let network = NetworkConfig { isolated_network: !is_connected, ..NetworkConfig::default() };
    let patch = SpecPatch { backend, limits: Some(limits), network: Some(network), ..SpecPatch::default() };
    // A template is more work than this one VM, and of no use to VMs of another size.
    let config = ManagerConfig { templates: false, health_interval_s: None, ..config.clone() };
    let outcome = async {
        let manager = Manager::new(config, image.clone())?;
        let vm = manager.create(CreateRequest { vm_id: None, isolation_type: IsolationType::BrowserTab, patch })?;
        let begun = Instant::now();
        let answered = async {
            vm.start().await?;
            let (facts, start) = (vm.facts(), begun.elapsed());
            vm.command("ping", json!({}), None).await?;
            Ok(Answered { facts, start })
        };
        let outcome = answered.await;
        manager.stop().await;
        outcome
    };
    Trial { backend, is_connected, outcome: outcome.await }
}

fn judge(image: &GuestImage, look: &Look, trials: &[Trial]) -> Value {
    let Look { settings, kvm, privileges, backends, tried, network, .. } = look;
    let (cpu, flag) = kvm::cpu();
    let (mut problems, mut hints) = (Vec::new(), Vec::new());
    let starts = starts(tried, trials);
    for (what, error) in failures(tried, trials) {
        problems.push(Finding::new(format!("{what}: {error}"), remedy_of(error)));
    }
    if let Ok(Tried { no_clone: Some(why), .. }) = tried {
        problems.push(Finding::new("VMs boot instead of being cloned".into(), Some(why.clone())));
    }
    if !kvm.usable {
        problems.push(Finding::new(format!("no hardware virtualization: {}", kvm.reason), kvm.remedy.clone()));
    }
    for found in backends.iter().filter(|found| found.grade.is_none()) {
        let finding = Finding::new(format!("{}: {}", found.backend, found.reason), found.remedy.clone());
        // One backend is enough.
        if starts { &mut hints } else { &mut problems }.push(finding);
    }
    let jail = jail_of(look, trials);
    for (name, layer) in jail.iter().filter(|(_, layer)| layer["given"] == false) {
        let how = layer["how"].as_str().unwrap_or_default();
        problems.push(Finding::new(format!("the jail lacks {name}: {how}"), layer_remedy(name, privileges)));
    }
    match network {
        Err(refusal) if mode(look).is_some() => {
            let what = format!("VMs are connected in user mode, since there can be no tap: {}", refusal.cause);
            hints.push(Finding::new(what, Some(refusal.remedy.clone())));
        }
        Err(refusal) => {
            let what = format!("VMs cannot be connected: {}", refusal.cause);
            problems.push(Finding::new(what, Some(refusal.remedy.clone())));
        }
        Ok(found) => problems.extend(found.iter().map(|one| {
            let what = format!("connected VMs may reach nothing: {}", one.what);
            Finding::new(what, Some(one.remedy.clone()))
        })),
    }
    problems.extend(look.lost.iter().map(|(name, why)| {
        let remedy = "export_disk() gets its files out, destroy_vm() ends it; or bring back what it ran on";
        Finding::new(format!("the suspended VM {name} cannot be resumed: {why}"), Some(remedy.into()))
    }));
    let listed: Vec<Value> = backends.iter().map(|found| backend_json(found, settings)).collect();
    json!({
        "verdict": verdict(look, trials, &jail),
        "platform": {"arch": std::env::consts::ARCH, "cpu": cpu, "virtualization_flag": flag},
        "privileges": {
            "root": privileges.root,
            "user_namespaces": jail.get("namespaces").is_some_and(|layer| layer["given"] == true),
            "net_admin": privileges.net_admin,
            "cgroup": privileges.cgroup,
        },
        "network": {
            "connected_vms": mode(look).is_some(),
            "mode": mode(look).map(NetworkMode::as_str),
            "uplinks": net::uplinks(),
            "reason": network.as_ref().err().map(|refusal| refusal.cause.to_string()),
            "remedy": network.as_ref().err().map(|refusal| &refusal.remedy),
        },
        "jail": jail,
        "kvm": {"device": kvm.device, "usable": kvm.usable, "reason": kvm.reason, "remedy": kvm.remedy},
        "backends": listed,
        "starts": trials.iter().map(Trial::json).collect::<Vec<_>>(),
        "guest_image": {
            "kernel": image.kernel,
            "initramfs": image.initramfs,
            "launcher": image.launcher,
            "complete": image.check().is_ok(),
        },
        "runtime_dir": store::default_runtime(),
        "cache_dir": settings.folders.cache.path(),
        "problems": problems.iter().map(Finding::json).collect::<Vec<_>>(),
        "hints": hints.iter().map(Finding::json).collect::<Vec<_>>(),
    })
}

/// The layers of the jail: those that a VM got, where one was started.
fn jail_of(look: &Look, trials: &[Trial]) -> Map<String, Value> {
    let got = trials.iter().find_map(|trial| trial.outcome.as_ref().ok()?.facts.jail.as_ref()?.as_object());
    let mut jail: Map<String, Value> = match got {
        // Beside the layers there is the mode; and where the VMM's memory lies is the manager's choice, not the host's.
        Some(got) => got.clone().into_iter().filter(|(name, layer)| name != LAYOUT && layer.is_object()).collect(),
        None => look.layers.iter().map(|(name, layer)| ((*name).to_owned(), layer_json(layer))).collect(),
    };
    let is_given = |jail: &Map<String, Value>, name: &str| jail.get(name).is_some_and(|layer| layer["given"] == true);
    // Each VM has another one.
    if look.privileges.root && is_given(&jail, "uid") {
        jail.insert("uid".into(), layer_json(&Layer::Given("a uid of its own".into())));
    }
    // Where v2 has no such controller, the jail's root does its work.
    if is_given(&jail, "root") && !is_given(&jail, "cgroup_devices") {
        jail.remove("cgroup_devices");
    }
    jail
}

fn layer_json(layer: &Layer) -> Value {
    match layer {
        Layer::Given(how) => json!({"given": true, "how": how}),
        Layer::Missing(why) => json!({"given": false, "how": why}),
    }
}

/// Whether VMs start: measured where it was tried.
fn starts(tried: &Result<Tried>, trials: &[Trial]) -> bool {
    match trials {
        [] => tried.is_ok(),
        some => some.iter().any(|trial| trial.outcome.is_ok()),
    }
}

/// What did not start, with the error.
fn failures<'a>(tried: &'a Result<Tried>, trials: &'a [Trial]) -> Vec<(String, &'a Error)> {
    let is_dead = !starts(tried, trials);
    // Where no VM starts at all, no connected one does.
    let (connected, others): (Vec<_>, Vec<_>) = trials.iter().partition(|trial| trial.is_connected);
    let of_trials = others.into_iter().chain(connected).filter_map(|trial| {
        let error = trial.outcome.as_ref().err()?;
        let what = match (trial.backend, trial.is_connected) {
            (Some(backend), _) => format!("no VM of {backend} starts"),
            (None, true) => "no connected VM starts".into(),
            (None, false) if is_dead => "no VM starts".into(),
            (None, false) => "no VM starts without naming its backend".into(),
        };
        Some((what, error))
    });
    let mut failures: Vec<_> = of_trials.collect();
    match tried {
        Err(error) if trials.is_empty() => failures.push(("no VM starts".into(), error)),
        Err(error) if !is_dead => failures.push(("no VM of the default size starts".into(), error)),
        _ => {}
    }
    failures
}

fn remedy_of(error: &Error) -> Option<String> {
    let remedy = error.details()["remedy"].as_str().map(str::to_owned);
    // Some messages end with it.
    remedy.filter(|remedy| !error.to_string().contains(remedy))
}

fn verdict(look: &Look, trials: &[Trial], jail: &Map<String, Value>) -> Value {
    let answered = trials.iter().find_map(|trial| Some((trial, trial.outcome.as_ref().ok()?)));
    let tried = look.tried.as_ref();
    let failed = failures(&look.tried, trials);
    let (backend, reason, text) = match (answered, tried) {
        (Some((trial, Answered { facts, start })), _) => {
            let backend = facts.backend.map(Backend::as_str);
            let accelerator = facts.accelerator.unwrap_or("?");
            let how = how(backend, accelerator, facts.grade, jail, trial.is_connected);
            (backend, facts.backend_reason.as_deref(), format!("yes, in {:.1} s ({how})", start.as_secs_f64()))
        }
        (None, Ok(tried)) if trials.is_empty() => {
            let (backend, grade) = (Some(tried.vmm.backend().as_str()), Some(tried.vmm.grade()));
            let how = how(backend, tried.vmm.accelerator(), grade, jail, mode(look).is_some());
            (backend, Some(tried.chosen.as_str()), format!("yes ({how}); no start was tried"))
        }
        _ => (None, None, "no".to_owned()),
    };
    json!({
        "starts": backend.is_some(),
        "text": format!("VMs start here: {text}"),
        "backend": backend,
        "backend_reason": reason,
        "error": failed.last().filter(|_| backend.is_none()).map(|(_, error)| error.code()),
    })
}

/// How a VM runs, in a few words.
fn how(
    backend: Option<&str>,
    accelerator: &str,
    grade: Option<Grade>,
    jail: &Map<String, Value>,
    is_connected: bool,
) -> String {
    let lacks: Vec<&str> =
        jail.iter().filter(|(_, layer)| layer["given"] == false).map(|(name, _)| name.as_str()).collect();
    let jail = if lacks.is_empty() { "jail complete".into() } else { format!("jail without {}", lacks.join(", ")) };
    let networks = if is_connected { "isolated and connected" } else { "isolated only" };
    let (backend, grade) = (backend.unwrap_or("?"), grade.map_or("?", Grade::as_str));
    format!("{backend} on {accelerator}: {grade}; {jail}; {networks}")
}

impl Trial {
    fn json(&self) -> Value {
        let answered = self.outcome.as_ref().ok();
        let facts = answered.map(|answered| &answered.facts);
        let backend = facts.and_then(|facts| facts.backend).or(self.backend);
        json!({
            "backend": backend.map(Backend::as_str),
            "accelerator": facts.and_then(|facts| facts.accelerator),
            "isolation_grade": facts.and_then(|facts| facts.grade).map(Grade::as_str),
            "connected": self.is_connected,
            "seconds": answered.map(|answered| answered.start.as_secs_f64()),
            "jail": facts.and_then(|facts| facts.jail.as_ref()),
            "error": self.outcome.as_ref().err().map(Error::to_string),
        })
    }
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
        "packaged": found.path.as_deref().map(|path| settings.binaries.is_packaged(path)),
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
fn layer_remedy(layer: &str, privileges: &Privileges) -> Option<String> {
    match layer {
        _ if layer.starts_with("cgroup_") => Some(remedy::cgroups(privileges.cgroup, &Place::look())),
        "landlock" => {
            Some("a kernel from 5.13 on that has landlock among its security modules (boot parameter lsm=)".into())
        }
        "seccomp_allow_list" => Some("none is needed but for jail=\"strict\"; use a release that was measured".into()),
        _ => None,
    }
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
