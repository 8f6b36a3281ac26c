//! MAC addresses.

/// IEEE 802: in the first octet, bit 0 marks a group, bit 1 an address that nobody registered.
const GROUP: u8 = 1;
const LOCAL: u8 = 2;

/// A locally administered unicast address from random octets.
#[must_use]
pub fn generate(random: [u8; 6]) -> String {
    let [first, rest @ ..] = random;
    let mut text = format!("{:02x}", (first & !GROUP) | LOCAL);
    for octet in rest {
        text.push_str(&format!(":{octet:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NetworkConfig;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn test_generate_is_a_local_unicast_address(random: [u8; 6]) {
            let mac = generate(random);
            prop_assert!(["2", "6", "a", "e"].contains(&&mac[1..2]));
            let config = NetworkConfig { mac_address: Some(mac), ..NetworkConfig::default() };
            prop_assert!(config.check().is_ok());
        }
    }
}
