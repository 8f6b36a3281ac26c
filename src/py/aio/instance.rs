//! The operations on one VM.

use std::future::Future;
use std::sync::Arc;

use pyo3::prelude::*;

use super::super::gate::OnInterrupt;
use super::super::instance::{self, MicroVMInstance};
use super::super::ports::{self, ConnectArguments, PublishedPort};
use super::super::stream::StreamArguments;
use super::super::transfer::{DownloadArguments, UploadArguments};
use super::super::{convert, errors};
use super::queue::OperationQueue;
use super::transfer::{DownloadOperations, UploadOperations};
use crate::error::Result;
use crate::vm::{connections, info, Machine, MicroVm};

/// The operations on one VM: each begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct VmOperations {
    handle: Py<MicroVMInstance>,
}

impl VmOperations {
    fn vm(&self, py: Python<'_>) -> PyResult<Arc<MicroVm>> {
        self.handle.get().owned(py).cloned()
    }

    /// Begins `run`; the VM keeps the error that it ends with.
    fn on_vm<F, T, R>(
        &self,
        queue: &Bound<'_, OperationQueue>,
        on_cancel: OnInterrupt,
        run: impl FnOnce(Arc<MicroVm>) -> F,
        finish: impl FnOnce(Python<'_>, T) -> PyResult<R> + Send + 'static,
    ) -> PyResult<u64>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
        R: for<'py> IntoPyObject<'py>,
    {
        let vm = self.vm(queue.py())?;
        queue.get().begin(on_cancel, run(vm.clone()), move |py, result| {
            finish(py, errors::raised(py, result, |error| vm.set_last_error(error))?)
        })
    }

    fn change<F>(
        &self,
        queue: &Bound<'_, OperationQueue>,
        on_cancel: OnInterrupt,
        run: impl FnOnce(Arc<MicroVm>) -> F,
    ) -> PyResult<u64>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.on_vm(queue, on_cancel, run, |_, ()| Ok(true))
    }
}

#[pymethods]
impl VmOperations {
    #[new]
    fn new(handle: Py<MicroVMInstance>) -> Self {
        Self { handle }
    }

    fn start(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, OnInterrupt::Abandon, |vm| async move { vm.start().await })
    }

    fn stop(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, OnInterrupt::Finish, |vm| async move { vm.stop().await })
    }

    fn pause(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, OnInterrupt::Finish, |vm| async move { vm.pause().await })
    }

    fn resume(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, OnInterrupt::Finish, |vm| async move { vm.resume().await })
    }

    fn suspend(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, OnInterrupt::Finish, |vm| async move { vm.suspend().await })
    }

    fn snapshot(&self, queue: &Bound<'_, OperationQueue>, name: &Bound<'_, PyAny>) -> PyResult<u64> {
        let name = convert::template("name", name)?;
        let snapshot = |vm: Arc<MicroVm>| async move { vm.snapshot(&name).await };
        self.on_vm(queue, OnInterrupt::Finish, snapshot, |py, ()| Ok(py.None()))
    }

    #[pyo3(signature = (queue, command, params=None, timeout=None))]
    fn send_command(
        &self,
        queue: &Bound<'_, OperationQueue>,
        command: &Bound<'_, PyAny>,
        params: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let (command, params, timeout) = instance::command_from(command, params, timeout)?;
        let (vm, asked) = (self.vm(queue.py())?, self.vm(queue.py())?);
        let answering = async move { asked.command(&command, params, timeout).await };
        queue.get().begin_here(answering, move |py, answered| {
            let answer = errors::raised(py, answered, |error| vm.set_last_error(error))?;
            Ok(convert::from_json(py, &instance::answer_json(answer))?.unbind())
        })
    }

    fn stream(&self, queue: &Bound<'_, OperationQueue>, arguments: StreamArguments<'_>) -> PyResult<u64> {
        let (params, options) = arguments.parse()?;
        let start = |vm: Arc<MicroVm>| async move { vm.stream(params).await };
        self.on_vm(queue, OnInterrupt::Abandon, start, |py, process| Py::new(py, options.stream(py, process)?))
    }

    #[pyo3(signature = (queue, port, address=None, timeout=None))]
    fn connect(
        &self,
        queue: &Bound<'_, OperationQueue>,
        port: &Bound<'_, PyAny>,
        address: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let ConnectArguments { port, address, timeout } = ConnectArguments::parse(port, address, timeout)?;
        let connect = |vm: Arc<MicroVm>| async move { connections::connect(&*vm, port, address, timeout).await };
        self.on_vm(queue, OnInterrupt::Abandon, connect, |py, end| Ok(ports::socket(py, end)?.unbind()))
    }

    #[pyo3(signature = (queue, port, host_port=None, address=None, protocol=None, guest_address=None))]
    fn publish(
        &self,
        queue: &Bound<'_, OperationQueue>,
        port: &Bound<'_, PyAny>,
        host_port: Option<&Bound<'_, PyAny>>,
        address: Option<&Bound<'_, PyAny>>,
        protocol: Option<&Bound<'_, PyAny>>,
        guest_address: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let mapping = ports::mapping(port, host_port, address, protocol, guest_address)?;
        let published = self.vm(queue.py())?;
        let publish = |vm: Arc<MicroVm>| async move { connections::publish(&vm, mapping) };
        self.on_vm(queue, OnInterrupt::Abandon, publish, move |py, port| {
            Py::new(py, PublishedPort::wrap(&*published, &port))
        })
    }

    fn ports(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let list = |vm: Arc<MicroVm>| async move { Ok(vm.ports().list()) };
        self.on_vm(queue, OnInterrupt::Abandon, list, |py, listed| Ok(convert::from_json(py, &listed)?.unbind()))
    }

    fn upload<'py>(&self, queue: &Bound<'py, OperationQueue>, arguments: UploadArguments<'py>) -> PyResult<u64> {
        UploadOperations::begin(self.vm(queue.py())?, queue, &arguments)
    }

    fn download<'py>(&self, queue: &Bound<'py, OperationQueue>, arguments: DownloadArguments<'py>) -> PyResult<u64> {
        DownloadOperations::begin(self.vm(queue.py())?, queue, &arguments)
    }

    fn get_health_metrics(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let vm = self.vm(queue.py())?;
        queue.get().begin(OnInterrupt::Abandon, async move { vm.health().await }, |py, health| {
            Ok(convert::model(py, "VMHealthMetrics", &info::health_json(&health))?.unbind())
        })
    }

    fn get_info(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let vm = self.vm(queue.py())?;
        queue.get().begin(OnInterrupt::Abandon, info::info(vm), |py, info| Ok(convert::from_json(py, &info)?.unbind()))
    }
}
