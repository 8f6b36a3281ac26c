//! Connections to servers in a guest: by a socket of this process, and by those that this host listens at.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};
use std::time::Duration;

use microvm_protocol::message::CONNECT;
use nix::errno::Errno;
use serde_json::json;
use tokio::sync::{watch, OwnedSemaphorePermit};
use tokio::task::JoinSet;

use super::ports::{Counted, Mapping, PublishedPort, MAX_CONNECTIONS};
use super::streams::Machine;
use crate::channel::PortConnection;
use crate::error::{Cause, Error, Result};
use crate::host::stream_socket::{Listener, StreamSocket};

/// How long a listener rests that could not accept, as when this process has no descriptor left.
const REST: Duration = Duration::from_millis(100);

/// Connects to a port of the guest, within `timeout` or the time of commands. Returns a blocking socket of this process.
///
/// # Errors
/// [`Machine::open`]'s, [`Error::Guest`] where the guest cannot connect, [`Error::ChannelTimeout`] also while too many
/// connections are open.
pub async fn connect<M: Machine>(
    machine: &M,
    port: u16,
    address: Option<IpAddr>,
    timeout: Option<Duration>,
) -> Result<OwnedFd> {
    let limit = timeout.unwrap_or(machine.command_timeout());
    let until = tokio::time::Instant::now() + limit;
    let (ports, vm_id) = (machine.ports(), machine.id().to_string());
    let late = |what: &str, sent| {
        let (vm_id, what) = (vm_id.clone(), format!("connect to port {port}{what}"));
        Error::ChannelTimeout { vm_id, what, limit_s: limit.as_secs_f64(), sent }
    };
    let place = within(until, ports.places.clone().acquire_owned()).await;
    let place = place.ok_or_else(|| late(&format!(" ({MAX_CONNECTIONS} connections are open)"), false))?;
    let place = place.map_err(|error| Error::host("connect", &vm_id, error))?;
    let opened = within(until, open(machine, port, address)).await.ok_or_else(|| late("", false))?;
    let connection = opened?;
    connection.made(until.saturating_duration_since(tokio::time::Instant::now())).await?;
    let (ours, theirs) = StreamSocket::pair().map_err(|error| Error::host("socketpair", "a connection", error))?;
    let breaks = ports.breaks.subscribe();
    tokio::spawn(async move { carry(vm_id, port, connection, ours, breaks, place).await });
    Ok(theirs)
}

async fn within<T>(until: tokio::time::Instant, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout_at(until, work).await.ok()
}

async fn open<M: Machine>(machine: &M, port: u16, address: Option<IpAddr>) -> Result<PortConnection> {
    let mut params = json!({"port": port});
    if let Some(address) = address {
        params["address"] = json!(address);
    }
    let (_, stream) = machine.open("connect to a port of", CONNECT, params).await?;
    Ok(PortConnection::new(stream))
}

/// Carries a connection to its end. The end of [`Ports`] breaks it.
async fn carry(
    vm_id: String,
    port: u16,
    connection: PortConnection,
    local: StreamSocket,
    mut breaks: watch::Receiver<()>,
    _place: OwnedSemaphorePermit,
) {
    let ended = tokio::select! {
        ended = connection.carry(local) => ended,
        _ = breaks.changed() => return,
    };
    if let Err(error) = ended {
        log::debug!("{vm_id}: a connection to port {port} broke: {error}");
    }
}

/// Has this host listen, and carries what comes to the guest. Needs the runtime.
///
/// # Errors
/// [`Error::PortUnavailable`]; [`Error::VmNotFound`] when the VM is gone.
pub fn publish<M: Machine + 'static>(machine: &Arc<M>, mut mapping: Mapping) -> Result<Arc<PublishedPort>> {
    let vm_id = machine.id().to_string();
    let wanted = mapping.host;
    let unavailable = |error: std::io::Error| unavailable(wanted, error);
    machine.ports().publish(&vm_id, || {
        let listener = Arc::new(Listener::bind(mapping.host).map_err(unavailable)?);
        mapping.host = listener.address().map_err(unavailable)?;
        let connections = Arc::new(AtomicUsize::new(0));
        let accepting = accept(Arc::downgrade(machine), vm_id.clone(), listener.clone(), mapping, connections.clone());
        let accepting = tokio::spawn(accepting).abort_handle();
        Ok(PublishedPort::new(mapping, connections, listener, accepting))
    })
}

fn unavailable(address: SocketAddr, error: std::io::Error) -> Error {
    let source = Cause::from(error);
    let remedy = match source.errno() {
        Some(Errno::EADDRINUSE) => "another program listens there: choose another host_port, or 0 for one that is free",
        Some(Errno::EACCES) => {
            "ports below net.ipv4.ip_unprivileged_port_start (1024) need CAP_NET_BIND_SERVICE: choose a higher host_port, or 0 \
             for one that is free"
        }
        Some(Errno::EADDRNOTAVAIL) => "no interface of this host has that address: `ip address` lists those there are",
        _ => "choose another host_port or address",
    };
    Error::PortUnavailable { address, source, remedy }
}

/// Accepts for as long as the VM is there. Dropping it breaks the connections.
async fn accept<M: Machine + 'static>(
    machine: Weak<M>,
    vm_id: String,
    listener: Arc<Listener>,
    mapping: Mapping,
    connections: Arc<AtomicUsize>,
) {
    let Some(places) = machine.upgrade().map(|machine| machine.ports().places.clone()) else { return };
    let mut tasks = JoinSet::new();
    loop {
        let local = match listener.accept().await {
            Ok(local) => local,
            Err(error) => {
                log::debug!("{vm_id}: {} accepts nothing: {error}", mapping.host);
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        // Others wait in the kernel meanwhile.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        while tasks.try_join_next().is_some() {}
        let Some(machine) = machine.upgrade() else { return };
        let (counted, vm_id) = (Counted::new(&connections), vm_id.clone());
        tasks.spawn(async move {
            let _counted = counted;
            let breaks = machine.ports().breaks.subscribe();
            match open(&*machine, mapping.guest_port, mapping.guest_address).await {
                Ok(connection) => {
                    drop(machine);
                    carry(vm_id, mapping.guest_port, connection, local, breaks, place).await;
                }
                Err(error) => log::debug!("{vm_id}: a connection to port {} was refused: {error}", mapping.guest_port),
            }
        });
    }
}
