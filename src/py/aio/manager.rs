//! The operations on a manager.

use std::future::Future;
use std::sync::Arc;

use pyo3::prelude::*;
use serde_json::Value;

use super::super::convert::{self, SpecArguments};
use super::super::errors;
use super::super::gate::{self, OnInterrupt};
use super::super::manager::{self, MicroVMIsolationManager};
use super::queue::OperationQueue;
use crate::error::{Error, Result};
use crate::manager::{CreateRequest, Manager};
use crate::vm::{MicroVm, Preparation};

/// The operations on a manager: each begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct ManagerOperations {
    handle: Py<MicroVMIsolationManager>,
}

/// Does what waits for a disk on a thread of its own.
pub async fn blocking<T: Send + 'static>(what: &'static str, call: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let called = tokio::task::spawn_blocking(call).await;
    called.map_err(|error| Error::host("read", what, std::io::Error::other(error)))
}

/// A VM whose id the caller does not have yet: it is destroyed when the caller is cancelled before.
struct Unclaimed {
    manager: Arc<Manager>,
    vm: Option<Arc<MicroVm>>,
}

impl Unclaimed {
    fn create(manager: Arc<Manager>, request: CreateRequest) -> Result<Self> {
        let vm = manager.create(request)?;
        Ok(Self { manager, vm: Some(vm) })
    }

    fn claim(mut self) -> Option<Arc<MicroVm>> {
        self.vm.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        let Some(vm) = self.vm.take() else { return };
        let manager = self.manager.clone();
        let destroying = gate::spawn(async move {
            if let Err(error) = manager.destroy(vm.id().as_str()).await {
                log::warn!("{}: created for a caller that was cancelled, and not destroyed: {error}", vm.id());
            }
        });
        if let Err(error) = destroying {
            log::error!("a VM that was created for a caller that was cancelled stays: {error}");
        }
    }
}

