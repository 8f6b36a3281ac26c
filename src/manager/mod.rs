//! All VMs of one owner: registry, quota, cleanup, pool.
//!
//! Architecture invariant: `registry` is held for a few instructions at a time, never across an await; what takes
//! time happens on a VM of its own, so one slow VM never blocks another.

mod metrics;
mod policy;
mod pool;
mod shared;
mod snapshots;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::error::{Error, Result};
use crate::host::memory::{self, HostMemory};
use crate::host::zygote::Zygotes;
use crate::image::template::{self, StoreLimits};
use crate::image::GuestImage;
use crate::model::{
    EventKind, IsolationType, JailMode, Labels, ManagerConfig, QuotaLedger, QuotaUse, Reservation, ResourceLimits,
    SpecPatch, VmId, VmSpec, VmState,
};
use crate::mutex::Mutex;
use crate::store::{path, Existing, Folders};
use crate::vm::{self, janitor, Events, Heartbeat, MicroVm, Preparation, Settings};
use crate::vmm::{Binaries, COST_MIB};
use policy::Remediations;
use pool::Pool;

pub use pool::PoolUse;
pub use snapshots::{ExportedDisk, SnapshotEntry};

/// Events that may wait for the policies to be enforced.
const POLICY_EVENTS: usize = 65_536;

/// What `create` is asked for; its template and the configuration fill in the rest of `patch`, whose paths are absolute.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// `None`: a new name.
    pub vm_id: Option<VmId>,
    pub isolation_type: IsolationType,
    pub patch: SpecPatch,
}

impl CreateRequest {
    /// Another VM like one that was made from `spec`.
    fn like(spec: &VmSpec) -> Self {
        Self { vm_id: None, isolation_type: spec.isolation_type, patch: spec.clone().into() }
    }
}

/// Which VMs of a manager are asked for; `None` passes all.
#[derive(Debug, Clone, Default)]
pub struct VmFilter {
    pub isolation_type: Option<IsolationType>,
    pub state: Option<VmState>,
    /// All of which a VM must have.
    pub labels: Labels,
}

impl VmFilter {
    fn passes(&self, vm: &MicroVm) -> bool {
        self.isolation_type.is_none_or(|wanted| vm.spec().isolation_type == wanted)
            && self.state.is_none_or(|wanted| vm.state() == wanted)
            && vm.spec().labels.contain(&self.labels)
    }
}

/// How many VMs there are, of which kind and in which state, and what they have reserved.
#[derive(Debug, Clone, Default)]
pub struct ResourceUsage {
    pub total_vms: usize,
    pub allocated: QuotaUse,
    pub available: QuotaUse,
    pub by_type: BTreeMap<&'static str, usize>,
    pub by_state: BTreeMap<&'static str, usize>,
    /// Apart from the VMs above, and yielding to them.
    pub pool: Vec<PoolUse>,
    /// How many templates there are, and their bytes on disk.
    pub templates: (usize, u64),
    /// The same of the user's own templates, and of suspended VMs.
    pub snapshots: (usize, u64),
    pub suspended: (usize, u64),
}

#[derive(Default)]
struct Registry {
    /// In the order of creation.
    vms: Vec<Arc<MicroVm>>,
}

/// What a started manager does by itself.
#[derive(Default)]
struct Tasks {
    is_started: bool,
    set: JoinSet<()>,
}

/// The manager.
pub struct Manager {
    me: Weak<Self>,
    config: ManagerConfig,
    settings: Arc<Settings>,
    registry: Mutex<Registry>,
    ledger: Arc<QuotaLedger>,
    pool: Arc<Pool>,
    remediations: Remediations,
    tasks: Mutex<Tasks>,
}

impl Drop for Manager {
    fn drop(&mut self) {
        // Its tasks are aborted with their set.
        self.pool.drain();
        self.events().close();
    }
}

