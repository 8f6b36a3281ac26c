//! From a network configuration to a VM that is connected, and back.
//!
//! Architecture invariant: [`crate::net`] says what is to be done, [`crate::host::net`] does it; here is the order. A
//! VM network is let in by name before its tap is up, and its tap is down before its rules go: at no time is there traffic
//! without rules.

mod relay;
mod sweep;
mod user;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::identity::GuestNetwork;
use nix::errno::Errno;

use crate::error::{Cause, Error, Result};
use crate::host::fork::PerProcess;
use crate::host::net::{self as host, Counters, Refusal, Step, Table, Tap, Tool, Undo};
use crate::host::{clock, kernel, privileges};
use crate::model::{Ipv4Net, MacAddress, NetworkConfig, NetworkMode, VmId};
use crate::mutex::Mutex;
use crate::net::{self, Addresses, Before, HostNetwork, Interface, Problem, Resolution, Rules, VmNetwork};
use crate::vmm::{Capabilities, JailPlan, Nic, Plug, Wire};
use relay::Relay;
use user::{Gateway, GatewayState};

pub use sweep::sweep;

/// How often other addresses are tried when someone else takes those chosen at the same time.
const TRIES: u32 = 8;

/// A look at the host's rules is good for as many times as long as it took: it takes milliseconds, but where others have
/// thousands of rules a second.
const REUSE: u32 = 20;
/// How old a look at the host's rules may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    Now,
    Recent,
}

/// When the firewall was last read, how long that took, and what was found.
type FirewallSample = (Instant, Duration, Option<net::Firewall>);
static SEEN: PerProcess<Mutex<Option<FirewallSample>>> = PerProcess::new();

/// What a connected VM got.
#[derive(Debug)]
pub struct Connected {
    /// Tap or user.
    pub mode: NetworkMode,
    /// Why it is that one.
    pub reason: String,
    pub tap: Option<String>,
    pub mac: MacAddress,
    pub addresses: Addresses,
    /// The servers that the guest's `resolv.conf` names.
    pub guest_servers: Vec<Ipv4Addr>,
    is_relayed: bool,
    gateway: Option<GatewayState>,
}

impl Connected {
    /// How it ended.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        self.gateway.as_ref().and_then(GatewayState::problem).map(|problem| problem.what)
    }
}

/// A connected VM's network. Dropping it disconnects the VM and leaves no trace; it blocks for some milliseconds.
#[derive(Debug)]
pub struct Connection {
    connected: Arc<Connected>,
    _wire: HostEnd,
}

/// The host's end of a VM's wire.
#[derive(Debug)]
enum HostEnd {
    Tap { _relay: Option<Relay>, _undo: Undo },
    User { _gateway: Gateway },
}

impl Connection {
    #[must_use]
    pub fn connected(&self) -> &Arc<Connected> {
        &self.connected
    }

    /// What the wire moved, as the host sees it.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let Connected { tap, gateway, .. } = &*self.connected;
        let by_tap = tap.as_deref().and_then(host::counters);
        by_tap.or(gateway.as_ref().map(GatewayState::counters)).unwrap_or_default()
    }
}

/// What a host has for the networks of its VMs, and the VM's backend for its end.
pub struct Host<'a> {
    pub range: Ipv4Net,
    pub can: Capabilities,
    /// The VMM's jail, of whose kind a gateway's is.
    pub jail: &'a JailPlan,
    /// The program.
    pub gateway: &'a Path,
}

/// The table of this process.
struct Home {
    rules: Rules,
    table: Arc<Table>,
    /// Blocks of the range are taken in turn from here on, so that one comes back late: what answers to an old VM may
    /// still be under way.
    next_block: AtomicU32,
}

fn home() -> Result<&'static Home> {
    static HOME: PerProcess<Home> = PerProcess::new();
    HOME.get_or_try_init(|| {
        let [a, b, c, d, e, f, g, h] = clock::random()?;
        let mut rules = Rules::new(u32::from_ne_bytes([a, b, c, d]));
        if !kernel::is_at_least(5, 9) {
            rules = rules.without_early_refusals();
        }
        let table = Table::new(rules.table(), rules.head(), rules.drop());
        let next_block = AtomicU32::new(u32::from_ne_bytes([e, f, g, h]));
        Ok(Home { rules, table, next_block })
    })
}

