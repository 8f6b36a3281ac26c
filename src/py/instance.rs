//! The handle of one VM.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{json, Map, Value};

use super::gate::{self, OnInterrupt, Owned};
use super::stream::ProcessStream;
use super::{convert, errors, logging, transfer};
use crate::manager;
use crate::model::{Backend, ManagerConfig, NetworkConfig, NetworkText};
use crate::net::{Problem, Segment};
use crate::vm::{network, Health, MicroVm, Spec};

/// One microVM: `start`, `stop`, `pause`, `resume`, commands and health. Usable on its own, without a manager.
#[pyclass(subclass, frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct MicroVMInstance {
    vm: Owned<MicroVm>,
    raising: bool,
}

pub fn health_json(health: &Health) -> Value {
    json!({
        "cpu_usage_percent": health.cpu_usage_percent,
        "memory_usage_mb": health.memory_usage_mb,
        "disk_io_bytes": health.disk_io_bytes,
        "network_rx_bytes": health.network_rx_bytes,
        "network_tx_bytes": health.network_tx_bytes,
        "uptime_seconds": health.uptime_seconds,
        "last_health_check": health.last_health_check,
        "health_status": health.verdict.status.as_str(),
    })
}

/// What there is to say beyond the metrics: why, and what guest and host count.
fn health_info(vm: &MicroVm, health: &Health) -> Value {
    let verdict = &health.verdict;
    let (since, history) = vm.history_json();
    json!({
        "status": verdict.status.as_str(),
        "reason": verdict.reason.as_str(),
        "detail": verdict.detail,
        "since": since,
        "heartbeats_missed": verdict.missed,
        "round_trip_seconds": health.round_trip_s,
        "clock_offset_seconds": health.clock_offset_s,
        "guest": health.guest.as_ref().map(crate::model::GuestUse::to_json),
        "host": {
            "cpu_seconds": health.cpu_s,
            "resident_memory_mb": health.memory_usage_mb,
            "group_memory_bytes": health.group.memory_bytes,
            "oom_kills": health.group.oom_kills,
            "throttled_seconds": health.group.throttled_us.map(|us| us as f64 / 1e6),
            "memory_pressure_percent": health.group.memory_pressure_centi.map(|centi| centi as f64 / 100.0),
        },
        "history": history,
    })
}

/// What the VM got while it is connected, else what it asked for.
fn network_info(network: &NetworkConfig, segment: Option<&Segment>, problems: &[Problem]) -> Value {
    let network = NetworkText::from(network.clone());
    let mut info = json!({
        "isolated": network.isolated_network,
        "tap_device": network.tap_device,
        "ip_address": network.ip_address,
        "mac_address": network.mac_address,
        "gateway": network.gateway,
        "dns_servers": network.dns_servers,
        "egress": network.egress,
        "ipv6": network.ipv6,
        "problems": problems.iter().map(|Problem { what, remedy, .. }| json!({"what": what, "remedy": remedy})).collect::<Vec<_>>(),
    });
    if let Some(segment) = segment {
        let addresses = &segment.addresses;
        info["tap_device"] = json!(segment.tap.name);
        info["ip_address"] = json!(addresses.address);
        info["prefix_length"] = json!(addresses.prefix);
        info["mac_address"] = json!(segment.mac.to_string());
        info["gateway"] = json!(addresses.gateway);
        info["dns_servers"] = json!(segment.guest_servers());
    }
    info
}

