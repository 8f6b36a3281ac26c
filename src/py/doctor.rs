//! What this host can run, for Python.

use pyo3::prelude::*;

use super::gate::{self, OnInterrupt};
use super::{convert, errors};
use crate::doctor as core;

/// Reports what this host can run, and what to do about what is missing.
///
/// Blocks for about a second, longer where KVM hangs; with `start` for some seconds more. It looks at
/// backends, accelerators and privileges, and makes and removes what a start makes before its VMM runs, with
/// the default configuration. Needs no privilege, and reports those that are missing.
///
/// Args:
///     start: Whether to start a VM of 128 MiB on each backend that is there and have it answer a command:
///         the first one connected to the network where the host lets it. Then the verdict is measured, and
///         `jail` is what a VM got.
///
/// Returns:
///     A dict of plain JSON types: `verdict` (`starts` says whether VMs start here), `platform`,
///     `privileges`, `network`, `jail`, `kvm`, `backends`, `starts` (empty without `start`), `guest_image`,
///     `runtime_dir`, `cache_dir`, `problems` and `hints`, each of the last two with a `remedy`.
///
/// Raises:
///     HostError: The host could not be looked at (`host_error`).
///
/// Example:
///     >>> doctor(start=True)["verdict"]["starts"]
///     True
#[pyfunction]
#[pyo3(signature = (*, start=false))]
pub fn doctor(py: Python<'_>, start: bool) -> PyResult<Bound<'_, PyAny>> {
    let image = convert::guest_image(py)?;
    let report = gate::wait(py, OnInterrupt::Abandon, core::report(image, start))?;
    convert::from_json(py, &report.map_err(|error| errors::raise(py, &error))?)
}
