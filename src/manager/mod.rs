//! All VMs of one owner: registry, quota, cleanup.
//!
//! Architecture invariant: `registry` is held for a few instructions at a time, never across an await; what takes
//! time happens on a VM of its own, so one slow VM never blocks another.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{AbortHandle, JoinSet};

use crate::error::{Error, Result};
use crate::host::memory::{self, HostMemory};
use crate::host::{clock, runtime_dir};
use crate::image::GuestImage;
use crate::model::{
    Backend, IsolationType, ManagerConfig, NetworkConfig, Quota, QuotaUse, ResourceLimits, VmId, VmState,
};
use crate::vm::{MicroVm, Settings, Spec};
use crate::vmm::{Binaries, OVERHEAD_MIB};

/// What `create` is asked for; absent parts come from the configuration.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub isolation_type: IsolationType,
    pub limits: Option<ResourceLimits>,
    pub backend: Option<Backend>,
    pub network: Option<NetworkConfig>,
    pub vm_id: Option<VmId>,
    pub kernel_path: Option<PathBuf>,
    pub rootfs_path: Option<PathBuf>,
}

/// How many VMs there are, of which kind and in which state, and what they have reserved.
#[derive(Debug, Clone, Default)]
pub struct ResourceUsage {
    pub total_vms: usize,
    pub allocated: QuotaUse,
    pub available: QuotaUse,
    pub by_type: BTreeMap<&'static str, usize>,
    pub by_state: BTreeMap<&'static str, usize>,
}

struct Registry {
    /// In the order of creation.
    vms: Vec<Arc<MicroVm>>,
    quota: Quota,
}

/// The manager.
pub struct Manager {
    config: ManagerConfig,
    settings: Arc<Settings>,
    registry: Mutex<Registry>,
    janitor: Mutex<Option<AbortHandle>>,
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.stop_janitor();
    }
}

/// The settings that a configuration means.
#[must_use]
pub fn settings(config: &ManagerConfig, image: GuestImage) -> Settings {
    Settings {
        base: config.runtime_dir.as_ref().map_or_else(runtime_dir::default_base, PathBuf::from),
        image,
        binaries: Binaries::from(config),
        min_isolation: config.min_isolation,
        jail: config.jail,
        uid_range: config.uid_range,
        cgroup_parent: config.cgroup_parent.as_ref().map(PathBuf::from),
        start_timeout: Duration::from_secs_f64(config.start_timeout_s),
        command_timeout: Duration::from_secs_f64(config.command_timeout_s),
    }
}

impl Manager {
    #[must_use]
    pub fn new(config: ManagerConfig, image: GuestImage) -> Arc<Self> {
        let registry = Registry { vms: Vec::new(), quota: Quota::new(config.max_vcpus, config.max_memory_mb) };
        Arc::new(Self {
            settings: Arc::new(settings(&config, image)),
            config,
            registry: Mutex::new(registry),
            janitor: Mutex::new(None),
        })
    }

