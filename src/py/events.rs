//! The handle of one who hears a manager's events.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::gate::Owned;
use super::{convert, errors};
use crate::host::fork::PerProcess;
use crate::vm::{Heard, Hearer};

/// How long a signal may wait to be seen.
const SLICE: Duration = Duration::from_millis(50);

/// Everyone who hears anything in this process: they are told when the interpreter exits.
static HEARERS: PerProcess<Mutex<Vec<Weak<Hearer>>>> = PerProcess::new();

/// A manager's events from its making on: an iterator of dicts, which ends with the manager.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct EventStream {
    hearer: Owned<Hearer>,
    timeout: Option<Duration>,
}

impl EventStream {
    pub fn new(hearer: Arc<Hearer>, timeout: Option<Duration>) -> Self {
        let mut hearers = HEARERS.get().lock().unwrap_or_else(PoisonError::into_inner);
        hearers.retain(|hearer| hearer.strong_count() > 0);
        hearers.push(Arc::downgrade(&hearer));
        Self { hearer: Owned::new("EventStream", hearer), timeout }
    }

    fn take(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<Heard> {
        let hearer = self.hearer.get(py)?.clone();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let slice = Instant::now() + SLICE;
            let until = deadline.map_or(slice, |deadline| deadline.min(slice));
            match py.detach(|| hearer.wait(until)) {
                Heard::Nothing if deadline.is_none_or(|deadline| Instant::now() < deadline) => py.check_signals()?,
                heard => return Ok(heard),
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
            Heard::Event(event) => convert::from_json(py, &event.to_json()).map(Some),
            Heard::Nothing | Heard::Closed => Ok(None),
        }
    }

    /// The next event, a dict; `None` when none came within `timeout` seconds (the stream's own where left out), or when there
    /// will be none.
    #[pyo3(signature = (timeout=None))]
    fn get<'py>(&self, py: Python<'py>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let timeout = timeout.filter(|t| !t.is_none()).map(|t| convert::seconds("timeout", t)).transpose()?;
        match self.take(py, timeout.or(self.timeout))? {
            Heard::Event(event) => convert::from_json(py, &event.to_json()).map(Some),
            Heard::Nothing | Heard::Closed => Ok(None),
        }
    }

    /// For the thread that serves a callback, which sees no signals and so need not look for any: the next event, `None`
    /// when there will be none.
    fn _wait<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let hearer = self.hearer.get(py)?.clone();
        loop {
            match py.detach(|| hearer.wait(Instant::now() + Duration::from_secs(3600))) {
                Heard::Event(event) => return convert::from_json(py, &event.to_json()).map(Some),
                Heard::Closed => return Ok(None),
                Heard::Nothing => {}
            }
        }
    }

    /// Hears no more; what has come can still be taken. May be called twice; does nothing in a forked child.
    fn close(&self) {
        if self.hearer.is_ours() {
            self.hearer.peek().close();
        }
    }

    /// How many events were lost because nobody took them in time.
    #[getter]
    fn dropped(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.hearer.get(py)?.dropped())
    }

    fn __repr__(&self) -> String {
        match self.hearer.is_ours() {
            true => {
                let hearer = self.hearer.peek();
                format!("<EventStream {} events wait, {} lost>", hearer.waiting(), hearer.dropped())
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
    let hearers = std::mem::take(&mut *HEARERS.get().lock().unwrap_or_else(PoisonError::into_inner));
    hearers.iter().filter_map(Weak::upgrade).for_each(|hearer| hearer.close());
}
