//! The operations on one program.

use std::time::Duration;

use microvm_protocol::mux::{STDERR, STDOUT};
use pyo3::prelude::*;
use pyo3::IntoPyObjectExt;

use super::super::gate::OnInterrupt;
use super::super::stream::{input_from, output, Limit, ProcessStream, Taken};
use super::super::{convert, errors};
use super::queue::OperationQueue;
use crate::channel::Piece;
use crate::error::Result;

/// The operations on one program: each begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct StreamOperations {
    handle: Py<ProcessStream>,
}

fn raised<T>(py: Python<'_>, result: Result<T>) -> PyResult<T> {
    result.map_err(|error| errors::raise(py, &error))
}

#[pymethods]
impl StreamOperations {
    #[new]
    fn new(handle: Py<ProcessStream>) -> Self {
        Self { handle }
    }

    /// The next output, `None` at its end; `waited` seconds of the `timeout` have gone by.
    #[pyo3(signature = (queue, timeout=None, waited=0.0))]
    fn next(
        &self,
        queue: &Bound<'_, OperationQueue>,
        timeout: Option<&Bound<'_, PyAny>>,
        waited: f64,
    ) -> PyResult<u64> {
        let limit = Limit::parse(timeout, Duration::try_from_secs_f64(waited).unwrap_or_default())?;
        let program = self.handle.get().program(queue.py())?;
        queue.get().begin_here(program.next(limit), |py, next| {
            let piece = raised(py, next)?.and_then(Taken::claim);
            piece.map(|piece| output(py, &piece).into_py_any(py)).transpose()
        })
    }

    /// Gives back a piece that `next` gave to a task that was cancelled before it took it.
    fn put_back(&self, queue: &Bound<'_, OperationQueue>, piece: Option<(String, Vec<u8>)>) -> PyResult<()> {
        if let Some((channel, bytes)) = piece {
            let piece = Piece { channel: if channel == "stderr" { STDERR } else { STDOUT }, bytes, last: false };
            self.handle.get().program(queue.py())?.put_back(piece);
        }
        Ok(())
    }

    fn write(&self, queue: &Bound<'_, OperationQueue>, data: &Bound<'_, PyAny>) -> PyResult<u64> {
        let (program, bytes) = (self.handle.get().program(queue.py())?, convert::bytes("data", data)?);
        queue.get().begin_here(program.write(bytes), raised)
    }

    #[pyo3(signature = (queue, input=None, timeout=None, text=false))]
    fn communicate(
        &self,
        queue: &Bound<'_, OperationQueue>,
        input: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        text: bool,
    ) -> PyResult<u64> {
        let py = queue.py();
        let limit = Limit::parse(timeout, Duration::ZERO)?;
        self.handle.get().give(py, input_from(input)?)?;
        let (program, done) = (self.handle.get().program(py)?, self.handle.get().program(py)?);
        queue.get().begin(OnInterrupt::Abandon, program.collect(limit), move |py, collected| {
            raised(py, collected)?;
            done.collected(py, text)?.into_py_any(py)
        })
    }

    #[pyo3(signature = (queue, timeout=None))]
    fn wait(&self, queue: &Bound<'_, OperationQueue>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let limit = Limit::parse(timeout, Duration::ZERO)?;
        let (program, handle) = (self.handle.get().program(queue.py())?, self.handle.clone_ref(queue.py()));
        queue.get().begin(OnInterrupt::Abandon, program.drain(limit), move |py, drained| {
            raised(py, drained)?;
            handle.get().exit_code(py)
        })
    }
}
