//! The manager's handle.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{json, Map, Value};
use tokio::task::JoinSet;

use super::events::{self, EventStream};
use super::gate::{self, OnInterrupt, Owned};
use super::instance::{self, MicroVMInstance};
use super::{convert, errors, logging};
use crate::error::Error;
use crate::manager::{CreateRequest, ExportedDisk, KeptEntry, Manager, ShelfUse};
use crate::model::{HealthStatus, ManagerConfig, PoolSpec, Shape, VmState};
use crate::vm::MicroVm;

/// How many events wait to be taken, unless a caller says otherwise; and at most.
const EVENTS: u64 = 1024;
const MOST_EVENTS: u64 = 1 << 20;

/// Creates, finds and destroys microVMs within one quota. All methods may be called from any thread, and release the GIL
/// while they wait.
///
/// Args:
///     config: A dict; the README lists its keys. An unknown key or a wrong value raises. With `"raise_on_error": True`
///         methods raise what they otherwise keep as `last_error` behind `False` or `None`.
///
/// Example:
///     >>> with MicroVMIsolationManager() as manager:  # doctest: +SKIP
///     ...     vm = manager.get_vm(manager.create_vm("browser_tab"))
///     ...     vm.start(), vm.send_command("ping")
#[pyclass(subclass, frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct MicroVMIsolationManager {
    manager: Owned<Manager>,
    /// The dict as the caller gave it, copied.
    config: Py<PyDict>,
    last_error: Mutex<Option<Error>>,
    /// One handle per VM, so that `get_vm` answers with the same object each time.
    handles: Mutex<HashMap<String, Py<MicroVMInstance>>>,
}

impl MicroVMIsolationManager {
    fn raising(&self) -> bool {
        self.manager.peek().config().raise_on_error
    }

    fn settle<T>(&self, py: Python<'_>, result: Result<T, Error>) -> PyResult<Option<T>> {
        errors::settle(py, result, self.raising(), |error| {
            *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        })
    }

    fn handle(&self, py: Python<'_>, vm: Arc<MicroVm>) -> PyResult<Py<MicroVMInstance>> {
        let id = vm.id().as_str().to_owned();
        {
            let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(handle) = handles.get(&id).filter(|handle| Arc::ptr_eq(handle.get().vm(), &vm)) {
                return Ok(handle.clone_ref(py));
            }
        }
        let made = Py::new(py, MicroVMInstance::wrap(vm, self.raising()))?;
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of VMs that the core has removed by itself, as policies do, go now.
        let is_gone = |handle: &Py<MicroVMInstance>| handle.get().vm().state() == VmState::Destroyed;
        let gone: Vec<String> =
            handles.iter().filter(|(_, handle)| is_gone(handle)).map(|(id, _)| id.clone()).collect();
        let mut old: Vec<_> = gone.iter().filter_map(|id| handles.remove(id)).collect();
        old.extend(handles.insert(id, made.clone_ref(py)));
        drop(handles);
        drop(old);
        Ok(made)
    }

    fn forget_handle(&self, vm_id: &str) {
        let old = self.handles.lock().unwrap_or_else(PoisonError::into_inner).remove(vm_id);
        drop(old);
    }

    /// One operation on one VM, by name; the VM keeps the reason, too.
    fn on_vm<F>(
        &self,
        py: Python<'_>,
        vm_id: &str,
        on: OnInterrupt,
        run: impl FnOnce(Arc<MicroVm>) -> F,
    ) -> PyResult<bool>
    where
        F: Future<Output = crate::error::Result<()>> + Send + 'static,
    {
        let found = self.manager.get(py)?.find(vm_id);
        let result = match found {
            Ok(vm) => {
                let result = gate::wait(py, on, run(vm.clone()))?;
                result.inspect_err(|error| vm.set_last_error(error.clone()))
            }
            Err(error) => Err(error),
        };
        Ok(self.settle(py, result)?.is_some())
    }
}

