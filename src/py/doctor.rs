//! What this host can run, for Python.

use pyo3::prelude::*;

use super::convert;
use crate::doctor as core;

/// Tells what this host can run: looks at backends, accelerators and privileges, and makes and removes what a start makes
/// before its VMM runs, with the default configuration. Blocks for a second, or some where KVM hangs.
#[pyfunction]
pub fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let image = convert::guest_image(py)?;
    let report = py.detach(move || core::report(&image));
    convert::from_json(py, &report)
}
