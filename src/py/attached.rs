//! The handle of a VM of another process.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

use super::gate::{self, OnInterrupt, Owned};
use super::instance::{answer_json, command_from};
use super::ports::{self, ConnectArguments, PublishedPort};
use super::stream::{ProcessStream, StreamArguments};
use super::transfer::{self, DownloadArguments, UploadArguments};
use super::{convert, errors, logging};
use crate::channel::{Operation, SessionError};
use crate::error::Error;
use crate::model::VmId;
use crate::mutex::Mutex;
use crate::store::{self, runtime};
use crate::vm::attached::{self, Attached};
use crate::vm::{connections, Machine};

/// A VM that another process of this user has, reached through that process.
///
/// The process that made the VM keeps it: closing this handle, by its ``with`` block or by the end of this
/// process, ends this process's own programs in the VM and nothing else. Every failure is raised. When the
/// process that has the VM ends, what is under way raises `ChannelError` at once. Every method may be called
/// from any thread, releases the GIL and sees Ctrl-C within 50 ms; none can be used in a forked child
/// (`ForkedProcessError`). Properties do not block. The socket is the user's alone: neither other users' VMs nor other users'
/// processes can be reached by it.
///
/// Blocks until the owner answers, at most for `timeout`.
///
/// Args:
///     vm_id: The id of a VM that runs, or is paused, in any process of this user.
///     runtime_dir: The owner's `runtime_dir`; the default one where left out.
///     timeout: Seconds that the owner may take to answer, 0 to 86400.
///
/// Raises:
///     InvalidTypeError: An argument has the wrong type.
///     InvalidValueError: An argument is malformed.
///     VmNotFoundError: No VM of this id runs (`vm_not_found`).
///     ChannelError: The owner does not answer (`channel_timeout`), or another user listens at the socket
///         (`foreign_socket`).
///
/// Example:
///     >>> with manager.attach(vm_id) as attached:
///     ...     attached.run(["echo", "hello"]).stdout
///     'hello\n'
#[pyclass(subclass, frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct AttachedVM {
    vm_id: String,
    owner_pid: Option<i32>,
    /// `None` once it was closed.
    attached: Owned<Mutex<Option<Arc<Attached>>>>,
}

/// The arguments of `attach`.
pub struct AttachArguments {
    vm_id: VmId,
    socket: PathBuf,
    timeout: Duration,
}

impl AttachArguments {
    pub fn parse(
        vm_id: &Bound<'_, PyAny>,
        runtime_dir: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let vm_id = convert::vm_id(vm_id)?;
        let folder = convert::optional_absolute("runtime_dir", runtime_dir)?.unwrap_or_else(store::default_runtime);
        let timeout = timeout.map(|t| convert::seconds("timeout", t)).transpose()?.unwrap_or(Duration::from_secs(5));
        let socket = runtime::socket_path(&folder, &vm_id);
        Ok(Self { vm_id, socket, timeout })
    }

    pub fn attach(self, py: Python<'_>) -> PyResult<impl Future<Output = Result<Attached, Error>> + Send + 'static> {
        logging::start(py)?;
        Ok(async move { Attached::to(self.vm_id, &self.socket, self.timeout).await })
    }
}

/// The arguments of `running_vms`.
pub struct ListArguments {
    pub folder: Option<PathBuf>,
    pub timeout: Duration,
}

impl ListArguments {
    pub fn parse(runtime_dir: Option<&Bound<'_, PyAny>>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let folder = convert::optional_absolute("runtime_dir", runtime_dir)?;
        let timeout = timeout.map(|t| convert::seconds("timeout", t)).transpose()?.unwrap_or(Duration::from_secs(2));
        Ok(Self { folder, timeout })
    }
}

impl AttachedVM {
    pub fn wrap(attached: Attached) -> Self {
        Self {
            vm_id: attached.id().to_string(),
            owner_pid: attached.owner_pid(),
            attached: Owned::new("AttachedVM", Arc::new(Mutex::new(Some(Arc::new(attached))))),
        }
    }

    /// The VM, in the process that attached, until it is closed.
    pub fn attached(&self, py: Python<'_>) -> PyResult<Arc<Attached>> {
        let attached = self.attached.get(py)?.lock().clone();
        attached
            .ok_or_else(|| errors::raise(py, &Error::channel_closed(&self.vm_id, SessionError::HandleClosed, false)))
    }

