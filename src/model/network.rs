//! How one VM is, or is not, on a network.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

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
        }
    }
}

/// The prefix of an address that came without one.
const DEFAULT_PREFIX: u8 = 24;

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
        let unusable =
            address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.is_loopback();
        if unusable || !(1..=30).contains(&prefix) {
            return Err(bad());
        }
        Ok(Some((address, prefix)))
    }

    /// # Errors
    /// [`Error::InvalidValue`] naming the first field that is malformed or does not fit the others.
    pub fn check(&self) -> Result<()> {
        if let Some(tap) = &self.tap_device {
            // IFNAMSIZ is 16 with the final NUL.
            let fits = (1..=15).contains(&tap.len()) && tap != "." && tap != "..";
            if !fits || !tap.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':') {
                return Err(invalid(
                    "tap_device",
                    tap,
                    "an interface name of 1 to 15 characters without '/', ':' or spaces",
                ));
            }
        }
        if let Some(mac) = &self.mac_address {
            check_mac(mac)?;
        }
        let address = self.address()?;
        if let Some(gateway) = &self.gateway {
            let parsed: Ipv4Addr = gateway.parse().map_err(|_| invalid("gateway", gateway, "an IPv4 address"))?;
            if let Some((address, prefix)) = address {
                let mask = u32::MAX << (32 - u32::from(prefix));
                if u32::from(parsed) & mask != u32::from(address) & mask || parsed == address {
                    let subnet = Ipv4Addr::from(u32::from(address) & mask);
                    let allowed = format!("another address inside the VM's subnet {subnet}/{prefix}");
                    return Err(invalid("gateway", gateway, &allowed));
                }
            }
        }
        for server in &self.dns_servers {
            if server.parse::<std::net::IpAddr>().is_err() {
                return Err(invalid("dns_servers", server, "a list of IP addresses"));
            }
        }
        Ok(())
    }
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
        }
    }

    #[test]
    fn test_check_the_descriptions_example_passes() {
        connected().check().unwrap();
    }

    #[test]
    fn test_check_malformed_fields_are_named() {
        type Change = fn(&mut NetworkConfig);
        let cases: [(&str, Change); 9] = [
            ("tap_device", |c| c.tap_device = Some("a-name-that-is-too-long".into())),
            ("tap_device", |c| c.tap_device = Some("a/b".into())),
            ("ip_address", |c| c.ip_address = Some("300.1.1.1".into())),
            ("ip_address", |c| c.ip_address = Some("10.0.0.1/33".into())),
            ("ip_address", |c| c.ip_address = Some("127.0.0.1".into())),
            ("mac_address", |c| c.mac_address = Some("52:54:00:12:34".into())),
            ("mac_address", |c| c.mac_address = Some("01:54:00:12:34:56".into())),
            ("gateway", |c| c.gateway = Some("10.0.0.1".into())),
            ("dns_servers", |c| c.dns_servers = vec!["dns.example".into()]),
        ];
        for (field, change) in cases {
            let mut config = connected();
            change(&mut config);
            let message = config.check().unwrap_err().to_string();
            assert!(message.starts_with(field), "{message}");
        }
    }
}
