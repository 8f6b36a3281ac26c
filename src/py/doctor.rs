//! What this host can run, for Python.

use pyo3::prelude::*;

use super::convert;
use crate::doctor as core;

/// Looks at backends, accelerators and privileges; changes nothing.
#[pyfunction]
pub fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let image = convert::guest_image(py)?;
    let report = py.detach(move || core::report(&image));
    convert::from_json(py, &report)
}
