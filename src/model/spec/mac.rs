//! MAC addresses.

use std::fmt;

/// IEEE 802: in the first octet, bit 0 marks a group, bit 1 an address that no registry gave out.
const GROUP: u8 = 1;
const LOCAL: u8 = 2;

/// A unicast address; shown in lower case.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Reads six octets of two hexadecimal digits each, as in `52:54:00:12:34:56`; `None` for anything else, and for what
    /// no network device may have: groups and all zeros.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let octet = |text: &str| {
            let is_hex = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(text, 16).ok().filter(|_| is_hex)
        };
        let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
        let octets: [u8; 6] = octets?.try_into().ok()?;
        (octets[0] & GROUP == 0 && octets != [0; 6]).then_some(Self(octets))
    }

    /// A locally administered address from random octets.
    #[must_use]
    pub fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [b, c, d, e, f] = rest;
        Self([(first & !GROUP) | LOCAL, b, c, d, e, f])
    }

    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn test_parse_what_is_no_unicast_address_is_none() {
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56", "+2:54:00:12:34:56"] {
            assert_eq!(MacAddress::parse(bad), None, "{bad:?}");
        }
        assert_eq!((MacAddress::parse("01:00:5e:00:00:01"), MacAddress::parse("00:00:00:00:00:00")), (None, None));
    }

    proptest! {
        #[test]
        fn test_local_is_a_local_unicast_address_that_parses_back(random: [u8; 6]) {
            let text = MacAddress::local(random).to_string();
            prop_assert!(["2", "6", "a", "e"].contains(&&text[1..2]));
            prop_assert_eq!(MacAddress::parse(&text), Some(MacAddress::local(random)));
            prop_assert_eq!(MacAddress::parse(&text.to_uppercase()), Some(MacAddress::local(random)));
        }
    }
}