    /// The owner does it to its end, also when this process does not wait for that.
    fn operate(&self, py: Python<'_>, operation: Operation) -> PyResult<Value> {
        let attached = self.attached(py)?;
        let done = gate::wait(py, OnInterrupt::Abandon, async move { attached.operate(operation).await })?;
        done.map_err(|error| errors::raise(py, &error))
    }
}

#[pymethods]
impl AttachedVM {
    #[new]
    #[pyo3(signature = (vm_id, runtime_dir=None, timeout=None), text_signature = "(vm_id, runtime_dir=None, timeout=5.0)")]
    fn new(
        py: Python<'_>,
        vm_id: &Bound<'_, PyAny>,
        runtime_dir: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let attaching = AttachArguments::parse(vm_id, runtime_dir, timeout)?.attach(py)?;
        let attached = gate::wait(py, OnInterrupt::Abandon, attaching)?;
        Ok(Self::wrap(attached.map_err(|error| errors::raise(py, &error))?))
    }

    /// Sends a command to the agent in the guest and returns its answer.
    ///
    /// Blocks until the agent answers.
    ///
    /// Args:
    ///     command: The name of the command; docs/commands.md lists them with their parameters and results.
    ///     params: The parameters of the command: plain JSON types.
    ///     timeout: Seconds to wait for the answer, 0 to 86400. Where left out, the owner's
    ///         `command_timeout_s`, or longer if the command's own `timeout` in `params` is.
    ///
    /// Returns:
    ///     What the guest says: `{"status": "ok", "result": ...}`, or
    ///     `{"status": "error", "error": {"code": ..., "message": ...}}`.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type, or `params` holds what JSON cannot.
    ///     InvalidValueError: An argument is out of range.
    ///     ChannelError: The channel failed (`channel_timeout`, `channel_closed`, `message_too_large`);
    ///         `details["sent"]` says whether the command may have run.
    #[pyo3(signature = (command, params=None, timeout=None))]
    fn send_command<'py>(
        &self,
        py: Python<'py>,
        command: &Bound<'_, PyAny>,
        params: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (command, params, timeout) = command_from(command, params, timeout)?;
        let attached = self.attached(py)?;
        let asking = async move { attached.command(&command, params, timeout).await };
        let answer = gate::wait(py, OnInterrupt::Abandon, asking)?.map_err(|error| errors::raise(py, &error))?;
        convert::from_json(py, &answer_json(answer))
    }