fn start_json(origin: &str, stages: &[(&'static str, Duration)]) -> Value {
    let stages: Map<String, Value> =
        stages.iter().map(|(stage, length)| ((*stage).to_owned(), json!(length.as_secs_f64()))).collect();
    json!({"origin": origin, "stages_seconds": stages})
}

/// Everything there is to know about a VM, as plain data.
pub async fn info(vm: Arc<MicroVm>) -> Value {
    let health = vm.health().await;
    let (spec, facts) = (vm.spec(), vm.facts());
    let segment = facts.segment.as_deref();
    let problems = match facts.segment.clone() {
        None => Vec::new(),
        Some(segment) => {
            let looked = tokio::task::spawn_blocking(move || network::problems_of(&segment)).await;
            looked.unwrap_or_else(|error| {
                log::warn!("{}: its host's network was not looked at: {error}", spec.vm_id);
                Vec::new()
            })
        }
    };
    let mut metrics = health_json(&health);
    metrics["status"] = json!(health.verdict.status.as_str());
    metrics["cpu_usage"] = json!(health.cpu_usage_percent);
    json!({
        "vm_id": spec.vm_id.as_str(),
        "backend": facts.backend.unwrap_or(Backend::Qemu).as_str(),
        "backend_reason": facts.backend_reason,
        "isolation_type": spec.isolation_type.as_str(),
        "isolation_grade": facts.grade.map(|grade| grade.as_str()),
        "accelerator": facts.accelerator,
        "start": facts.origin.map(|origin| start_json(origin, &facts.stages)),
        "state": vm.state().as_str(),
        "suspended": vm.is_suspended(),
        "template": spec.template.as_ref().map(|name| name.as_str()),
        "pid": facts.pid,
        "socket_path": facts.socket,
        "kernel_path": spec.kernel_path,
        "rootfs_path": spec.rootfs_path,
        "resource_limits": convert::limits_json(&spec.limits),
        "jail": facts.jail,
        "limits": facts.limits,
        "network_config": network_info(&spec.network, segment, &problems),
        "health_metrics": metrics,
        "health": health_info(&vm, &health),
        "last_error": vm.last_error().map(|error| json!({"code": error.code(), "message": error.to_string()})),
    })
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
    let command = convert::text("command", command)?;
    let params = match params {
        Some(params) => Value::Object(convert::object("params", params)?),
        None => Value::Null,
    };
    let timeout: Option<Duration> = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
    let asking = vm.clone();
    let answered =
        gate::wait(py, OnInterrupt::Abandon, async move { asking.command(&command, params, timeout).await })?;
    let Some(answer) = errors::settle(py, answered, raising, |error| vm.set_last_error(error))? else {
        return Ok(None);
    };
    let answer = serde_json::to_value(answer).unwrap_or(Value::Null);
    convert::from_json(py, &answer).map(Some)
}

impl MicroVMInstance {
    pub fn wrap(vm: Arc<MicroVm>, raising: bool) -> Self {
        gate::track(&vm);
        Self { vm: Owned::new("MicroVMInstance", vm), raising }
    }

    pub fn vm(&self) -> &Arc<MicroVm> {
        self.vm.peek()
    }

    /// What the newer methods do with a failure: they raise it. It is kept, too.
    fn raise<T>(&self, py: Python<'_>, result: crate::error::Result<T>) -> PyResult<T> {
        result.map_err(|error| {
            let raised = errors::raise(py, &error);
            self.vm().set_last_error(error);
            raised
        })
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
    #[pyo3(signature = (vm_id, backend, isolation_type, resource_limits, network_config=None, kernel_path=None, rootfs_path=None, template=None))]
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
    ) -> PyResult<Self> {
        let py = vm_id.py();
        let spec = Spec {
            vm_id: convert::vm_id(vm_id)?,
            backend: Some(convert::backend(backend)?),
            isolation_type: convert::isolation_type(isolation_type)?,
            limits: convert::limits(resource_limits)?,
            network: network_config.map(convert::network).transpose()?.unwrap_or_default(),
            kernel_path: convert::optional_absolute("kernel_path", kernel_path)?,
            rootfs_path: convert::optional_absolute("rootfs_path", rootfs_path)?,
            template: convert::optional_template("template", template)?,
        };
        logging::start(py)?;
        let settings = manager::settings(&ManagerConfig::default(), convert::guest_image(py)?);
        Ok(Self::wrap(MicroVm::new(spec, Arc::new(settings), None, None), false))
    }

    /// Boots the VM, or clones a template, and waits for its agent; `True` at once when it runs.
    ///
    /// Blocks for 30 to 300 ms as a clone, for seconds where there is no template yet, at most for `start_timeout_s`.
    /// Ctrl-C undoes it. Starting a stopped or failed VM gives it a new disk. A connected VM needs CAP_NET_ADMIN.
    ///
    /// Returns:
    ///     `False` with `last_error`: the state does not allow it (`invalid_state`) or quota is exhausted (`quota_exceeded`), and
    ///     nothing has changed; or it did not come up (`start_failed`, `start_timeout`, `backend_unavailable`,
    ///     `isolation_unavailable`, `network_unavailable`, `image_invalid`, ...), and it is in ERROR, with nothing running.
    fn start(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Abandon, |vm| async move { vm.start().await })
    }

    /// Shuts the VM down: the guest is asked, then the VMM told, then killed; `True` at once when it is stopped.
    ///
    /// Blocks for at most 10 s. What is on its disk is gone; a suspended VM's state is thrown away. Its quota stays
    /// reserved, but for a VM that was suspended. `False` with `last_error` when it was never started or is destroyed (`invalid_state`).
    fn stop(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.stop().await })
    }

    /// Stops the vCPUs; memory and disk stay. `False` with `last_error` unless it runs (`invalid_state`).
    fn pause(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.pause().await })
    }

    /// Lets a paused VM go on and sets its clock, or brings a suspended one back; see `MicroVMIsolationManager.resume_vm`.
    fn resume(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.resume().await })
    }

    /// Makes a template of the VM as it is now: memory, running programs, disk.
    ///
    /// The VM goes on: it stands still for some milliseconds, and for as long as what is on its disk takes to be copied
    /// where the file system cannot share it; commands and streams that are under way get their answers. A paused VM is
    /// woken for a moment. Clones begin where the VM stood, each with an identity of its own; requests that were under
    /// way are cancelled in them. They share all that the VM's memory held: docs/templates.md says what that means.
    ///
    /// Args:
    ///     name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.
    ///
    /// Raises:
    ///     InvalidValueError: The name is malformed.
    ///     VmStateError: The VM is neither running nor paused, or it is suspended.
    ///     TemplateError: The name is taken (`template_taken`).
    ///     CommandError: A program in the guest cannot be stopped (`busy`); the VM goes on.
    ///     HostError: The state could not be written; the VM goes on, and nothing of the template is left.
    fn snapshot(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<()> {
        let (vm, name) = (self.vm.get(py)?.clone(), convert::template("name", name)?);
        let taken = gate::wait(py, OnInterrupt::Finish, async move { vm.snapshot(&name).await })?;
        self.raise(py, taken)
    }

    /// Writes the VM's state to disk, below `cache_dir`, and ends its process.
    ///
    /// The VM is PAUSED then, with `info["suspended"]` true and `pid` `None`; what it had reserved of the manager's
    /// quota is given back. It stays suspended when its manager stops. Waits up to 5 s for commands and streams to end.
    ///
    /// Returns:
    ///     `False` with `last_error` when it is neither running nor paused (`invalid_state`), commands or streams do not
    ///     end (`busy`), or the state could not be written (`host_error`); the VM goes on then.
    fn suspend(&self, py: Python<'_>) -> PyResult<bool> {
        self.change(py, OnInterrupt::Finish, |vm| async move { vm.suspend().await })
    }

    /// Where the VM is in its life. Does not block.
    fn get_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::member(py, "VMState", self.vm.get(py)?.state().as_str())
    }

    /// Asks the agent in the guest; blocks until it answers.
    ///
    /// Args:
    ///     command: Such as `ping`, `exec`, `read_file`; docs/channel.md lists them.
    ///     params: The command's own; plain JSON types, and bytes for data.
    ///     timeout: Seconds to wait, up to 86400; `command_timeout_s` where left out, or what `params` allows a program.
    ///
    /// Returns:
    ///     `{"status": "ok", "result": ...}` or `{"status": "error", "error": {"code", "message", ...}}`, as the guest says; `None`
    ///     with `last_error` when there was no answer: the VM does not run (`invalid_state`), died (`vm_died`), or the channel
    ///     failed (`channel_timeout`, `channel_closed`; `details["sent"]` says whether it may have been done).
    ///
    /// Raises:
    ///     TypeError, ValueError: An argument is none that can be sent.
    ///
    /// Example:
    ///     >>> vm.send_command("exec", {"program": "/bin/echo", "args": ["hello"]})["result"]["stdout"]  # doctest: +SKIP
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

    /// Runs a program live; see `ProcessStream`. `timeout` is how long it may run, seconds. Raises when it does not start,
    /// or when the guest does not begin within `command_timeout_s`.
    #[pyo3(signature = (program, args=None, env=None, cwd=None, stdin=None, pty=false, uid=None, timeout=None, rows=None, columns=None, on_output=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn stream(
        &self,
        py: Python<'_>,
        program: &Bound<'_, PyAny>,
        args: Option<&Bound<'_, PyAny>>,
        env: Option<&Bound<'_, PyAny>>,
        cwd: Option<&Bound<'_, PyAny>>,
        stdin: Option<&Bound<'_, PyAny>>,
        pty: bool,
        uid: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        rows: Option<&Bound<'_, PyAny>>,
        columns: Option<&Bound<'_, PyAny>>,
        on_output: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<ProcessStream> {
        let vm = self.vm.get(py)?;
        let mut params = Map::new();
        params.insert("program".into(), convert::text("program", program)?.into());
        params.insert("pty".into(), pty.into());
        for (field, value) in [("args", args), ("env", env)] {
            if let Some(value) = value {
                params.insert(field.into(), convert::json(field, value)?);
            }
        }
        if let Some(cwd) = cwd {
            params.insert("cwd".into(), convert::text("cwd", cwd)?.into());
        }
        for (field, value, least, most) in
            // The last uid is (uid_t)-1: "no user" to every system call.
            [
                ("uid", uid, 0, u64::from(u32::MAX) - 1),
                ("rows", rows, 1, 65_535),
                ("columns", columns, 1, 65_535),
            ]
        {
            if let Some(value) = value {
                params.insert(field.into(), convert::whole_in(field, value, least, most)?.into());
            }
        }
        if let Some(timeout) = timeout {
            params.insert("timeout".into(), convert::seconds("timeout", timeout)?.as_secs_f64().into());
        }
        let stdin = stdin.map(|stdin| convert::bytes("stdin", stdin)).transpose()?;
        let on_output = convert::optional_callable("on_output", on_output)?.map(|call| call.clone().unbind());
        let starting = vm.clone();
        let started =
            gate::wait(py, OnInterrupt::Abandon, async move { starting.stream(Value::Object(params)).await })?;
        let stream = ProcessStream::new(self.raise(py, started)?, pty, on_output);
        if let Some(stdin) = stdin {
            stream.give(py, stdin)?;
        }
        Ok(stream)
    }

    /// Writes a file of the guest from a path or an object with `read`. An existing file keeps its mode and owner; a new one
    /// gets the source's permission bits (0644 for an object); `mode` sets others. Raises when it fails, or when the guest
    /// takes nothing for `timeout` seconds (by default `command_timeout_s`).
    #[pyo3(signature = (source, guest_path, offset=None, mode=None, progress=None, timeout=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn upload<'py>(
        &self,
        py: Python<'py>,
        source: &Bound<'py, PyAny>,
        guest_path: &Bound<'py, PyAny>,
        offset: Option<&Bound<'py, PyAny>>,
        mode: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
        timeout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let stall: Option<Duration> = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        let guest_path = convert::text("guest_path", guest_path)?;
        let offset = offset.map(|offset| convert::whole_in("offset", offset, 0, 1 << 62)).transpose()?;
        let mode = mode.map(|mode| convert::whole_in("mode", mode, 0, 0o7777)).transpose()?.map(|mode| mode as u32);
        let progress = convert::optional_callable("progress", progress)?;
        transfer::upload(self.vm.get(py)?, source, guest_path, offset, mode, progress, stall)
    }

    /// Reads a file of the guest into a path or an object with `write`. An existing file keeps its mode and owner; a new one
    /// gets the guest file's permission bits, less the umask. Raises when it fails, when the guest sends nothing for `timeout`
    /// seconds (by default `command_timeout_s`), or more than `max_bytes` (by default, what the VM's disk, memory and image
    /// can hold).
    #[pyo3(signature = (guest_path, destination, offset=None, progress=None, max_bytes=None, timeout=None))]
    #[expect(clippy::too_many_arguments, reason = "the public signature")]
    fn download<'py>(
        &self,
        py: Python<'py>,
        guest_path: &Bound<'py, PyAny>,
        destination: &Bound<'py, PyAny>,
        offset: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
        max_bytes: Option<&Bound<'py, PyAny>>,
        timeout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let stall: Option<Duration> = timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?;
        let max_bytes = max_bytes.map(|most| convert::whole_in("max_bytes", most, 0, 1 << 62)).transpose()?;
        let guest_path = convert::text("guest_path", guest_path)?;
        let offset = offset.map(|offset| convert::whole_in("offset", offset, 0, 1 << 62)).transpose()?;
        let progress = convert::optional_callable("progress", progress)?;
        transfer::download(self.vm.get(py)?, guest_path, destination, offset, progress, max_bytes, stall)
    }

    /// Looks at the VM now: its process, its drives and its agent. Blocks for at most 2 s where the guest does not answer.
    fn get_health_metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vm = self.vm.get(py)?.clone();
        let health = gate::wait(py, OnInterrupt::Abandon, async move { vm.health().await })?;
        convert::model(py, "VMHealthMetrics", &health_json(&health))
    }

    /// Everything there is to know about the VM, as plain JSON types; looks at it as `get_health_metrics` does.
    ///
    /// `vm_id`, `backend`, `isolation_type`, `state`, `suspended`, `pid`, `start` (how it came to be, and how long each stage took),
    /// `resource_limits`, `network_config`, `jail` and `limits` (what confines it, and what could not be had), `health_metrics`,
    /// `health`, `socket_path`, `last_error`, ...
    pub fn get_info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let vm = self.vm.get(py)?.clone();
        convert::from_json(py, &gate::wait(py, OnInterrupt::Abandon, info(vm))?)
    }

    /// The VM's name.
    #[getter]
    fn vm_id(&self) -> &str {
        self.vm().id().as_str()
    }

    /// The VMM that was asked for; QEMU where the best was. `get_info()["backend"]` says which one runs.
    #[getter]
    fn backend<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::member(py, "VMBackend", self.vm().spec().backend.unwrap_or(Backend::Qemu).as_str())
    }

    /// What the VM is for.
    #[getter]
    fn isolation_type<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::member(py, "IsolationType", self.vm().spec().isolation_type.as_str())
    }

    /// What the VM may have: a copy, changing it changes nothing.
    #[getter]
    fn resource_limits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::model(py, "VMResourceLimits", &convert::limits_json(&self.vm().spec().limits))
    }

    /// The network that was asked for: a copy. `get_info()["network_config"]` says what a running VM got.
    #[getter]
    fn network_config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        convert::model(py, "VMNetworkConfig", &convert::network_json(&self.vm().spec().network))
    }

    /// The kernel of the VM's own; `None`: the one that comes with the package.
    #[getter]
    fn kernel_path(&self) -> Option<String> {
        self.vm().spec().kernel_path.as_ref().map(|path| path.display().to_string())
    }

    /// The image of the VM's own; `None`: the guest that comes with the package.
    #[getter]
    fn rootfs_path(&self) -> Option<String> {
        self.vm().spec().rootfs_path.as_ref().map(|path| path.display().to_string())
    }

    /// The package's logger, `thirstys_waterfall.security.microvm_isolation`; it has no handlers of its own.
    #[getter]
    fn logger<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        logging::logger(py)
    }

    /// The reason of the last failure, with a stable `code`; `None` when there was none. A success does not clear it.
    #[getter]
    fn last_error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.vm.get(py)?.last_error().map(|error| errors::exception(py, &error)).transpose()
    }

    fn __repr__(&self) -> String {
        match self.vm.is_ours() {
            true => format!("<MicroVMInstance {} {}>", self.vm().id(), self.vm().state()),
            false => format!("<MicroVMInstance {} of the parent process>", self.vm().id()),
        }
    }
}
