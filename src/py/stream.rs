//! The handle of a program that runs in a VM.

use std::sync::Arc;
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
use crate::mutex::Mutex;
use crate::vm::Live;

type Output<'py> = (Bound<'py, PyString>, Bound<'py, PyBytes>);

/// A program that runs in a guest: an iterator of `("stdout" or "stderr", bytes)`.
///
/// Made by `MicroVMInstance.stream`. Iterating blocks until there is output; it ends with the output.
/// Leaving the `with` block, or dropping the object, kills the program with all its descendants. Ctrl-C
/// in a method raises `KeyboardInterrupt` and leaves the program running, as with `subprocess.Popen`.
/// Properties do not block. Every error is raised; `ForkedProcessError` in a forked child.
///
/// Example:
///     >>> with vm.stream("cat") as program:
///     ...     program.write(b"hello"), program.close_stdin(), list(program), program.exit_code
///     (True, None, [('stdout', b'hello')], 0)
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
        self.on_output.lock().as_ref().map(|call| call.clone_ref(py))
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

    /// Writes to the program's input.
    ///
    /// Blocks while the program does not read, so also while it waits for its own output to be taken: take
    /// that on another thread, or write at most 64 KiB, which a pipe holds (pipe(7)), at a time.
    ///
    /// Args:
    ///     data: The bytes to write.
    ///
    /// Returns:
    ///     `True` when everything was written; `False` when the program reads no more.
    ///
    /// Raises:
    ///     InvalidTypeError: `data` is not bytes.
    ///     ChannelError: The channel failed (`channel_closed`).
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        let bytes = convert::bytes("data", data)?;
        let process = self.process.get(py)?.clone();
        let written = gate::wait(py, OnInterrupt::Abandon, async move { process.write(&bytes).await })?;
        written.map_err(|error| errors::raise(py, &error))
    }

    /// Ends the program's input.
    ///
    /// Does not block.
    fn close_stdin(&self, py: Python<'_>) -> PyResult<()> {
        self.process.get(py)?.inner.close_stdin();
        Ok(())
    }

    /// Sends a signal to the program's process group; SIGKILL ends all its descendants.
    ///
    /// Does not block.
    ///
    /// Args:
    ///     number: The number of the signal, 1 to 64 (signal(7)).
    ///
    /// Raises:
    ///     InvalidTypeError: `number` is not an int.
    ///     InvalidValueError: `number` is out of range.
    ///     ChannelError: The channel failed (`channel_closed`).
    fn signal(&self, py: Python<'_>, number: &Bound<'_, PyAny>) -> PyResult<()> {
        let signal = convert::whole_in("number", number, 1, 64)?;
        self.control(py, &Control::Signal { signal: signal as i32 })
    }

    /// Sets the size of the program's terminal (TIOCSWINSZ, ioctl_tty(2)).
    ///
    /// Does not block.
    ///
    /// Args:
    ///     rows: The height in characters, 1 to 65535.
    ///     columns: The width in characters, 1 to 65535.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument is not an int.
    ///     InvalidValueError: An argument is out of range, or the program was started without `pty`.
    ///     ChannelError: The channel failed (`channel_closed`).
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

    /// Waits for the program's end; output that was not taken goes to `on_output`, or is dropped.
    ///
    /// Blocks until the program ends. Ctrl-C raises and leaves the program running.
    ///
    /// Args:
    ///     timeout: Seconds to wait, 0 to 86400; no limit where left out.
    ///
    /// Returns:
    ///     The exit code; `-n` after signal `n`, -9 after `kill`, as `subprocess.Popen.returncode`.
    ///
    /// Raises:
    ///     InvalidTypeError: `timeout` is not a number.
    ///     InvalidValueError: `timeout` is out of range.
    ///     CommandError: The program ran longer than the `timeout` of `MicroVMInstance.stream` and was
    ///         killed (`timeout`); raised once, later calls return -9.
    ///     ChannelError: The program did not end in time (`channel_timeout`), or the channel failed
    ///         (`channel_closed`).
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

    /// Kills the program and all its descendants; `wait` then returns -9.
    ///
    /// Does not block. Does nothing when the program has ended.
    ///
    /// Raises:
    ///     ForkedProcessError: The calling process is a forked child.
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

    /// The exit code, or the negative number of the signal that ended the program; `None` until its output
    /// was taken to the end.
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
            Some(on_output) => on_output.as_ref().map_or(Ok(()), |call| visit.call(call)),
            None => Ok(()),
        }
    }

    fn __clear__(&self) {
        let call = self.on_output.lock().take();
        drop(call);
    }
}
