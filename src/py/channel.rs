//! A channel's handle.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use serde_json::Value;

use super::gate::{self, OnInterrupt, Owned};
use super::{convert, errors, logging};
use crate::channel::Client;
use crate::error::Error;
use crate::store::{self, runtime};

/// How long a message may take to be written; the broker reads as fast as its VM answers.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to one VM's agent, from any process of the same user.
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
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
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

    /// Connects to the VM's broker, within `timeout` seconds; anew if it was connected.
    ///
    /// `False` with `last_error` when the VM does not run in a process of this user, or does not answer (`channel_closed`,
    /// `channel_timeout`).
    #[pyo3(signature = (timeout=None), text_signature = "($self, timeout=5.0)")]
    fn connect(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let timeout = timeout.map(|t| convert::seconds("timeout", t)).transpose()?.unwrap_or(Duration::from_secs(5));
        let client = self.client.get(py)?.clone();
        let connected = gate::wait(py, OnInterrupt::Abandon, async move { client.connect(timeout).await })?;
        Ok(self.settle(py, connected)?.is_some())
    }

    /// Sends one message, a dict of plain JSON types such as `{"type": "ping"}`; docs/channel.md lists them.
    ///
    /// Blocks for at most 30 s, as long as the broker takes no more. `False` with `last_error` when it was not sent.
    fn send_message(&self, py: Python<'_>, message: &Bound<'_, PyAny>) -> PyResult<bool> {
        let message = Value::Object(convert::object("message", message)?);
        let client = self.client.get(py)?.clone();
        let sent = gate::wait(py, OnInterrupt::Abandon, async move { client.send(&message, SEND_DEADLINE).await })?;
        Ok(self.settle(py, sent)?.is_some())
    }

    /// The next message within `timeout` seconds; `None` with `last_error` when none came (`channel_timeout`) or the
    /// connection ended (`channel_closed`).
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

    /// Ends the connection. May be called twice; does nothing in a forked child of the process that made the channel.
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

    /// Where the VM's broker listens, or will.
    #[getter]
    fn socket_path(&self) -> String {
        self.socket_path.display().to_string()
    }

    /// The package's logger, `thirstys_waterfall.security.microvm_isolation`; it has no handlers of its own.
    #[getter]
    fn logger<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        logging::logger(py)
    }

    /// The reason of the last failure, with a stable `code`; `None` when there was none. A success does not clear it.
    #[getter]
    fn last_error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let error = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        error.map(|error| errors::exception(py, &error)).transpose()
    }
}
