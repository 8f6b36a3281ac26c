//! The host's side: sockets of this process, and what the kernel says of addresses.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;

use microvm_isolation::host::net::{Destination, Routes};
use mio::net::{TcpStream, UdpSocket};
use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn};
use std::os::fd::AsRawFd;

/// Where flows go; the tests put another machine there.
pub trait Outward {
    fn destination(&mut self, to: Ipv4Addr) -> Destination;
    /// A connection that has begun.
    ///
    /// # Errors
    /// The kernel's.
    fn tcp(&mut self, to: SocketAddr) -> io::Result<TcpStream>;
    /// A socket that sends to one peer and hears it alone.
    ///
    /// # Errors
    /// The kernel's.
    fn udp(&mut self, to: SocketAddr) -> io::Result<UdpSocket>;
    /// The same for echo requests; many hosts let no ordinary user have one (net.ipv4.ping_group_range).
    ///
    /// # Errors
    /// The kernel's.
    fn ping(&mut self, to: Ipv4Addr) -> io::Result<UdpSocket>;
}

/// The network that this process is in.
#[derive(Debug)]
pub struct Host(Routes);

impl Host {
    /// # Errors
    /// There is no netlink socket: nothing would say which addresses are the host's own.
    pub fn open() -> io::Result<Self> {
        Ok(Self(Routes::open()?))
    }
}

impl Outward for Host {
    fn destination(&mut self, to: Ipv4Addr) -> Destination {
        self.0.destination(to).unwrap_or_else(|errno| {
            log::warn!("the kernel does not say where {to} is ({errno}): it is taken for this host's own");
            Destination::Local
        })
    }

    fn tcp(&mut self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<UdpSocket> {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        Ok(socket)
    }

    fn ping(&mut self, to: Ipv4Addr) -> io::Result<UdpSocket> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, SockProtocol::Icmp)?;
        connect(socket.as_fd().as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(to, 0)))?;
        Ok(UdpSocket::from_std(socket.into()))
    }
}
