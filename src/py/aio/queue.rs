//! The queue through which one event loop hears of the operations that have ended.

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::IntoPyObjectExt;
use tokio::task::AbortHandle;

use super::super::errors;
use super::super::gate::{self, OnInterrupt};
use crate::error::Error;
use crate::host::notifier::Notifier;
use crate::mutex::Mutex;

/// What workers see of a queue: numbers, and no Python object.
struct Ended {
    notifier: Notifier,
    numbers: Mutex<Vec<u64>>,
}

impl Ended {
    fn push(&self, number: u64) {
        let is_first = {
            let mut numbers = self.numbers.lock();
            numbers.push(number);
            numbers.len() == 1
        };
        // The loop takes all numbers at once, after it has cleared the notifier.
        if is_first {
            self.notifier.notify();
        }
    }
}

/// Tells the loop that an operation has ended, also one that was aborted or has panicked.
struct EndGuard {
    ended: Arc<Ended>,
    number: u64,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.ended.push(self.number);
    }
}

type Finish = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

struct Operation {
    on_cancel: OnInterrupt,
    /// `None` for an operation that ended as it began.
    task: Option<AbortHandle>,
    /// Runs on the loop's thread, and may hold Python objects.
    finish: Finish,
}

/// The operations that one event loop waits for.
///
/// Used by `aio` alone, on the thread of its loop. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct OperationQueue {
    ended: Arc<Ended>,
    operations: Mutex<HashMap<u64, Operation>>,
    next: AtomicU64,
}

impl OperationQueue {
    /// Lets `future` run on the runtime; `finish` makes the result of what it gives, on the loop's thread.
    pub fn begin<F, T>(
        &self,
        on_cancel: OnInterrupt,
        future: F,
        finish: impl FnOnce(Python<'_>, F::Output) -> PyResult<T> + Send + 'static,
    ) -> PyResult<u64>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
        T: for<'py> IntoPyObject<'py>,
    {
        let (number, future, finish) = self.prepare(future, finish);
        let task = Some(gate::begin(future)?);
        self.operations.lock().insert(number, Operation { on_cancel, task, finish });
        Ok(number)
    }

    /// As [`OperationQueue::begin`], for what does not block: its first step is taken on this thread. Dropped when cancelled.
    pub fn begin_here<F, T>(
        &self,
        future: F,
        finish: impl FnOnce(Python<'_>, F::Output) -> PyResult<T> + Send + 'static,
    ) -> PyResult<u64>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
        T: for<'py> IntoPyObject<'py>,
    {
        let (number, future, finish) = self.prepare(future, finish);
        let task = gate::begin_here(future)?;
        self.operations.lock().insert(number, Operation { on_cancel: OnInterrupt::Abandon, task, finish });
        Ok(number)
    }

    /// What runs, and what makes its result on the loop's thread. That thread drains the queue later, so an operation may
    /// end before it is noted.
    fn prepare<F, T>(
        &self,
        future: F,
        finish: impl FnOnce(Python<'_>, F::Output) -> PyResult<T> + Send + 'static,
    ) -> (u64, impl Future<Output = ()> + Send + 'static, Finish)
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
        T: for<'py> IntoPyObject<'py>,
    {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let output = Arc::new(Mutex::new(None));
        let finish = {
            let output = output.clone();
            move |py: Python<'_>| {
                let output = output.lock().take();
                let output = output.ok_or_else(|| PyRuntimeError::new_err("the operation ended without a result"))?;
                finish(py, output)?.into_py_any(py)
            }
        };
        let guard = EndGuard { ended: self.ended.clone(), number };
        let running = async move {
            // Dropped last: the output is there when the loop hears of it.
            let _guard = guard;
            let value = future.await;
            *output.lock() = Some(value);
        };
        (number, running, Box::new(finish))
    }
}

#[pymethods]
impl OperationQueue {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let notifier = Notifier::new().map_err(|error| errors::raise(py, &Error::host("make", "an eventfd", error)))?;
        let ended = Arc::new(Ended { notifier, numbers: Mutex::default() });
        Ok(Self { ended, operations: Mutex::default(), next: AtomicU64::new(0) })
    }

    /// The descriptor that is readable while operations have ended that `drain` has not returned.
    fn fileno(&self) -> RawFd {
        self.ended.notifier.as_raw_fd()
    }

    /// Returns each operation that has ended: its number, and its result or its exception.
    fn drain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.ended.notifier.clear();
        let numbers = std::mem::take(&mut *self.ended.numbers.lock());
        let drained = PyList::empty(py);
        // A loop on a daemon thread would print tracebacks of operations that end because the process does.
        if gate::is_exiting() {
            return Ok(drained);
        }
        for number in numbers {
            // A cancelled one has been forgotten.
            let Some(operation) = self.forget(number) else { continue };
            match (operation.finish)(py) {
                Ok(value) => drained.append((number, value, py.None()))?,
                Err(error) => drained.append((number, py.None(), error.into_value(py)))?,
            }
        }
        Ok(drained)
    }

    /// Forgets an operation; one whose half would be worse than its whole goes on, any other is undone.
    fn cancel(&self, number: u64) {
        if let Some(operation) = self.forget(number) {
            if operation.on_cancel == OnInterrupt::Abandon {
                operation.task.iter().for_each(AbortHandle::abort);
            }
        }
    }
}

impl OperationQueue {
    fn forget(&self, number: u64) -> Option<Operation> {
        self.operations.lock().remove(&number)
    }
}
