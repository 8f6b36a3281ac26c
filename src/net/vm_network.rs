//! The network of one VM: the VM, the host's end of its wire, and what may pass.
//!
//! ```text
//!   guest               host
//!   eth0 ==== tap ====[ who: MAC, address ]==[ where to: the rules ]==[ NAT ]==== uplink
//!   address             gateway/32, no other address of the host is reached
//! ```

use std::net::{IpAddr, Ipv4Addr};

use super::rules::is_never;
use super::{Addresses, Interface};
use crate::model::{EgressRule, EgressTarget, MacAddress, NetworkConfig};

/// What a tap was like that was there before: what it goes back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Before {
    pub up: bool,
    /// It had the gateway's address, with a prefix of 32.
    pub gateway: bool,
}

/// Everything that is decided about one VM network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmNetwork {
    pub tap: Interface,
    /// `None`: the tap was made for this, and vanishes by itself.
    pub before: Option<Before>,
    pub mac: MacAddress,
    pub addresses: Addresses,
    pub resolution: Resolution,
    pub egress: Option<Vec<EgressRule>>,
    pub bandwidth_mbps: u64,
}

/// Who answers the VM's DNS questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolution {
    /// These servers, which the VM asks itself.
    Direct(Vec<Ipv4Addr>),
    /// The gateway, which asks for the VM.
    Relayed(Upstream),
}

/// Whom the gateway asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upstream {
    Given(Vec<IpAddr>),
    /// Whoever the host itself asks at the time.
    Host,
}

impl Resolution {
    /// The VM asks the servers it was given itself, unless the answers decide where it may go (an allow-list), there is
    /// none, or one of them is where no VM may go: an address of the host, a link-local one, an IPv6 one.
    #[must_use]
    pub fn of(config: &NetworkConfig, gateway: Ipv4Addr, is_host: impl Fn(Ipv4Addr) -> bool) -> Self {
        // The gateway as a server means that it shall find one.
        let servers = config.dns_servers.iter().copied().filter(|server| *server != IpAddr::V4(gateway));
        let servers: Vec<IpAddr> = servers.collect();
        let reached = |server: &IpAddr| match server {
            IpAddr::V4(server) => Some(*server).filter(|server| !is_never(*server) && !is_host(*server)),
            IpAddr::V6(_) => None,
        };
        let direct: Option<Vec<Ipv4Addr>> = servers.iter().map(reached).collect();
        match direct {
            _ if servers.is_empty() => Resolution::Relayed(Upstream::Host),
            Some(direct) if config.egress.is_none() && servers.len() == config.dns_servers.len() => {
                Resolution::Direct(direct)
            }
            _ => Resolution::Relayed(Upstream::Given(servers)),
        }
    }
}

impl VmNetwork {
    #[must_use]
    pub fn new(
        config: &NetworkConfig,
        tap: Interface,
        before: Option<Before>,
        mac: MacAddress,
        addresses: Addresses,
        resolution: Resolution,
        bandwidth_mbps: u64,
    ) -> Self {
        Self { tap, before, mac, addresses, resolution, egress: config.egress.clone(), bandwidth_mbps }
    }

    /// The servers that the guest's `resolv.conf` names.
    #[must_use]
    pub fn guest_servers(&self) -> Vec<Ipv4Addr> {
        match &self.resolution {
            Resolution::Direct(servers) => servers.clone(),
            Resolution::Relayed(_) => vec![self.addresses.gateway],
        }
    }

    /// The entries of the allow-list that name hosts.
    pub fn named_rules(&self) -> impl Iterator<Item = &EgressRule> {
        self.egress.iter().flatten().filter(|rule| matches!(rule.to, EgressTarget::Name(_)))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The description's example, on the interface with index 7.
    pub fn example(egress: Option<&[&str]>) -> VmNetwork {
        let config = NetworkConfig {
            dns_servers: vec![[8, 8, 8, 8].into(), [8, 8, 4, 4].into()],
            egress: egress.map(|entries| entries.iter().map(|entry| EgressRule::parse(entry).unwrap()).collect()),
            isolated_network: false,
            ..NetworkConfig::default()
        };
        let gateway = Ipv4Addr::new(192, 168, 100, 1);
        let addresses = Addresses { address: Ipv4Addr::new(192, 168, 100, 10), prefix: 24, gateway };
        let tap = Interface { name: "tap0".into(), index: 7 };
        let resolution = Resolution::of(&config, gateway, |_| false);
        let mac = MacAddress::parse("52:54:00:12:34:AB").unwrap();
        VmNetwork::new(&config, tap, None, mac, addresses, resolution, 100)
    }

    fn resolution(servers: &[&str], egress: Option<Vec<EgressRule>>) -> Resolution {
        let dns_servers = servers.iter().map(|server| server.parse().unwrap()).collect();
        let config = NetworkConfig { dns_servers, egress, ..NetworkConfig::default() };
        Resolution::of(&config, Ipv4Addr::new(10, 0, 0, 1), |address| address == Ipv4Addr::new(10, 5, 5, 5))
    }

    #[test]
    fn test_resolution_servers_that_a_vm_reaches_are_asked_directly() {
        assert_eq!(resolution(&["8.8.8.8"], None), Resolution::Direct(vec![Ipv4Addr::new(8, 8, 8, 8)]));
        assert_eq!(example(None).guest_servers().len(), 2);
    }

    #[test]
    fn test_resolution_what_no_vm_reaches_is_relayed() {
        let given = |servers: &[&str]| {
            Resolution::Relayed(Upstream::Given(servers.iter().map(|server| server.parse().unwrap()).collect()))
        };
        for server in ["127.0.0.53", "169.254.169.254", "2001:db8::1", "10.5.5.5"] {
            assert_eq!(resolution(&[server], None), given(&[server]), "{server}");
        }
        assert_eq!(resolution(&["8.8.8.8"], Some(vec![])), given(&["8.8.8.8"]));
        assert_eq!(resolution(&["10.0.0.1", "8.8.8.8"], None), given(&["8.8.8.8"]));
    }

    #[test]
    fn test_resolution_without_a_server_is_the_hosts() {
        assert_eq!(resolution(&[], None), Resolution::Relayed(Upstream::Host));
        assert_eq!(resolution(&["10.0.0.1"], None), Resolution::Relayed(Upstream::Host));
    }
}
