//! The Python handle of a subscriber to a manager's events.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::gate::Owned;
use super::{convert, errors};
use crate::host::fork::PerProcess;
use crate::mutex::Mutex;
use crate::vm::{Recv, Subscriber};

/// How long a signal may wait to be seen.
const SLICE: Duration = Duration::from_millis(50);

/// The subscribers of this process: they are closed when the interpreter exits.
static SUBSCRIBERS: PerProcess<Mutex<Vec<Weak<Subscriber>>>> = PerProcess::new();

/// The events of a manager from now on: an iterator of dicts, which ends with the manager.
///
/// Made by `MicroVMIsolationManager.events`. Iterating blocks until there is an event, at most for the
/// stream's `timeout`; Ctrl-C is seen within 50 ms. Properties do not block. Raises `ForkedProcessError`
/// in a forked child.
///
/// Example:
///     >>> with manager.events() as events:
///     ...     vm.pause(), vm.resume()
///     ...     [(event["from"], event["to"]) for event in [next(events), next(events)]]
///     (True, True)
///     [('running', 'paused'), ('paused', 'running')]
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct EventStream {
    subscriber: Owned<Subscriber>,
    timeout: Option<Duration>,
}

impl EventStream {
    pub fn new(subscriber: Arc<Subscriber>, timeout: Option<Duration>) -> Self {
        let mut subscribers = SUBSCRIBERS.get().lock();
        subscribers.retain(|subscriber| subscriber.strong_count() > 0);
        subscribers.push(Arc::downgrade(&subscriber));
        Self { subscriber: Owned::new("EventStream", subscriber), timeout }
    }

    /// The subscriber, in the process that made it.
    pub fn subscriber(&self, py: Python<'_>) -> PyResult<&Arc<Subscriber>> {
        self.subscriber.get(py)
    }

    /// How long a caller waits who does not say so.
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn take(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<Recv> {
        let subscriber = self.subscriber.get(py)?.clone();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let slice = Instant::now() + SLICE;
            let until = deadline.map_or(slice, |deadline| deadline.min(slice));
            match py.detach(|| subscriber.wait(until)) {
                Recv::TimedOut if deadline.is_none_or(|deadline| Instant::now() < deadline) => py.check_signals()?,
                received => return Ok(received),
            }
        }
    }
}

#[pymethods]
impl EventStream {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.take(py, self.timeout)? {
            Recv::Event(event) => convert::from_json(py, &event.to_json()).map(Some),
            Recv::TimedOut | Recv::Closed => Ok(None),
        }
    }

    /// Returns the next event, or `None` when none comes in time or the stream has ended.
    ///
    /// Blocks until there is an event.
    ///
    /// Args:
    ///     timeout: Seconds to wait, 0 to 86400; the stream's own where left out.
    ///
    /// Raises:
    ///     InvalidTypeError: `timeout` is not a number.
    ///     InvalidValueError: `timeout` is out of range.
    #[pyo3(signature = (timeout=None))]
    fn get<'py>(&self, py: Python<'py>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let timeout = timeout.filter(|t| !t.is_none()).map(|t| convert::seconds("timeout", t)).transpose()?;
        match self.take(py, timeout.or(self.timeout))? {
            Recv::Event(event) => convert::from_json(py, &event.to_json()).map(Some),
            Recv::TimedOut | Recv::Closed => Ok(None),
        }
    }

    /// For the thread that serves a callback, which sees no signals and so need not look for any: the next event, `None`
    /// when there will be none.
    fn _wait<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let subscriber = self.subscriber.get(py)?.clone();
        loop {
            match py.detach(|| subscriber.wait(Instant::now() + Duration::from_secs(3600))) {
                Recv::Event(event) => return convert::from_json(py, &event.to_json()).map(Some),
                Recv::Closed => return Ok(None),
                Recv::TimedOut => {}
            }
        }
    }

    /// Takes no more events; those that have come can still be taken.
    ///
    /// Does not block. May be called twice. Does nothing in a forked child.
    fn close(&self) {
        if self.subscriber.is_ours() {
            self.subscriber.peek().close();
        }
    }

    /// How many events were dropped because nobody took them in time.
    #[getter]
    fn dropped(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.subscriber.get(py)?.dropped())
    }

    fn __repr__(&self) -> String {
        match self.subscriber.is_ours() {
            true => {
                let subscriber = self.subscriber.peek();
                format!("<EventStream {} events wait, {} lost>", subscriber.waiting(), subscriber.dropped())
            }
            false => "<EventStream of the parent process>".to_owned(),
        }
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback))]
    fn __exit__(
        &self,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> bool {
        let (_, _, _) = (exc_type, exc_value, traceback);
        self.close();
        false
    }
}

/// Serves `callback` with the events of `stream`, on a Python thread.
pub fn serve<'py>(py: Python<'py>, stream: EventStream, callback: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    if !callback.is_callable() {
        let error = crate::error::Error::InvalidType {
            field: "callback".into(),
            value: convert::shown(callback),
            allowed: "callable with one event, a dict".into(),
        };
        return Err(errors::raise(py, &error));
    }
    let module = py.import("thirstys_waterfall.security.microvm_isolation._events")?;
    module.getattr("EventSubscription")?.call1((stream, callback))
}

/// Ends every stream of events, so that the threads that wait for one can end: the interpreter exits.
#[pyfunction]
pub fn close_events(_py: Python<'_>) {
    let subscribers = std::mem::take(&mut *SUBSCRIBERS.get().lock());
    subscribers.iter().filter_map(Weak::upgrade).for_each(|subscriber| subscriber.close());
}
