//! Where the kernel would send a packet. Asking sends none.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{recv, send, socket, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};

/// rtnetlink(7), linux/rtnetlink.h.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLM_F_REQUEST: u16 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTN_UNICAST: u8 = 1;
/// `struct nlmsghdr`, `struct rtmsg`, `struct rtattr`.
const HEADER: usize = 16;
const RTMSG: usize = 12;
const ATTRIBUTE: usize = 4;

/// The index of the interface by which the host's own packets to `to` leave, by all its tables and rules; `None`: there is no
/// way, or it may not be asked.
#[must_use]
pub fn way_to(to: Ipv4Addr) -> Option<u32> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
    let socket = socket.ok()?;
    send(socket.as_raw_fd(), &question(to), MsgFlags::empty()).ok()?;
    let mut buffer = [0; 4096];
    // The kernel has answered by the time that send(2) comes back.
    let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).ok()?;
    parse(buffer.get(..length)?)
}

fn question(to: Ipv4Addr) -> Vec<u8> {
    let length = HEADER + RTMSG + ATTRIBUTE + 4;
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&(length as u32).to_ne_bytes());
    for number in [RTM_GETROUTE, NLM_F_REQUEST] {
        message.extend_from_slice(&number.to_ne_bytes());
    }
    // Sequence and port; then family and prefix, all else zero.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[libc::AF_INET as u8, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for number in [(ATTRIBUTE + 4) as u16, RTA_DST] {
        message.extend_from_slice(&number.to_ne_bytes());
    }
    message.extend_from_slice(&to.octets());
    message
}

fn parse(message: &[u8]) -> Option<u32> {
    let u16_at = |bytes: &[u8], at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let kind = *message.get(HEADER + 7)?;
    if u16_at(message, 4)? != RTM_NEWROUTE || kind != RTN_UNICAST {
        return None;
    }
    let mut attributes = message.get(HEADER + RTMSG..)?;
    loop {
        let (length, kind) = (usize::from(u16_at(attributes, 0)?), u16_at(attributes, 2)?);
        if kind == RTA_OIF {
            return Some(u32::from_ne_bytes(attributes.get(ATTRIBUTE..ATTRIBUTE + 4)?.try_into().ok()?));
        }
        attributes = attributes.get(length.max(ATTRIBUTE).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_way_to_this_machine_is_no_way_out() {
        // Of type "local".
        assert_eq!(way_to(Ipv4Addr::LOCALHOST), None);
    }

    #[test]
    fn test_parse_finds_the_interface_behind_other_attributes() {
        let mut message = vec![0; HEADER + RTMSG];
        message[4..6].copy_from_slice(&RTM_NEWROUTE.to_ne_bytes());
        message[HEADER + 7] = RTN_UNICAST;
        for (kind, data) in [(15u16, [254, 0, 0, 0]), (RTA_DST, [8, 8, 8, 8]), (RTA_OIF, 7u32.to_ne_bytes())] {
            message.extend_from_slice(&8u16.to_ne_bytes());
            message.extend_from_slice(&kind.to_ne_bytes());
            message.extend_from_slice(&data);
        }
        assert_eq!(parse(&message), Some(7));
        assert_eq!(parse(&message[..message.len() - 1]), None);
        message[HEADER + 7] = 7;
        assert_eq!(parse(&message), None);
        assert_eq!(parse(&[2; 20]), None);
    }
}
