//! How one VM is, or is not, on a network.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use super::{EgressRule, MacAddress};
use crate::error::{Error, Result};
use crate::model::Ipv4Net;

/// One VM's network. Every part is parsed, and the parts fit each other: [`NetworkConfig::parse`] is the only way in from
/// text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "NetworkText", into = "NetworkText")]
pub struct NetworkConfig {
    pub tap_device: Option<String>,
    pub ip_address: Option<GuestAddress>,
    pub mac_address: Option<MacAddress>,
    pub gateway: Option<Ipv4Addr>,
    pub dns_servers: Vec<IpAddr>,
    pub isolated_network: bool,
    /// Where the VM may go; `None`: wherever the policy of all VMs lets it.
    pub egress: Option<Vec<EgressRule>>,
    pub ipv6: bool,
    pub mode: NetworkMode,
}

/// By what a VM is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkMode {
    /// By a tap where this process may and the host is fit, else in user mode.
    #[default]
    Auto,
    /// By an interface of the host, with the kernel's rules and NAT: needs CAP_NET_ADMIN.
    Tap,
    /// By a gateway in a process of its own, whose far side are ordinary sockets: needs no privilege.
    User,
}

impl NetworkMode {
    const ALL: [Self; 3] = [Self::Auto, Self::Tap, Self::User];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            NetworkMode::Auto => "auto",
            NetworkMode::Tap => "tap",
            NetworkMode::User => "user",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text)
    }
}

/// The same as text: the form in which callers write it, and in which manifests keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkText {
    pub tap_device: Option<String>,
    pub ip_address: Option<String>,
    pub mac_address: Option<String>,
    pub gateway: Option<String>,
    pub dns_servers: Vec<String>,
    pub isolated_network: bool,
    pub egress: Option<Vec<String>>,
    pub ipv6: bool,
    /// What is older than user mode knows none.
    #[serde(default = "auto")]
    pub mode: String,
}

fn auto() -> String {
    NetworkMode::default().as_str().to_owned()
}

/// A VM's own address and the subnet that it lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestAddress {
    address: Ipv4Addr,
    subnet: Ipv4Net,
    /// Whether the prefix was written out.
    is_explicit: bool,
}

/// The prefix of an address that came without one.
pub const DEFAULT_PREFIX: u8 = 24;
/// Entries of an allow-list: each is a rule that packets are held against one after the other.
const MAX_EGRESS: usize = 256;

fn invalid(field: &str, value: &str, allowed: &str) -> Error {
    Error::InvalidValue { field: field.into(), value: format!("{value:?}"), allowed: allowed.into() }
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
            mode: NetworkMode::Auto,
        }
    }
}

impl NetworkConfig {
    /// # Errors
    /// [`Error::InvalidValue`] naming the first field that is malformed or does not fit the others.
    pub fn parse(text: NetworkText) -> Result<Self> {
        if let Some(tap) = text.tap_device.as_deref().filter(|tap| !is_interface_name(tap)) {
            let allowed =
                "1 to 15 letters, digits, '.', '_' and '-', with a letter first; not \"all\", \"default\" or \"if\" and a number";
            return Err(invalid("tap_device", tap, allowed));
        }
        let mac_address = text.mac_address.as_deref().map(parse_mac).transpose()?;
        let ip_address = text.ip_address.as_deref().map(GuestAddress::parse).transpose()?;
        let gateway = text.gateway.as_deref().map(|gateway| parse_gateway(gateway, ip_address)).transpose()?;
        let mode = NetworkMode::parse(&text.mode)
            .ok_or_else(|| invalid("mode", &text.mode, "\"auto\", \"tap\" or \"user\""))?;
        if let (NetworkMode::User, Some(tap)) = (mode, &text.tap_device) {
            return Err(invalid("tap_device", tap, "None with mode=\"user\", which has no tap"));
        }
        let server = |text: &String| text.parse().map_err(|_| invalid("dns_servers", text, "a list of IP addresses"));
        Ok(Self {
            tap_device: text.tap_device,
            ip_address,
            mac_address,
            gateway,
            dns_servers: text.dns_servers.iter().map(server).collect::<Result<_>>()?,
            isolated_network: text.isolated_network,
            egress: text.egress.as_deref().map(parse_egress).transpose()?,
            ipv6: text.ipv6,
            mode,
        })
    }

    /// The same without what no two VMs can have at once.
    #[must_use]
    pub fn without_addresses(&self) -> Self {
        Self { tap_device: None, ip_address: None, mac_address: None, gateway: None, ..self.clone() }
    }
}

impl TryFrom<NetworkText> for NetworkConfig {
    type Error = Error;

    fn try_from(text: NetworkText) -> Result<Self> {
        Self::parse(text)
    }
}

impl From<NetworkConfig> for NetworkText {
    fn from(network: NetworkConfig) -> Self {
        fn texts<T: fmt::Display>(values: &[T]) -> Vec<String> {
            values.iter().map(ToString::to_string).collect()
        }
        Self {
            tap_device: network.tap_device,
            ip_address: network.ip_address.map(|address| address.to_string()),
            mac_address: network.mac_address.map(|mac| mac.to_string()),
            gateway: network.gateway.map(|gateway| gateway.to_string()),
            dns_servers: texts(&network.dns_servers),
            isolated_network: network.isolated_network,
            egress: network.egress.as_deref().map(texts),
            ipv6: network.ipv6,
            mode: network.mode.as_str().to_owned(),
        }
    }
}

