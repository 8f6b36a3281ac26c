//! The manager's handle.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{json, Value};
use tokio::task::JoinSet;

use super::convert::SpecArguments;
use super::events::{self, EventStream};
use super::gate::{self, OnInterrupt, Owned};
use super::instance::{self, MicroVMInstance};
use super::{convert, errors, logging};
use crate::error::Error;
use crate::image::template::SnapshotMetadata;
use crate::manager::{CreateRequest, ExportedDisk, Manager, PoolUse, ResourceUsage, SnapshotEntry, VmFilter};
use crate::model::{HealthStatus, IsolationType, ManagerConfig, PoolSpec, VmSpec, VmState};
use crate::mutex::Mutex;
use crate::vm::{info, MicroVm, Preparation};

/// How many events wait to be taken, unless a caller says otherwise; and at most.
const EVENTS: u64 = 1024;
const MOST_EVENTS: u64 = 1 << 20;

/// Creates, finds and destroys microVMs within one quota.
///
/// Every method may be called from any thread; one that blocks releases the GIL and sees Ctrl-C within
/// 50 ms. Properties do not block, and neither does the constructor, which reads the configuration only.
///
/// Errors under "Errors" are logged once and kept as `last_error`, and the method returns `False` or
/// `None`; with `config={"raise_on_error": True}` they are raised instead. Errors under "Raises" are
/// always raised, and so is `ForkedProcessError` in a forked child of the process that made the manager.
///
/// No privilege is needed, except CAP_NET_ADMIN for VMs on a tap (capabilities(7)), and read and
/// write access to `/dev/kvm` for hardware virtualization. Root gets more layers of the jail:
/// docs/security.md.
///
/// Args:
///     config: Settings by name; docs/configuration.md has their units, ranges and defaults.
///
/// Raises:
///     InvalidTypeError: A value has the wrong type.
///     InvalidValueError: A key is unknown or a value is not allowed; the message names both.
///
/// Example:
///     >>> with MicroVMIsolationManager({"raise_on_error": True}) as manager:
///     ...     vm_id = manager.create_vm("browser_tab", VMResourceLimits(memory_mb=128))
///     ...     manager.start_vm(vm_id)
///     ...     manager.send_command_to_vm(vm_id, "ping")
///     True
///     {'result': 'pong', 'status': 'ok'}
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
        errors::settle(py, result, self.raising(), |error| self.keep(error))
    }

    /// Notes the error as the last one.
    pub fn keep(&self, error: Error) {
        *self.last_error.lock() = Some(error);
    }

    /// What `prepare` begins with in both faces.
    pub fn preparation(
        &self,
        py: Python<'_>,
        arguments: &SpecArguments<'_, '_>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Result<Arc<Preparation>, Error>> {
        let manager = self.manager.get(py)?;
        if let Some(value) = progress.filter(|value| !value.is_callable()) {
            let (field, value) = ("progress".into(), convert::shown(value));
            let allowed = "callable with a stage and a fraction, or None".into();
            return Err(errors::raise(py, &Error::InvalidType { field, value, allowed }));
        }
        let patch = arguments.parse()?.or(manager.config().defaults());
        Ok(manager.prepare(VmSpec::new(IsolationType::BrowserTab, patch)).map(Arc::new))
    }

    /// The manager, in the process that made it.
    pub fn owned(&self, py: Python<'_>) -> PyResult<&Arc<Manager>> {
        self.manager.get(py)
    }

    pub fn handle(&self, py: Python<'_>, vm: Arc<MicroVm>) -> PyResult<Py<MicroVMInstance>> {
        let id = vm.id().as_str().to_owned();
        {
            let handles = self.handles.lock();
            if let Some(handle) = handles.get(&id).filter(|handle| Arc::ptr_eq(handle.get().vm(), &vm)) {
                return Ok(handle.clone_ref(py));
            }
        }
        let made = Py::new(py, MicroVMInstance::wrap(vm, self.raising()))?;
        let mut handles = self.handles.lock();
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

    pub fn forget_handle(&self, vm_id: &str) {
        let old = self.handles.lock().remove(vm_id);
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

    /// Starts the clean-up of dead VMs, the `policies` and the `pool`, and removes what dead processes left.
    ///
    /// Blocks for milliseconds, longer where dead processes left much. May be called twice. What cannot be
    /// removed is logged.
    ///
    /// Errors:
    ///     HostError: `runtime_dir` or `cache_dir` is refused (`folder_refused`); nothing is started then, and
    ///         a `with` block raises this instead of being entered.
    ///
    /// Example:
    ///     >>> manager.start()
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        let manager = self.manager.get(py)?.clone();
        let started = gate::wait(py, OnInterrupt::Finish, async move { manager.start().await })?;
        self.settle(py, started).map(drop)
    }

    /// Destroys every VM and ends what `start` started; suspended VMs stay on disk and event streams end.
    ///
    /// Blocks until nothing is left, up to some seconds. May be called twice. Does nothing in a forked
    /// child of the process that made the manager.
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
        let error = slf.get().last_error.lock().clone();
        // `with` has no answer that says that the start failed.
        match error.filter(|_| !slf.get()._cleanup_active()) {
            Some(error) => Err(errors::raise(slf.py(), &error)),
            None => Ok(slf),
        }
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

    /// Reserves quota for a VM and names it; starts no process and works before `start`.
    ///
    /// Does not block, except to read the description of a `template` from disk.
    ///
    /// Args:
    ///     isolation_type: What the VM is for; generated ids contain its value.
    ///     resource_limits: What the VM may have; the `default_*` settings where left out.
    ///     backend: The VMM; the best one that this host can run where left out (docs/backends.md).
    ///     network_config: The VM's network; none where left out.
    ///     vm_id: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter or digit.
    ///     kernel_path: A Linux kernel for the VM: an uncompressed ELF image with a PVH entry point
    ///         (CONFIG_PVH). The kernel of this package where left out.
    ///     rootfs_path: An ext4 or EROFS image as the root file system; it is never written to. The guest of
    ///         this package where left out.
    ///     template: A name that was given to `MicroVMInstance.snapshot`: the VM starts as a clone of that
    ///         VM, with its programs running and its disk. Arguments that are left out are the template's.
    ///         vCPUs, memory, disk size, backend, kernel, image and whether there is a network cannot
    ///         differ from it.
    ///     labels: At most 64 strings by strings, for `list_vms`, `get_info()` and events: keys of 1 to 63 of
    ///         the letters, digits, `.`, `_`, `/` and `-`, beginning with a letter or digit; values of at most 256
    ///         characters. They come back with a suspended VM; a clone has only its own.
    ///
    /// Returns:
    ///     The id of the VM, or `None`.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range or malformed; the message names it.
    ///
    /// Errors:
    ///     QuotaExceededError: The quota or the host's memory has no room (`quota_exceeded`).
    ///     VmIdTakenError: Another VM has the id (`vm_id_taken`).
    ///     TemplateError: The template is missing (`template_not_found`), damaged (`state_damaged`) or
    ///         differs from the arguments (`state_mismatch`, naming each difference).
    ///
    /// Example:
    ///     >>> made = manager.create_vm(IsolationType.PLUGIN, VMResourceLimits(memory_mb=128))
    ///     >>> made.startswith("plugin-"), manager.destroy_vm(made)
    ///     (True, True)
    #[pyo3(signature = (isolation_type, resource_limits=None, backend=None, network_config=None, vm_id=None, kernel_path=None, rootfs_path=None, template=None, labels=None))]
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
        labels: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<String>> {
        let manager = self.manager.get(py)?;
        let arguments =
            SpecArguments { backend, resource_limits, network_config, kernel_path, rootfs_path, template, labels };
        let request = CreateRequest {
            vm_id: vm_id.map(convert::vm_id).transpose()?,
            isolation_type: convert::isolation_type(isolation_type)?,
            patch: arguments.parse()?,
        };
        let created = py.detach(|| manager.create(request));
        let Some(vm) = self.settle(py, created)? else { return Ok(None) };
        logging::on_this_thread(py, "info", &format!("{}: created", vm.id()))?;
        let id = vm.id().as_str().to_owned();
        self.handle(py, vm)?;
        Ok(Some(id))
    }

    /// Starts a VM: `MicroVMInstance.start` by id.
    ///
    /// Blocks as `MicroVMInstance.start` does.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///
    /// Returns:
    ///     `True` when the VM runs, else `False`.
    ///
    /// Errors:
    ///     VmNotFoundError: The manager has no such VM (`vm_not_found`).
    ///     MicroVMError: Every error of `MicroVMInstance.start`.
    fn start_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Abandon, |vm| async move { vm.start().await })
    }

    /// Stops a VM: `MicroVMInstance.stop` by id.
    ///
    /// Blocks for at most 10 s.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///
    /// Returns:
    ///     `True` when the VM is stopped, else `False`.
    ///
    /// Errors:
    ///     VmNotFoundError: The manager has no such VM (`vm_not_found`).
    ///     MicroVMError: Every error of `MicroVMInstance.stop`.
    fn stop_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Finish, |vm| async move { vm.stop().await })
    }

    /// Pauses a VM: `MicroVMInstance.pause` by id.
    ///
    /// Blocks for milliseconds.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///
    /// Returns:
    ///     `True` when the VM is paused, else `False`.
    ///
    /// Errors:
    ///     VmNotFoundError: The manager has no such VM (`vm_not_found`).
    ///     MicroVMError: Every error of `MicroVMInstance.pause`.
    fn pause_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Finish, |vm| async move { vm.pause().await })
    }

    /// Resumes a paused VM, or a suspended one, also one that another manager or process suspended.
    ///
    /// Blocks for milliseconds for a paused VM, for the time of a start for a suspended one. A suspended VM
    /// comes back once, under its id, with its disk, its programs where they were, the right time and new
    /// session keys; its state on disk is removed then. If the resume fails, that state stays as it was.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager, or one of `list_suspended()`.
    ///
    /// Returns:
    ///     `True` when the VM runs, else `False`.
    ///
    /// Errors:
    ///     VmNotFoundError: There is no such VM (`vm_not_found`).
    ///     VmIdTakenError: Another caller resumes the same VM (`vm_id_taken`).
    ///     VmStateError: The VM is neither paused nor suspended (`invalid_state`).
    ///     QuotaExceededError: The quota, which is reserved anew, has no room (`quota_exceeded`).
    ///     TemplateError: The state on disk is damaged (`state_damaged`) or does not fit this host
    ///         (`state_mismatch`).
    fn resume_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = convert::text("vm_id", vm_id)?;
        let manager = self.manager.get(py)?.clone();
        let resumed = gate::wait(py, OnInterrupt::Finish, async move { manager.resume(&vm_id).await })?;
        let Some(vm) = self.settle(py, resumed)? else { return Ok(false) };
        self.handle(py, vm)?;
        Ok(true)
    }

    /// Suspends a VM to disk: `MicroVMInstance.suspend` by id.
    ///
    /// Blocks as `MicroVMInstance.suspend` does.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///
    /// Returns:
    ///     `True` when the VM is suspended, else `False`.
    ///
    /// Errors:
    ///     VmNotFoundError: The manager has no such VM (`vm_not_found`).
    ///     MicroVMError: Every error of `MicroVMInstance.suspend`.
    fn suspend_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.on_vm(py, vm_id, OnInterrupt::Finish, |vm| async move { vm.suspend().await })
    }

    /// Lists the suspended VMs of this user in `cache_dir`, also those that other processes suspended.
    ///
    /// Blocks while it reads the cache folder, and each image that has changed since its VM was suspended.
    ///
    /// Returns:
    ///     A dict for each VM, with `disk_bytes` in bytes and `created` in Unix seconds. `usable` says
    ///     whether the VM can be resumed on this host as it is now; `differences` names what has changed,
    ///     the old and the new.
    fn list_suspended<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get(py)?.clone();
        list_snapshots(py, "vm_id", move || manager.list_suspended())
    }

    /// Copies the disk of a suspended VM to a new file: a raw ext4 file system, its holes kept.
    ///
    /// Blocks for the time of the copy. Works also for a VM that cannot be resumed any more because its VMM
    /// or its image was replaced.
    ///
    /// Args:
    ///     vm_id: The id of a VM of `list_suspended()`.
    ///     path: A path at which there is no file yet; the new file has mode 0600.
    ///
    /// Returns:
    ///     `bytes`, the size in bytes, and `verified`: whether the copy has the digest that was noted when
    ///     the VM was suspended. `None` after an error.
    ///
    /// Raises:
    ///     InvalidValueError: There is a file at `path`.
    ///
    /// Errors:
    ///     VmNotFoundError: There is no such suspended VM (`vm_not_found`), for example because it runs.
    ///     HostError: The copy cannot be read or written (`host_error`).
    fn export_disk<'py>(
        &self,
        py: Python<'py>,
        vm_id: &Bound<'py, PyAny>,
        path: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (vm_id, path) = (convert::text("vm_id", vm_id)?, convert::path("path", path)?);
        let manager = self.manager.get(py)?.clone();
        let exported = gate::wait(py, OnInterrupt::Finish, async move { manager.export_disk(&vm_id, path).await })?;
        self.settle(py, exported)?.map(|disk| convert::from_json(py, &disk_json(&disk))).transpose()
    }

    /// Lists the templates that `MicroVMInstance.snapshot` made for this user in `cache_dir`.
    ///
    /// Blocks while it reads the cache folder, and each image that has changed since its template was made.
    ///
    /// Returns:
    ///     A dict for each template, with `disk_bytes` in bytes and `created` in Unix seconds; `usable` and
    ///     `differences` as in `list_suspended`.
    fn list_templates<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get(py)?.clone();
        list_snapshots(py, "name", move || manager.list_templates())
    }

    /// Deletes a template that `MicroVMInstance.snapshot` made; its clones run on.
    ///
    /// Blocks for milliseconds.
    ///
    /// Args:
    ///     name: The name of the template.
    ///
    /// Returns:
    ///     `True` when the template is deleted, else `False`.
    ///
    /// Raises:
    ///     InvalidValueError: The name is malformed.
    ///
    /// Errors:
    ///     TemplateError: There is no such template (`template_not_found`).
    fn delete_template(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (manager, name) = (self.manager.get(py)?.clone(), convert::template("name", name)?);
        let deleted = gate::wait(py, OnInterrupt::Finish, async move { manager.delete_template(&name).await })?;
        Ok(self.settle(py, deleted)?.is_some())
    }

    /// Destroys a VM in any state, with its files and its suspended state, and gives its quota back.
    ///
    /// Blocks for about 100 ms. Cancels a start that is under way.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager, or one of `list_suspended()`.
    ///
    /// Returns:
    ///     `True` when the VM is gone, else `False`.
    ///
    /// Errors:
    ///     VmNotFoundError: There is no such VM (`vm_not_found`).
    ///     VmIdTakenError: Another caller resumes the suspended VM at this moment (`vm_id_taken`).
    fn destroy_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        let (manager, id) = (self.manager.get(py)?.clone(), vm_id.to_owned());
        let destroyed = gate::wait(py, OnInterrupt::Finish, async move { manager.destroy(&id).await })?;
        if destroyed.is_ok() {
            self.forget_handle(vm_id);
        }
        Ok(self.settle(py, destroyed)?.is_some())
    }

    /// Destroys every VM of this manager, all at the same time; suspended VMs stay on disk.
    ///
    /// Blocks until all are gone, up to some seconds.
    fn destroy_all_vms(&self, py: Python<'_>) -> PyResult<()> {
        let manager = self.manager.get(py)?.clone();
        gate::wait(py, OnInterrupt::Finish, async move { manager.destroy_all().await })?;
        self.forget_all();
        Ok(())
    }

    /// Returns the VM of this id, the same object each time, or `None` when there is none.
    ///
    /// Does not block.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///
    /// Raises:
    ///     InvalidTypeError: The id is not a string.
    ///
    /// Example:
    ///     >>> manager.get_vm(vm_id) is manager.get_vm(vm_id)
    ///     True
    fn get_vm(&self, py: Python<'_>, vm_id: &Bound<'_, PyAny>) -> PyResult<Option<Py<MicroVMInstance>>> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        self.manager.get(py)?.get(vm_id).map(|vm| self.handle(py, vm)).transpose()
    }

    /// Lists the ids of the VMs, in the order in which they were created.
    ///
    /// Does not block.
    ///
    /// Args:
    ///     isolation_type: Only VMs of this type; VMs of every type where left out.
    ///     state: Only VMs in this state; VMs in every state where left out.
    ///     labels: Only VMs that have all of these labels; VMs with any labels where left out.
    ///
    /// Raises:
    ///     InvalidValueError: There is no such type or state, or a label is malformed.
    ///
    /// Example:
    ///     >>> vm_id in manager.list_vms(state=VMState.RUNNING)
    ///     True
    #[pyo3(signature = (isolation_type=None, state=None, labels=None))]
    fn list_vms(
        &self,
        py: Python<'_>,
        isolation_type: Option<&Bound<'_, PyAny>>,
        state: Option<&Bound<'_, PyAny>>,
        labels: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<String>> {
        let isolation_type = isolation_type.map(convert::isolation_type).transpose()?;
        let state = state.map(convert::vm_state).transpose()?;
        let labels = labels.map(convert::labels).transpose()?.unwrap_or_default();
        let vms = self.manager.get(py)?.list(&VmFilter { isolation_type, state, labels });
        Ok(vms.iter().map(|vm| vm.id().as_str().to_owned()).collect())
    }

    /// Returns everything there is to know about a VM: `MicroVMInstance.get_info` by id.
    ///
    /// Blocks for at most 2 s if the guest does not answer.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///
    /// Returns:
    ///     A dict of plain JSON types; `None` when there is no such VM.
    fn get_vm_info<'py>(&self, py: Python<'py>, vm_id: &Bound<'_, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let vm_id = &convert::text("vm_id", vm_id)?;
        let Some(vm) = self.manager.get(py)?.get(vm_id) else { return Ok(None) };
        let info = gate::wait(py, OnInterrupt::Abandon, info::info(vm))?;
        convert::from_json(py, &info).map(Some)
    }

    /// Returns `MicroVMInstance.get_info` of every VM, by id.
    ///
    /// Blocks for at most 2 s if a guest does not answer; all VMs are asked at the same time.
    fn get_all_vms_info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vms = self.manager.get(py)?.all();
        let all = gate::wait(py, OnInterrupt::Abandon, all_info(vms))?;
        convert::from_json(py, &all)
    }

    /// Sends a command to the agent in a VM: `MicroVMInstance.send_command` by id.
    ///
    /// Blocks until the agent answers.
    ///
    /// Args:
    ///     vm_id: The id of a VM of this manager.
    ///     command: The name of the command; docs/commands.md lists them.
    ///     params: The parameters of the command.
    ///     timeout: Seconds to wait for the answer, 0 to 86400; as in `MicroVMInstance.send_command` where
    ///         left out.
    ///
    /// Returns:
    ///     The answer of the guest, or `None`.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range.
    ///
    /// Errors:
    ///     VmNotFoundError: The manager has no such VM (`vm_not_found`).
    ///     MicroVMError: Every error of `MicroVMInstance.send_command`.
    ///
    /// Example:
    ///     >>> manager.send_command_to_vm(vm_id, "ping")["result"]
    ///     'pong'
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
            *self.last_error.lock() = vm.last_error();
        }
        Ok(answer)
    }

    /// Returns what the quota has, what is reserved of it, and what lies in the cache folder.
    ///
    /// Blocks for milliseconds while it looks at the cache folder. Sizes called `mb` are MiB, `disk_bytes`
    /// are bytes. Suspended VMs reserve nothing.
    ///
    /// Returns:
    ///     `total_vms`; of the quota `vcpus_allocated`, `vcpus_available`, `memory_allocated_mb` and
    ///     `memory_available_mb`; counts `vms_by_type` and `vms_by_state`; for each entry of the `pool` how
    ///     many VMs are `ready` of those `wanted`; `count` and `disk_bytes` of `templates` (of the library),
    ///     `own_templates` (by `MicroVMInstance.snapshot`) and `suspended` VMs.
    ///
    /// Example:
    ///     >>> manager.get_resource_usage()["vms_by_state"]
    ///     {'running': 1}
    fn get_resource_usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get(py)?;
        let usage = py.detach(|| manager.usage());
        convert::from_json(py, &usage_json(&usage))
    }

    /// Makes the template of a kind of VM ahead of time, so that the first VM, too, starts as a clone.
    ///
    /// Blocks for the time of a boot, which is seconds without hardware virtualization; returns at once when
    /// the template is there. Reserves no quota.
    ///
    /// Args:
    ///     resource_limits: The limits of such VMs; the `default_*` settings where left out.
    ///     kernel_path: Their kernel, as in `create_vm`.
    ///     rootfs_path: Their image, as in `create_vm`.
    ///     progress: A function that is called, here, with the stage that begins and with the fraction of
    ///         the time that has gone by there, 0.0 to 1.0, as the events of kind `template` have them. The
    ///         last call is `("done", 1.0)`, and the only one when the template is there already or another
    ///         VM's start makes it. What it raises is raised here; a template that has begun to boot is
    ///         finished all the same.
    ///
    /// Returns:
    ///     `True` when the template is there, else `False`.
    ///
    /// Raises:
    ///     InvalidTypeError: `progress` is not callable, or another argument has the wrong type.
    ///
    /// Errors:
    ///     MicroVMError: Every error of `MicroVMInstance.start`.
    ///
    /// Example:
    ///     >>> manager.prepare(progress=lambda stage, fraction: print(f"{fraction:4.0%} {stage}"))
    ///     100% done
    ///     True
    #[pyo3(signature = (resource_limits=None, kernel_path=None, rootfs_path=None, progress=None))]
    fn prepare(
        &self,
        py: Python<'_>,
        resource_limits: Option<&Bound<'_, PyAny>>,
        kernel_path: Option<&Bound<'_, PyAny>>,
        rootfs_path: Option<&Bound<'_, PyAny>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let arguments = SpecArguments { resource_limits, kernel_path, rootfs_path, ..SpecArguments::default() };
        let preparation = self.preparation(py, &arguments, progress)?;
        let Some(preparation) = self.settle(py, preparation)? else { return Ok(false) };
        loop {
            let making = preparation.clone();
            let next = gate::wait(py, OnInterrupt::Abandon, async move { making.next().await })?;
            match (self.settle(py, next)?, progress) {
                (Some(Some(stage)), Some(progress)) => drop(progress.call1(stage)?),
                (Some(Some(_)), None) => {}
                (ended, _) => return Ok(ended.is_some()),
            }
        }
    }

    /// Measures the health of every VM now, and counts the healthy and the unhealthy ones.
    ///
    /// Blocks for at most 2 s if a guest does not answer; all VMs are asked at the same time.
    ///
    /// Returns:
    ///     `total_vms`, `healthy_vms`, `unhealthy_vms` (dead ones included) and `resource_usage`, as
    ///     `get_resource_usage` returns it.
    ///
    /// Example:
    ///     >>> manager.get_health_status()["healthy_vms"]
    ///     1
    fn get_health_status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vms = self.manager.get(py)?.all();
        let report = gate::wait(py, OnInterrupt::Abandon, health_counts(vms))?;
        let report = convert::from_json(py, &report)?;
        report.set_item("resource_usage", self.get_resource_usage(py)?)?;
        Ok(report)
    }

    /// Returns an iterator of what happens to the VMs from now on; it ends with the manager.
    ///
    /// Does not block; the iterator does (see `EventStream`).
    ///
    /// Args:
    ///     timeout: Seconds that the iterator waits for each event before it ends, 0 to 86400; no limit
    ///         where left out.
    ///     capacity: Number of events that may wait to be taken, 1 to 1048576; when more come, the oldest
    ///         are dropped (`EventStream.dropped`).
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range.
    ///
    /// Example:
    ///     >>> with manager.events(timeout=5) as events:
    ///     ...     made = manager.create_vm("plugin", VMResourceLimits(memory_mb=128))
    ///     ...     next(events)["kind"], manager.destroy_vm(made)
    ///     ('created', True)
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

    /// Calls `callback` with each event from now on, on a thread of its own, until it is closed.
    ///
    /// Does not block. An exception of the callback is logged and the next event is delivered.
    ///
    /// Args:
    ///     callback: A function of one argument, the event: a dict.
    ///     capacity: Number of events that may wait to be delivered, 1 to 1048576; when more come, the
    ///         oldest are dropped (`EventSubscription.dropped`).
    ///
    /// Raises:
    ///     InvalidTypeError: `callback` is not callable.
    ///     InvalidValueError: `capacity` is out of range.
    ///
    /// Example:
    ///     >>> subscription = manager.on_event(print)
    ///     >>> subscription.close()
    #[pyo3(signature = (callback, capacity=None), text_signature = "($self, callback, capacity=1024)")]
    fn on_event<'py>(
        &self,
        py: Python<'py>,
        callback: &Bound<'py, PyAny>,
        capacity: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        events::serve(py, self.events(py, None, capacity)?, callback)
    }

    /// Returns the metrics of the manager and its VMs as OpenMetrics text, for Prometheus.
    ///
    /// Does not block: it asks no VM, and its figures are those of the last measurement of each VM. The
    /// format is that of the OpenMetrics 1.0 specification; each metric has a line of help.
    ///
    /// Example:
    ///     >>> manager.metrics().endswith("# EOF\n")
    ///     True
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        let manager = self.manager.get(py)?.clone();
        Ok(py.detach(|| manager.metrics()))
    }

    /// The configuration as it was given, copied.
    #[getter]
    fn config(&self, py: Python<'_>) -> Py<PyDict> {
        self.config.clone_ref(py)
    }

    /// The logger of the package, `thirstys_waterfall.security.microvm_isolation`; the package adds no
    /// handler that prints.
    #[getter]
    fn logger<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        logging::logger(py)
    }

    /// The error of the last failure, with a stable `code`; `None` before the first. A success does not
    /// clear it.
    #[getter]
    fn last_error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let error = self.last_error.lock().clone();
        error.map(|error| errors::exception(py, &error)).transpose()
    }

    fn __repr__(&self) -> String {
        if !self.manager.is_ours() {
            return "<MicroVMIsolationManager of the parent process>".to_owned();
        }
        let manager = self.manager.peek();
        let (vms, used, config) = (manager.all().len(), manager.allocated(), manager.config());
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

fn list_snapshots<'py>(
    py: Python<'py>,
    key: &'static str,
    list: impl FnOnce() -> Vec<SnapshotEntry> + Send + 'static,
) -> PyResult<Bound<'py, PyAny>> {
    let listed = gate::wait(py, OnInterrupt::Abandon, async move { tokio::task::spawn_blocking(list).await })?;
    let entries = listed.map_err(|error| errors::raise(py, &Error::host("list", "the snapshots", error)))?;
    convert::from_json(py, &snapshots_json(key, &entries))
}

