//! The handle of a program that runs in a VM.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::message::Control;
use microvm_protocol::mux::STDERR;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};
use pyo3::IntoPyObjectExt;
use pyo3::PyTraverseError;
use pyo3::PyVisit;
use serde_json::{Map, Value};

use super::gate::{self, OnInterrupt, Owned};
use super::{convert, errors};
use crate::channel::{Piece, Process};
use crate::error::{Error, Result};
use crate::mutex::Mutex;
use crate::vm::Live;

type Output<'py> = (Bound<'py, PyString>, Bound<'py, PyBytes>);

/// How long a caller waits for a program.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    length: Duration,
    end: Instant,
}

impl Limit {
    /// `None` where there is none; `waited` of it has gone by already.
    pub fn parse(timeout: Option<&Bound<'_, PyAny>>, waited: Duration) -> PyResult<Option<Self>> {
        let length = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        Ok(length.map(|length| Self { length, end: Instant::now() + length.saturating_sub(waited) }))
    }
}

/// A program and its output, which one caller takes at a time.
pub struct Program {
    process: Live<Process>,
    /// Held while a piece is on its way to its caller: one that the caller gives up is returned before the next is taken.
    turn: Arc<tokio::sync::Mutex<()>>,
    returned: Mutex<VecDeque<Piece>>,
    collected: Mutex<Collected>,
}

/// What `communicate` has taken so far: another call goes on where one was given up.
#[derive(Default)]
struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// A piece on its way to its caller. Dropped before, it is returned.
pub struct Taken {
    piece: Option<Piece>,
    program: Arc<Program>,
    _turn: tokio::sync::OwnedMutexGuard<()>,
}

impl Taken {
    pub fn claim(mut self) -> Option<Piece> {
        self.piece.take()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(piece) = self.piece.take() {
            self.program.put_back(piece);
        }
    }
}

impl Program {
    fn new(process: Live<Process>) -> Self {
        Self { process, turn: Arc::default(), returned: Mutex::default(), collected: Mutex::default() }
    }

    pub fn put_back(&self, piece: Piece) {
        self.returned.lock().push_front(piece);
    }

    async fn take(self: Arc<Self>) -> Result<Option<Taken>> {
        let _turn = self.turn.clone().lock_owned().await;
        let returned = self.returned.lock().pop_front();
        let piece = match returned {
            Some(piece) => Some(piece),
            None => self.process.next().await?,
        };
        Ok(piece.is_some().then(|| Taken { piece, program: self, _turn }))
    }

    /// The next output; `None` at its end. A program that has ended is drained whatever the limit says: what is left of its
    /// output is here already.
    ///
    /// # Errors
    /// Those of the process, and [`Error::ChannelTimeout`].
    pub async fn next(self: Arc<Self>, limit: Option<Limit>) -> Result<Option<Taken>> {
        let Some(limit) = limit else { return self.take().await };
        let is_late = Instant::now() >= limit.end && !self.process.inner.is_over();
        // A timer alone would not be looked at while there is output.
        if !is_late {
            if let Ok(next) = tokio::time::timeout_at(limit.end.into(), self.clone().take()).await {
                return next;
            }
        }
        let (vm_id, what) = (self.process.inner.vm_id().to_owned(), "the program".to_owned());
        Err(Error::ChannelTimeout { vm_id, what, limit_s: limit.length.as_secs_f64(), sent: true })
    }

    /// Drops what is left of the output.
    ///
    /// # Errors
    /// As for [`Program::next`].
    pub async fn drain(self: Arc<Self>, limit: Option<Limit>) -> Result<()> {
        while let Some(taken) = self.clone().next(limit).await? {
            taken.claim();
        }
        Ok(())
    }

    /// Keeps what is left of the output, for [`Program::collected`].
    ///
    /// # Errors
    /// As for [`Program::next`].
    pub async fn collect(self: Arc<Self>, limit: Option<Limit>) -> Result<()> {
        while let Some(taken) = self.clone().next(limit).await? {
            let Some(piece) = taken.claim() else { continue };
            let mut collected = self.collected.lock();
            let kept = if piece.channel == STDERR { &mut collected.stderr } else { &mut collected.stdout };
            kept.extend_from_slice(&piece.bytes);
        }
        Ok(())
    }

    /// Stdout and stderr as [`Program::collect`] has kept them.
    pub fn collected(&self, py: Python<'_>, text: bool) -> PyResult<(Py<PyAny>, Py<PyAny>)> {
        let collected = self.collected.lock();
        let given = |bytes: &[u8]| match text {
            true => String::from_utf8_lossy(bytes).into_py_any(py),
            false => PyBytes::new(py, bytes).into_py_any(py),
        };
        Ok((given(&collected.stdout)?, given(&collected.stderr)?))
    }

    /// Writes to its input, as fast as it reads. Returns false when it reads no more.
    ///
    /// # Errors
    /// Those of the process.
    pub async fn write(self: Arc<Self>, bytes: Vec<u8>) -> Result<bool> {
        self.process.write(&bytes).await
    }
}

