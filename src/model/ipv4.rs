//! IPv4 networks.

use std::fmt;
use std::net::Ipv4Addr;

/// A network: its lowest address and the length of its prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ipv4Net {
    base: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Net {
    /// The network that `address` lies in; `None` for a prefix over 32.
    #[must_use]
    pub fn around(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        (prefix <= 32).then(|| Self { base: Ipv4Addr::from(u32::from(address) & Self::mask(prefix)), prefix })
    }

    /// One address alone.
    #[must_use]
    pub const fn host(address: Ipv4Addr) -> Self {
        Self { base: address, prefix: 32 }
    }

    /// Reads `a.b.c.d/p`, or `a.b.c.d` as one address; `None` for anything else, host bits included.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let Some((address, prefix)) = text.split_once('/') else { return text.parse().ok().map(Self::host) };
        let plain = !prefix.is_empty() && prefix.len() <= 2 && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let address: Ipv4Addr = address.parse().ok()?;
        let net = Self::around(address, prefix.parse().ok().filter(|_| plain)?)?;
        (net.base == address).then_some(net)
    }

    fn mask(prefix: u8) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
    }

    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The lowest address.
    #[must_use]
    pub fn first(self) -> Ipv4Addr {
        self.base
    }

    /// The highest address.
    #[must_use]
    pub fn last(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) | !Self::mask(self.prefix))
    }

    /// The address `offset` above the lowest one; `None` outside of the network.
    #[must_use]
    pub fn nth(self, offset: u32) -> Option<Ipv4Addr> {
        let address = Ipv4Addr::from(u32::from(self.base).checked_add(offset)?);
        self.contains(address).then_some(address)
    }

    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & Self::mask(self.prefix) == u32::from(self.base)
    }

    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }
}

/// IANA's registry of special addresses, as far as it names networks that are not the internet: this network, private ones,
/// carriers', this machine, link-local ones, protocols', benchmarks', multicast, reserved.
const SPECIAL: [Ipv4Net; 11] = [
    Ipv4Net { base: Ipv4Addr::new(0, 0, 0, 0), prefix: 8 },
    Ipv4Net { base: Ipv4Addr::new(10, 0, 0, 0), prefix: 8 },
    Ipv4Net { base: Ipv4Addr::new(100, 64, 0, 0), prefix: 10 },
    Ipv4Net { base: Ipv4Addr::new(127, 0, 0, 0), prefix: 8 },
    Ipv4Net { base: Ipv4Addr::new(169, 254, 0, 0), prefix: 16 },
    Ipv4Net { base: Ipv4Addr::new(172, 16, 0, 0), prefix: 12 },
    Ipv4Net { base: Ipv4Addr::new(192, 0, 0, 0), prefix: 24 },
    Ipv4Net { base: Ipv4Addr::new(192, 168, 0, 0), prefix: 16 },
    Ipv4Net { base: Ipv4Addr::new(198, 18, 0, 0), prefix: 15 },
    Ipv4Net { base: Ipv4Addr::new(224, 0, 0, 0), prefix: 4 },
    Ipv4Net { base: Ipv4Addr::new(240, 0, 0, 0), prefix: 4 },
];

/// Whether `address` is one of the internet's.
#[must_use]
pub fn is_public(address: Ipv4Addr) -> bool {
    !SPECIAL.iter().any(|net| net.contains(address))
}

/// `a.b.c.d/p`; one address alone has no prefix.
impl fmt::Display for Ipv4Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix {
            32 => write!(f, "{}", self.base),
            prefix => write!(f, "{}/{prefix}", self.base),
        }
    }
}

impl fmt::Debug for Ipv4Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn test_parse_what_is_no_network_is_none() {
        for bad in
            ["", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0.1/8", "10.0.0/8", "a/8", "::/0", "10.0.0.0/08 "]
        {
            assert_eq!(Ipv4Net::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn test_is_public_knows_the_edges_of_every_special_network() {
        for (inside, outside) in [
            ("0.255.255.255", "1.0.0.0"),
            ("10.0.0.0", "9.255.255.255"),
            ("100.64.0.0", "100.63.255.255"),
            ("100.127.255.255", "100.128.0.0"),
            ("127.0.0.53", "128.0.0.0"),
            ("169.254.169.254", "169.253.255.255"),
            ("172.16.0.0", "172.15.255.255"),
            ("172.31.255.255", "172.32.0.0"),
            ("192.0.0.192", "192.0.1.0"),
            ("192.168.255.255", "192.167.255.255"),
            ("198.19.255.255", "198.20.0.0"),
            ("224.0.0.1", "223.255.255.255"),
            ("255.255.255.255", "198.17.255.255"),
        ] {
            let public = |text: &str| is_public(text.parse().unwrap());
            assert!(!public(inside) && public(outside), "{inside} {outside}");
        }
    }

    #[test]
    fn test_whole_address_space_has_no_edge() {
        let all = Ipv4Net::parse("0.0.0.0/0").unwrap();
        assert_eq!((all.last(), all.nth(u32::MAX)), (Ipv4Addr::BROADCAST, Some(Ipv4Addr::BROADCAST)));
    }

    proptest! {
        #[test]
        fn test_display_parses_back(address: u32, prefix in 0u8..=32) {
            let net = Ipv4Net::around(address.into(), prefix).unwrap();
            prop_assert!(net.contains(address.into()) && net.contains(net.first()) && net.contains(net.last()));
            prop_assert_eq!(Ipv4Net::parse(&net.to_string()), Some(net));
        }

        #[test]
        fn test_overlaps_is_symmetric_and_means_a_common_address(a: u32, b: u32, p in 0u8..=32, q in 0u8..=32) {
            let (a, b) = (Ipv4Net::around(a.into(), p).unwrap(), Ipv4Net::around(b.into(), q).unwrap());
            let common = a.first().max(b.first()) <= a.last().min(b.last());
            prop_assert_eq!((a.overlaps(b), b.overlaps(a)), (common, common));
        }
    }
}
