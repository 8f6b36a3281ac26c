//! Sockets of one interface: nobody reaches them by another one, whatever address is asked for.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    bind, getsockname, listen, setsockopt, socket, sockopt, AddressFamily, Backlog, SockFlag, SockType, SockaddrIn,
};

use super::Refusal;
use crate::error::Cause;

/// How often another port is tried when one is free for UDP alone.
const TRIES: usize = 16;
const BACKLOG: i32 = 16;

/// A port of both kinds.
#[derive(Debug)]
pub struct Listening {
    pub udp: UdpSocket,
    pub tcp: TcpListener,
    pub port: u16,
}

/// Listens on a free port of `interface`; neither socket blocks.
///
/// # Errors
/// No port or descriptor is left, or the process may not.
pub fn listen_on(interface: &str) -> Result<Listening, Refusal> {
    let mut last = nix::errno::Errno::EADDRINUSE;
    for _ in 0..TRIES {
        match try_listen(interface) {
            Ok(listening) => return Ok(listening),
            Err(errno) => last = errno,
        }
    }
    let text = format!("a DNS relay cannot listen on {interface}: {last}");
    Err(Refusal::new(Cause::explained(last, text), "look at its limits and capabilities"))
}

fn try_listen(interface: &str) -> nix::Result<Listening> {
    let udp = bound(interface, SockType::Datagram, 0)?;
    let address: SockaddrIn = getsockname(udp.as_raw_fd())?;
    let tcp = bound(interface, SockType::Stream, address.port())?;
    listen(&tcp, Backlog::new(BACKLOG)?)?;
    Ok(Listening { udp: udp.into(), tcp: tcp.into(), port: address.port() })
}

fn bound(interface: &str, kind: SockType, port: u16) -> nix::Result<OwnedFd> {
    let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsStr::new(interface).to_owned())?;
    // The interface has no address yet; it will have one.
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)))?;
    Ok(socket)
}