    /// Starts a program in the guest and returns a handle to its input and output.
    ///
    /// Blocks until the program runs. The program ends with the handle, with this process, and with the owner.
    ///
    /// Args:
    ///     program: The path of the program in the guest, or a name that is looked up on its `PATH`.
    ///     args: Its arguments.
    ///     env: Environment variables, beside the usual ones and in their place (docs/guest.md).
    ///     cwd: Its working directory; `/` where left out.
    ///     stdin: Its whole input; where left out, `ProcessStream.write` gives it.
    ///     pty: Whether it runs on a terminal (pty(7)); stderr comes with stdout then.
    ///     uid: The user that it runs as, 0 to 4294967294 (setuid(2)); 0, which is root, where left out.
    ///     timeout: Seconds that it may run, more than 0 and at most 86400; no limit where left out.
    ///     rows: The terminal's height in characters, 1 to 65535; 24 where left out.
    ///     columns: The terminal's width in characters, 1 to 65535; 80 where left out.
    ///     on_output: A function that `ProcessStream.wait` calls with `"stdout"` or `"stderr"` and bytes.
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.stream`.
    #[pyo3(signature = (program, args=None, env=None, cwd=None, stdin=None, pty=false, uid=None, timeout=None, rows=None, columns=None, on_output=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn stream<'py>(
        &self,
        py: Python<'py>,
        program: Bound<'py, PyAny>,
        args: Option<Bound<'py, PyAny>>,
        env: Option<Bound<'py, PyAny>>,
        cwd: Option<Bound<'py, PyAny>>,
        stdin: Option<Bound<'py, PyAny>>,
        pty: bool,
        uid: Option<Bound<'py, PyAny>>,
        timeout: Option<Bound<'py, PyAny>>,
        rows: Option<Bound<'py, PyAny>>,
        columns: Option<Bound<'py, PyAny>>,
        on_output: Option<Bound<'py, PyAny>>,
    ) -> PyResult<ProcessStream> {
        let attached = self.attached(py)?;
        let arguments = StreamArguments { program, args, env, cwd, stdin, pty, uid, timeout, rows, columns, on_output };
        let (params, options) = arguments.parse()?;
        let started = gate::wait(py, OnInterrupt::Abandon, async move { attached.stream(params).await })?;
        options.stream(py, started.map_err(|error| errors::raise(py, &error))?)
    }

    /// Connects to a TCP port of the guest and returns a socket.
    ///
    /// Blocks until the guest has connected. The connection ends with this handle. The arguments are those of
    /// `MicroVMInstance.connect`.
    ///
    /// Args:
    ///     port: The port, 1 to 65535.
    ///     address: Where in the guest it is, as an IPv4 or IPv6 address; where left out, 127.0.0.1, and `::1` where that
    ///         refuses.
    ///     timeout: Seconds that it may take, 0 to 86400; the owner's `command_timeout_s` where left out.
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.connect`.
    #[pyo3(signature = (port, address=None, timeout=None))]
    fn connect<'py>(
        &self,
        py: Python<'py>,
        port: &Bound<'_, PyAny>,
        address: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let attached = self.attached(py)?;
        let ConnectArguments { port, address, timeout } = ConnectArguments::parse(port, address, timeout)?;
        let connecting = async move { connections::connect(&*attached, port, address, timeout).await };
        let connected = gate::wait(py, OnInterrupt::Abandon, connecting)?;
        ports::socket(py, connected.map_err(|error| errors::raise(py, &error))?)
    }

    /// Has this process listen at a port, and carries the connections that come to a TCP port of the guest.
    ///
    /// Does not block. The port ends with this handle, and the owner's `ports` do not tell it. The arguments are those of
    /// `MicroVMInstance.publish`.
    ///
    /// Args:
    ///     port: The port of the guest, 1 to 65535.
    ///     host_port: The port of the host, 0 to 65535; one that is free where it is 0 or left out.
    ///     address: The address of the host to listen at: 127.0.0.1 where left out.
    ///     protocol: `tcp`.
    ///     guest_address: Where in the guest the port is, as for `connect`.
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.publish`.
    #[pyo3(signature = (port, host_port=None, address=None, protocol=None, guest_address=None), text_signature = "($self, port, host_port=0, address='127.0.0.1', protocol='tcp', guest_address=None)")]
    fn publish(
        &self,
        py: Python<'_>,
        port: &Bound<'_, PyAny>,
        host_port: Option<&Bound<'_, PyAny>>,
        address: Option<&Bound<'_, PyAny>>,
        protocol: Option<&Bound<'_, PyAny>>,
        guest_address: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PublishedPort> {
        let mapping = ports::mapping(port, host_port, address, protocol, guest_address)?;
        let attached = self.attached(py)?;
        let publishing = attached.clone();
        let published =
            gate::wait(py, OnInterrupt::Abandon, async move { connections::publish(&publishing, mapping) })?;
        Ok(PublishedPort::wrap(&*attached, &published.map_err(|error| errors::raise(py, &error))?))
    }

    /// Returns what the owner has published of the VM.
    ///
    /// Blocks until the owner answers.
    ///
    /// Returns:
    ///     `PortInfo` of each port, in the order of the host's addresses.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn ports<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::from_json(py, &self.operate(py, Operation::Ports)?)
    }

    /// Writes a file of the guest from a path or an object with `read`.
    ///
    /// Blocks until the whole file is written. The arguments are those of `MicroVMInstance.upload`.
    ///
    /// Args:
    ///     source: A path on the host, or an object whose `read(size)` returns at most that many bytes.
    ///     guest_path: The path in the guest.
    ///     offset: Position in bytes, 0 to 2**62, from which `source` is read and the file is written in place.
    ///     mode: Permission bits of the file, 0 to 0o7777 (chmod(2)).
    ///     progress: A function that is called with the bytes sent so far, and with the size in bytes, or
    ///         `None` where that is not known.
    ///     timeout: Seconds that the guest may take nothing, 0 to 86400.
    ///
    /// Returns:
    ///     `bytes`, how many this call sent, and `crc32`, their checksum, which both sides compared
    ///     (`zlib.crc32`).
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.upload`.
    #[pyo3(signature = (source, guest_path, offset=None, mode=None, progress=None, timeout=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn upload<'py>(
        &self,
        py: Python<'py>,
        source: Bound<'py, PyAny>,
        guest_path: Bound<'py, PyAny>,
        offset: Option<Bound<'py, PyAny>>,
        mode: Option<Bound<'py, PyAny>>,
        progress: Option<Bound<'py, PyAny>>,
        timeout: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let arguments = UploadArguments { source, guest_path, offset, mode, progress, timeout };
        transfer::upload(&self.attached(py)?, &arguments)
    }

    /// Reads a file of the guest into a path or an object with `write`.
    ///
    /// Blocks until the whole file is read. The arguments are those of `MicroVMInstance.download`.
    ///
    /// Args:
    ///     guest_path: The path in the guest.
    ///     destination: A path on the host, or an object with `write(data)`.
    ///     offset: Position in bytes, 0 to 2**62, from which the guest's file is read and the other is
    ///         written in place. Where left out, the whole file is replaced.
    ///     progress: A function that is called with the bytes received so far and the size in bytes.
    ///     max_bytes: The most bytes that are taken, 0 to 2**62; where left out, what the VM's disk, memory
    ///         and image can hold.
    ///     timeout: Seconds that the guest may send nothing, 0 to 86400.
    ///
    /// Returns:
    ///     `bytes`, how many this call received, and `crc32`, their checksum, which both sides compared
    ///     (`zlib.crc32`).
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.download`.
    #[pyo3(signature = (guest_path, destination, offset=None, progress=None, max_bytes=None, timeout=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn download<'py>(
        &self,
        py: Python<'py>,
        guest_path: Bound<'py, PyAny>,
        destination: Bound<'py, PyAny>,
        offset: Option<Bound<'py, PyAny>>,
        progress: Option<Bound<'py, PyAny>>,
        max_bytes: Option<Bound<'py, PyAny>>,
        timeout: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let arguments = DownloadArguments { guest_path, destination, offset, progress, max_bytes, timeout };
        transfer::download(&self.attached(py)?, &arguments)
    }

    /// Measures the VM's health now.
    ///
    /// Blocks for at most 2 s if the guest does not answer.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn get_health_metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::model(py, "VMHealthMetrics", &self.operate(py, Operation::Health)?)
    }

    /// Returns everything there is to know about the VM, as `MicroVMInstance.get_info` does for its owner.
    ///
    /// Blocks for at most 2 s if the guest does not answer.
    ///
    /// Returns:
    ///     `VMInfo`.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn get_info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::from_json(py, &self.operate(py, Operation::Info)?)
    }

    /// Returns the VM's state.
    ///
    /// Blocks until the owner answers.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn get_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let summary = self.operate(py, Operation::Summary)?;
        convert::member(py, "VMState", summary["state"].as_str().unwrap_or("error"))
    }

    /// Stops the vCPUs; memory and disk stay.
    ///
    /// Blocks for milliseconds.
    ///
    /// Raises:
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        self.operate(py, Operation::Pause).map(drop)
    }

    /// Resumes a paused VM and sets its clock.
    ///
    /// Blocks for milliseconds.
    ///
    /// Raises:
    ///     VmStateError: The VM is not paused (`invalid_state`).
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        self.operate(py, Operation::Resume).map(drop)
    }

    /// Makes a template of the VM as it is now, below the owner's `cache_dir`.
    ///
    /// Blocks as `MicroVMInstance.snapshot` does.
    ///
    /// Args:
    ///     name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.snapshot`.
    fn snapshot(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = convert::template("name", name)?.to_string();
        self.operate(py, Operation::Snapshot { name }).map(drop)
    }

    /// Has the owner write the VM's state to disk and end its process; this handle is of no use then.
    ///
    /// Blocks as `MicroVMInstance.suspend` does.
    ///
    /// Raises:
    ///     MicroVMError: Every error of `MicroVMInstance.suspend`.
    fn suspend(&self, py: Python<'_>) -> PyResult<()> {
        self.operate(py, Operation::Suspend).map(drop)
    }

    /// Has the owner shut the VM down, as `MicroVMInstance.stop` does; this handle is of no use then.
    ///
    /// Blocks for at most 10 s.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.operate(py, Operation::Stop).map(drop)
    }

    /// Has the owner end the VM without asking the guest; this handle is of no use then.
    ///
    /// Blocks for at most 7 s.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn kill(&self, py: Python<'_>) -> PyResult<()> {
        self.operate(py, Operation::Kill).map(drop)
    }

    /// Has the owner destroy the VM, with its files; its manager knows it no more.
    ///
    /// Blocks for about 100 ms.
    ///
    /// Raises:
    ///     ChannelError: The owner has ended or let go of the VM (`channel_closed`).
    fn destroy(&self, py: Python<'_>) -> PyResult<()> {
        self.operate(py, Operation::Destroy).map(drop)
    }

    /// Waits until the VM is no more to be used: it was stopped or destroyed, or its owner has ended.
    ///
    /// Blocks until then, at most for `timeout`.
    ///
    /// Args:
    ///     timeout: Seconds to wait, 0 to 86400; without end where left out.
    ///
    /// Returns:
    ///     `True` when it has ended, `False` when the time was over.
    ///
    /// Raises:
    ///     InvalidTypeError: `timeout` is not a number.
    ///     InvalidValueError: `timeout` is out of range.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let timeout = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        let attached = self.attached(py)?;
        gate::wait(py, OnInterrupt::Abandon, async move { attached.closed_within(timeout).await })
    }

    /// Ends what this handle has under way in the VM; the VM goes on.
    ///
    /// Does not block. May be called twice. Does nothing in a forked child of the process that attached.
    fn close(&self) {
        if self.attached.is_ours() {
            let attached = self.attached.peek().lock().take();
            if let Some(attached) = attached {
                attached.close();
            }
        }
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback))]
    fn __exit__(
        &self,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> bool {
        let (_, _, _) = (exc_type, exc_value, traceback);
        self.close();
        false
    }

    /// The VM's name.
    #[getter]
    fn vm_id(&self) -> &str {
        &self.vm_id
    }

    /// The process that has the VM; `None` where this process cannot see it, as from another PID namespace.
    #[getter]
    fn owner_pid(&self) -> Option<i32> {
        self.owner_pid
    }

    fn __repr__(&self) -> String {
        match self.owner_pid {
            Some(pid) => format!("<AttachedVM {} of process {pid}>", self.vm_id),
            None => format!("<AttachedVM {}>", self.vm_id),
        }
    }
}

