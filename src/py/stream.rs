//! The handle of a program that runs in a VM.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use microvm_protocol::message::Control;
use microvm_protocol::mux::STDERR;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};
use pyo3::PyTraverseError;
use pyo3::PyVisit;

use super::gate::{self, OnInterrupt, Owned};
use super::{convert, errors};
use crate::channel::{Piece, Process};
use crate::error::Error;
use crate::vm::Live;

type Output<'py> = (Bound<'py, PyString>, Bound<'py, PyBytes>);

/// A running program: an iterator of `("stdout" | "stderr", bytes)`. Leaving its `with` block, or dropping it, kills it.
/// Ctrl-C in one of its methods raises and leaves it running.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct ProcessStream {
    process: Owned<Live<Process>>,
    has_terminal: bool,
    on_output: Mutex<Option<Py<PyAny>>>,
}

impl ProcessStream {
    pub fn new(process: Live<Process>, has_terminal: bool, on_output: Option<Py<PyAny>>) -> Self {
        let process = Owned::new("ProcessStream", Arc::new(process));
        Self { process, has_terminal, on_output: Mutex::new(on_output) }
    }

    fn on_output(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.on_output.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|call| call.clone_ref(py))
    }

    /// The next output, or its end (`Some(None)`); `None` when neither came until `deadline`.
    fn take(&self, py: Python<'_>, deadline: Option<Instant>) -> PyResult<Option<Option<Piece>>> {
        let process = self.process.get(py)?.clone();
        let taken = gate::wait(py, OnInterrupt::Abandon, async move {
            match deadline {
                None => process.next().await.map(Some),
                Some(deadline) => match tokio::time::timeout_at(deadline.into(), process.next()).await {
                    Ok(next) => next.map(Some),
                    Err(_) => Ok(None),
                },
            }
        })?;
        taken.map_err(|error| errors::raise(py, &error))
    }

    /// Writes and closes the program's input, at whatever pace it reads, while others take its output.
    pub fn give(&self, py: Python<'_>, bytes: Vec<u8>) -> PyResult<()> {
        let process = self.process.get(py)?.clone();
        gate::spawn(async move {
            if let Err(error) = process.write(&bytes).await {
                log::debug!("a program's input: {error}");
            }
            process.inner.close_stdin();
        })
    }

    fn control(&self, py: Python<'_>, control: &Control) -> PyResult<()> {
        self.process.get(py)?.inner.control(control).map_err(|error| errors::raise(py, &error))
    }
}

fn output<'py>(py: Python<'py>, piece: &Piece) -> Output<'py> {
    let name = if piece.channel == STDERR { pyo3::intern!(py, "stderr") } else { pyo3::intern!(py, "stdout") };
    (name.clone(), PyBytes::new(py, &piece.bytes))
}

