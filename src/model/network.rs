//! How one VM is, or is not, on a network.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::{EgressRule, Ipv4Net};
use crate::error::{Error, Result};

/// One VM's network, as the caller wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    pub tap_device: Option<String>,
    pub ip_address: Option<String>,
    pub mac_address: Option<String>,
    pub gateway: Option<String>,
    pub dns_servers: Vec<String>,
    pub isolated_network: bool,
    /// Where the VM may go; `None`: wherever the policy of all VMs lets it.
    pub egress: Option<Vec<String>>,
    pub ipv6: bool,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            tap_device: None,
            ip_address: None,
            mac_address: None,
            gateway: None,
            dns_servers: Vec::new(),
            isolated_network: true,
            egress: None,
            ipv6: false,
        }
    }
}

/// The prefix of an address that came without one.
pub const DEFAULT_PREFIX: u8 = 24;
/// Entries of an allow-list: each is a rule that packets are held against one after the other.
const MAX_EGRESS: usize = 256;

fn invalid(field: &str, value: &str, allowed: &str) -> Error {
    Error::InvalidValue { field: field.into(), value: format!("{value:?}"), allowed: allowed.into() }
}

impl NetworkConfig {
    /// The address and prefix length, if an address was given.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] naming `ip_address`.
    pub fn address(&self) -> Result<Option<(Ipv4Addr, u8)>> {
        let Some(text) = &self.ip_address else { return Ok(None) };
        let bad = || invalid("ip_address", text, "an IPv4 host address, as in 192.168.100.10 or 192.168.100.10/24");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, prefix.parse().map_err(|_| bad())?),
            None => (text.as_str(), DEFAULT_PREFIX),
        };
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let net = Ipv4Net::around(address, prefix).filter(|_| (1..=30).contains(&prefix)).ok_or_else(bad)?;
        if !is_host(address) || address == net.first() || address == net.last() {
            return Err(bad());
        }
        Ok(Some((address, prefix)))
    }

    /// # Errors
    /// [`Error::InvalidValue`] naming `egress`.
    pub fn egress_rules(&self) -> Result<Option<Vec<EgressRule>>> {
        let Some(entries) = &self.egress else { return Ok(None) };
        if entries.len() > MAX_EGRESS {
            let allowed = format!("a list of at most {MAX_EGRESS} entries");
            return Err(Error::InvalidValue { field: "egress".into(), value: entries.len().to_string(), allowed });
        }
        entries.iter().map(|entry| EgressRule::parse(entry)).collect::<Result<_>>().map(Some)
    }

    /// # Errors
    /// [`Error::InvalidValue`] naming the first field that is malformed or does not fit the others.
    pub fn check(&self) -> Result<()> {
        if let Some(tap) = self.tap_device.as_deref().filter(|tap| !is_interface_name(tap)) {
            let allowed =
                "1 to 15 letters, digits, '.', '_' and '-', with a letter first; not \"all\", \"default\" or \"if\" and a number";
            return Err(invalid("tap_device", tap, allowed));
        }
        if let Some(mac) = &self.mac_address {
            check_mac(mac)?;
        }
        let address = self.address()?;
        if let Some(gateway) = &self.gateway {
            let parsed = gateway.parse().ok().filter(|parsed| is_host(*parsed));
            let parsed: Ipv4Addr = parsed.ok_or_else(|| invalid("gateway", gateway, "an IPv4 host address"))?;
            let subnet = address.and_then(|(address, prefix)| Ipv4Net::around(address, prefix).zip(Some(address)));
            if let Some((subnet, address)) = subnet {
                let inside = subnet.contains(parsed) && parsed != subnet.first() && parsed != subnet.last();
                if !inside || parsed == address {
                    let allowed = format!("another host address inside the VM's subnet {subnet}");
                    return Err(invalid("gateway", gateway, &allowed));
                }
            }
        }
        for server in &self.dns_servers {
            if server.parse::<std::net::IpAddr>().is_err() {
                return Err(invalid("dns_servers", server, "a list of IP addresses"));
            }
        }
        self.egress_rules().map(drop)
    }
}

/// Whether a tap may be called so: IFNAMSIZ is 16 with the final NUL, the tools that are told of it read some characters
/// as their own, and take a number, or `if` with a number, for an index; the kernel's settings of `all` interfaces and
/// the `default` ones lie beside those of each.
fn is_interface_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let by_index = name.strip_prefix("if").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    let taken = by_index || ["all", "default"].contains(&name);
    name.len() <= 15 && name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(plain) && !taken
}

/// Whether a machine on a network may have `address`.
fn is_host(address: Ipv4Addr) -> bool {
    let special = address.is_unspecified() || address.is_broadcast() || address.is_multicast();
    !special && !address.is_loopback() && !address.is_link_local()
}

fn check_mac(mac: &str) -> Result<()> {
    let octets: Vec<&str> = mac.split(':').collect();
    let hex = |o: &&str| o.len() == 2 && o.chars().all(|c| c.is_ascii_hexdigit());
    let valid = octets.len() == 6 && octets.iter().all(hex);
    let first = if valid { u8::from_str_radix(octets[0], 16).unwrap_or(1) } else { 1 };
    if valid && first & 1 == 0 && mac != "00:00:00:00:00:00" {
        return Ok(());
    }
    Err(invalid("mac_address", mac, "a unicast MAC address of six hexadecimal octets, as in 52:54:00:12:34:56"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connected() -> NetworkConfig {
        NetworkConfig {
            tap_device: Some("tap0".into()),
            ip_address: Some("192.168.100.10".into()),
            mac_address: Some("52:54:00:12:34:56".into()),
            gateway: Some("192.168.100.1".into()),
            dns_servers: vec!["8.8.8.8".into()],
            isolated_network: false,
            egress: Some(vec!["example.com:443".into()]),
            ipv6: false,
        }
    }

    #[test]
    fn test_check_the_descriptions_example_passes() {
        connected().check().unwrap();
    }

    #[test]
    fn test_check_malformed_fields_are_named() {
        type Change = fn(&mut NetworkConfig);
        let cases: [(&str, Change); 17] = [
            ("tap_device", |c| c.tap_device = Some("a-name-that-is-too-long".into())),
            ("tap_device", |c| c.tap_device = Some("a/b".into())),
            ("tap_device", |c| c.tap_device = Some("a#b".into())),
            ("tap_device", |c| c.tap_device = Some("all".into())),
            ("tap_device", |c| c.tap_device = Some("7".into())),
            ("tap_device", |c| c.tap_device = Some("if7".into())),
            ("ip_address", |c| c.ip_address = Some("300.1.1.1".into())),
            ("ip_address", |c| c.ip_address = Some("10.0.0.1/33".into())),
            ("ip_address", |c| c.ip_address = Some("127.0.0.1".into())),
            ("ip_address", |c| c.ip_address = Some("169.254.0.7".into())),
            ("ip_address", |c| c.ip_address = Some("10.0.0.255/24".into())),
            ("mac_address", |c| c.mac_address = Some("52:54:00:12:34".into())),
            ("mac_address", |c| c.mac_address = Some("01:54:00:12:34:56".into())),
            ("gateway", |c| c.gateway = Some("10.0.0.1".into())),
            ("gateway", |c| c.gateway = Some("192.168.100.255".into())),
            ("dns_servers", |c| c.dns_servers = vec!["dns.example".into()]),
            ("egress", |c| c.egress = Some(vec!["a b".into()])),
        ];
        for (field, change) in cases {
            let mut config = connected();
            change(&mut config);
            let message = config.check().unwrap_err().to_string();
            assert!(message.starts_with(field), "{message}");
        }
    }
}