/// Why a try came to nothing.
enum Failed {
    /// Someone else has the address.
    Taken(Refusal),
    Refused(Refusal),
    Other(Error),
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Failed::Refused(refusal)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Failed::Other(error)
    }
}

/// Connects a VM: the host's end of its wire, and what its guest is told. Blocking; call on the runtime.
///
/// # Errors
/// [`Error::NetworkUnavailable`] with the way out.
pub fn connect(
    vm_id: &VmId,
    config: &NetworkConfig,
    bandwidth_mbps: u64,
    host: &Host<'_>,
) -> Result<(Connection, Nic, GuestNetwork)> {
    let refused =
        |Refusal { cause: source, remedy }| Error::NetworkUnavailable { vm_id: vm_id.clone(), source, remedy };
    if config.ipv6 {
        return Err(refused(Refusal::new("this release gives VMs no IPv6", "leave out ipv6=True")));
    }
    if config.mode == NetworkMode::User {
        let reason = "mode=\"user\" was asked for".to_owned();
        return user::connect(vm_id, config, bandwidth_mbps, host, reason).map_err(refused);
    }
    let relayed = config.egress.is_some() || config.dns_servers.is_empty();
    let reason = match (config.mode, &config.tap_device) {
        (NetworkMode::Tap, _) => "mode=\"tap\" was asked for",
        (_, Some(_)) => "tap_device names one",
        (_, None) => "this process may make one, and the host is fit for it",
    };
    let problems = match ready(config.tap_device.as_deref(), relayed, Age::Recent) {
        Ok(problems) => problems,
        // Who names a tap wants that one.
        Err(Refusal { cause, .. })
            if config.mode == NetworkMode::Auto && config.tap_device.is_none() && host.can.streams_frames =>
        {
            let reason = format!("there can be no tap: {cause}");
            return user::connect(vm_id, config, bandwidth_mbps, host, reason).map_err(refused);
        }
        Err(refusal) => return Err(refused(refusal)),
    };
    for _ in 0..TRIES {
        match try_connect(config, host.range, bandwidth_mbps, host.can.wire, reason) {
            Ok(connected) => {
                tell(vm_id, &problems);
                return Ok(connected);
            }
            Err(Failed::Taken(_)) if config.ip_address.is_none() => {}
            Err(Failed::Taken(refusal) | Failed::Refused(refusal)) => return Err(refused(refusal)),
            Err(Failed::Other(error)) => return Err(error),
        }
    }
    let remedy = "set config[\"network_range\"] to a range that is not in use";
    let range = host.range;
    Err(refused(Refusal::new(format!("every address tried in {range} was taken by someone else"), remedy)))
}

/// Whether this process and this host can connect a VM with this tap (`None`: one of ours), as far as that is known before
/// anything is made; what may keep it from reaching anything.
///
/// # Errors
/// What is missing, and what to do.
pub fn ready(tap: Option<&str>, relayed: bool, age: Age) -> std::result::Result<Vec<Problem>, Refusal> {
    if !privileges::probe().net_admin {
        return Err(Refusal::denied("a tap and its rules"));
    }
    for tool in Tool::ALL {
        tool.find()?;
    }
    // What a start is refused for must be so now.
    let mut problems = look(tap, relayed, age);
    if problems.iter().any(|problem| problem.is_certain) {
        problems = look(tap, relayed, Age::Now);
    }
    match problems.iter().find(|problem| problem.is_certain) {
        Some(Problem { what, remedy, .. }) => Err(Refusal::new(what.as_str(), remedy)),
        None => Ok(problems),
    }
}

/// What keeps a connected VM from reaching anything, by what the host is like now. Blocking: for a tap it runs `nft`.
#[must_use]
pub fn problems_of(connected: &Connected) -> Vec<Problem> {
    match &connected.gateway {
        None => look(connected.tap.as_deref(), connected.is_relayed, Age::Recent),
        Some(gateway) => gateway.problem().into_iter().collect(),
    }
}

