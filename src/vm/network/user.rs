//! A VM's network in user mode: its gateway is a process of its own (`microvm-usernet`), in a jail, with no privilege.
//!
//! Architecture invariant: the gateway is as hostile as the VMM that it talks to. What it says is capped and escaped, and it
//! is waited for with a deadline; it ends with the VM's connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use microvm_jail::{Access, Resource, Rlimit, Seccomp};
use microvm_protocol::identity::GuestNetwork;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::{guest_network, host_servers, no_address, Connected, Connection, Host, HostEnd};
use crate::host::net::{self as host, Counters, Refusal};
use crate::host::process::{Exit, Jailed};
use crate::host::tail::Tail;
use crate::host::{clock, rlimit};
use crate::model::{printable, Ipv4Net, MacAddress, NetworkConfig, NetworkMode, VmId};
use crate::net::{self, Problem, Resolution, Upstream, UserNetwork, UserReport};
use crate::vmm::{JailPlan, Nic, Plug};

/// How long a gateway may take to serve; it takes milliseconds.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// And to end once it has said nothing more.
const END_DEADLINE: Duration = Duration::from_secs(1);
/// Its longest line.
const MAX_LINE: usize = 8 << 10;
/// What of its words is shown, in bytes.
const SAID: usize = 400;
/// A socket for each of its flows, and some of its own.
const OPEN_FILES: u64 = 4096;
/// With fewer there is no use in a network.
const LEAST_OPEN_FILES: u64 = 64;
/// The buffers of its connections are 44 MiB at most.
const DATA_BYTES: u64 = 96 << 20;
const STACK_BYTES: u64 = 1 << 20;
/// Its descriptors: the wire, the manager's socket, its complaints.
const TARGETS: [i32; 3] = [0, 1, 2];

/// A gateway that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Gateway {
    jailed: Jailed,
    hearing: AbortHandle,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.hearing.abort();
        self.jailed.kill();
    }
}

/// How a gateway is doing.
#[derive(Debug)]
pub struct GatewayState {
    exit: watch::Receiver<Option<Exit>>,
    moved: Arc<Moved>,
    stderr: Tail,
}

#[derive(Debug, Default)]
struct Moved {
    from_vm_bytes: AtomicU64,
    to_vm_bytes: AtomicU64,
}

impl GatewayState {
    pub fn counters(&self) -> Counters {
        Counters {
            received_bytes: self.moved.from_vm_bytes.load(Ordering::Relaxed),
            sent_bytes: self.moved.to_vm_bytes.load(Ordering::Relaxed),
        }
    }

    /// Why the VM reaches nothing, where that is the gateway's end.
    pub fn problem(&self) -> Option<Problem> {
        let exit = self.exit.borrow().clone()?;
        let said = self.stderr.text();
        let said = if said.is_empty() { said } else { format!(": {}", printable(said.trim(), SAID)) };
        let what = format!("the VM's user-mode network has ended ({exit}){said}");
        Some(Problem { what, remedy: "stop the VM and start it again".into(), is_certain: true })
    }
}