    #[must_use]
    pub fn config(&self) -> &ManagerConfig {
        &self.config
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn janitor(&self) -> MutexGuard<'_, Option<AbortHandle>> {
        self.janitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what dead processes left and begins to clean up; nothing when it runs already.
    pub async fn start(self: &Arc<Self>) {
        let base = self.settings.base.clone();
        match tokio::task::spawn_blocking(move || runtime_dir::sweep(&base)).await {
            Ok(swept) if !swept.is_empty() => log::warn!("removed the remains of dead processes: {}", swept.join(", ")),
            Ok(_) => {}
            Err(error) => log::warn!("the sweep of the runtime directory failed: {error}"),
        }
        let mut janitor = self.janitor();
        if janitor.is_none() {
            let interval = Duration::from_secs_f64(self.config.cleanup_interval_s);
            let task = Handle::current().spawn(clean_up(Arc::downgrade(self), interval));
            *janitor = Some(task.abort_handle());
        }
    }

    /// Destroys every VM and stops cleaning up; nothing when it is stopped already.
    pub async fn stop(&self) {
        self.stop_janitor();
        self.destroy_all().await;
    }

    fn stop_janitor(&self) {
        if let Some(janitor) = self.janitor().take() {
            janitor.abort();
        }
    }

    #[must_use]
    pub fn is_cleaning_up(&self) -> bool {
        self.janitor().is_some()
    }

    /// Reserves quota and a name; starts no process.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`], also when the host has not the memory for one more; [`Error::VmIdTaken`],
    /// [`Error::InvalidValue`].
    pub fn create(&self, request: CreateRequest) -> Result<Arc<MicroVm>> {
        let limits = request.limits.unwrap_or_else(|| self.config.default_limits.clone());
        limits.check()?;
        let network = request.network.unwrap_or_default();
        network.check()?;
        let vm_id = match request.vm_id {
            Some(vm_id) => vm_id,
            None => VmId::parse(&format!("{}-{}", request.isolation_type, clock::hex(&clock::random::<6>()?)))?,
        };
        let spec = Spec {
            vm_id: vm_id.clone(),
            backend: request.backend.or(self.config.default_backend),
            isolation_type: request.isolation_type,
            limits: limits.clone(),
            network,
            kernel_path: request.kernel_path,
            rootfs_path: request.rootfs_path,
        };
        let vm = MicroVm::new(spec, self.settings.clone());
        let host = memory::read().filter(|_| !self.config.overcommit_memory);
        // Looked up before the registry is locked; a VM that starts meanwhile is counted in full, which is safe.
        let taken: u64 = self.list(None, None).iter().map(|vm| vm.memory_taken_mib()).sum();
        let mut registry = self.registry();
        if let Some(host) = host {
            let cost = |memory_mb: u64| memory_mb + OVERHEAD_MIB;
            let promised: u64 = registry.vms.iter().map(|vm| cost(vm.spec().limits.memory_mb)).sum();
            check_host_memory(&vm_id, cost(limits.memory_mb), promised.saturating_sub(taken), host)?;
        }
        registry.quota.reserve(&vm_id, &limits)?;
        registry.vms.push(vm.clone());
        Ok(vm)
    }

    #[must_use]
    pub fn get(&self, vm_id: &str) -> Option<Arc<MicroVm>> {
        self.registry().vms.iter().find(|vm| vm.id().as_str() == vm_id).cloned()
    }

    /// # Errors
    /// [`Error::VmNotFound`].
    pub fn find(&self, vm_id: &str) -> Result<Arc<MicroVm>> {
        self.get(vm_id).ok_or_else(|| Error::VmNotFound { vm_id: vm_id.to_owned() })
    }

    /// The VMs of a kind and in a state, in the order of their creation.
    #[must_use]
    pub fn list(&self, isolation_type: Option<IsolationType>, state: Option<VmState>) -> Vec<Arc<MicroVm>> {
        let vms = self.registry().vms.clone();
        let fits = |vm: &Arc<MicroVm>| {
            isolation_type.is_none_or(|wanted| vm.spec().isolation_type == wanted)
                && state.is_none_or(|wanted| vm.state() == wanted)
        };
        vms.into_iter().filter(fits).collect()
    }

    /// Removes a VM and every trace of it, and gives its quota back.
    ///
    /// # Errors
    /// [`Error::VmNotFound`].
    pub async fn destroy(&self, vm_id: &str) -> Result<()> {
        let vm = self.find(vm_id)?;
        self.remove(&vm).await;
        Ok(())
    }

    async fn remove(&self, vm: &Arc<MicroVm>) {
        vm.destroy().await;
        let mut registry = self.registry();
        let before = registry.vms.len();
        registry.vms.retain(|other| !Arc::ptr_eq(other, vm));
        // Two callers may destroy the same VM: only the one that took it out releases, or it might be a namesake's.
        if registry.vms.len() < before {
            registry.quota.release(vm.id());
        }
    }

    pub async fn destroy_all(&self) {
        let vms = self.list(None, None);
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
        let (vms, allocated, available) = {
            let registry = self.registry();
            (registry.vms.clone(), registry.quota.allocated(), registry.quota.available())
        };
        let mut usage = ResourceUsage { total_vms: vms.len(), allocated, available, ..ResourceUsage::default() };
        for vm in vms {
            *usage.by_type.entry(vm.spec().isolation_type.as_str()).or_default() += 1;
            *usage.by_state.entry(vm.state().as_str()).or_default() += 1;
        }
        usage
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
        for vm in manager.list(None, Some(VmState::Error)) {
            if vm.dead_for().is_some_and(|dead| dead >= interval) {
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
