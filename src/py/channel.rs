//! A channel's handle.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use serde_json::Value;

use super::gate::{self, OnInterrupt, Owned};
use super::{convert, errors, logging};
use crate::channel::Client;
use crate::error::Error;
use crate::mutex::Mutex;
use crate::store::{self, runtime};

/// How long a message may take to be written; the broker reads as fast as its VM answers.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to the agent of one VM, from any process of the VM's user or of root.
///
/// It talks to the socket of the VM's broker; docs/channel.md has the framing. Properties do not block,
/// and neither does the constructor, which connects to nothing. Methods release the GIL and see Ctrl-C
/// within 50 ms.
///
/// Errors under "Errors" are logged once and kept as `last_error`, and the method returns `False` or
/// `None`. Errors under "Raises" are always raised, and so is `ForkedProcessError` in a forked child.
///
/// Args:
///     vm_id: The id of a running VM.
///     socket_path: The path of its socket; where left out, the one that the VM has with the default
///         `runtime_dir`. With another one it is `info["socket_path"]`.
///
/// Raises:
///     InvalidTypeError: An argument has the wrong type.
///     InvalidValueError: An argument is malformed.
///
/// Example:
///     >>> with CommunicationChannel(vm_id) as channel:
///     ...     channel.send_message({"type": "ping"}), channel.receive_message(timeout=5)
///     (True, {'type': 'pong'})
#[pyclass(subclass, frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct CommunicationChannel {
    vm_id: String,
    socket_path: PathBuf,
    client: Owned<Client>,
    last_error: Mutex<Option<Error>>,
}

impl CommunicationChannel {
    fn settle<T>(&self, py: Python<'_>, result: Result<T, Error>) -> PyResult<Option<T>> {
        errors::settle(py, result, false, |error| self.keep(error))
    }

    fn keep(&self, error: Error) {
        *self.last_error.lock() = Some(error);
    }
}

#[pymethods]
impl CommunicationChannel {
    #[new]
    #[pyo3(signature = (vm_id, socket_path=None))]
    fn new(py: Python<'_>, vm_id: &Bound<'_, PyAny>, socket_path: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let vm_id = convert::vm_id(vm_id)?;
        let given = convert::optional_absolute("socket_path", socket_path)?;
        let socket_path = given.unwrap_or_else(|| runtime::socket_path(&store::default_runtime(), &vm_id));
        logging::start(py)?;
        let client = Arc::new(Client::new(vm_id.clone(), socket_path.clone()));
        Ok(Self {
            vm_id: vm_id.as_str().to_owned(),
            socket_path,
            client: Owned::new("CommunicationChannel", client),
            last_error: Mutex::new(None),
        })
    }

    /// Connects to the VM's broker, anew if it was connected.
    ///
    /// Blocks for at most `timeout`.
    ///
    /// Args:
    ///     timeout: Seconds to wait, 0 to 86400.
    ///
    /// Returns:
    ///     `True` when it is connected, else `False`.
    ///
    /// Raises:
    ///     InvalidTypeError: `timeout` is not a number.
    ///     InvalidValueError: `timeout` is out of range.
    ///
    /// Errors:
    ///     ChannelError: The VM does not run (`channel_closed`), does not answer (`channel_timeout`), or
    ///         another user listens at the socket (`foreign_socket`).
    #[pyo3(signature = (timeout=None), text_signature = "($self, timeout=5.0)")]
    fn connect(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let timeout = timeout.map(|t| convert::seconds("timeout", t)).transpose()?.unwrap_or(Duration::from_secs(5));
        let client = self.client.get(py)?.clone();
        let connected = gate::wait(py, OnInterrupt::Abandon, async move { client.connect(timeout).await })?;
        Ok(self.settle(py, connected)?.is_some())
    }

    /// Sends one message to the VM.
    ///
    /// Blocks for at most 30 s while the broker takes no more.
    ///
    /// Args:
    ///     message: A dict of plain JSON types, such as `{"type": "ping"}`; docs/channel.md lists the types.
    ///
    /// Returns:
    ///     `True` when it was sent, else `False`.
    ///
    /// Raises:
    ///     InvalidTypeError: `message` is not a dict, or holds what JSON cannot.
    ///
    /// Errors:
    ///     ChannelError: It was not sent (`channel_closed`, `channel_timeout`, `message_too_large`).
    fn send_message(&self, py: Python<'_>, message: &Bound<'_, PyAny>) -> PyResult<bool> {
        let message = Value::Object(convert::object("message", message)?);
        let client = self.client.get(py)?.clone();
        let sent = gate::wait(py, OnInterrupt::Abandon, async move { client.send(&message, SEND_DEADLINE).await })?;
        Ok(self.settle(py, sent)?.is_some())
    }

    /// Returns the next message of the VM, or `None`.
    ///
    /// Blocks for at most `timeout`.
    ///
    /// Args:
    ///     timeout: Seconds to wait, 0 to 86400.
    ///
    /// Raises:
    ///     InvalidTypeError: `timeout` is not a number.
    ///     InvalidValueError: `timeout` is out of range.
    ///
    /// Errors:
    ///     ChannelError: No message came in time (`channel_timeout`, which is not logged), or the connection
    ///         ended (`channel_closed`).
    #[pyo3(signature = (timeout=None), text_signature = "($self, timeout=1.0)")]
    fn receive_message<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let timeout = timeout.map(|t| convert::seconds("timeout", t)).transpose()?.unwrap_or(Duration::from_secs(1));
        let client = self.client.get(py)?.clone();
        let received = match gate::wait(py, OnInterrupt::Abandon, async move { client.receive(timeout).await })? {
            // Nothing to receive yet is an answer, not a failure to log.
            Err(error @ Error::ChannelTimeout { .. }) => {
                self.keep(error);
                None
            }
            received => self.settle(py, received)?,
        };
        received.map(|document| convert::from_json(py, &document)).transpose()
    }

    /// Ends the connection.
    ///
    /// Does not block, except while another thread sends or receives on the channel. May be called twice.
    /// Does nothing in a forked child of the process that made the channel.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        // A forked child closes nothing of its parent's.
        if !self.client.is_ours() {
            return Ok(());
        }
        let client = self.client.get(py)?.clone();
        gate::wait(py, OnInterrupt::Finish, async move { client.close().await })
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.call_method0("connect")?;
        Ok(slf)
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
        self.close(py)?;
        Ok(false)
    }

    /// The name of the VM.
    #[getter]
    fn vm_id(&self) -> &str {
        &self.vm_id
    }

    /// The path at which the VM's broker listens while the VM runs.
    #[getter]
    fn socket_path(&self) -> String {
        self.socket_path.display().to_string()
    }

    /// The logger of the package, `thirstys_waterfall.security.microvm_isolation`; the package adds no
    /// handler that prints.
    #[getter]
    fn logger<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        logging::logger(py)
    }

    /// The error of the last failure, with a stable `code`; `None` before the first. A success does not
    /// clear it.
    #[getter]
    fn last_error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let error = self.last_error.lock().clone();
        error.map(|error| errors::exception(py, &error)).transpose()
    }
}