/// Judges the host's network.
fn look(tap: Option<&str>, relayed: bool, age: Age) -> Vec<Problem> {
    let uplinks = host::uplinks().into_iter().map(|name| (host::forwards(&name), name));
    let uplinks = uplinks.map(|(forwards, name)| (name, forwards)).collect();
    // Held throughout: a second caller would only do the same.
    let mut seen = SEEN.get().lock();
    let (begun, took, firewall) = match seen.take() {
        Some((begun, took, firewall)) if age == Age::Recent && begun.elapsed() < took * REUSE => {
            (begun, took, firewall)
        }
        _ => {
            let begun = Instant::now();
            let firewall = host::ruleset().map(|ruleset| net::Firewall::parse(&ruleset, Rules::is_table));
            (begun, begun.elapsed(), firewall)
        }
    };
    let host = HostNetwork { uplinks, cut_off: host::is_cut_off(), firewall };
    let found = net::problems(&host, tap, relayed);
    *seen = Some((begun, took, host.firewall));
    found
}

/// Tells of what may keep a VM from reaching anything, once in this process: the next VM would have the same.
fn tell(vm_id: &VmId, problems: &[Problem]) {
    static TOLD: PerProcess<Mutex<BTreeSet<String>>> = PerProcess::new();
    for Problem { what, remedy, .. } in problems {
        if TOLD.get().lock().insert(what.clone()) {
            log::warn!("{vm_id}: {what}; {remedy}");
        }
    }
}

fn try_connect(
    config: &NetworkConfig,
    range: Ipv4Net,
    bandwidth_mbps: u64,
    wire: Wire,
    reason: &str,
) -> std::result::Result<(Connection, Nic, GuestNetwork), Failed> {
    let home = home()?;
    let tap = Tap::open(config.tap_device.as_deref().unwrap_or(net::GENERATED_TAP), wire == Wire::WithHeaders)?;
    let vm_network = Arc::new(plan(config, range, bandwidth_mbps, &tap, home)?);
    let (undo, relay) = raise(&vm_network, home)?;
    let VmNetwork { mac, addresses, .. } = &*vm_network;
    let connected = Connected {
        mode: NetworkMode::Tap,
        reason: reason.to_owned(),
        tap: Some(vm_network.tap.name.clone()),
        mac: *mac,
        addresses: *addresses,
        guest_servers: vm_network.guest_servers(),
        is_relayed: matches!(vm_network.resolution, Resolution::Relayed(_)),
        gateway: None,
    };
    let (nic, guest) = (Nic { mac: mac.to_string(), plug: Plug::Tap(Arc::new(tap)) }, guest_network(&connected));
    let wire = HostEnd::Tap { _relay: relay, _undo: undo };
    Ok((Connection { connected: Arc::new(connected), _wire: wire }, nic, guest))
}

/// What a guest is told.
fn guest_network(Connected { mac, addresses, guest_servers, .. }: &Connected) -> GuestNetwork {
    GuestNetwork {
        mac_address: mac.to_string(),
        address: format!("{}/{}", addresses.address, addresses.prefix),
        gateway: Some(addresses.gateway.to_string()),
        dns_servers: guest_servers.iter().map(ToString::to_string).collect(),
    }
}

/// Why this host cannot have these addresses, or any, among those of its interfaces.
fn no_address(range: Ipv4Net) -> Refusal {
    let remedy = "destroy VMs that are done, or set config[\"network_range\"] to a larger range";
    Refusal::new(format!("no address is left in {range}"), remedy)
}

/// Decides everything about the VM network behind `tap`.
fn plan(
    config: &NetworkConfig,
    range: Ipv4Net,
    bandwidth_mbps: u64,
    tap: &Tap,
    home: &Home,
) -> std::result::Result<VmNetwork, Failed> {
    let hosts = host::networks();
    // What an existing tap has already is its own affair.
    let others = hosts.iter().filter(|(name, _, _)| *name != tap.name);
    let taken: Vec<(String, Ipv4Net)> = others.map(|(name, _, net)| (name.clone(), *net)).collect();
    let nets: Vec<Ipv4Net> = taken.iter().map(|(_, net)| *net).collect();
    let seed = home.next_block.fetch_add(1, Ordering::Relaxed);
    let addresses = net::choose(config, range, &nets, seed).ok_or_else(|| no_address(range))?;
    if let Some(reason) = net::conflict(&addresses, &taken) {
        return Err(Refusal::new(reason, "choose an ip_address and a gateway that this host has not").into());
    }
    let before = match tap.existed {
        false => None,
        true => {
            let its_own = |(name, address, net): &(String, Ipv4Addr, Ipv4Net)| {
                *name == tap.name && *address == addresses.gateway && net.prefix() == 32
            };
            Some(Before { up: was_up(tap)?, gateway: hosts.iter().any(its_own) })
        }
    };
    let mac = config.mac_address.map_or_else(|| clock::random().map(MacAddress::local), Ok)?;
    let is_host = |address| hosts.iter().any(|(_, host, _)| *host == address);
    let resolution = Resolution::of(config, addresses.gateway, is_host);
    let tap = Interface { name: tap.name.clone(), index: tap.index };
    Ok(VmNetwork::new(config, tap, before, mac, addresses, resolution, bandwidth_mbps))
}

