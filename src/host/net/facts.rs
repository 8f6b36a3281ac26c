//! What the host's network is like, and the settings of its interfaces. All of it is seen from this process's network
//! namespace: `/proc/net` and `/proc/sys/net` are, `/sys/class/net` need not be.

use std::fs;
use std::net::Ipv4Addr;

use serde_json::Value;

use super::route::way_to;
use super::{Refusal, Tool};
use crate::error::Cause;
use crate::model::Ipv4Net;

/// The index of the interface called `name`.
#[must_use]
pub fn index_of(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

/// The index and name of every interface.
#[must_use]
pub fn interfaces() -> Vec<(u32, String)> {
    let Ok(interfaces) = nix::net::if_::if_nameindex() else { return Vec::new() };
    let named = |interface: &nix::net::if_::Interface| {
        interface.name().to_str().ok().map(|name| (interface.index(), name.to_owned()))
    };
    interfaces.iter().filter_map(named).collect()
}

/// Each IPv4 address of the host with its interface and its network.
#[must_use]
pub fn networks() -> Vec<(String, Ipv4Addr, Ipv4Net)> {
    let Ok(addresses) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let read = |entry: nix::ifaddrs::InterfaceAddress| {
        let address = entry.address?.as_sockaddr_in()?.ip();
        let mask = entry.netmask?.as_sockaddr_in()?.ip();
        let prefix = u8::try_from(u32::from(mask).leading_ones()).ok()?;
        Some((entry.interface_name, address, Ipv4Net::around(address, prefix)?))
    };
    addresses.filter_map(read).collect()
}

/// An address of the internet in each half of the address space: VPNs have a route for each, to leave the default one alone.
const FAR: [Ipv4Addr; 2] = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(193, 0, 14, 129)];

/// The interfaces by which packets to the internet leave, as the kernel says: by all its tables and rules.
#[must_use]
pub fn uplinks() -> Vec<String> {
    let known = interfaces();
    let mut names: Vec<String> = Vec::new();
    for index in FAR.into_iter().filter_map(way_to) {
        let name = known.iter().find(|(other, _)| *other == index).map(|(_, name)| name.clone());
        names.extend(name.filter(|name| !names.contains(name)));
    }
    names
}

/// Whether some part of the internet has no route.
#[must_use]
pub fn is_cut_off() -> bool {
    FAR.into_iter().any(|address| way_to(address).is_none())
}

/// All rules of nf_tables, as `nft --json list ruleset` has them; `None` when they cannot be read.
#[must_use]
pub fn ruleset() -> Option<Value> {
    let printed = Tool::Nft.ask(&["--json", "list", "ruleset"]).ok()?;
    // Warnings about tables that iptables manages may come before it.
    let json = printed.get(printed.find("{\"nftables\"")?..)?;
    serde_json::Deserializer::from_str(json).into_iter::<Value>().next()?.ok()
}

/// Whether packets that come in by this interface are forwarded.
#[must_use]
pub fn forwards(name: &str) -> bool {
    setting(&format!("ipv4/conf/{name}/forwarding")).as_deref() == Some("1")
}

/// A setting below `/proc/sys/net`; `None` when the kernel does not have it.
#[must_use]
pub fn setting(path: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/net/{path}")).ok().map(|text| text.trim().to_owned())
}

/// Gives a setting a value, if it has another one.
///
/// # Errors
/// The process may not.
pub fn set_setting(path: &str, value: &str) -> Result<(), Refusal> {
    match setting(path) {
        Some(now) if now != value => fs::write(format!("/proc/sys/net/{path}"), value).map_err(|error| {
            let reason = format!("/proc/sys/net/{path} cannot be set to {value}: {error}");
            Refusal::new(
                Cause::explained(error, reason),
                "let this process write below /proc/sys/net (a container: --privileged)",
            )
        }),
        // A kernel without IPv6 has none to switch off.
        _ => Ok(()),
    }
}

/// Bytes that an interface moved, as the host sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// `None` when there is no such interface.
#[must_use]
pub fn counters(name: &str) -> Option<Counters> {
    parse_counters(&fs::read_to_string("/proc/net/dev").ok()?, name)
}

fn parse_counters(table: &str, name: &str) -> Option<Counters> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Counters { received_bytes: *fields.first()?, sent_bytes: *fields.get(8)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_networks_know_the_loopback_and_interfaces_too() {
        let loopback = Ipv4Net::parse("127.0.0.0/8").unwrap();
        assert!(networks().iter().any(|(_, _, net)| *net == loopback) || networks().is_empty());
        assert!(interfaces().iter().any(|(index, name)| name == "lo" && index_of("lo") == Some(*index)));
    }

    #[test]
    fn test_parse_counters_finds_the_whole_name() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes\n\
                     twm10: 5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0\n  twm1:100 2 0 0 0 0 0 0 200 3 0 0 0 0 0 0\n";
        let expected = Counters { received_bytes: 100, sent_bytes: 200 };
        assert_eq!((parse_counters(table, "twm1"), parse_counters(table, "twm")), (Some(expected), None));
    }
}