/// Connects a VM in user mode. Blocking; call on the runtime.
pub(super) fn connect(
    vm_id: &VmId,
    config: &NetworkConfig,
    bandwidth_mbps: u64,
    host: &Host<'_>,
    reason: String,
) -> Result<(Connection, Nic, GuestNetwork), Refusal> {
    if !host.can.streams_frames {
        let remedy = "take backend QEMU, or mode=\"tap\" with CAP_NET_ADMIN";
        return Err(Refusal::new("this backend's VMs have no user-mode network yet", remedy));
    }
    let hosts = host::networks();
    let taken: Vec<(String, Ipv4Net)> = hosts.iter().map(|(name, _, net)| (name.clone(), *net)).collect();
    let nets: Vec<Ipv4Net> = taken.iter().map(|(_, net)| *net).collect();
    let random = |error: crate::error::Error| Refusal::new(error.to_string(), "look at this host's /dev/urandom");
    let seed = clock::random().map(u32::from_ne_bytes).map_err(random)?;
    let addresses = net::choose(config, host.range, &nets, seed).ok_or_else(|| no_address(host.range))?;
    if let Some(reason) = net::conflict(&addresses, &taken) {
        return Err(Refusal::new(reason, "choose an ip_address and a gateway that this host has not"));
    }
    let mac = config.mac_address.map_or_else(|| clock::random().map(MacAddress::local), Ok).map_err(random)?;
    let gateway_mac = other_mac(mac).map_err(random)?;
    let is_host = |address| hosts.iter().any(|(_, host, _)| *host == address);
    let resolution = Resolution::of(config, addresses.gateway, is_host);
    let (guest_servers, resolvers): (_, Vec<IpAddr>) = match resolution {
        Resolution::Direct(servers) => (servers, Vec::new()),
        Resolution::Relayed(Upstream::Given(servers)) => (vec![addresses.gateway], servers),
        Resolution::Relayed(Upstream::Host) => (vec![addresses.gateway], host_servers()),
    };
    let network = UserNetwork {
        mac: mac.to_string(),
        address: addresses.address,
        gateway_mac: gateway_mac.to_string(),
        gateway: addresses.gateway,
        is_relayed: guest_servers == [addresses.gateway],
        resolvers,
        egress: config.egress.as_ref().map(|rules| rules.iter().map(ToString::to_string).collect()),
        bandwidth_mbps,
    };
    let (wire, gateway, state) = start(vm_id, &network, host)?;
    let connected = Connected {
        mode: NetworkMode::User,
        reason,
        tap: None,
        mac,
        addresses,
        guest_servers,
        is_relayed: network.is_relayed,
        gateway: Some(state),
    };
    let (nic, guest) = (Nic { mac: mac.to_string(), plug: Plug::Stream(Arc::new(wire)) }, guest_network(&connected));
    let wire = HostEnd::User { _gateway: gateway };
    Ok((Connection { connected: Arc::new(connected), _wire: wire }, nic, guest))
}

/// A MAC address for the other end.
fn other_mac(mac: MacAddress) -> crate::error::Result<MacAddress> {
    loop {
        let other = MacAddress::local(clock::random()?);
        if other != mac {
            return Ok(other);
        }
    }
}

/// The gateway's jail: of the VMM's kind and user, with nothing in it but the program, in the network that this process is
/// in: there its sockets go out.
fn jailed(host: &Host<'_>) -> crate::error::Result<microvm_jail::LaunchSpec> {
    let files = OPEN_FILES.min(rlimit::hard(Resource::Nofile));
    let stack = STACK_BYTES.min(rlimit::hard(Resource::Stack));
    let limits = [
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Fsize, 0),
        (Resource::Nofile, files),
        (Resource::Data, DATA_BYTES.min(rlimit::hard(Resource::Data))),
        (Resource::Stack, stack),
    ];
    let mut jail = JailPlan {
        files: Vec::new(),
        rlimits: limits.into_iter().map(|(resource, value)| Rlimit::both(resource, value)).collect(),
        // The VM's groups are removed when its VMM has ended.
        cgroup_procs: Vec::new(),
        audit: false,
        hands_tap: false,
        ..host.jail.clone()
    };
    let program = jail.show("package data", host.gateway, "/vmm/usernet", Access::Execute)?;
    let mut spec = jail.spec(vec![program.display().to_string()], Vec::new(), Seccomp::Gateway);
    spec.namespaces.net = false;
    spec.huge_pages = false;
    spec.fds = TARGETS.to_vec();
    Ok(spec)
}