pub fn snapshots_json(key: &str, entries: &[SnapshotEntry]) -> Value {
    entries.iter().map(|entry| snapshot_json(key, entry)).collect()
}

/// `vm::info::info` of each VM, by id; all are asked at the same time.
pub async fn all_info(vms: Vec<Arc<MicroVm>>) -> Value {
    let mut asking = JoinSet::new();
    for vm in vms {
        asking.spawn(async move { (vm.id().as_str().to_owned(), info::info(vm.clone()).await) });
    }
    Value::Object(asking.join_all().await.into_iter().collect())
}

/// How many VMs are healthy and how many are not; all are asked at the same time.
pub async fn health_counts(vms: Vec<Arc<MicroVm>>) -> Value {
    let total = vms.len();
    let mut asking = JoinSet::new();
    for vm in vms {
        asking.spawn(async move { vm.health().await.report.status });
    }
    let statuses = asking.join_all().await;
    let count = |wanted: &[HealthStatus]| statuses.iter().filter(|status| wanted.contains(status)).count();
    json!({
        "total_vms": total,
        "healthy_vms": count(&[HealthStatus::Healthy]),
        "unhealthy_vms": count(&[HealthStatus::Unhealthy, HealthStatus::Dead]),
    })
}

pub fn usage_json(usage: &ResourceUsage) -> Value {
    json!({
        "total_vms": usage.total_vms,
        "vcpus_allocated": usage.allocated.vcpus,
        "vcpus_available": usage.available.vcpus,
        "memory_allocated_mb": usage.allocated.memory_mb,
        "memory_available_mb": usage.available.memory_mb,
        "vms_by_type": usage.by_type,
        "vms_by_state": usage.by_state,
        "pool": usage.pool.iter().map(pool_json).collect::<Vec<_>>(),
        "templates": {"count": usage.templates.0, "disk_bytes": usage.templates.1},
        "own_templates": {"count": usage.snapshots.0, "disk_bytes": usage.snapshots.1},
        "suspended": {"count": usage.suspended.0, "disk_bytes": usage.suspended.1},
    })
}