/// The configuration with every path in full: later the working directory may be another one, and the janitor's is `/`.
fn absolute(mut config: ManagerConfig) -> Result<ManagerConfig> {
    let in_full = |key: &str, text: &mut Option<String>| -> Result<()> {
        if let Some(given) = text {
            let path = path::absolute(&format!("config[{key:?}]"), Path::new(given))?;
            *given = path.to_string_lossy().into_owned();
        }
        Ok(())
    };
    in_full("runtime_dir", &mut config.runtime_dir)?;
    in_full("cache_dir", &mut config.cache_dir)?;
    in_full("cgroup_parent", &mut config.cgroup_parent)?;
    for (key, binary) in [
        ("qemu_binary", &mut config.qemu_binary),
        ("firecracker_binary", &mut config.firecracker_binary),
        ("cloud_hypervisor_binary", &mut config.cloud_hypervisor_binary),
    ] {
        // A bare name is looked up on PATH.
        if binary.as_ref().is_some_and(|name| name.is_empty() || name.contains(['/', '~', '\0'])) {
            in_full(key, binary)?;
        }
    }
    let pool = config.pool.iter_mut().map(|pool| ("pool", &mut pool.vm));
    for (key, vm) in pool.chain(config.prepare.iter_mut().map(|vm| ("prepare", vm))) {
        for (name, image) in vm.image.parts_mut() {
            if let Some(path) = image {
                *path = path::absolute(&format!("config[{key:?}][{name:?}]"), path)?;
            }
        }
    }
    let (runtime, cache) = (config.runtime_dir.as_ref().map(Path::new), config.cache_dir.as_ref().map(Path::new));
    if let Some((runtime, cache)) = runtime.zip(cache) {
        if runtime.starts_with(cache) || cache.starts_with(runtime) {
            return Err(Error::InvalidValue {
                field: "config[\"runtime_dir\"]".into(),
                value: format!("{runtime:?}"),
                allowed: format!("it and config[\"cache_dir\"], {cache:?}, must be folders that lie apart"),
            });
        }
    }
    Ok(config)
}

/// The settings that a configuration means; its paths are absolute.
#[must_use]
pub fn settings(config: &ManagerConfig, image: GuestImage) -> Settings {
    let path = |text: &Option<String>| text.as_ref().map(PathBuf::from);
    let folders = Folders::new(path(&config.runtime_dir), path(&config.cache_dir));
    let cache = folders.cache.path().to_owned();
    let limits = StoreLimits {
        max_bytes: config.cache_max_mb << 20,
        max_age: Duration::from_secs(config.cache_max_age_days * 86_400),
    };
    let packaged_qemu = image.qemu.clone();
    let zygotes = (config.jail != JailMode::Strict).then(|| Arc::new(Zygotes::new(&image.zygote)));
    Settings {
        folders,
        image,
        templates: config.templates.then(|| shared::store(&cache, limits)),
        snapshots: shared::snapshots(&cache),
        suspended: shared::suspended(&cache),
        digests: shared::digests(),
        binaries: Binaries::new(config, packaged_qemu),
        min_isolation: config.min_isolation,
        jail: config.jail,
        zygotes,
        uid_range: config.uid_range,
        cgroup_parent: path(&config.cgroup_parent),
        start_timeout: Duration::from_secs_f64(config.start_timeout_s),
        command_timeout: Duration::from_secs_f64(config.command_timeout_s),
        network_range: config.network_range,
        heartbeat: Heartbeat {
            interval: config.health_interval_s.map(Duration::from_secs_f64),
            misses: u32::try_from(config.health_misses).unwrap_or(u32::MAX),
        },
        events: Arc::default(),
        starts: shared::starts(),
    }
}

impl Manager {
    /// Starts no process and makes no folder.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a path that cannot be made absolute.
    pub fn new(config: ManagerConfig, image: GuestImage) -> Result<Arc<Self>> {
        let config = absolute(config)?;
        let ledger = QuotaLedger::new(config.max_vcpus, config.max_memory_mb);
        let settings = Arc::new(settings(&config, image));
        let pool = Pool::new(&config.pool, settings.clone());
        let (registry, remediations, tasks) = (Mutex::default(), Remediations::default(), Mutex::default());
        let made =
            |me: &Weak<Self>| Self { me: me.clone(), settings, config, registry, ledger, pool, remediations, tasks };
        Ok(Arc::new_cyclic(made))
    }

    #[must_use]
    pub fn config(&self) -> &ManagerConfig {
        &self.config
    }

    /// Where what happens to its VMs is told.
    #[must_use]
    pub fn events(&self) -> &Arc<Events> {
        &self.settings.events
    }

    /// The manager and its VMs as OpenMetrics text.
    #[must_use]
    pub fn metrics(&self) -> String {
        metrics::render(self)
    }