/// The VMs of every process of this user, as their owners describe them.
///
/// Blocks for as long as the owners take to answer, at most for `timeout`. Nothing of other users is looked at.
///
/// Args:
///     runtime_dir: The owners' `runtime_dir`; the default ones where left out.
///     timeout: Seconds that an owner may take to answer, 0 to 86400.
///
/// Returns:
///     `VMSummary` of each VM, in the order of their ids. `error` says why there is no more of one that is
///     still starting, whose owner has died, or whose owner does not answer.
///
/// Raises:
///     InvalidTypeError: An argument has the wrong type.
///     InvalidValueError: An argument is out of range.
///     HostError: `runtime_dir` is not this user's alone (`folder_refused`).
///
/// Example:
///     >>> vm_id in [vm["vm_id"] for vm in running_vms()]
///     True
#[pyfunction]
#[pyo3(signature = (runtime_dir=None, timeout=None), text_signature = "(runtime_dir=None, timeout=2.0)")]
pub fn running_vms<'py>(
    py: Python<'py>,
    runtime_dir: Option<&Bound<'_, PyAny>>,
    timeout: Option<&Bound<'_, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let ListArguments { folder, timeout } = ListArguments::parse(runtime_dir, timeout)?;
    let found = py.detach(|| runtime::found_in(folder)).map_err(|error| errors::raise(py, &error))?;
    let listed = gate::wait(py, OnInterrupt::Abandon, attached::list(found, timeout))?;
    convert::from_json(py, &Value::Array(listed))
}
