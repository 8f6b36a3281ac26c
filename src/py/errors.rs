//! The core's errors as Python's, and what the legacy surface does with them.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use super::convert;
use super::logging;
use crate::error::{errno, Error};
use crate::model::{printable, RECORD_BYTES};

/// The exception object for `error`. Where a system call failed, its `__cause__` is the `OSError` with that number.
pub fn exception<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    static MAKE_ERROR: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let make_error = MAKE_ERROR.import(py, "thirstys_waterfall.security.microvm_isolation._errors", "make_error")?;
    let details = convert::from_json(py, &error.details())?;
    let made = make_error.call1((error.code(), printable(&error.to_string(), RECORD_BYTES), details))?;
    if let Some(errno) = errno(error) {
        let strerror = py.import("os")?.call_method1("strerror", (errno as i32,))?;
        // Python picks the class by the number: `PermissionError`, `FileNotFoundError`.
        made.setattr("__cause__", py.get_type::<PyOSError>().call1((errno as i32, strerror))?)?;
    }
    Ok(made)
}

/// `error` as something to raise.
pub fn raise(py: Python<'_>, error: &Error) -> PyErr {
    exception(py, error).map_or_else(|failed| failed, PyErr::from_value)
}

/// Whether the legacy surface, too, raises this.
pub fn is_usage(error: &Error) -> bool {
    matches!(error, Error::InvalidType { .. } | Error::InvalidValue { .. } | Error::ForkedProcess { .. })
}

/// What everything newer than the legacy surface does with a failure: raises it. It is kept, too.
pub fn raised<T>(py: Python<'_>, result: Result<T, Error>, keep: impl FnOnce(Error)) -> PyResult<T> {
    result.map_err(|error| {
        let raised = raise(py, &error);
        keep(error);
        raised
    })
}

/// What the legacy surface does: logs once, on the calling thread, and answers `None`; or raises.
pub fn settle<T>(
    py: Python<'_>,
    result: Result<T, Error>,
    raising: bool,
    keep: impl FnOnce(Error),
) -> PyResult<Option<T>> {
    let error = match result {
        Ok(value) => return Ok(Some(value)),
        Err(error) => error,
    };
    let usage = is_usage(&error);
    let raised = (usage || raising).then(|| raise(py, &error));
    if raised.is_none() {
        let level = if matches!(error, Error::InvalidState { .. }) { "warning" } else { "error" };
        logging::on_this_thread(py, level, &error.to_string())?;
    }
    if !usage {
        keep(error);
    }
    raised.map_or(Ok(None), Err)
}