#[pymethods]
impl MicroVMIsolationManager {
    #[new]
    #[pyo3(signature = (config=None))]
    fn new(py: Python<'_>, config: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let config = config.filter(|config| !config.is_none());
        let fields = config.map(|config| convert::object("config", config)).transpose()?.unwrap_or_default();
        let parsed = ManagerConfig::from_json(&fields).map_err(|error| errors::raise(py, &error))?;
        let kept = PyDict::new(py);
        if let Some(config) = config {
            kept.update(config.cast()?)?;
        }
        let image = convert::guest_image(py)?;
        let manager = Manager::new(parsed, image).map_err(|error| errors::raise(py, &error))?;
        logging::start(py)?;
        Ok(Self {
            manager: Owned::new("MicroVMIsolationManager", manager),
            config: kept.unbind(),
            last_error: Mutex::new(None),
            handles: Mutex::default(),
        })
    }

    /// Begins to clean up dead VMs, to enforce `policies` and to fill the `pool`, and removes what dead processes left behind.
    ///
    /// Blocks for milliseconds, longer where much is left. May be called twice. What cannot be removed is logged. A `runtime_dir` or
    /// `cache_dir` that is refused (`host_error`) is the `last_error`, raised with `raise_on_error`, and nothing is begun then.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        let manager = self.manager.get(py)?.clone();
        let started = gate::wait(py, OnInterrupt::Finish, async move { manager.start().await })?;
        self.settle(py, started).map(drop)
    }

    /// Destroys every VM and ends what `start` began; suspended VMs stay on disk.
    ///
    /// Blocks until nothing is left, up to some seconds. May be called twice; does nothing in a forked child of the process that made
    /// the manager. Streams of events end.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        // A forked child that leaves a `with` block, or stops what it inherited, ends nothing of its parent's.
        if !self.manager.is_ours() {
            return Ok(());
        }
        let manager = self.manager.get(py)?.clone();
        gate::wait(py, OnInterrupt::Finish, async move { manager.stop().await })?;
        self.forget_all();
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.call_method0("start")?;
        Ok(slf)
    }

    #[pyo3(signature = (exc_type, exc_value, traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let (_, _, _) = (exc_type, exc_value, traceback);
        self.stop(py)?;
        Ok(false)
    }

    /// Reserves quota for a VM and names it; starts no process, and works before `start`.
    ///
    /// Args:
    ///     isolation_type: What the VM is for; generated ids contain its value.
    ///     resource_limits: What it may have; `default_...` of the configuration where left out.
    ///     backend: The VMM; the best that this host can run where left out.
    ///     network_config: Isolated where left out.
    ///     vm_id: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter or digit.
    ///     kernel_path: A kernel of one's own, uncompressed with a PVH entry.
    ///     rootfs_path: An ext4 image; it is never written to.
    ///     template: A name that was given to `MicroVMInstance.snapshot`: the VM starts as a clone of that VM, with its
    ///         programs running and its disk. What is left out here is the template's; vCPUs, memory, disk size,
    ///         backend, kernel, image and whether there is a network cannot be otherwise.
    ///
    /// Returns:
    ///     The id; `None` with `last_error` when quota or the host's memory is exhausted (`quota_exceeded`), the id is taken
    ///     (`vm_id_taken`), or the template is missing (`template_not_found`), damaged (`state_damaged`) or of another shape
    ///     (`state_mismatch`, naming each difference).
    ///
    /// Raises:
    ///     TypeError: An argument has the wrong type.
    ///     ValueError: An argument is out of range or malformed; the message names it.
    #[pyo3(signature = (isolation_type, resource_limits=None, backend=None, network_config=None, vm_id=None, kernel_path=None, rootfs_path=None, template=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn create_vm(
        &self,
        py: Python<'_>,
        isolation_type: &Bound<'_, PyAny>,
        resource_limits: Option<&Bound<'_, PyAny>>,
        backend: Option<&Bound<'_, PyAny>>,
        network_config: Option<&Bound<'_, PyAny>>,
        vm_id: Option<&Bound<'_, PyAny>>,
        kernel_path: Option<&Bound<'_, PyAny>>,
        rootfs_path: Option<&Bound<'_, PyAny>>,
        template: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<String>> {
        let manager = self.manager.get(py)?;
        let request = CreateRequest {
            isolation_type: convert::isolation_type(isolation_type)?,
            limits: resource_limits.map(convert::limits).transpose()?,
            backend: backend.map(convert::backend).transpose()?,
            network: network_config.map(convert::network).transpose()?,
            vm_id: vm_id.map(convert::vm_id).transpose()?,
            kernel_path: convert::optional_path("kernel_path", kernel_path)?,
            rootfs_path: convert::optional_path("rootfs_path", rootfs_path)?,
            template: convert::optional_template("template", template)?,
        };
        let created = py.detach(|| manager.create(request));
        let Some(vm) = self.settle(py, created)? else { return Ok(None) };
        logging::on_this_thread(py, "info", &format!("{}: created", vm.id()))?;
        let id = vm.id().as_str().to_owned();
        self.handle(py, vm)?;
        Ok(Some(id))
    }

    /// `MicroVMInstance.start` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`).
    fn start_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Abandon, |vm| async move { vm.start().await })
    }

    /// `MicroVMInstance.stop` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`).
    fn stop_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Finish, |vm| async move { vm.stop().await })
    }

    /// `MicroVMInstance.pause` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`).
    fn pause_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Finish, |vm| async move { vm.pause().await })
    }

    /// Lets a paused VM go on, or brings a suspended one back, also one that another manager or process suspended.
    ///
    /// Blocks for a start's time. A suspended VM comes back under its id, with its disk, its programs where they were,
    /// the right time and new session keys; its state on disk is gone then. Of several callers that resume the same
    /// VM one does, the others get `vm_id_taken` or `vm_not_found`. A resume that fails leaves the state as it was; it can fail with
    /// `quota_exceeded`, for quota is reserved anew.
    fn resume_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = convert::text("vm_id", vm_id)?;
        let manager = self.manager.get(py)?.clone();
        let resumed = gate::wait(py, OnInterrupt::Finish, async move { manager.resume(&vm_id).await })?;
        let Some(vm) = self.settle(py, resumed)? else { return Ok(false) };
        self.handle(py, vm)?;
        Ok(true)
    }

    /// `MicroVMInstance.suspend` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`).
    fn suspend_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Finish, |vm| async move { vm.suspend().await })
    }

    /// The suspended VMs of this user and `cache_dir`, whichever process suspended them: `vm_id`, `created` (Unix
    /// seconds), `disk_bytes`, `isolation_type`, `resource_limits`, `damaged`, ...
    ///
    /// `usable` says whether each could be resumed on this host as the host is now; if not, `differences` names what has
    /// changed since, the old and the new. Blocks; reads an image that has changed.
    fn list_suspended<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get(py)?.clone();
        kept_list(py, "vm_id", move || manager.list_suspended())
    }

    /// Copies the disk of a suspended VM to a new file: raw ext4, its holes kept. Blocks for the time of the copy.
    ///
    /// Works also for a VM that cannot be resumed any more, because its VMM or its image was replaced.
    ///
    /// Args:
    ///     vm_id: A VM of `list_suspended()`, whichever process suspended it.
    ///     path: A path at which there is no file yet; the file has mode 0600.
    ///
    /// Returns:
    ///     `bytes`, and `verified`: whether the copy has the digest that was noted when the VM was suspended. `None` with
    ///     `last_error` when there is no such VM, or it runs.
    ///
    /// Raises:
    ///     InvalidValueError: There is a file at `path`.
    fn export_disk<'py>(
        &self,
        py: Python<'py>,
        vm_id: &Bound<'py, PyAny>,
        path: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (vm_id, path) = (convert::text("vm_id", vm_id)?, convert::path("path", path)?);
        let manager = self.manager.get(py)?.clone();
        let exported = gate::wait(py, OnInterrupt::Finish, async move { manager.export_disk(&vm_id, path).await })?;
        let told =
            |disk: ExportedDisk| convert::from_json(py, &json!({"bytes": disk.bytes, "verified": disk.verified}));
        self.settle(py, exported)?.map(told).transpose()
    }

    /// The templates made by `MicroVMInstance.snapshot`: `name`, `source_vm_id`, `created` (Unix seconds),
    /// `disk_bytes`, `resource_limits`, `isolated_network`, `backend`, `damaged`, `usable`, `differences` (as in
    /// `list_suspended`), ...
    fn list_templates<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get(py)?.clone();
        kept_list(py, "name", move || manager.list_templates())
    }

    /// Removes a template of one's own; its clones run on. `False` with `last_error` when there is none.
    ///
    /// Raises:
    ///     ValueError: The name is malformed.
    fn delete_template(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (manager, name) = (self.manager.get(py)?.clone(), convert::template("name", name)?);
        let deleted = gate::wait(py, OnInterrupt::Finish, async move { manager.delete_template(&name).await })?;
        Ok(self.settle(py, deleted)?.is_some())
    }

    /// Removes a VM, in whatever state, every trace of it and its suspended state; gives its quota back.
    ///
    /// Blocks for some 100 ms. A start that is under way is cancelled. `False` with `last_error` when there is no such VM
    /// (`vm_not_found`), or it is suspended and resumed by another caller at this moment (`vm_id_taken`).
    fn destroy_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        let (manager, id) = (self.manager.get(py)?.clone(), vm_id.to_owned());
        let destroyed = gate::wait(py, OnInterrupt::Finish, async move { manager.destroy(&id).await })?;
        if destroyed.is_ok() {
            self.forget_handle(vm_id);
        }
        Ok(self.settle(py, destroyed)?.is_some())
    }

    /// Destroys every VM of this manager, side by side; suspended VMs stay on disk.
    fn destroy_all_vms(&self, py: Python<'_>) -> PyResult<()> {
        let manager = self.manager.get(py)?.clone();
        gate::wait(py, OnInterrupt::Finish, async move { manager.destroy_all().await })?;
        self.forget_all();
        Ok(())
    }

    /// The VM of this id, the same object each time; `None` when there is none.
    ///
    /// Raises:
    ///     TypeError: The id is no string.
    fn get_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<Option<Py<MicroVMInstance>>> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.manager.get(py)?.get(vm_id).map(|vm| self.handle(py, vm)).transpose()
    }

    /// The ids of the VMs of a type and in a state, all of them by default, in the order of their creation.
    ///
    /// Raises:
    ///     ValueError: There is no such type or state.
    #[pyo3(signature = (isolation_type=None, state=None))]
    fn list_vms(
        &self,
        py: Python<'_>,
        isolation_type: Option<&Bound<'_, PyAny>>,
        state: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<String>> {
        let isolation_type = isolation_type.map(convert::isolation_type).transpose()?;
        let state = state.map(convert::vm_state).transpose()?;
        let vms = self.manager.get(py)?.list(isolation_type, state);
        Ok(vms.iter().map(|vm| vm.id().as_str().to_owned()).collect())
    }

    /// `MicroVMInstance.get_info` by id; `None` when there is no such VM.
    fn get_vm_info<'py>(&self, py: Python<'py>, vm_id: &Bound<'_, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        let Some(vm) = self.manager.get(py)?.get(vm_id) else { return Ok(None) };
        let info = gate::wait(py, OnInterrupt::Abandon, instance::info(vm))?;
        convert::from_json(py, &info).map(Some)
    }

    /// `MicroVMInstance.get_info` of every VM, by id; all are asked at the same time.
    fn get_all_vms_info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vms = self.manager.get(py)?.list(None, None);
        let all = gate::wait(py, OnInterrupt::Abandon, async move {
            let mut asking = JoinSet::new();
            for vm in vms {
                asking.spawn(async move { (vm.id().as_str().to_owned(), instance::info(vm.clone()).await) });
            }
            asking.join_all().await.into_iter().collect::<Map<String, Value>>()
        })?;
        convert::from_json(py, &Value::Object(all))
    }

    /// `MicroVMInstance.send_command` by id; `None` with `last_error` also when there is no such VM (`vm_not_found`).
    #[pyo3(signature = (vm_id, command, params=None, timeout=None))]
    fn send_command_to_vm<'py>(
        &self,
        py: Python<'py>,
        vm_id: &Bound<'_, PyAny>,
        command: &Bound<'_, PyAny>,
        params: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        let Some(vm) = self.settle(py, self.manager.get(py)?.find(vm_id))? else { return Ok(None) };
        let answer = instance::ask(py, &vm, self.raising(), command, params, timeout)?;
        if answer.is_none() {
            *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = vm.last_error();
        }
        Ok(answer)
    }

    /// What there is and what is reserved, as a dict.
    ///
    /// `total_vms`; `vcpus_allocated`, `vcpus_available`, `memory_allocated_mb`, `memory_available_mb` (of the quota, MiB);
    /// `vms_by_type`, `vms_by_state`; `pool`, for each entry `ready` of `wanted`; `templates`, `own_templates` and `suspended`, each
    /// `count` and `disk_bytes`. Suspended VMs reserve nothing. Looks at the cache folder, so it may take milliseconds.
    fn get_resource_usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get(py)?;
        let usage = py.detach(|| manager.usage());
        let report = json!({
            "total_vms": usage.total_vms,
            "vcpus_allocated": usage.allocated.vcpus,
            "vcpus_available": usage.available.vcpus,
            "memory_allocated_mb": usage.allocated.memory_mb,
            "memory_available_mb": usage.available.memory_mb,
            "vms_by_type": usage.by_type,
            "vms_by_state": usage.by_state,
            "pool": usage.pool.iter().map(shelf_json).collect::<Vec<_>>(),
            "templates": {"count": usage.templates.0, "disk_bytes": usage.templates.1},
            "own_templates": {"count": usage.snapshots.0, "disk_bytes": usage.snapshots.1},
            "suspended": {"count": usage.suspended.0, "disk_bytes": usage.suspended.1},
        });
        convert::from_json(py, &report)
    }

    /// Makes the template of VMs of this kind ahead of time, so that the first one, too, starts as a clone.
    ///
    /// Blocks for a boot's time, seconds without hardware virtualization; at once when it is there. Reserves no quota. `False` with
    /// `last_error` as for a start that fails.
    #[pyo3(signature = (resource_limits=None, kernel_path=None, rootfs_path=None))]
    fn prepare(
        &self,
        py: Python<'_>,
        resource_limits: Option<&Bound<'_, PyAny>>,
        kernel_path: Option<&Bound<'_, PyAny>>,
        rootfs_path: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let manager = self.manager.get(py)?.clone();
        let limits = resource_limits.filter(|limits| !limits.is_none()).map(convert::limits).transpose()?;
        let shape = Shape {
            limits: limits.unwrap_or_else(|| manager.config().default_limits.clone()),
            kernel_path: convert::optional_path("kernel_path", kernel_path)?,
            rootfs_path: convert::optional_path("rootfs_path", rootfs_path)?,
        };
        let prepared = gate::wait(py, OnInterrupt::Abandon, async move { manager.prepare(&shape).await })?;
        Ok(self.settle(py, prepared)?.is_some())
    }

    /// Looks at every VM now: `total_vms`, `healthy_vms`, `unhealthy_vms` (dead ones, too), and `resource_usage`.
    ///
    /// Blocks for at most 2 s where a guest does not answer.
    fn get_health_status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vms = self.manager.get(py)?.list(None, None);
        let total = vms.len();
        let statuses = gate::wait(py, OnInterrupt::Abandon, async move {
            let mut asking = JoinSet::new();
            for vm in vms {
                asking.spawn(async move { vm.health().await.verdict.status });
            }
            asking.join_all().await
        })?;
        let count = |wanted: &[HealthStatus]| statuses.iter().filter(|status| wanted.contains(status)).count();
        let report = PyDict::new(py);
        report.set_item("total_vms", total)?;
        report.set_item("healthy_vms", count(&[HealthStatus::Healthy]))?;
        report.set_item("unhealthy_vms", count(&[HealthStatus::Unhealthy, HealthStatus::Dead]))?;
        report.set_item("resource_usage", self.get_resource_usage(py)?)?;
        Ok(report.into_any())
    }

    /// What happens from now on, as an iterator of dicts; it ends with the manager, or when `timeout` passes without one.
    ///
    /// Args:
    ///     timeout: Seconds to wait for each event, up to 86400; without end where left out.
    ///     capacity: Events that wait to be taken, 1 to 1048576; the oldest are lost after that (`EventStream.dropped`).
    #[pyo3(signature = (timeout=None, capacity=None), text_signature = "($self, timeout=None, capacity=1024)")]
    fn events(
        &self,
        py: Python<'_>,
        timeout: Option<&Bound<'_, PyAny>>,
        capacity: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<EventStream> {
        let timeout = timeout.filter(|t| !t.is_none()).map(|t| convert::seconds("timeout", t)).transpose()?;
        let capacity = capacity.map(|c| convert::whole_in("capacity", c, 1, MOST_EVENTS)).transpose()?;
        let capacity = usize::try_from(capacity.unwrap_or(EVENTS)).unwrap_or(usize::MAX);
        Ok(EventStream::new(self.manager.get(py)?.events().subscribe(capacity), timeout))
    }

    /// Calls `callback` with each event from now on, on a thread of its own, until the subscription is closed.
    ///
    /// An exception of the callback is logged and the next event delivered. `capacity` as in `events`.
    ///
    /// Raises:
    ///     TypeError: `callback` is not callable.
    #[pyo3(signature = (callback, capacity=None), text_signature = "($self, callback, capacity=1024)")]
    fn on_event<'py>(
        &self,
        py: Python<'py>,
        callback: &Bound<'py, PyAny>,
        capacity: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        events::serve(py, self.events(py, None, capacity)?, callback)
    }

    /// The manager and its VMs as OpenMetrics text; asks no VM anything: figures are those of the last look at each.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        let manager = self.manager.get(py)?.clone();
        Ok(py.detach(|| manager.metrics()))
    }

    /// The configuration as it was given, copied.
    #[getter]
    fn config(&self, py: Python<'_>) -> Py<PyDict> {
        self.config.clone_ref(py)
    }

    /// The package's logger, `thirstys_waterfall.security.microvm_isolation`; it has no handlers of its own.
    #[getter]
    fn logger<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        logging::logger(py)
    }

    /// The reason of the last failure, with a stable `code`; `None` when there was none. A success does not clear it.
    #[getter]
    fn last_error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let error = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        error.map(|error| errors::exception(py, &error)).transpose()
    }

    fn __repr__(&self) -> String {
        if !self.manager.is_ours() {
            return "<MicroVMIsolationManager of the parent process>".to_owned();
        }
        let manager = self.manager.peek();
        let (vms, used, config) = (manager.list(None, None).len(), manager.allocated(), manager.config());
        format!(
            "<MicroVMIsolationManager {}: {vms} VMs, {} of {} vCPUs and {} of {} MiB reserved>",
            if manager.is_cleaning_up() { "started" } else { "not started" },
            used.vcpus,
            config.max_vcpus,
            used.memory_mb,
            config.max_memory_mb,
        )
    }

    #[getter]
    fn _max_vcpus(&self) -> u64 {
        self.manager.peek().config().max_vcpus
    }

    #[getter]
    fn _max_memory_mb(&self) -> u64 {
        self.manager.peek().config().max_memory_mb
    }

    #[getter]
    fn _cleanup_active(&self) -> bool {
        self.manager.is_ours() && self.manager.peek().is_cleaning_up()
    }
}