impl ManagerOperations {
    /// Begins `run`; the manager keeps the error that it ends with.
    fn on_manager<F, T, R>(
        &self,
        queue: &Bound<'_, OperationQueue>,
        on_cancel: OnInterrupt,
        run: impl FnOnce(Arc<Manager>) -> F,
        finish: impl FnOnce(Python<'_>, &MicroVMIsolationManager, T) -> PyResult<R> + Send + 'static,
    ) -> PyResult<u64>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
        R: for<'py> IntoPyObject<'py>,
    {
        let py = queue.py();
        let future = run(self.handle.get().owned(py)?.clone());
        let handle = self.handle.clone_ref(py);
        queue.get().begin(on_cancel, future, move |py, result| {
            let handle = handle.get();
            finish(py, handle, errors::raised(py, result, |error| handle.keep(error))?)
        })
    }

    fn report<F>(&self, queue: &Bound<'_, OperationQueue>, run: impl FnOnce(Arc<Manager>) -> F) -> PyResult<u64>
    where
        F: Future<Output = Result<Value>> + Send + 'static,
    {
        self.on_manager(queue, OnInterrupt::Abandon, run, |py, _, report| Ok(convert::from_json(py, &report)?.unbind()))
    }
}

#[pymethods]
impl ManagerOperations {
    #[new]
    fn new(handle: Py<MicroVMIsolationManager>) -> Self {
        Self { handle }
    }

    fn start(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let start = |manager: Arc<Manager>| async move { manager.start().await };
        self.on_manager(queue, OnInterrupt::Finish, start, |py, _, ()| Ok(py.None()))
    }

    fn stop(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let stop = |manager: Arc<Manager>| async move {
            manager.stop().await;
            Ok(())
        };
        self.on_manager(queue, OnInterrupt::Finish, stop, |py, handle, ()| {
            handle.forget_all();
            Ok(py.None())
        })
    }

    #[pyo3(signature = (queue, isolation_type, resource_limits=None, backend=None, network_config=None, vm_id=None, kernel_path=None, rootfs_path=None, template=None, labels=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn create_vm(
        &self,
        queue: &Bound<'_, OperationQueue>,
        isolation_type: &Bound<'_, PyAny>,
        resource_limits: Option<&Bound<'_, PyAny>>,
        backend: Option<&Bound<'_, PyAny>>,
        network_config: Option<&Bound<'_, PyAny>>,
        vm_id: Option<&Bound<'_, PyAny>>,
        kernel_path: Option<&Bound<'_, PyAny>>,
        rootfs_path: Option<&Bound<'_, PyAny>>,
        template: Option<&Bound<'_, PyAny>>,
        labels: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let arguments =
            SpecArguments { backend, resource_limits, network_config, kernel_path, rootfs_path, template, labels };
        let request = CreateRequest {
            vm_id: vm_id.map(convert::vm_id).transpose()?,
            isolation_type: convert::isolation_type(isolation_type)?,
            patch: arguments.parse()?,
        };
        let create = |manager: Arc<Manager>| async move {
            blocking("the template", move || Unclaimed::create(manager, request)).await?
        };
        self.on_manager(queue, OnInterrupt::Abandon, create, |py, handle, unclaimed| {
            let vm = unclaimed.claim();
            let id = vm.as_ref().map(|vm| vm.id().as_str().to_owned());
            vm.map(|vm| handle.handle(py, vm)).transpose()?;
            Ok(id)
        })
    }

    fn resume_vm(&self, queue: &Bound<'_, OperationQueue>, vm_id: &Bound<'_, PyAny>) -> PyResult<u64> {
        let vm_id = convert::text("vm_id", vm_id)?;
        let resume = |manager: Arc<Manager>| async move { manager.resume(&vm_id).await };
        self.on_manager(queue, OnInterrupt::Finish, resume, |py, handle, vm| {
            handle.handle(py, vm)?;
            Ok(true)
        })
    }

    fn destroy_vm(&self, queue: &Bound<'_, OperationQueue>, vm_id: &Bound<'_, PyAny>) -> PyResult<u64> {
        let vm_id = convert::text("vm_id", vm_id)?;
        let id = vm_id.clone();
        let destroy = |manager: Arc<Manager>| async move { manager.destroy(&id).await };
        self.on_manager(queue, OnInterrupt::Finish, destroy, move |_, handle, ()| {
            handle.forget_handle(&vm_id);
            Ok(true)
        })
    }

    fn destroy_all_vms(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let destroy = |manager: Arc<Manager>| async move {
            manager.destroy_all().await;
            Ok(())
        };
        self.on_manager(queue, OnInterrupt::Finish, destroy, |py, handle, ()| {
            handle.forget_all();
            Ok(py.None())
        })
    }

    fn get_all_vms_info(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.report(queue, |manager| async move { Ok(manager::all_info(manager.all()).await) })
    }

    fn get_resource_usage(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.report(queue, |manager| blocking("the cache folder", move || manager::usage_json(&manager.usage())))
    }

    fn get_health_status(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.report(queue, |manager| async move {
            let mut report = manager::health_counts(manager.all()).await;
            let usage = blocking("the cache folder", move || manager::usage_json(&manager.usage())).await?;
            report["resource_usage"] = usage;
            Ok(report)
        })
    }

    fn list_suspended(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.report(queue, |manager| {
            blocking("the snapshots", move || manager::snapshots_json("vm_id", &manager.list_suspended()))
        })
    }

    fn export_disk(
        &self,
        queue: &Bound<'_, OperationQueue>,
        vm_id: &Bound<'_, PyAny>,
        path: &Bound<'_, PyAny>,
    ) -> PyResult<u64> {
        let (vm_id, path) = (convert::text("vm_id", vm_id)?, convert::path("path", path)?);
        let export = |manager: Arc<Manager>| async move { manager.export_disk(&vm_id, path).await };
        self.on_manager(queue, OnInterrupt::Finish, export, |py, _, disk| {
            Ok(convert::from_json(py, &manager::disk_json(&disk))?.unbind())
        })
    }

    fn list_templates(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.report(queue, |manager| {
            blocking("the snapshots", move || manager::snapshots_json("name", &manager.list_templates()))
        })
    }

    fn delete_template(&self, queue: &Bound<'_, OperationQueue>, name: &Bound<'_, PyAny>) -> PyResult<u64> {
        let name = convert::template("name", name)?;
        let delete = |manager: Arc<Manager>| async move { manager.delete_template(&name).await };
        self.on_manager(queue, OnInterrupt::Finish, delete, |_, _, ()| Ok(true))
    }

    /// The making of a template: its `next` does it, stage by stage.
    #[pyo3(signature = (resource_limits=None, kernel_path=None, rootfs_path=None, progress=None))]
    fn prepare(
        &self,
        py: Python<'_>,
        resource_limits: Option<&Bound<'_, PyAny>>,
        kernel_path: Option<&Bound<'_, PyAny>>,
        rootfs_path: Option<&Bound<'_, PyAny>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PrepareOperation> {
        let arguments = SpecArguments { resource_limits, kernel_path, rootfs_path, ..SpecArguments::default() };
        let handle = self.handle.get();
        let preparation = handle.preparation(py, &arguments, progress)?;
        let preparation = errors::raised(py, preparation, |error| handle.keep(error))?;
        Ok(PrepareOperation { handle: self.handle.clone_ref(py), preparation })
    }
}

/// The making of a template: each `next` begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct PrepareOperation {
    handle: Py<MicroVMIsolationManager>,
    preparation: Arc<Preparation>,
}

#[pymethods]
impl PrepareOperation {
    /// The stage that begins and its fraction, `None` when the template is there. Cancelling it gives the making up.
    fn next(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let (handle, preparation) = (self.handle.clone_ref(queue.py()), self.preparation.clone());
        queue.get().begin(OnInterrupt::Abandon, async move { preparation.next().await }, move |py, next| {
            errors::raised(py, next, |error| handle.get().keep(error))
        })
    }
}
