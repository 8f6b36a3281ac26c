//! Who gets which address.

use std::net::Ipv4Addr;

use crate::model::{Ipv4Net, NetworkConfig, DEFAULT_PREFIX};

/// A block holds its own address, the gateway, the VM and a broadcast address that nobody uses.
const BLOCK_PREFIX: u8 = 30;

/// The addresses of one VM network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    pub address: Ipv4Addr,
    pub prefix: u8,
    /// The host's end, which is the VM's way out.
    pub gateway: Ipv4Addr,
}

/// Takes what `config` names and chooses the rest, beginning at a place that `seed` picks; `None` with nothing left.
/// `taken` are the networks of the host's other interfaces: the addresses chosen lie in none of them.
#[must_use]
pub fn choose(config: &NetworkConfig, range: Ipv4Net, taken: &[Ipv4Net], seed: u32) -> Option<Addresses> {
    match (config.ip_address, config.gateway) {
        (Some(own), gateway) => {
            let (address, subnet) = (own.address(), own.subnet());
            let lowest = || [1, 2].into_iter().filter_map(|n| subnet.nth(n)).find(|other| *other != address);
            gateway.or_else(lowest).map(|gateway| Addresses { address, prefix: subnet.prefix(), gateway })
        }
        (None, Some(gateway)) => {
            let subnet = Ipv4Net::around(gateway, DEFAULT_PREFIX);
            subnet.and_then(|subnet| free_host(subnet, gateway, taken, seed)).map(|address| Addresses {
                address,
                prefix: DEFAULT_PREFIX,
                gateway,
            })
        }
        (None, None) => free_block(range, taken, seed),
    }
}

/// Why the host cannot have these addresses: one of its other interfaces has a network that holds them.
#[must_use]
pub fn conflict(chosen: &Addresses, taken: &[(String, Ipv4Net)]) -> Option<String> {
    let Addresses { address, gateway, .. } = chosen;
    // Several VM networks may have the same gateway: each is alone on its interface, with a prefix of 32.
    let clash = |net: Ipv4Net| net.contains(*address) || (net.prefix() < 32 && net.contains(*gateway));
    let (name, net) = taken.iter().find(|(_, net)| clash(*net))?;
    Some(format!("{address} with gateway {gateway} lies in {net}, which {name} has"))
}

fn free_host(subnet: Ipv4Net, gateway: Ipv4Addr, taken: &[Ipv4Net], seed: u32) -> Option<Ipv4Addr> {
    let hosts = (1u32 << (32 - subnet.prefix())) - 2;
    (0..hosts)
        .filter_map(|n| subnet.nth(1 + (n + seed % hosts) % hosts))
        .find(|address| *address != gateway && !taken.iter().any(|net| net.prefix() == 32 && net.contains(*address)))
}

fn free_block(range: Ipv4Net, taken: &[Ipv4Net], seed: u32) -> Option<Addresses> {
    let blocks = 1u32 << BLOCK_PREFIX.checked_sub(range.prefix())?;
    let block = |n: u32| Ipv4Net::around(range.nth((n + seed % blocks) % blocks * 4)?, BLOCK_PREFIX);
    let free = |block: &Ipv4Net| !taken.iter().any(|net| net.overlaps(*block));
    let block = (0..blocks).filter_map(block).find(free)?;
    Some(Addresses { address: block.nth(2)?, prefix: BLOCK_PREFIX, gateway: block.nth(1)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GuestAddress;
    use proptest::prelude::*;

    fn net(text: &str) -> Ipv4Net {
        Ipv4Net::parse(text).unwrap()
    }

    fn config(ip_address: Option<&str>, gateway: Option<&str>) -> NetworkConfig {
        let ip_address = ip_address.map(|text| GuestAddress::parse(text).unwrap());
        let gateway = gateway.map(|text| text.parse().unwrap());
        NetworkConfig { ip_address, gateway, ..NetworkConfig::default() }
    }

    fn chosen(ip_address: Option<&str>, gateway: Option<&str>) -> Option<(String, u8, String)> {
        let addresses = choose(&config(ip_address, gateway), net("10.9.0.0/16"), &[], 0);
        addresses.map(|a| (a.address.to_string(), a.prefix, a.gateway.to_string()))
    }

    #[test]
    fn test_choose_what_is_given_is_kept_and_the_rest_fits() {
        let expected = |address: &str, prefix, gateway: &str| Some((address.to_owned(), prefix, gateway.to_owned()));
        let ours = Some("192.168.100.10");
        assert_eq!(chosen(ours, Some("192.168.100.1")), expected("192.168.100.10", 24, "192.168.100.1"));
        assert_eq!(chosen(Some("10.0.0.1/29"), None), expected("10.0.0.1", 29, "10.0.0.2"));
        assert_eq!(chosen(None, Some("10.0.0.1")), expected("10.0.0.2", 24, "10.0.0.1"));
        assert_eq!(chosen(None, None), expected("10.9.0.2", 30, "10.9.0.1"));
    }

    #[test]
    fn test_choose_with_the_range_full_is_none() {
        let range = net("10.9.0.0/29");
        let taken = [net("10.9.0.1"), net("10.9.0.4/30")];
        assert_eq!(choose(&config(None, None), range, &taken, 7), None);
        assert!(choose(&config(None, None), range, &taken[..1], 7).is_some());
    }

    #[test]
    fn test_conflict_names_the_interface_and_shares_a_gateway() {
        let chosen = choose(&config(Some("192.168.100.10"), None), net("10.9.0.0/16"), &[], 0).unwrap();
        let taken = |text: &str| vec![("eth0".to_owned(), net(text))];
        assert!(conflict(&chosen, &taken("192.168.0.0/16")).unwrap().contains("eth0"));
        assert!(conflict(&chosen, &taken("192.168.100.10")).is_some());
        assert_eq!(conflict(&chosen, &taken("192.168.100.1")), None);
    }

    proptest! {
        #[test]
        fn test_free_block_overlaps_nothing_and_stays_in_the_range(
            seed: u32, taken in prop::collection::vec((any::<u16>(), 20u8..=32), 0..20),
        ) {
            let range = net("10.9.0.0/16");
            let address = |low: u16| Ipv4Addr::from(u32::from(range.first()) | u32::from(low));
            let taken: Vec<_> = taken.into_iter().filter_map(|(low, p)| Ipv4Net::around(address(low), p)).collect();
            if let Some(found) = free_block(range, &taken, seed) {
                let block = Ipv4Net::around(found.address, BLOCK_PREFIX).unwrap();
                prop_assert!(range.contains(block.first()) && range.contains(block.last()));
                prop_assert!(block.contains(found.gateway) && found.gateway != found.address);
                prop_assert!(!taken.iter().any(|net| net.overlaps(block)));
            }
        }
    }
}
