//! The operations on a VM of another process.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::IntoPyObjectExt;
use serde_json::Value;

use super::super::attached::{AttachArguments, AttachedVM, ListArguments};
use super::super::gate::OnInterrupt;
use super::super::instance::{answer_json, command_from};
use super::super::ports::{self, ConnectArguments, PublishedPort};
use super::super::stream::StreamArguments;
use super::super::transfer::{DownloadArguments, UploadArguments};
use super::super::{convert, errors};
use super::manager::blocking;
use super::queue::OperationQueue;
use super::transfer::{DownloadOperations, UploadOperations};
use crate::channel::Operation;
use crate::error::Result;
use crate::store::runtime;
use crate::vm::attached::{self, Attached};
use crate::vm::{connections, Machine};

fn raised<T>(py: Python<'_>, result: Result<T>) -> PyResult<T> {
    result.map_err(|error| errors::raise(py, &error))
}

/// The operations on a VM of another process: each begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct AttachedOperations {
    handle: Py<AttachedVM>,
}

impl AttachedOperations {
    fn attached(&self, py: Python<'_>) -> PyResult<Arc<Attached>> {
        self.handle.get().attached(py)
    }

    /// Has the owner do something, which it does to its end.
    fn operate<R>(
        &self,
        queue: &Bound<'_, OperationQueue>,
        operation: Operation,
        finish: impl FnOnce(Python<'_>, Value) -> PyResult<R> + Send + 'static,
    ) -> PyResult<u64>
    where
        R: for<'py> IntoPyObject<'py>,
    {
        let attached = self.attached(queue.py())?;
        let operating = async move { attached.operate(operation).await };
        queue.get().begin(OnInterrupt::Abandon, operating, |py, done| finish(py, raised(py, done)?))
    }

    fn change(&self, queue: &Bound<'_, OperationQueue>, operation: Operation) -> PyResult<u64> {
        self.operate(queue, operation, |py, _| Ok(py.None()))
    }
}

#[pymethods]
impl AttachedOperations {
    #[new]
    fn new(handle: Py<AttachedVM>) -> Self {
        Self { handle }
    }

    #[pyo3(signature = (queue, command, params=None, timeout=None))]
    fn send_command(
        &self,
        queue: &Bound<'_, OperationQueue>,
        command: &Bound<'_, PyAny>,
        params: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let (command, params, timeout) = command_from(command, params, timeout)?;
        let attached = self.attached(queue.py())?;
        let answering = async move { attached.command(&command, params, timeout).await };
        queue
            .get()
            .begin_here(answering, |py, answer| Ok(convert::from_json(py, &answer_json(raised(py, answer)?))?.unbind()))
    }

    fn stream(&self, queue: &Bound<'_, OperationQueue>, arguments: StreamArguments<'_>) -> PyResult<u64> {
        let attached = self.attached(queue.py())?;
        let (params, options) = arguments.parse()?;
        let starting = async move { attached.stream(params).await };
        queue
            .get()
            .begin(OnInterrupt::Abandon, starting, |py, process| Py::new(py, options.stream(py, raised(py, process)?)?))
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
        let attached = self.attached(queue.py())?;
        let connecting = async move { connections::connect(&*attached, port, address, timeout).await };
        queue.get().begin(OnInterrupt::Abandon, connecting, |py, end| Ok(ports::socket(py, raised(py, end)?)?.unbind()))
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
        let (attached, publishing) = (self.attached(queue.py())?, self.attached(queue.py())?);
        queue.get().begin(
            OnInterrupt::Abandon,
            async move { connections::publish(&publishing, mapping) },
            move |py, port| Py::new(py, PublishedPort::wrap(&*attached, &raised(py, port)?)),
        )
    }

    fn ports(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.operate(queue, Operation::Ports, |py, listed| Ok(convert::from_json(py, &listed)?.unbind()))
    }

    fn upload<'py>(&self, queue: &Bound<'py, OperationQueue>, arguments: UploadArguments<'py>) -> PyResult<u64> {
        UploadOperations::begin(self.attached(queue.py())?, queue, &arguments)
    }

    fn download<'py>(&self, queue: &Bound<'py, OperationQueue>, arguments: DownloadArguments<'py>) -> PyResult<u64> {
        DownloadOperations::begin(self.attached(queue.py())?, queue, &arguments)
    }

    fn get_health_metrics(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.operate(
            queue,
            Operation::Health,
            |py, health| Ok(convert::model(py, "VMHealthMetrics", &health)?.unbind()),
        )
    }

    fn get_info(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.operate(queue, Operation::Info, |py, info| Ok(convert::from_json(py, &info)?.unbind()))
    }

    fn get_state(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.operate(queue, Operation::Summary, |py, summary| {
            Ok(convert::member(py, "VMState", summary["state"].as_str().unwrap_or("error"))?.unbind())
        })
    }

    fn pause(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, Operation::Pause)
    }

    fn resume(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, Operation::Resume)
    }

    fn snapshot(&self, queue: &Bound<'_, OperationQueue>, name: &Bound<'_, PyAny>) -> PyResult<u64> {
        let name = convert::template("name", name)?.to_string();
        self.change(queue, Operation::Snapshot { name })
    }

    fn suspend(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, Operation::Suspend)
    }

    fn stop(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, Operation::Stop)
    }

    fn kill(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, Operation::Kill)
    }

    fn destroy(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        self.change(queue, Operation::Destroy)
    }

    #[pyo3(signature = (queue, timeout=None))]
    fn wait(&self, queue: &Bound<'_, OperationQueue>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let timeout = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        let attached = self.attached(queue.py())?;
        let waiting = async move { attached.closed_within(timeout).await };
        queue.get().begin(OnInterrupt::Abandon, waiting, |py, is_closed| is_closed.into_py_any(py))
    }
}

/// Begins to reach a VM of another process; its number in the queue.
#[pyfunction]
#[pyo3(signature = (queue, vm_id, runtime_dir=None, timeout=None))]
pub fn begin_attach(
    queue: &Bound<'_, OperationQueue>,
    vm_id: &Bound<'_, PyAny>,
    runtime_dir: Option<&Bound<'_, PyAny>>,
    timeout: Option<&Bound<'_, PyAny>>,
) -> PyResult<u64> {
    let attaching = AttachArguments::parse(vm_id, runtime_dir, timeout)?.attach(queue.py())?;
    queue
        .get()
        .begin(OnInterrupt::Abandon, attaching, |py, attached| Py::new(py, AttachedVM::wrap(raised(py, attached)?)))
}

/// Begins to ask the owners of this user's VMs; its number in the queue.
#[pyfunction]
#[pyo3(signature = (queue, runtime_dir=None, timeout=None))]
pub fn begin_running_vms(
    queue: &Bound<'_, OperationQueue>,
    runtime_dir: Option<&Bound<'_, PyAny>>,
    timeout: Option<&Bound<'_, PyAny>>,
) -> PyResult<u64> {
    let ListArguments { folder, timeout } = ListArguments::parse(runtime_dir, timeout)?;
    let listing = async move {
        let found = blocking("the runtime folder", move || runtime::found_in(folder)).await??;
        Ok(Value::Array(attached::list(found, timeout).await))
    };
    queue
        .get()
        .begin(OnInterrupt::Abandon, listing, |py, listed| Ok(convert::from_json(py, &raised(py, listed)?)?.unbind()))
}