/// Starts a gateway and waits until it serves; the VM's end of the wire comes with it.
fn start(vm_id: &VmId, network: &UserNetwork, host: &Host<'_>) -> Result<(OwnedFd, Gateway, GatewayState), Refusal> {
    let files = rlimit::hard(Resource::Nofile);
    if files < LEAST_OPEN_FILES {
        let reason =
            format!("the user-mode network needs {LEAST_OPEN_FILES} open files, and this process may have {files}");
        return Err(Refusal::new(reason, "raise the limit (ulimit -Hn)"));
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Refusal::new(
            format!("the user-mode network does not start: {what}: {error}"),
            "install the package again, or look at ulimit -a",
        )
    };
    let pair = || StdStream::pair().map_err(|error| failed("socketpair", &error));
    let ((vm_end, wire), (manager, gateways)) = (pair()?, pair()?);
    let (stderr, stderr_end) = Tail::pipe().map_err(|error| failed("pipe", &error))?;
    let spec = jailed(host).map_err(|error| failed("jail", &error))?;
    let fds = [wire.as_fd(), gateways.as_fd(), stderr_end.as_fd()];
    let jailed = Jailed::launch(&host.jail.launcher, &spec, &fds, Box::new(()));
    let jailed = jailed.map_err(|error| failed("jail", &error))?;
    // The gateway alone has these now: their end is its end.
    drop((wire, gateways, stderr_end));
    if let Err(error) = introduce(&manager, network) {
        return Err(failed(&why_ended(&jailed, &stderr), &error));
    }
    let nonblocking = manager.set_nonblocking(true).and_then(|()| UnixStream::from_std(manager));
    let stream = nonblocking.map_err(|error| failed("epoll", &error))?;
    let moved = Arc::<Moved>::default();
    let hearing = tokio::spawn(hear(stream, moved.clone(), vm_id.clone())).abort_handle();
    let state = GatewayState { exit: jailed.exit_receiver(), moved, stderr };
    Ok((vm_end.into(), Gateway { jailed, hearing }, state))
}

/// Tells a gateway what it is for, and waits until it serves.
fn introduce(mut manager: &StdStream, network: &UserNetwork) -> std::io::Result<()> {
    manager.set_write_timeout(Some(START_DEADLINE))?;
    manager.set_read_timeout(Some(START_DEADLINE))?;
    let mut line = serde_json::to_vec(network)?;
    line.push(b'\n');
    manager.write_all(&line)?;
    let mut answer = Vec::new();
    BufReader::with_capacity(1, manager.take(MAX_LINE as u64)).read_until(b'\n', &mut answer)?;
    match serde_json::from_slice(&answer) {
        Ok(UserReport::Ready) => Ok(()),
        _ => Err(std::io::Error::other("it does not say that it serves")),
    }
}

/// How a gateway ended that did not serve, and what it said.
fn why_ended(jailed: &Jailed, stderr: &Tail) -> String {
    let ended = async { tokio::time::timeout(END_DEADLINE, jailed.exited()).await };
    match tokio::runtime::Handle::current().block_on(ended) {
        Ok(exit) => format!("{exit} {}", printable(stderr.text().trim(), SAID)),
        Err(_) => "it says nothing".to_owned(),
    }
}

/// Hears what a gateway has to say, until it is gone.
async fn hear(mut stream: UnixStream, moved: Arc<Moved>, vm_id: VmId) {
    let mut bytes = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => bytes.extend_from_slice(buffer.get(..length).unwrap_or_default()),
        }
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = bytes.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(UserReport::Moved { from_vm_bytes, to_vm_bytes }) => {
                    moved.from_vm_bytes.store(from_vm_bytes, Ordering::Relaxed);
                    moved.to_vm_bytes.store(to_vm_bytes, Ordering::Relaxed);
                }
                Ok(UserReport::Warning(what)) => log::warn!("{vm_id}: {}", printable(&what, SAID)),
                Ok(UserReport::Ready) => {}
                Err(error) => return log::warn!("{vm_id}: its user-mode network says what is not understood: {error}"),
            }
        }
        if bytes.len() > MAX_LINE {
            return log::warn!("{vm_id}: its user-mode network says too much");
        }
    }
}
