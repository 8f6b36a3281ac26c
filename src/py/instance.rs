//! The handle of one VM.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

use super::convert::SpecArguments;
use super::gate::{self, OnInterrupt, Owned};
use super::ports::{self, ConnectArguments, PublishedPort};
use super::stream::{ProcessStream, StreamArguments};
use super::transfer::{self, DownloadArguments, UploadArguments};
use super::{convert, errors, logging};
use crate::channel::Answer;
use crate::manager;
use crate::model::{printable, Backend, ManagerConfig, VmSpec};
use crate::vm::{connections, info, Machine, MicroVm};

/// Of a failure's words in a `repr`; `last_error` has them all.
const REPR_BYTES: usize = 200;

/// One microVM: its life, its commands, its files and its health.
///
/// Made by `MicroVMIsolationManager.get_vm`, or on its own without a manager. Every method may be called
/// from any thread; one that blocks releases the GIL and sees Ctrl-C within 50 ms. Properties do not
/// block, and neither does the constructor, which starts no process.
///
/// Errors under "Errors" are logged once and kept as `last_error`, and the method returns `False` or
/// `None`; they are raised instead where the manager has `raise_on_error`. Errors under "Raises" are
/// always raised, and so is `ForkedProcessError` in a forked child of the process that made the VM.
///
/// No privilege is needed, except CAP_NET_ADMIN for a VM on a tap (capabilities(7)), and read and
/// write access to `/dev/kvm` for hardware virtualization.
///
/// Args:
///     vm_id: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter or digit.
///     backend: The VMM.
///     isolation_type: What the VM is for.
///     resource_limits: What the VM may have.
///     network_config: The VM's network; none where left out.
///     kernel_path: A kernel for the VM, as in `MicroVMIsolationManager.create_vm`.
///     rootfs_path: An image for the VM, as in `MicroVMIsolationManager.create_vm`.
///     template: The name of a template, as in `MicroVMIsolationManager.create_vm`.
///     labels: Strings by strings, as in `MicroVMIsolationManager.create_vm`.
///
/// Raises:
///     InvalidTypeError: An argument has the wrong type.
///     InvalidValueError: An argument is out of range or malformed; the message names it.
///
/// Example:
///     >>> limits = VMResourceLimits(memory_mb=128, disk_size_mb=64)
///     >>> single = MicroVMInstance("single", "qemu", "plugin", limits)
///     >>> single.start(), single.get_state(), single.stop()
///     (True, <VMState.RUNNING: 'running'>, True)
#[pyclass(subclass, frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct MicroVMInstance {
    vm: Owned<MicroVm>,
    raising: bool,
}

/// The arguments of `send_command`: the command, its parameters and how long to wait.
pub fn command_from(
    command: &Bound<'_, PyAny>,
    params: Option<&Bound<'_, PyAny>>,
    timeout: Option<&Bound<'_, PyAny>>,
) -> PyResult<(String, Value, Option<Duration>)> {
    let params = match params {
        Some(params) => Value::Object(convert::object("params", params)?),
        None => Value::Null,
    };
    let timeout = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
    Ok((convert::text("command", command)?, params, timeout))
}

pub fn answer_json(answer: Answer) -> Value {
    serde_json::to_value(answer).unwrap_or(Value::Null)
}

/// Asks the agent; the answer, or `None` with the reason kept.
pub fn ask<'py>(
    py: Python<'py>,
    vm: &Arc<MicroVm>,
    raising: bool,
    command: &Bound<'_, PyAny>,
    params: Option<&Bound<'_, PyAny>>,
    timeout: Option<&Bound<'_, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (command, params, timeout) = command_from(command, params, timeout)?;
    let asking = vm.clone();
    let answered =
        gate::wait(py, OnInterrupt::Abandon, async move { asking.command(&command, params, timeout).await })?;
    let Some(answer) = errors::settle(py, answered, raising, |error| vm.set_last_error(error))? else {
        return Ok(None);
    };
    convert::from_json(py, &answer_json(answer)).map(Some)
}

impl MicroVMInstance {
    pub fn wrap(vm: Arc<MicroVm>, raising: bool) -> Self {
        gate::track(&vm);
        Self { vm: Owned::new("MicroVMInstance", vm), raising }
    }

    pub fn vm(&self) -> &Arc<MicroVm> {
        self.vm.peek()
    }

    /// The VM, in the process that made it.
    pub fn owned(&self, py: Python<'_>) -> PyResult<&Arc<MicroVm>> {
        self.vm.get(py)
    }