#[pymethods]
impl ProcessStream {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Output<'py>>> {
        Ok(self.take(py, None)?.flatten().map(|piece| output(py, &piece)))
    }

    /// Writes to the program's input, as fast as it reads; `False` when it reads no more. Blocks while the program does not
    /// read, so also while it waits for its own output to be taken: take that on another thread, or write less than a pipe
    /// holds (64 KiB) at a time.
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        let bytes = convert::bytes("data", data)?;
        let process = self.process.get(py)?.clone();
        let written = gate::wait(py, OnInterrupt::Abandon, async move { process.write(&bytes).await })?;
        written.map_err(|error| errors::raise(py, &error))
    }

    /// Ends the program's input.
    fn close_stdin(&self, py: Python<'_>) -> PyResult<()> {
        self.process.get(py)?.inner.close_stdin();
        Ok(())
    }

    /// Sends a signal, 1 to 64, to the program's process group; SIGKILL ends all its descendants.
    fn signal(&self, py: Python<'_>, number: &Bound<'_, PyAny>) -> PyResult<()> {
        let signal = convert::whole_in("number", number, 1, 64)?;
        self.control(py, &Control::Signal { signal: signal as i32 })
    }

    /// Tells the program's terminal its size; `ValueError` for a program that was started without `pty`.
    fn resize(&self, py: Python<'_>, rows: &Bound<'_, PyAny>, columns: &Bound<'_, PyAny>) -> PyResult<()> {
        let rows = convert::whole_in("rows", rows, 1, 65_535)? as u16;
        let columns = convert::whole_in("columns", columns, 1, 65_535)? as u16;
        if !self.has_terminal {
            let (field, value) = ("resize".into(), format!("({rows}, {columns})"));
            let allowed = "only a program on a terminal has a size; start it with stream(..., pty=True)".into();
            return Err(errors::raise(py, &Error::InvalidValue { field, value, allowed }));
        }
        self.control(py, &Control::Resize { rows, columns })
    }

    /// Waits for the program's end and gives its exit code, `-n` after signal `n`, -9 after `kill()`. Output that was not taken
    /// goes to `on_output`, or is dropped. A program that its `timeout` ended raises `CommandError` once (`timeout`), then
    /// gives -9. Ctrl-C raises and leaves the program running: `wait()` again, `kill()` it, or leave its `with` block.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<Option<i32>> {
        let timeout: Option<Duration> = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let on_output = self.on_output(py);
        loop {
            match (self.take(py, deadline)?, &on_output) {
                (Some(Some(piece)), Some(call)) => drop(call.call1(py, output(py, &piece))?),
                (Some(Some(_)), None) => {}
                (Some(None), _) => return self.exit_code(py),
                (None, _) => {
                    let (vm_id, what) = (self.process.peek().inner.vm_id().to_owned(), "the program".to_owned());
                    let limit_s = timeout.unwrap_or_default().as_secs_f64();
                    return Err(errors::raise(py, &Error::ChannelTimeout { vm_id, what, limit_s, sent: true }));
                }
            }
        }
    }

    /// Kills the program and all its descendants; `wait()` then gives -9. Nothing when it has ended.
    fn kill(&self, py: Python<'_>) -> PyResult<()> {
        self.process.get(py)?.inner.kill();
        Ok(())
    }

    fn __repr__(&self) -> String {
        let inner = &self.process.peek().inner;
        let state = match self.process.is_ours().then(|| inner.ended()) {
            None => "of the parent process".to_owned(),
            Some(None) => "not at its end".to_owned(),
            Some(Some(Ok(exit))) => match (exit.exit_code, exit.signal) {
                (Some(code), _) => format!("ended with exit code {code}"),
                (None, signal) => format!("ended by signal {}", signal.unwrap_or_default()),
            },
            Some(Some(Err(error))) => format!("failed ({})", error.code()),
        };
        format!("<ProcessStream {} pid {} {state}>", inner.vm_id(), inner.pid())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let (_, _, _) = (exc_type, exc_value, traceback);
        // A forked child that leaves the block ends nothing of its parent's.
        if self.process.is_ours() {
            self.kill(py)?;
        }
        Ok(false)
    }

    /// The exit code, the negative number of the signal that ended the program, or `None` while its output was not taken
    /// to the end.
    #[getter]
    fn exit_code(&self, py: Python<'_>) -> PyResult<Option<i32>> {
        let Some(Ok(exit)) = self.process.get(py)?.inner.ended() else { return Ok(None) };
        Ok(exit.exit_code.or_else(|| exit.signal.map(|signal| -signal)))
    }

    /// The program's process id in the guest.
    #[getter]
    fn pid(&self) -> u32 {
        self.process.peek().inner.pid()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.on_output.try_lock() {
            Ok(on_output) => on_output.as_ref().map_or(Ok(()), |call| visit.call(call)),
            Err(_) => Ok(()),
        }
    }

    fn __clear__(&self) {
        let call = self.on_output.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(call);
    }
}
