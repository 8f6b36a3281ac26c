//! Where the kernel would send a packet. Asking sends none.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use netlink_packet_core::{Parseable, NLM_F_ACK};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::rtnetlink::{exchange, exchange_on, open, Change};

/// The index of the interface by which the host's own packets to `to` leave, by all its tables and rules; `None`: there is no
/// way, or it may not be asked.
#[must_use]
pub fn way_to(to: Ipv4Addr) -> Option<u32> {
    let answers = exchange(question(to), NLM_F_ACK).ok()?;
    parse(answers.first()?)
}

/// What the kernel would do with the host's own packets to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Send them to one other machine.
    Elsewhere,
    /// Take them itself: it is an address of this host.
    Local,
    /// Anything else: broadcast, multicast, a route that denies.
    Other,
    /// There is no way.
    Unreachable,
}

/// Asks by a socket that was opened before the process lost the right to open one.
#[derive(Debug)]
pub struct Routes(OwnedFd);

impl Routes {
    /// # Errors
    /// The kernel's; where a sandbox has no netlink sockets.
    pub fn open() -> nix::Result<Self> {
        open().map(Self)
    }

    /// What the kernel would do with packets to `to`, by all its tables and rules.
    ///
    /// # Errors
    /// The kernel's, where it does not answer.
    pub fn destination(&self, to: Ipv4Addr) -> nix::Result<Destination> {
        match exchange_on(&self.0, question(to), NLM_F_ACK) {
            Ok(answers) => {
                let kind = answers.first().and_then(|payload| RouteMessage::parse(payload).ok());
                Ok(match kind.map(|route| route.header.kind) {
                    Some(RouteType::Unicast) => Destination::Elsewhere,
                    Some(RouteType::Local) => Destination::Local,
                    _ => Destination::Other,
                })
            }
            Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => Ok(Destination::Unreachable),
            // Routes of the types prohibit and blackhole.
            Err(Errno::EACCES | Errno::EINVAL) => Ok(Destination::Other),
            Err(errno) => Err(errno),
        }
    }
}

fn question(to: Ipv4Addr) -> Change {
    let mut question = RouteMessage::default();
    question.header.address_family = AddressFamily::Inet;
    question.header.destination_prefix_length = 32;
    question.attributes = vec![RouteAttribute::Destination(RouteAddress::Inet(to))];
    RouteNetlinkMessage::GetRoute(question).into()
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
    fn test_destination_knows_this_machine_and_what_is_no_machine() {
        let routes = Routes::open().unwrap();
        for (to, expected) in [
            ([127, 0, 0, 1], Destination::Local),
            ([127, 9, 9, 9], Destination::Local),
            // Asked twice by one socket: no answer is left for the next question.
            ([127, 0, 0, 1], Destination::Local),
        ] {
            assert_eq!(routes.destination(to.into()), Ok(expected), "{to:?}");
        }
        assert_ne!(routes.destination([255, 255, 255, 255].into()), Ok(Destination::Elsewhere));
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