    fn raise<T>(&self, py: Python<'_>, result: crate::error::Result<T>) -> PyResult<T> {
        errors::raised(py, result, |error| self.vm().set_last_error(error))
    }

    /// Runs a change of state; `False` with the reason kept when it is not to be.
    fn change<F>(
        &self,
        py: Python<'_>,
        on_interrupt: OnInterrupt,
        change: impl FnOnce(Arc<MicroVm>) -> F,
    ) -> PyResult<bool>
    where
        F: std::future::Future<Output = crate::error::Result<()>> + Send + 'static,
    {
        let vm = self.vm.get(py)?;
        let result = gate::wait(py, on_interrupt, change(vm.clone()))?;
        Ok(errors::settle(py, result, self.raising, |error| vm.set_last_error(error))?.is_some())
    }
}

#[pymethods]
impl MicroVMInstance {
    #[new]
    #[pyo3(signature = (vm_id, backend, isolation_type, resource_limits, network_config=None, kernel_path=None, rootfs_path=None, template=None, labels=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn new(
        vm_id: &Bound<'_, PyAny>,
        backend: &Bound<'_, PyAny>,
        isolation_type: &Bound<'_, PyAny>,
        resource_limits: &Bound<'_, PyAny>,
        network_config: Option<&Bound<'_, PyAny>>,
        kernel_path: Option<&Bound<'_, PyAny>>,
        rootfs_path: Option<&Bound<'_, PyAny>>,
        template: Option<&Bound<'_, PyAny>>,
        labels: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = vm_id.py();
        let (id, isolation_type) = (convert::vm_id(vm_id)?, convert::isolation_type(isolation_type)?);
        let (backend, resource_limits) = (Some(backend), Some(resource_limits));
        let arguments =
            SpecArguments { backend, resource_limits, network_config, kernel_path, rootfs_path, template, labels };
        let spec = VmSpec::new(isolation_type, arguments.parse()?);
        logging::start(py)?;
        let settings = manager::settings(&ManagerConfig::default(), convert::guest_image(py)?);
        Ok(Self::wrap(MicroVm::new(id, spec, Arc::new(settings), None, None), false))
    }

    /// Starts the VM, as a clone of a template where there is one, and waits for its agent.
    ///
    /// Blocks for 30 to 300 ms for a clone, for seconds where the template must be made first, and at most
    /// for `start_timeout_s`; returns at once when the VM runs. Ctrl-C undoes the start. A stopped or failed
    /// VM that is started gets a new disk. A VM on a tap needs CAP_NET_ADMIN (capabilities(7)).
    ///
    /// Returns:
    ///     `True` when the VM runs. `False` after `VmStateError` or `QuotaExceededError`, and nothing has
    ///     changed; `False` after any other error, and the VM is in ERROR with nothing running.
    ///
    /// Errors:
    ///     VmStateError: The state does not allow it (`invalid_state`).
    ///     QuotaExceededError: The quota is exhausted (`quota_exceeded`).
    ///     StartError: The VM did not come up; `details` has the stage and the tails of the guest's console
    ///         and of the VMM's stderr (`start_failed`, `start_timeout`).
    ///     BackendUnavailableError: The VMM cannot run on this host (`backend_unavailable`).
    ///     IsolationUnavailableError: The host does not give what `min_isolation` or `jail="strict"` ask for
    ///         (`isolation_unavailable`).
    ///     NetworkUnavailableError: The VM cannot be connected (`network_unavailable`).
    ///     ImageError: The kernel or the image cannot be used (`image_unreadable`, `image_invalid`).
    ///     TemplateError: The VM's template cannot be used (`template_not_found`, `state_damaged`,
    ///         `state_mismatch`).
    ///     HostError: A system call failed, or a limit of this process leaves too little (`host_error`,
    ///         `limit_too_low`).
    ///
    /// Example:
    ///     >>> vm.start(), vm.get_state().name
    ///     (True, 'RUNNING')
    fn start(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Abandon, |vm| async move { vm.start().await })
    }

    /// Shuts the VM down: the guest is asked, then the VMM is told, then its process is killed.
    ///
    /// Blocks for at most 10 s; returns at once when the VM is stopped. What is on the VM's disk is lost, and
    /// so is the state of a suspended VM. The VM's quota stays reserved, except that of a suspended VM.
    ///
    /// Returns:
    ///     `True` when the VM is stopped, else `False`.
    ///
    /// Errors:
    ///     VmStateError: The VM was never started or is destroyed (`invalid_state`).
    fn stop(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.stop().await })
    }

    /// Stops the vCPUs; memory and disk stay.
    ///
    /// Blocks for milliseconds.
    ///
    /// Returns:
    ///     `True` when the VM is paused, else `False`.
    ///
    /// Errors:
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///
    /// Example:
    ///     >>> vm.pause(), vm.resume()
    ///     (True, True)
    fn pause(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.pause().await })
    }

    /// Resumes a paused VM and sets its clock, or brings a suspended one back from disk.
    ///
    /// Blocks for milliseconds for a paused VM, for the time of a start for a suspended one;
    /// `MicroVMIsolationManager.resume_vm` has the details.
    ///
    /// Returns:
    ///     `True` when the VM runs, else `False`.
    ///
    /// Errors:
    ///     VmStateError: The VM is neither paused nor suspended (`invalid_state`).
    ///     MicroVMError: Every other error of `MicroVMIsolationManager.resume_vm`.
    fn resume(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.resume().await })
    }

    /// Makes a template of the VM as it is now: memory, running programs and disk.
    ///
    /// Blocks for the time that it takes to write the memory that is in use, and at most 10 s for the guest
    /// to get ready. The VM goes on afterwards: it stands still for some milliseconds, and for as long as the
    /// copy of its disk takes where the file system cannot share it (FICLONE, ioctl_ficlone(2)). Commands and
    /// streams that are under way get their answers. A paused VM is woken for a moment.
    ///
    /// Clones begin where the VM stood, each with an identity of its own; requests that were under way are
    /// cancelled in them. Clones share all secrets that the VM's memory held: docs/templates.md.
    ///
    /// Args:
    ///     name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.
    ///
    /// Raises:
    ///     InvalidValueError: The name is malformed.
    ///     VmStateError: The VM is neither running nor paused, or it is suspended (`invalid_state`).
    ///     NotSupportedError: The backend or the jail cannot do it; only QEMU can (`not_supported`).
    ///     TemplateError: The name is taken (`template_taken`), or a file that the VM needs was replaced
    ///         since its start (`state_mismatch`).
    ///     CommandError: A program in the guest cannot be stopped (`busy`).
    ///     HostError: The state could not be written (`host_error`); nothing of the template is left.
    ///
    /// Example:
    ///     >>> vm.snapshot("logged-in")
    ///     >>> manager.delete_template("logged-in")
    ///     True
    fn snapshot(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<()> {
        let (vm, name) = (self.vm.get(py)?.clone(), convert::template("name", name)?);
        let taken = gate::wait(py, OnInterrupt::Finish, async move { vm.snapshot(&name).await })?;
        self.raise(py, taken)
    }

    /// Writes the VM's state to disk, below `cache_dir`, and ends its process.
    ///
    /// Blocks for at most 5 s while commands and streams end, then for the time of the writing. The VM is
    /// PAUSED afterwards, with `info["suspended"]` true and no `pid`; its share of the manager's quota is
    /// given back. It stays suspended when its manager stops.
    ///
    /// Returns:
    ///     `True` when the VM is suspended. `False` after an error, and the VM goes on.
    ///
    /// Errors:
    ///     VmStateError: The VM is neither running nor paused (`invalid_state`).
    ///     NotSupportedError: The backend or the jail cannot do it; only QEMU can (`not_supported`).
    ///     TemplateError: A file that the VM needs was replaced since its start (`state_mismatch`).
    ///     CommandError: Commands or streams do not end (`busy`).
    ///     HostError: The state could not be written (`host_error`).
    fn suspend(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.suspend().await })
    }

    /// Returns the VM's state.
    ///
    /// Does not block.
    fn get_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::member(py, "VMState", self.vm.get(py)?.state().as_str())
    }

    /// Sends a command to the agent in the guest and returns its answer.
    ///
    /// Blocks until the agent answers.
    ///
    /// Args:
    ///     command: The name of the command, such as `ping`, `exec` or `read_file`; docs/commands.md lists
    ///         them with their parameters and results.
    ///     params: The parameters of the command: plain JSON types.
    ///     timeout: Seconds to wait for the answer, 0 to 86400. Where left out, `command_timeout_s`, or
    ///         longer if the command's own `timeout` in `params` is.
    ///
    /// Returns:
    ///     What the guest says: `{"status": "ok", "result": ...}`, or
    ///     `{"status": "error", "error": {"code": ..., "message": ...}}`. `None` when there was no answer.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type, or `params` holds what JSON cannot.
    ///     InvalidValueError: An argument is out of range.
    ///
    /// Errors:
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///     VmDiedError: The VM died meanwhile (`vm_died`).
    ///     ChannelError: The channel failed (`channel_timeout`, `channel_closed`, `message_too_large`);
    ///         `details["sent"]` says whether the command may have run.
    ///     CommandError: The library keeps the command to itself (`reserved_action`).
    ///
    /// Example:
    ///     >>> vm.send_command("exec", {"program": "/bin/echo", "args": ["hello"]})["result"]["stdout"]
    ///     'hello\n'
    #[pyo3(signature = (command, params=None, timeout=None))]
    fn send_command<'py>(
        &self,
        py: Python<'py>,
        command: &Bound<'_, PyAny>,
        params: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        ask(py, self.vm.get(py)?, self.raising, command, params, timeout)
    }

    /// Starts a program in the guest and returns a handle to its input and output.
    ///
    /// Blocks until the program runs, at most for `command_timeout_s`.
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
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range.
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///     CommandError: The guest does not start it (`program_not_found`, `permission_denied`,
    ///         `bad_params`).
    ///     ChannelError: The guest did not answer (`channel_timeout`, `channel_closed`).
    ///
    /// Example:
    ///     >>> with vm.stream("/bin/sh", ["-c", "echo hello"]) as program:
    ///     ...     list(program), program.exit_code
    ///     ([('stdout', b'hello\n')], 0)
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
        let vm = self.vm.get(py)?.clone();
        let arguments = StreamArguments { program, args, env, cwd, stdin, pty, uid, timeout, rows, columns, on_output };
        let (params, options) = arguments.parse()?;
        let started = gate::wait(py, OnInterrupt::Abandon, async move { vm.stream(params).await })?;
        options.stream(py, self.raise(py, started)?)
    }

    /// Connects to a TCP port of the guest and returns a socket.
    ///
    /// Blocks until the guest has connected. The bytes go by the channel, so a VM without a network has this, too. The socket is
    /// one of this process alone (AF_UNIX): `http.client`, `ssl`, `select` and asyncio take it like any other. It has no timeout
    /// (`settimeout` gives it one). At most 48 connections of a VM are open at once.
    ///
    /// Args:
    ///     port: The port, 1 to 65535.
    ///     address: Where in the guest it is, as an IPv4 or IPv6 address; where left out, 127.0.0.1, and `::1` where that
    ///         refuses.
    ///     timeout: Seconds that it may take, 0 to 86400; `command_timeout_s` where left out.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range or malformed.
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///     PortRefusedError: No program of the guest listens there (`connection_refused`); it is a
    ///         `ConnectionRefusedError`, too.
    ///     CommandError: The guest cannot connect for another reason, with its own code, or its agent, that of an old
    ///         snapshot, knows no ports (`unknown_action`).
    ///     ChannelError: It took too long, also because too many connections are open (`channel_timeout`), or the channel
    ///         failed (`channel_closed`).
    ///
    /// Example:
    ///     >>> vm.send_command("exec", {"program": "httpd", "args": ["-p", "8001", "-h", "/etc"]})["status"]
    ///     'ok'
    ///     >>> with vm.connect(8001) as connection:
    ///     ...     connection.sendall(b"GET /hostname HTTP/1.0\r\n\r\n"), connection.recv(15)
    ///     (None, b'HTTP/1.1 200 OK')
    #[pyo3(signature = (port, address=None, timeout=None))]
    fn connect<'py>(
        &self,
        py: Python<'py>,
        port: &Bound<'_, PyAny>,
        address: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let vm = self.vm.get(py)?.clone();
        let ConnectArguments { port, address, timeout } = ConnectArguments::parse(port, address, timeout)?;
        let connecting = async move { connections::connect(&*vm, port, address, timeout).await };
        let connected = gate::wait(py, OnInterrupt::Abandon, connecting)?;
        ports::socket(py, self.raise(py, connected)?)
    }

    /// Has this host listen at a port, and carries the connections that come to a TCP port of the guest.
    ///
    /// Does not block. The bytes go by the channel, so a VM without a network has this, too, and no privilege is needed. The port
    /// stays until its handle is closed or the VM is destroyed; while the VM does not run, and where no program of the
    /// guest listens, connections are reset. At most 48 connections of a VM are open at once; more wait.
    ///
    /// Args:
    ///     port: The port of the guest, 1 to 65535.
    ///     host_port: The port of the host, 0 to 65535; one that is free where it is 0 or left out. Below 1024
    ///         CAP_NET_BIND_SERVICE is needed (capabilities(7)).
    ///     address: The address of the host to listen at. Every program of the host may connect to 127.0.0.1, which is taken
    ///         where it is left out; `0.0.0.0` or `::` lets other machines connect, too.
    ///     protocol: `tcp`.
    ///     guest_address: Where in the guest the port is, as for `connect`.
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range or malformed.
    ///     HostError: The host cannot listen there: the port is taken, or needs a privilege (`port_unavailable`).
    ///     VmNotFoundError: The VM is destroyed (`vm_not_found`).
    ///
    /// Example:
    ///     >>> published = vm.publish(8000)
    ///     >>> vm.ports() == [
    ///     ...     {"address": "127.0.0.1", "host_port": published.host_port, "guest_port": 8000, "protocol": "tcp", "connections": 0}
    ///     ... ]
    ///     True
    ///     >>> published.close()
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
        let (vm, publishing) = (self.vm.get(py)?, self.vm.get(py)?.clone());
        let published =
            gate::wait(py, OnInterrupt::Abandon, async move { connections::publish(&publishing, mapping) })?;
        Ok(PublishedPort::wrap(&**vm, &self.raise(py, published)?))
    }

    /// Returns what is published of the VM.
    ///
    /// Does not block.
    ///
    /// Returns:
    ///     `PortInfo` of each port, in the order of the host's addresses.
    fn ports<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::from_json(py, &self.vm.get(py)?.ports().list())
    }

    /// Writes a file of the guest from a path or an object with `read`.
    ///
    /// Blocks until the whole file is written. Holds one window (256 KiB) of it in memory. A new file takes
    /// its place when it is whole. An existing file keeps its mode and owner; a new one gets the permission
    /// bits of its source, 0644 for an object.
    ///
    /// Args:
    ///     source: A path on the host, or an object whose `read(size)` returns at most that many bytes.
    ///     guest_path: The path in the guest.
    ///     offset: Position in bytes, 0 to 2**62, from which `source` is read and the file is written in
    ///         place; what arrived is kept after a failure, and another call with the file's size resumes.
    ///         Where left out, the whole file is replaced.
    ///     mode: Permission bits of the file, 0 to 0o7777 (chmod(2)).
    ///     progress: A function that is called with the bytes sent so far, and with the size in bytes, or
    ///         `None` where that is not known.
    ///     timeout: Seconds that the guest may take nothing, 0 to 86400; `command_timeout_s` where left out.
    ///
    /// Returns:
    ///     `bytes`, how many this call sent, and `crc32`, their checksum, which both sides compared
    ///     (`zlib.crc32`).
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range.
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///     CommandError: The guest refuses the file, with the guest's own code.
    ///     ChannelError: The transfer failed (`channel_timeout`, `channel_closed`, `checksum_mismatch`).
    ///     HostError: `source` cannot be read (`host_error`).
    ///
    /// Example:
    ///     >>> vm.upload(io.BytesIO(b"hello"), "/data/hello")
    ///     {'bytes': 5, 'crc32': 907060870}
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
        transfer::upload(self.vm.get(py)?, &arguments)
    }

    /// Reads a file of the guest into a path or an object with `write`.
    ///
    /// Blocks until the whole file is read. Holds one window (256 KiB) of it in memory. A new file takes its
    /// place when it is whole. An existing file keeps its mode and owner; a new one gets the permission bits
    /// of the guest's file, less the umask.
    ///
    /// Args:
    ///     guest_path: The path in the guest.
    ///     destination: A path on the host, or an object with `write(data)`.
    ///     offset: Position in bytes, 0 to 2**62, from which the guest's file is read and the other is
    ///         written in place. Where left out, the whole file is replaced.
    ///     progress: A function that is called with the bytes received so far and the size in bytes.
    ///     max_bytes: The most bytes that are taken, 0 to 2**62; where left out, what the VM's disk, memory
    ///         and image can hold.
    ///     timeout: Seconds that the guest may send nothing, 0 to 86400; `command_timeout_s` where left out.
    ///
    /// Returns:
    ///     `bytes`, how many this call received, and `crc32`, their checksum, which both sides compared
    ///     (`zlib.crc32`).
    ///
    /// Raises:
    ///     InvalidTypeError: An argument has the wrong type.
    ///     InvalidValueError: An argument is out of range.
    ///     VmStateError: The VM does not run (`invalid_state`).
    ///     CommandError: The guest refuses the file, with the guest's own code, or it is larger than
    ///         `max_bytes` (`too_large`).
    ///     ChannelError: The transfer failed (`channel_timeout`, `channel_closed`, `checksum_mismatch`).
    ///     HostError: `destination` cannot be written (`host_error`).
    ///
    /// Example:
    ///     >>> content = io.BytesIO()
    ///     >>> received = vm.download("/etc/hostname", content)
    ///     >>> received["bytes"] == len(content.getvalue())
    ///     True
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
        transfer::download(self.vm.get(py)?, &arguments)
    }

    /// Measures the VM's health now: its process, its drives and its agent.
    ///
    /// Blocks for at most 2 s if the guest does not answer. CPU time and memory are those of the VMM's
    /// process (proc_pid_stat(5)).
    ///
    /// Example:
    ///     >>> vm.get_health_metrics().health_status
    ///     'healthy'
    fn get_health_metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vm = self.vm.get(py)?.clone();
        let health = gate::wait(py, OnInterrupt::Abandon, async move { vm.health().await })?;
        convert::model(py, "VMHealthMetrics", &info::health_json(&health))
    }

    /// Returns everything there is to know about the VM, as plain JSON types.
    ///
    /// Blocks for at most 2 s if the guest does not answer: it measures the VM's health as
    /// `get_health_metrics` does. Sizes called `mb` are MiB, `bytes` are bytes, `seconds` are seconds, and
    /// `time`, `since` and `last_health_check` are Unix seconds.
    ///
    /// Returns:
    ///     `VMInfo`. `start` says how the VM came to be and how long each stage took; `jail` and `limits` say
    ///     what confines it, how, and why a layer is missing.
    ///
    /// Example:
    ///     >>> info = vm.get_info()
    ///     >>> info["state"], info["backend"], info["isolation_grade"] in ("emulated", "hardware")
    ///     ('running', 'qemu', True)
    pub fn get_info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vm = self.vm.get(py)?.clone();
        convert::from_json(py, &gate::wait(py, OnInterrupt::Abandon, info::info(vm))?)
    }

    /// The VM's name.
    #[getter]
    fn vm_id(&self) -> &str {
        self.vm().id().as_str()
    }

    /// The VMM that was asked for; QEMU where the best one was. `get_info()["backend"]` says which one runs.
    #[getter]
    fn backend<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::member(py, "VMBackend", self.vm().spec().backend.unwrap_or(Backend::Qemu).as_str())
    }

    /// What the VM is for.
    #[getter]
    fn isolation_type<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::member(py, "IsolationType", self.vm().spec().isolation_type.as_str())
    }

    /// What the VM may have: a copy, so that changing it changes nothing.
    #[getter]
    fn resource_limits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::model(py, "VMResourceLimits", &convert::limits_json(&self.vm().spec().limits))
    }

    /// The network that was asked for: a copy. `get_info()["network_config"]` says what a running VM got.
    #[getter]
    fn network_config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::model(py, "VMNetworkConfig", &convert::network_json(&self.vm().spec().network))
    }

    /// The kernel that the VM was given; `None` for the kernel of this package.
    #[getter]
    fn kernel_path(&self) -> Option<String> {
        self.vm().spec().image.kernel_path.as_ref().map(|path| path.display().to_string())
    }

    /// The image that the VM was given; `None` for the guest of this package.
    #[getter]
    fn rootfs_path(&self) -> Option<String> {
        self.vm().spec().image.rootfs_path.as_ref().map(|path| path.display().to_string())
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
        self.vm.get(py)?.last_error().map(|error| errors::exception(py, &error)).transpose()
    }

    fn __repr__(&self) -> String {
        match self.vm.is_ours() {
            true => {
                let (vm, state) = (self.vm(), self.vm().state());
                let error = vm.last_error().map(|error| {
                    let words = error.to_string();
                    format!(", last error {}: {}", error.code(), printable(&words, REPR_BYTES))
                });
                format!("<MicroVMInstance {} {state}{}>", vm.id(), error.unwrap_or_default())
            }
            false => format!("<MicroVMInstance {} of the parent process>", self.vm().id()),
        }
    }
}
