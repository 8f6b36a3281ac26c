//! News from nf_tables.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{bind, recv, socket, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

/// linux/netfilter/nfnetlink.h: the multicast group of nf_tables, as a bit, and its subsystem's number.
const NFNLGRP_NFTABLES: u32 = 1 << (7 - 1);
const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// linux/netfilter/nf_tables.h.
const NFT_MSG_DELTABLE: u16 = 2;
/// netlink(7): `struct nlmsghdr` has the length, then the type, and 16 bytes in all.
const HEADER: usize = 16;

/// Tells of tables that were removed, by whomever.
#[derive(Debug)]
pub struct Removals(AsyncFd<OwnedFd>);

impl Removals {
    /// Call on the runtime.
    pub fn subscribe() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFNLGRP_NFTABLES))?;
        // SAFETY: an `OwnedFd` answers with the same open descriptor for as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        socket
            .map(Self)
            .map_err(|error| Errno::from_raw(std::io::Error::from(error).raw_os_error().unwrap_or(libc::EIO)))
    }

    /// Waits for the next one, or for the news that some were lost.
    pub async fn next(&self) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = |socket: &OwnedFd| match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // More came than the socket could hold.
                Err(Errno::ENOBUFS) => Ok(None),
                read => read.map(Some).map_err(std::io::Error::from),
            };
            match self.0.async_io(Interest::READABLE, read).await? {
                Some(length) if !tells_of_removal(&buffer[..length]) => {}
                _ => return Ok(()),
            }
        }
    }
}

fn tells_of_removal(mut messages: &[u8]) -> bool {
    while let Some([a, b, c, d, kind @ ..]) = messages.first_chunk::<6>() {
        if u16::from_ne_bytes(*kind) == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE {
            return true;
        }
        let length = (u32::from_ne_bytes([*a, *b, *c, *d]) as usize).max(HEADER).next_multiple_of(4);
        messages = messages.get(length..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, length: u32) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.resize((length as usize).max(HEADER).next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn test_tells_of_removal_looks_at_every_message() {
        let (other, removed) = (message(0x0a00, 30), message(0x0a02, 20));
        assert!(tells_of_removal(&[other.clone(), removed].concat()));
        assert!(!tells_of_removal(&[other, message(0x0a01, 3)].concat()));
        assert!(!tells_of_removal(&[]));
    }
}
