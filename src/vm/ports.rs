//! Ports of a VM: connections to servers in its guest, and sockets of this host that lead to them.
//!
//! A published port stays while its VM is paused, suspended or stopped; a connection that comes meanwhile is refused. It ends with
//! its handle, with the VM, and with this process.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use serde_json::{json, Value};
use tokio::sync::{watch, Semaphore};
use tokio::task::AbortHandle;

use crate::error::{Error, Result};
use crate::host::stream_socket::Listener;
use crate::mutex::Mutex;

/// Connections of one VM at once, of its 64 streams: programs and files keep the rest.
pub const MAX_CONNECTIONS: usize = 48;

/// What is published where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    pub guest_port: u16,
    /// Where in the guest; `None`: its loopback.
    pub guest_address: Option<IpAddr>,
    /// On this host; port 0 is one that is free.
    pub host: SocketAddr,
}

/// The ports of one VM.
pub struct Ports {
    pub(super) places: Arc<Semaphore>,
    published: Mutex<Published>,
    /// A change breaks all connections.
    pub(super) breaks: watch::Sender<()>,
}

#[derive(Default)]
struct Published {
    ports: Vec<Arc<PublishedPort>>,
    /// The VM is gone.
    has_ended: bool,
}

impl Default for Ports {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Self { places, published: Mutex::default(), breaks: watch::Sender::new(()) }
    }
}

impl Ports {
    /// What is published, in the order of the host's addresses.
    #[must_use]
    pub fn list(&self) -> Value {
        let mut ports = self.published.lock().ports.clone();
        ports.sort_by_key(|port| port.mapping.host);
        ports.iter().map(|port| port.describe()).collect()
    }

    /// Publishes what `begin` makes, unless the VM is gone.
    pub(super) fn publish(
        &self,
        vm_id: &str,
        begin: impl FnOnce() -> Result<PublishedPort>,
    ) -> Result<Arc<PublishedPort>> {
        let mut published = self.published.lock();
        if published.has_ended {
            return Err(Error::VmNotFound { vm_id: vm_id.to_owned() });
        }
        let port = Arc::new(begin()?);
        published.ports.push(port.clone());
        Ok(port)
    }

    /// Ends one; nothing when it has ended.
    pub fn unpublish(&self, port: &Arc<PublishedPort>) {
        self.published.lock().ports.retain(|one| !Arc::ptr_eq(one, port));
        port.end();
    }

    /// Breaks all connections; what is published stays.
    pub(super) fn break_connections(&self) {
        self.breaks.send_replace(());
    }

    /// Ends all of it for good.
    pub(super) fn end(&self) {
        let ports = {
            let mut published = self.published.lock();
            published.has_ended = true;
            std::mem::take(&mut published.ports)
        };
        ports.iter().for_each(|port| port.end());
        self.break_connections();
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        self.end();
    }
}

/// A port of this host that leads to one of a guest.
pub struct PublishedPort {
    mapping: Mapping,
    connections: Arc<AtomicUsize>,
    listener: Arc<Listener>,
    accepting: AbortHandle,
}

impl Drop for PublishedPort {
    fn drop(&mut self) {
        self.end();
    }
}

impl PublishedPort {
    pub(super) fn new(
        mapping: Mapping,
        connections: Arc<AtomicUsize>,
        listener: Arc<Listener>,
        accepting: AbortHandle,
    ) -> Self {
        Self { mapping, connections, listener, accepting }
    }

    /// With the host's port as it is.
    #[must_use]
    pub fn mapping(&self) -> Mapping {
        self.mapping
    }

    /// Its connections break, too.
    fn end(&self) {
        self.listener.stop();
        self.accepting.abort();
    }

    fn describe(&self) -> Value {
        let Mapping { guest_port, host, .. } = self.mapping;
        json!({
            "guest_port": guest_port,
            "host_port": host.port(),
            "address": host.ip().to_string(),
            "protocol": "tcp",
            "connections": self.connections.load(Ordering::Relaxed),
        })
    }
}

/// A connection that is counted for as long as it is carried.
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
