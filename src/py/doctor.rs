//! What this host can run, for Python.

use pyo3::prelude::*;

use super::convert;
use crate::doctor as core;

/// Reports what this host can run, and what to do about what is missing.
///
/// Blocks for about a second, longer where KVM hangs. It looks at backends, accelerators and privileges,
/// and makes and removes what a start makes before its VMM runs, with the default configuration. Needs no
/// privilege, and reports those that are missing.
///
/// Returns:
///     A dict of plain JSON types: `verdict` (`starts` says whether VMs start here), `platform`,
///     `privileges`, `network`, `jail`, `kvm`, `backends`, `guest_image`, `runtime_dir`, `problems` and
///     `hints`, each of the last two with a `remedy`.
///
/// Example:
///     >>> doctor()["verdict"]["starts"]
///     True
#[pyfunction]
pub fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let image = convert::guest_image(py)?;
    let report = py.detach(move || core::report(&image));
    convert::from_json(py, &report)
}