    fn remediations(&self) -> &Remediations {
        &self.remediations
    }

    /// Removes what dead processes left, begins to clean up, to make the templates that are to be prepared and to fill
    /// the pool; nothing when it runs already.
    ///
    /// # Errors
    /// [`Error::FolderRefused`], and nothing was touched or begun.
    pub async fn start(self: &Arc<Self>) -> Result<()> {
        let (folders, templates) = (self.settings.folders.clone(), self.settings.templates.clone());
        let stores = [self.settings.snapshots.clone(), self.settings.suspended.clone()];
        let cgroup_parent = self.settings.cgroup_parent.clone();
        let sweep = move || {
            let Existing { runtime, cache } = folders.existing()?;
            stores.iter().for_each(|store| store.clean_up());
            if let Some(templates) = templates {
                templates.clean_up();
            }
            Ok(janitor::sweep(runtime.as_deref(), cache.as_deref(), cgroup_parent.as_deref()))
        };
        match tokio::task::spawn_blocking(sweep).await {
            Ok(Ok(swept)) if swept.is_empty() => {}
            Ok(Ok(swept)) => log::info!("removed the remains of dead processes: {}", swept.join(", ")),
            Ok(Err(error)) => return Err(error),
            Err(error) => log::warn!("the sweep of the runtime directory failed: {error}"),
        }
        let mut tasks = self.tasks.lock();
        if std::mem::replace(&mut tasks.is_started, true) {
            return Ok(());
        }
        let interval = Duration::from_secs_f64(self.config.cleanup_interval_s);
        let weak = Arc::downgrade(self);
        tasks.set.spawn(clean_up(weak.clone(), interval));
        if !self.config.policies.is_empty() {
            let subscriber = self.events().subscribe(POLICY_EVENTS);
            tasks.set.spawn(policy::enforce(weak.clone(), subscriber));
        }
        if !self.config.prepare.is_empty() {
            tasks.set.spawn(prepare_all(weak.clone()));
        }
        if !self.config.pool.is_empty() {
            let left = move || weak.upgrade().map(|manager| manager.ledger.available());
            tasks.set.spawn(self.pool.clone().keep_filled(left));
        }
        Ok(())
    }

