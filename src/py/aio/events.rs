//! The operations on a stream of events.

use std::sync::Arc;

use pyo3::prelude::*;

use super::super::convert;
use super::super::events::EventStream;
use super::queue::OperationQueue;
use crate::model::Event;
use crate::mutex::Mutex;
use crate::vm::Subscriber;

/// An event on its way to its task. Dropped before, it is taken by the next one.
struct Taken {
    event: Option<Arc<Event>>,
    subscriber: Arc<Subscriber>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.subscriber.put_back(event);
        }
    }
}

/// An event that its task has not seen yet.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct TakenEvent(Mutex<Option<Taken>>);

#[pymethods]
impl TakenEvent {
    /// Returns the event, once.
    fn claim<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let event = self.0.lock().as_mut().and_then(|taken| taken.event.take());
        event.map(|event| convert::from_json(py, &event.to_json())).transpose()
    }

    /// Gives the event back, unless it was claimed.
    fn put_back(&self) {
        let taken = self.0.lock().take();
        drop(taken);
    }
}

/// The operations on a stream of events: each begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct EventOperations {
    handle: Py<EventStream>,
}

#[pymethods]
impl EventOperations {
    #[new]
    fn new(handle: Py<EventStream>) -> Self {
        Self { handle }
    }

    /// The next event; `None` at the end of the stream, and after the `timeout`, which is the stream's own where left out.
    #[pyo3(signature = (queue, timeout=None))]
    fn next(&self, queue: &Bound<'_, OperationQueue>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let py = queue.py();
        let timeout = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        let timeout = timeout.or(self.handle.get().timeout());
        let subscriber = self.handle.get().subscriber(py)?.clone();
        let next = async move {
            let taking = async move {
                let event = subscriber.next().await?;
                Some(Taken { event: Some(event), subscriber })
            };
            match timeout {
                Some(timeout) => tokio::time::timeout(timeout, taking).await.ok().flatten(),
                None => taking.await,
            }
        };
        queue.get().begin_here(next, |py, taken| {
            taken.map(|taken| Py::new(py, TakenEvent(Mutex::new(Some(taken))))).transpose()
        })
    }
}