impl GuestAddress {
    /// Reads `a.b.c.d`, or `a.b.c.d/prefix`.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] naming `ip_address`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || invalid("ip_address", text, "an IPv4 host address, as in 192.168.100.10 or 192.168.100.10/24");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse().map_err(|_| bad())?)),
            None => (text, None),
        };
        let (address, is_explicit): (Ipv4Addr, _) = (address.parse().map_err(|_| bad())?, prefix.is_some());
        let prefix = prefix.unwrap_or(DEFAULT_PREFIX);
        let subnet = Ipv4Net::around(address, prefix).filter(|_| (1..=30).contains(&prefix)).ok_or_else(bad)?;
        if !is_host(address) || address == subnet.first() || address == subnet.last() {
            return Err(bad());
        }
        Ok(Self { address, subnet, is_explicit })
    }

    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    #[must_use]
    pub fn subnet(self) -> Ipv4Net {
        self.subnet
    }
}

/// As it was written: with its prefix if that was there.
impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_explicit {
            true => write!(f, "{}/{}", self.address, self.subnet.prefix()),
            false => write!(f, "{}", self.address),
        }
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

fn parse_mac(text: &str) -> Result<MacAddress> {
    let allowed = "a unicast MAC address of six hexadecimal octets, as in 52:54:00:12:34:56";
    MacAddress::parse(text).ok_or_else(|| invalid("mac_address", text, allowed))
}

/// The host's end of the wire: another host of the VM's subnet, where that is known.
fn parse_gateway(text: &str, of: Option<GuestAddress>) -> Result<Ipv4Addr> {
    let gateway = text.parse().ok().filter(|gateway| is_host(*gateway));
    let gateway: Ipv4Addr = gateway.ok_or_else(|| invalid("gateway", text, "an IPv4 host address"))?;
    if let Some(GuestAddress { address, subnet, .. }) = of {
        let inside = subnet.contains(gateway) && gateway != subnet.first() && gateway != subnet.last();
        if !inside || gateway == address {
            return Err(invalid("gateway", text, &format!("another host address inside the VM's subnet {subnet}")));
        }
    }
    Ok(gateway)
}

fn parse_egress(entries: &[String]) -> Result<Vec<EgressRule>> {
    if entries.len() > MAX_EGRESS {
        let allowed = format!("a list of at most {MAX_EGRESS} entries");
        return Err(Error::InvalidValue { field: "egress".into(), value: entries.len().to_string(), allowed });
    }
    entries.iter().map(|entry| EgressRule::parse(entry)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connected() -> NetworkText {
        NetworkText {
            tap_device: Some("tap0".into()),
            ip_address: Some("192.168.100.10".into()),
            mac_address: Some("52:54:00:12:34:56".into()),
            gateway: Some("192.168.100.1".into()),
            dns_servers: vec!["8.8.8.8".into()],
            isolated_network: false,
            egress: Some(vec!["example.com:443".into(), "*.example.com".into(), "10.0.0.0/8:53".into()]),
            ipv6: false,
            mode: "auto".into(),
        }
    }

    #[test]
    fn test_parse_the_descriptions_example_passes_and_is_shown_as_it_was_written() {
        for ip_address in ["192.168.100.10", "192.168.100.10/28"] {
            let text = NetworkText { ip_address: Some(ip_address.into()), ..connected() };
            assert_eq!(NetworkText::from(NetworkConfig::parse(text.clone()).unwrap()), text);
        }
    }

    #[test]
    fn test_default_is_what_its_text_means() {
        assert_eq!(NetworkConfig::parse(NetworkConfig::default().into()).unwrap(), NetworkConfig::default());
    }

    #[test]
    fn test_parse_a_manifest_from_before_there_were_modes_means_auto() {
        let mut value = serde_json::to_value(NetworkConfig::default()).unwrap();
        assert_eq!(value.as_object_mut().unwrap().remove("mode"), Some("auto".into()));
        assert_eq!(serde_json::from_value::<NetworkConfig>(value).unwrap(), NetworkConfig::default());
    }

    #[test]
    fn test_parse_malformed_fields_are_named() {
        type Change = fn(&mut NetworkText);
        let cases: [(&str, Change); 20] = [
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
            ("gateway", |c| c.gateway = Some("192.168.100.10".into())),
            ("dns_servers", |c| c.dns_servers = vec!["dns.example".into()]),
            ("egress", |c| c.egress = Some(vec!["a b".into()])),
            ("mode", |c| c.mode = "slirp".into()),
            ("tap_device", |c| c.mode = "user".into()),
        ];
        for (field, change) in cases {
            let mut text = connected();
            change(&mut text);
            let message = NetworkConfig::parse(text).unwrap_err().to_string();
            assert!(message.starts_with(field), "{message}");
        }
    }
}