    /// Runs `task` beside the others of a started manager, which stops it; a stopped one runs none.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        // Those that have ended.
        while tasks.set.try_join_next().is_some() {}
        if tasks.is_started {
            tasks.set.spawn(task);
        }
    }

    /// What makes the template of VMs like `spec`, unless it is there; they then start as clones.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn prepare(&self, spec: VmSpec) -> Result<Preparation> {
        Preparation::new(spec, &self.settings)
    }

    /// Destroys every VM and stops cleaning up; nothing when it is stopped already.
    pub async fn stop(&self) {
        let Tasks { mut set, .. } = std::mem::take(&mut *self.tasks.lock());
        // None of them makes or starts a VM after this. A VM that one of them was at is destroyed with all the others.
        set.shutdown().await;
        self.remediations.forget_all();
        self.pool.drain();
        self.destroy_all().await;
        if let Some(templates) = &self.settings.templates {
            templates.cancel().await;
        }
        self.settings.suspended.removed().await;
        if let Some(zygotes) = &self.settings.zygotes {
            zygotes.end();
        }
        self.events().close();
    }

    #[must_use]
    pub fn is_cleaning_up(&self) -> bool {
        self.tasks.lock().is_started
    }

    /// Reserves quota and a name; starts no process.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`], also when the host has not the memory for one more; [`Error::VmIdTaken`],
    /// [`Error::InvalidValue`]; [`Error::TemplateNotFound`], [`Error::StateMismatch`], [`Error::StateDamaged`].
    pub fn create(&self, request: CreateRequest) -> Result<Arc<MicroVm>> {
        let CreateRequest { vm_id, isolation_type, patch } = request;
        let template = patch.template.clone().map(|name| Ok((self.template(&name)?, name))).transpose()?;
        let patch = match &template {
            Some((taken, _)) => patch.or(taken.as_template()),
            None => patch,
        };
        let spec = VmSpec::new(isolation_type, patch.or(self.config.defaults()));
        let vm_id = vm_id.map_or_else(|| vm::new_id(isolation_type.as_str()), Ok)?;
        if let Some((taken, name)) = &template {
            vm::check_clone(&vm_id, &spec, name, taken)?;
        }
        if self.settings.suspended.has(vm_id.as_str()) {
            let owner = "a suspended VM: resume_vm() or destroy_vm() it".into();
            return Err(Error::VmIdTaken { vm_id, owner });
        }
        let vm = self.vm(vm_id, spec);
        let admitted = self.admit(&vm);
        match &admitted {
            Ok(()) => vm.publish(EventKind::Created, vm.spec().limits.to_string()),
            Err(error @ Error::QuotaExceeded { .. }) => {
                vm.publish(EventKind::Limit { what: "quota" }, error.to_string())
            }
            Err(_) => {}
        }
        admitted.map(|()| vm)
    }

    fn vm(&self, vm_id: VmId, spec: VmSpec) -> Arc<MicroVm> {
        MicroVm::new(vm_id, spec, self.settings.clone(), Some(self.pool.clone()), Some(self.me.clone()))
    }

    /// Takes a new VM into the registry, with a reservation.
    fn admit(&self, vm: &Arc<MicroVm>) -> Result<()> {
        self.reserve(vm.id(), &vm.spec().limits, |registry, reserve| {
            if registry.vms.iter().any(|other| other.id() == vm.id()) {
                return Err(Error::VmIdTaken { vm_id: vm.id().clone(), owner: "this manager".into() });
            }
            vm.hold(reserve()?);
            registry.vms.push(vm.clone());
            Ok(())
        })
    }

    /// Has `admit` reserve what a VM needs, if the host has the memory. The one place that reserves.
    fn reserve<T>(
        &self,
        vm_id: &VmId,
        limits: &ResourceLimits,
        admit: impl FnOnce(&mut Registry, &dyn Fn() -> Result<Reservation>) -> Result<T>,
    ) -> Result<T> {
        let host = memory::read().filter(|_| !self.config.overcommit_memory);
        // Looked up before the registry is locked; a VM that starts meanwhile is counted in full, which is safe.
        let taken: u64 = self.all().iter().map(|vm| vm.memory_taken_mib()).sum();
        let admitted = {
            let mut registry = self.registry.lock();
            if let Some(host) = host {
                let cost = |memory_mb: u64| memory_mb + COST_MIB;
                let present = registry.vms.iter().filter(|vm| vm.is_counted());
                let of_vms: u64 = present.map(|vm| cost(vm.spec().limits.memory_mb)).sum();
                // Touched pages of templates are in use already.
                let promised = of_vms + (template::untouched_bytes() >> 20);
                check_host_memory(vm_id, cost(limits.memory_mb), promised.saturating_sub(taken), host)?;
            }
            admit(&mut registry, &|| self.ledger.reserve(vm_id, limits))?
        };
        self.pool.shrink_to(self.ledger.available());
        Ok(admitted)
    }

    /// What its VMs have reserved together.
    #[must_use]
    pub fn allocated(&self) -> QuotaUse {
        self.ledger.allocated()
    }

    #[must_use]
    pub fn get(&self, vm_id: &str) -> Option<Arc<MicroVm>> {
        self.registry.lock().vms.iter().find(|vm| vm.id().as_str() == vm_id).cloned()
    }

    /// # Errors
    /// [`Error::VmNotFound`].
    pub fn find(&self, vm_id: &str) -> Result<Arc<MicroVm>> {
        self.get(vm_id).ok_or_else(|| Error::VmNotFound { vm_id: vm_id.to_owned() })
    }

    /// Its VMs in the order of their creation.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<MicroVm>> {
        self.registry.lock().vms.clone()
    }

    /// Those of them that pass a filter.
    #[must_use]
    pub fn list(&self, filter: &VmFilter) -> Vec<Arc<MicroVm>> {
        self.all().into_iter().filter(|vm| filter.passes(vm)).collect()
    }

    /// Removes a VM and every trace of it, and gives its quota back.
    ///
    /// # Errors
    /// [`Error::VmNotFound`]; [`Error::VmIdTaken`] when it is suspended and someone resumes it.
    pub async fn destroy(&self, vm_id: &str) -> Result<()> {
        let Some(vm) = self.get(vm_id) else { return self.destroy_suspended(vm_id).await };
        self.remove(&vm).await;
        // Asked afterwards: it may have been about to be suspended. Another manager may keep a suspended VM of this name.
        match vm.has_suspended_state() {
            true => vm::forget_suspended(&self.settings, vm.id()).await.map(drop),
            false => Ok(()),
        }
    }

    async fn remove(&self, vm: &Arc<MicroVm>) {
        vm.destroy().await;
        {
            let mut registry = self.registry.lock();
            let before = registry.vms.len();
            registry.vms.retain(|other| !Arc::ptr_eq(other, vm));
            // Two callers may destroy the same VM: only the one that took it out publishes the event.
            if registry.vms.len() == before {
                return;
            }
        }
        vm.publish(EventKind::Removed, "destroyed");
    }

    pub async fn destroy_all(&self) {
        let vms = self.all();
        let mut destroying = JoinSet::new();
        for vm in &vms {
            let vm = vm.clone();
            destroying.spawn(async move { vm.destroy().await });
        }
        destroying.join_all().await;
        for vm in &vms {
            self.remove(vm).await;
        }
    }

    #[must_use]
    pub fn usage(&self) -> ResourceUsage {
        let vms = self.registry.lock().vms.clone();
        let (allocated, available) = (self.ledger.allocated(), self.ledger.available());
        let templates = self.settings.templates.as_ref().map_or((0, 0), |store| store.usage());
        let pool = self.pool.usage();
        let (snapshots, suspended) =
            (snapshots::usage(&self.settings.snapshots), snapshots::usage(&self.settings.suspended));
        let mut usage =
            ResourceUsage { total_vms: vms.len(), allocated, available, pool, templates, ..ResourceUsage::default() };
        (usage.snapshots, usage.suspended) = (snapshots, suspended);
        for vm in vms {
            *usage.by_type.entry(vm.spec().isolation_type.as_str()).or_default() += 1;
            *usage.by_state.entry(vm.state().as_str()).or_default() += 1;
        }
        usage
    }
}