/// The arguments of `stream`; `None`: it was left out.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct StreamArguments<'py> {
    pub program: Bound<'py, PyAny>,
    pub args: Option<Bound<'py, PyAny>>,
    pub env: Option<Bound<'py, PyAny>>,
    pub cwd: Option<Bound<'py, PyAny>>,
    pub stdin: Option<Bound<'py, PyAny>>,
    pub pty: bool,
    pub uid: Option<Bound<'py, PyAny>>,
    pub timeout: Option<Bound<'py, PyAny>>,
    pub rows: Option<Bound<'py, PyAny>>,
    pub columns: Option<Bound<'py, PyAny>>,
    pub on_output: Option<Bound<'py, PyAny>>,
}

/// The input of a program: bytes, a string as UTF-8, or none.
pub fn input_from(input: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<u8>> {
    match input {
        None => Ok(Vec::new()),
        Some(input) => match input.cast::<PyString>() {
            Ok(_) => Ok(convert::text("input", input)?.into_bytes()),
            Err(_) => convert::bytes("input", input),
        },
    }
}

/// What the handle of a program is made with, once it runs.
pub struct StreamOptions {
    has_terminal: bool,
    stdin: Option<Vec<u8>>,
    on_output: Option<Py<PyAny>>,
}

impl StreamArguments<'_> {
    /// What the guest is asked for, and what its handle is made with.
    pub fn parse(&self) -> PyResult<(Value, StreamOptions)> {
        let mut params = Map::new();
        params.insert("program".into(), convert::text("program", &self.program)?.into());
        params.insert("pty".into(), self.pty.into());
        for (field, value) in [("args", &self.args), ("env", &self.env)] {
            if let Some(value) = value {
                params.insert(field.into(), convert::json(field, value)?);
            }
        }
        if let Some(cwd) = &self.cwd {
            params.insert("cwd".into(), convert::text("cwd", cwd)?.into());
        }
        for (field, value, least, most) in
            // The last uid is (uid_t)-1: "no user" to every system call.
            [
                ("uid", &self.uid, 0, u64::from(u32::MAX) - 1),
                ("rows", &self.rows, 1, 65_535),
                ("columns", &self.columns, 1, 65_535),
            ]
        {
            if let Some(value) = value {
                params.insert(field.into(), convert::whole_in(field, value, least, most)?.into());
            }
        }
        if let Some(timeout) = &self.timeout {
            params.insert("timeout".into(), convert::seconds_above_0("timeout", timeout)?.as_secs_f64().into());
        }
        let on_output = convert::optional_callable("on_output", self.on_output.as_ref())?;
        let options = StreamOptions {
            has_terminal: self.pty,
            stdin: self.stdin.as_ref().map(|stdin| convert::bytes("stdin", stdin)).transpose()?,
            on_output: on_output.map(|call| call.clone().unbind()),
        };
        Ok((Value::Object(params), options))
    }
}

impl StreamOptions {
    /// The handle of a program that was started with these arguments.
    pub fn stream(self, py: Python<'_>, process: Live<Process>) -> PyResult<ProcessStream> {
        let program = Owned::new("ProcessStream", Arc::new(Program::new(process)));
        let stream = ProcessStream {
            program,
            has_terminal: self.has_terminal,
            on_output: Mutex::new(self.on_output),
            decoder: Mutex::default(),
        };
        if let Some(stdin) = self.stdin {
            stream.give(py, stdin)?;
        }
        Ok(stream)
    }
}

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
    program: Owned<Program>,
    has_terminal: bool,
    on_output: Mutex<Option<Py<PyAny>>>,
    /// Made by the first `text`, for all of them: one that is left in the middle of a character is gone on with.
    decoder: Mutex<Option<Py<PyAny>>>,
}

impl ProcessStream {
    fn on_output(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.on_output.lock().as_ref().map(|call| call.clone_ref(py))
    }

    /// The program, in the process that started it.
    pub fn program(&self, py: Python<'_>) -> PyResult<Arc<Program>> {
        self.program.get(py).cloned()
    }

    /// The next output; `None` at its end.
    fn take(&self, py: Python<'_>, limit: Option<Limit>) -> PyResult<Option<Piece>> {
        let program = self.program(py)?;
        let taken = gate::wait(py, OnInterrupt::Abandon, async move { program.next(limit).await })?;
        Ok(taken.map_err(|error| errors::raise(py, &error))?.and_then(Taken::claim))
    }

    /// Writes and closes the program's input, at whatever pace it reads, while others take its output.
    pub fn give(&self, py: Python<'_>, bytes: Vec<u8>) -> PyResult<()> {
        let program = self.program(py)?;
        gate::spawn(async move {
            if let Err(error) = program.clone().write(bytes).await {
                log::debug!("a program's input: {error}");
            }
            program.process.inner.close_stdin();
        })
    }

    fn control(&self, py: Python<'_>, control: &Control) -> PyResult<()> {
        self.program.get(py)?.process.inner.control(control).map_err(|error| errors::raise(py, &error))
    }
}

