//! Ports of a VM: sockets of this process that lead into its guest, and the handles of those that were published.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert;
use super::gate::Owned;
use crate::vm::ports::{Mapping, Ports, PublishedPort as Published};
use crate::vm::Machine;

const HIGHEST: u64 = 65_535;

/// The arguments of `connect`.
#[derive(Clone, Copy)]
pub struct ConnectArguments {
    pub port: u16,
    pub address: Option<IpAddr>,
    pub timeout: Option<Duration>,
}

impl ConnectArguments {
    pub fn parse(
        port: &Bound<'_, PyAny>,
        address: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self {
            port: convert::whole_in("port", port, 1, HIGHEST)? as u16,
            address: address.map(|address| convert::ip_address("address", address)).transpose()?,
            timeout: timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()?,
        })
    }
}

/// The arguments of `publish`.
pub fn mapping(
    port: &Bound<'_, PyAny>,
    host_port: Option<&Bound<'_, PyAny>>,
    address: Option<&Bound<'_, PyAny>>,
    protocol: Option<&Bound<'_, PyAny>>,
    guest_address: Option<&Bound<'_, PyAny>>,
) -> PyResult<Mapping> {
    let guest_port = convert::whole_in("port", port, 1, HIGHEST)? as u16;
    let host_port = host_port.map_or(Ok(0), |port| convert::whole_in("host_port", port, 0, HIGHEST))? as u16;
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let host = address.map_or(Ok(loopback), |address| convert::ip_address("address", address))?;
    if let Some(protocol) = protocol {
        convert::one_of("protocol", protocol, &["tcp"])?;
    }
    let guest_address = guest_address.map(|address| convert::ip_address("guest_address", address)).transpose()?;
    Ok(Mapping { guest_port, guest_address, host: SocketAddr::new(host, host_port) })
}

/// Python's socket of one end of a connection.
pub fn socket(py: Python<'_>, end: OwnedFd) -> PyResult<Bound<'_, PyAny>> {
    let options = PyDict::new(py);
    options.set_item("fileno", end.into_raw_fd())?;
    py.import("socket")?.getattr("socket")?.call((), Some(&options))
}

/// What the handle keeps: the VM keeps the port.
struct Handle {
    ports: Weak<Ports>,
    port: Weak<Published>,
}

/// A port of this host that leads to one of a guest, as `publish` makes it.
///
/// Leaving the `with` block closes it; dropping the object does not: the port stays for as long as its VM. It stays while the VM
/// is paused, suspended or stopped, and refuses connections meanwhile. Properties do not block.
///
/// Example:
///     >>> with vm.publish(8000) as published:
///     ...     published.address, published.guest_port, published.protocol
///     ('127.0.0.1', 8000, 'tcp')
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation")]
pub struct PublishedPort {
    handle: Owned<Handle>,
    mapping: Mapping,
}

impl PublishedPort {
    pub fn wrap(machine: &impl Machine, port: &Arc<Published>) -> Self {
        let handle = Handle { ports: Arc::downgrade(machine.ports()), port: Arc::downgrade(port) };
        Self { handle: Owned::new("PublishedPort", Arc::new(handle)), mapping: port.mapping() }
    }
}

#[pymethods]
impl PublishedPort {
    /// Has the host listen no more, and breaks the connections that came by this port.
    ///
    /// Does not block. May be called twice.
    ///
    /// Raises:
    ///     ForkedProcessError: The calling process is a forked child.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let handle = self.handle.get(py)?;
        if let (Some(ports), Some(port)) = (handle.ports.upgrade(), handle.port.upgrade()) {
            ports.unpublish(&port);
        }
        Ok(())
    }

    /// The port of the host.
    #[getter]
    fn host_port(&self) -> u16 {
        self.mapping.host.port()
    }

    /// The address of the host that it listens at.
    #[getter]
    fn address(&self) -> String {
        self.mapping.host.ip().to_string()
    }

    /// The port of the guest.
    #[getter]
    fn guest_port(&self) -> u16 {
        self.mapping.guest_port
    }

    /// `tcp`.
    #[getter]
    fn protocol(&self) -> &'static str {
        "tcp"
    }

    fn __repr__(&self) -> String {
        format!("<PublishedPort {} to port {} of the guest>", self.mapping.host, self.mapping.guest_port)
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
        if self.handle.is_ours() {
            self.close(py)?;
        }
        Ok(false)
    }
}