/// Makes the host's end of a VM network.
fn raise(vm_network: &Arc<VmNetwork>, home: &Home) -> std::result::Result<(Undo, Option<Relay>), Failed> {
    let Home { rules, table, .. } = home;
    let listening = match &vm_network.resolution {
        Resolution::Direct(_) => None,
        Resolution::Relayed(upstream) => Some((host::listen_on(&vm_network.tap.name)?, upstream.clone())),
    };
    let port = listening.as_ref().map(|(listening, _)| listening.port);
    let mut undo = Undo::default();
    undo.push(Step::Links(vm_network.links_end()));
    host::apply(&vm_network.links_begin(rules.group())).map_err(Refusal::from)?;
    for (path, value) in vm_network.settings() {
        if let Some(before) = host::setting(&path).filter(|_| vm_network.before.is_some()) {
            undo.push(Step::Setting(path.clone(), before));
        }
        host::set_setting(&path, value)?;
    }
    undo.push(Step::Batch(Tool::Tc, vm_network.tc_down()));
    Tool::Tc.run(&vm_network.tc())?;
    let part = table.add(rules.add(vm_network, port), rules.remove(vm_network, port.is_some()))?;
    undo.push(Step::Rules(part));
    undo.push(Step::Links(vm_network.links_down()));
    host::apply(&vm_network.links_up()).map_err(|rejected| match rejected.errno {
        Errno::EEXIST => Failed::Taken(Refusal::new(
            format!("this host has a route to {} already", vm_network.addresses.address),
            "choose another ip_address, or destroy the VM that has it",
        )),
        _ => Failed::Refused(rejected.into()),
    })?;
    let relay = listening.map(|(listening, upstream)| {
        Relay::start(listening, upstream, vm_network.clone(), rules.clone(), table.clone()).map_err(|error| {
            let text = format!("the DNS relay of {} does not start: {error}", vm_network.tap.name);
            Refusal::new(Cause::explained(error, text), "look at ulimit -n")
        })
    });
    Ok((undo, relay.transpose()?))
}

/// Whether a tap that exists is up; one that belongs to a bridge has no addresses of its own.
fn was_up(Tap { name, index, .. }: &Tap) -> std::result::Result<bool, Refusal> {
    let link = host::link(*index).map_err(|errno| {
        let text = format!("the kernel tells nothing of tap {name:?}: {errno}");
        Refusal::new(Cause::explained(errno, text), "look whether it is still there")
    })?;
    let Some(master) = link.master else { return Ok(link.is_up) };
    let master = host::link(master).map_or_else(|_| "another interface".to_owned(), |master| master.name);
    let remedy = format!("take it out (ip link set {name} nomaster), or choose another tap_device");
    Err(Refusal::new(format!("tap {name:?} belongs to {master}"), remedy))
}

/// The servers that this host asks; resolv.conf(5) takes the local one when it names none.
fn host_servers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = parse_servers(&text);
    if servers.is_empty() {
        vec![IpAddr::from([127, 0, 0, 1])]
    } else {
        servers
    }
}

fn parse_servers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        words.next().filter(|_| is_server).and_then(|word| word.parse().ok())
    };
    text.lines().filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_servers_takes_addresses_alone() {
        let text = "# nameserver 9.9.9.9\nsearch a\nnameserver 8.8.8.8\n nameserver\t::1 \nnameserver fe80::1%eth0\nnameserver\n";
        assert_eq!(parse_servers(text), ["8.8.8.8".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
    }
}