pub fn output<'py>(py: Python<'py>, piece: &Piece) -> Output<'py> {
    let name = if piece.channel == STDERR { pyo3::intern!(py, "stderr") } else { pyo3::intern!(py, "stdout") };
    (name.clone(), PyBytes::new(py, &piece.bytes))
}

#[pymethods]
impl ProcessStream {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Output<'py>>> {
        Ok(self.take(py, None)?.map(|piece| output(py, &piece)))
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
        let (program, bytes) = (self.program(py)?, convert::bytes("data", data)?);
        let written = gate::wait(py, OnInterrupt::Abandon, async move { program.write(bytes).await })?;
        written.map_err(|error| errors::raise(py, &error))
    }

    /// Ends the program's input.
    ///
    /// Does not block.
    fn close_stdin(&self, py: Python<'_>) -> PyResult<()> {
        self.program.get(py)?.process.inner.close_stdin();
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
        let limit = Limit::parse(timeout, Duration::ZERO)?;
        match self.on_output(py) {
            Some(call) => {
                while let Some(piece) = self.take(py, limit)? {
                    call.call1(py, output(py, &piece))?;
                }
            }
            None => {
                let program = self.program(py)?;
                let drained = gate::wait(py, OnInterrupt::Abandon, async move { program.drain(limit).await })?;
                drained.map_err(|error| errors::raise(py, &error))?;
            }
        }
        self.exit_code(py)
    }

    /// Gives the program its whole input, takes all its output, and waits for its end.
    ///
    /// Blocks until the program ends. Input and output go at the same time, whatever their sizes; the output
    /// is held in memory. After a failure the program goes on, and another call, without `input`, returns
    /// this output, too.
    ///
    /// Args:
    ///     input: Its input: bytes, or a string, which is sent as UTF-8. Where left out, its input ends.
    ///     timeout: Seconds to wait, 0 to 86400; no limit where left out.
    ///     text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is bytes.
    ///
    /// Returns:
    ///     Stdout and stderr, without what was taken before. `exit_code` says how the program ended.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: `timeout` is out of range.
    ///     CommandError: As of `wait`.
    ///     ChannelError: As of `wait`.
    ///
    /// Example:
    ///     >>> with vm.stream("cat") as program:
    ///     ...     program.communicate("hello", text=True), program.exit_code
    ///     (('hello', ''), 0)
    #[pyo3(signature = (input=None, timeout=None, text=false))]
    fn communicate(
        &self,
        py: Python<'_>,
        input: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        text: bool,
    ) -> PyResult<(Py<PyAny>, Py<PyAny>)> {
        let limit = Limit::parse(timeout, Duration::ZERO)?;
        self.give(py, input_from(input)?)?;
        let (program, done) = (self.program(py)?, self.program(py)?);
        let collected = gate::wait(py, OnInterrupt::Abandon, async move { program.collect(limit).await })?;
        collected.map_err(|error| errors::raise(py, &error))?;
        done.collected(py, text)
    }

    /// Returns an iterator of the output as text: `("stdout" or "stderr", str)`.
    ///
    /// Does not block; the iterator does, until there is output. A character whose bytes come in two pieces
    /// is one character; what is not UTF-8 becomes U+FFFD.
    ///
    /// Example:
    ///     >>> with vm.stream("echo", ["hello"]) as program:
    ///     ...     list(program.text())
    ///     [('stdout', 'hello\n')]
    fn text<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let module = py.import("thirstys_waterfall.security.microvm_isolation._text")?;
        let made = module.getattr("TextDecoder")?.call0()?.unbind();
        let decoder = slf.get().decoder.lock().get_or_insert(made).clone_ref(py);
        module.getattr("texts")?.call1((slf, decoder))
    }

    /// Kills the program and all its descendants; `wait` then returns -9.
    ///
    /// Does not block. Does nothing when the program has ended.
    ///
    /// Raises:
    ///     ForkedProcessError: The calling process is a forked child.
    fn kill(&self, py: Python<'_>) -> PyResult<()> {
        self.program.get(py)?.process.inner.kill();
        Ok(())
    }

    fn __repr__(&self) -> String {
        let inner = &self.program.peek().process.inner;
        let state = match self.program.is_ours().then(|| inner.ended()) {
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
        if self.program.is_ours() {
            self.kill(py)?;
        }
        Ok(false)
    }

    /// The exit code, or the negative number of the signal that ended the program; `None` until its output
    /// was taken to the end.
    #[getter]
    pub fn exit_code(&self, py: Python<'_>) -> PyResult<Option<i32>> {
        let Some(Ok(exit)) = self.program.get(py)?.process.inner.ended() else { return Ok(None) };
        Ok(exit.exit_code.or_else(|| exit.signal.map(|signal| -signal)))
    }

    /// The program's process id in the guest.
    #[getter]
    fn pid(&self) -> u32 {
        self.program.peek().process.inner.pid()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
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