async fn prepare_all(manager: Weak<Manager>) {
    let specs = manager.upgrade().map_or_else(Vec::new, |manager| manager.config.prepare.clone());
    for spec in specs {
        let Some(manager) = manager.upgrade() else { return };
        let prepared = async {
            let preparation = manager.prepare(spec)?;
            while preparation.next().await?.is_some() {}
            Ok::<_, Error>(())
        };
        if let Err(error) = prepared.await {
            log::warn!("a template could not be prepared: {error}");
        }
    }
}

/// Whether the host has room for a VM of `needed` MiB beside what its VMs were promised and have not taken yet.
fn check_host_memory(vm_id: &VmId, needed: u64, promised: u64, host: HostMemory) -> Result<()> {
    let available = host.available_mib.saturating_sub(promised);
    if needed <= available {
        return Ok(());
    }
    Err(Error::QuotaExceeded {
        vm_id: vm_id.clone(),
        what: "host memory (MiB, with what the VMM needs)",
        needed,
        available,
        limit: host.total_mib,
        remedy: "set overcommit_memory=True",
    })
}

/// Removes VMs that died; each stays in ERROR for one interval, so that its owner can see why.
async fn clean_up(manager: Weak<Manager>, interval: Duration) {
    loop {
        tokio::time::sleep(interval.min(Duration::from_secs(1))).await;
        let Some(manager) = manager.upgrade() else { return };
        let dead = VmFilter { state: Some(VmState::Error), ..VmFilter::default() };
        for vm in manager.list(&dead) {
            if vm.dead_for().is_some_and(|dead| dead >= interval) && !manager.remediations.is_under_way(vm.id()) {
                manager.remove(&vm).await;
                log::info!("{}: removed, it was dead", vm.id());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_check_host_memory_counts_what_was_promised() {
        let vm_id = VmId::parse("vm").unwrap();
        let host = HostMemory { total_mib: 4000, available_mib: 1000 };
        check_host_memory(&vm_id, 600, 400, host).unwrap();
        let error = check_host_memory(&vm_id, 600, 401, host).unwrap_err();
        assert_eq!(error.code(), "quota_exceeded");
        let message = error.to_string();
        assert!(message.contains("host memory") && message.contains("599 of 4000"), "{message}");
        assert!(message.contains("overcommit_memory"), "{message}");
    }
}