fn kept_list<'py>(
    py: Python<'py>,
    key: &'static str,
    list: impl FnOnce() -> Vec<KeptEntry> + Send + 'static,
) -> PyResult<Bound<'py, PyAny>> {
    let listed = gate::wait(py, OnInterrupt::Abandon, async move { tokio::task::spawn_blocking(list).await })?;
    let entries = listed.map_err(|error| errors::raise(py, &Error::host("list", "what is kept", error)))?;
    convert::from_json(py, &entries.iter().map(|entry| kept_json(key, entry)).collect())
}

fn kept_json(key: &str, entry: &KeptEntry) -> Value {
    let mut kept = match &entry.outline {
        Ok(outline) => json!({
            "backend": outline.backend,
            "isolation_type": outline.isolation_type,
            "resource_limits": convert::limits_json(&outline.limits),
            "isolated_network": outline.network.isolated_network,
            "kernel_path": outline.kernel_path,
            "rootfs_path": outline.rootfs_path,
            "created": outline.created_unix_s,
            "damaged": false,
        }),
        Err(error) => json!({"damaged": true, "reason": error.to_string()}),
    };
    if let (Ok(outline), "name") = (&entry.outline, key) {
        kept["source_vm_id"] = json!(outline.vm_id);
    }
    (kept[key], kept["disk_bytes"]) = (json!(entry.name), json!(entry.disk_bytes));
    (kept["usable"], kept["differences"]) = (json!(entry.differences.is_empty()), json!(entry.differences));
    kept
}

fn shelf_json(shelf: &ShelfUse) -> Value {
    let PoolSpec { shape, size, form } = &shelf.spec;
    json!({
        "form": form.as_str(),
        "wanted": size,
        "ready": shelf.ready,
        "resource_limits": convert::limits_json(&shape.limits),
        "kernel_path": shape.kernel_path,
        "rootfs_path": shape.rootfs_path,
    })
}

impl MicroVMIsolationManager {
    fn forget_all(&self) {
        let old = std::mem::take(&mut *self.handles.lock().unwrap_or_else(PoisonError::into_inner));
        drop(old);
    }
}