pub fn disk_json(disk: &ExportedDisk) -> Value {
    json!({"bytes": disk.bytes, "verified": disk.verified})
}

fn snapshot_json(key: &str, entry: &SnapshotEntry) -> Value {
    let mut snapshot = match &entry.metadata {
        Ok(SnapshotMetadata { spec, created_unix_s, .. }) => json!({
            "backend": spec.backend,
            "isolation_type": spec.isolation_type,
            "resource_limits": convert::limits_json(&spec.limits),
            "isolated_network": spec.network.isolated_network,
            "labels": spec.labels,
            "kernel_path": spec.image.kernel_path,
            "rootfs_path": spec.image.rootfs_path,
            "created": created_unix_s,
            "damaged": false,
        }),
        Err(error) => json!({"damaged": true, "reason": error.to_string()}),
    };
    if let (Ok(metadata), "name") = (&entry.metadata, key) {
        snapshot["source_vm_id"] = json!(metadata.vm_id);
    }
    (snapshot[key], snapshot["disk_bytes"]) = (json!(entry.name), json!(entry.disk_bytes));
    (snapshot["usable"], snapshot["differences"]) = (json!(entry.differences.is_empty()), json!(entry.differences));
    snapshot
}

fn pool_json(pool: &PoolUse) -> Value {
    let PoolSpec { vm, size, tier } = &pool.spec;
    json!({
        "form": tier.as_str(),
        "wanted": size,
        "ready": pool.ready,
        "resource_limits": convert::limits_json(&vm.limits),
        "kernel_path": vm.image.kernel_path,
        "rootfs_path": vm.image.rootfs_path,
    })
}

impl MicroVMIsolationManager {
    pub fn forget_all(&self) {
        let old = std::mem::take(&mut *self.handles.lock());
        drop(old);
    }
}
