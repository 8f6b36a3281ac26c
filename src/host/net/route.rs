//! Where the kernel would send a packet. Asking sends none.

use std::net::Ipv4Addr;

use netlink_packet_core::{Parseable, NLM_F_ACK};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::rtnetlink::exchange;

/// The index of the interface by which the host's own packets to `to` leave, by all its tables and rules; `None`: there is no
/// way, or it may not be asked.
#[must_use]
pub fn way_to(to: Ipv4Addr) -> Option<u32> {
    let mut question = RouteMessage::default();
    question.header.address_family = AddressFamily::Inet;
    question.header.destination_prefix_length = 32;
    question.attributes = vec![RouteAttribute::Destination(RouteAddress::Inet(to))];
    let answers = exchange(RouteNetlinkMessage::GetRoute(question).into(), NLM_F_ACK).ok()?;
    parse(answers.first()?)
}

fn parse(payload: &[u8]) -> Option<u32> {
    let route = RouteMessage::parse(payload).ok().filter(|route| route.header.kind == RouteType::Unicast)?;
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable;

    use super::*;

    #[test]
    fn test_way_to_this_machine_is_no_way_out() {
        // Of type "local".
        assert_eq!(way_to(Ipv4Addr::LOCALHOST), None);
    }

    #[test]
    fn test_parse_finds_the_interface_behind_other_attributes() {
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet;
        route.header.kind = RouteType::Unicast;
        let to = RouteAttribute::Destination(RouteAddress::Inet(Ipv4Addr::new(8, 8, 8, 8)));
        route.attributes = vec![RouteAttribute::Table(254), to, RouteAttribute::Oif(7)];
        let bytes = |route: &RouteMessage| {
            let mut bytes = vec![0; route.buffer_len()];
            route.emit(&mut bytes);
            bytes
        };
        let message = bytes(&route);
        assert_eq!(parse(&message), Some(7));
        assert_eq!(parse(&message[..message.len() - 1]), None);
        route.header.kind = RouteType::BlackHole;
        assert_eq!(parse(&bytes(&route)), None);
        assert_eq!(parse(&[2; 20]), None);
    }
}
