//! The gateway of a user-mode network: whatever frames its VM sends, and however their stream is cut.
#![no_main]

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use microvm_isolation::host::net::Destination;
use microvm_isolation::model::EgressRule;
use microvm_usernet::frame::Wire;
use microvm_usernet::gateway::Gateway;
use microvm_usernet::outward::Outward;
use microvm_usernet::policy::Policy;
use microvm_usernet::stream::Frames;
use smoltcp::wire::EthernetAddress;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 173, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 173, 0, 1);

/// A network that nothing reaches: the policy is asked all the same.
struct Nowhere;

impl Outward for Nowhere {
    fn destination(&mut self, _to: Ipv4Addr) -> Destination {
        Destination::Elsewhere
    }

    fn tcp(&mut self, to: SocketAddr) -> io::Result<mio::net::TcpStream> {
        refused(to)
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<mio::net::UdpSocket> {
        refused(to)
    }

    fn ping(&mut self, to: Ipv4Addr) -> io::Result<mio::net::UdpSocket> {
        refused(SocketAddr::new(to.into(), 0))
    }
}

fn refused<T>(to: SocketAddr) -> io::Result<T> {
    // What no VM may reach was stopped before.
    assert!(!microvm_isolation::net::is_never(match to.ip() {
        std::net::IpAddr::V4(ip) => ip,
        std::net::IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }));
    Err(io::ErrorKind::ConnectionRefused.into())
}

fuzz_target!(|bytes: &[u8]| {
    let (mut frames, mut stream, now) = (Frames::default(), bytes, Instant::now());
    let wire = Wire {
        guest_mac: EthernetAddress([2, 0, 0, 0, 0, 2]),
        guest: GUEST,
        gateway_mac: EthernetAddress([2, 0, 0, 0, 0, 1]),
        gateway: GATEWAY,
    };
    let rules = EgressRule::parse("*.test").ok().map(|rule| vec![rule]).filter(|_| bytes.len() % 2 == 0);
    let Ok(poll) = mio::Poll::new() else { return };
    let Ok(registry) = poll.registry().try_clone() else { return };
    let policy = Policy::new(GUEST, GATEWAY, rules);
    let mut gateway = Gateway::new(wire, policy, vec![Ipv4Addr::new(192, 0, 2, 53).into()], Nowhere, registry, now);
    while frames.read(&mut stream, 4096).is_ok() {
        loop {
            match frames.next_frame() {
                Ok(Some(frame)) => gateway.receive(&fitted(frame), now),
                Ok(None) => break,
                Err(_) => return,
            }
            gateway.run(now);
        }
    }
    assert!(gateway.flows() <= 64);
    assert!(gateway.out.waiting().len() <= 512 << 10);
});

/// The same with the checksums of IP, TCP, UDP and ICMP that it should have: else few frames would come far.
fn fitted(frame: &[u8]) -> Vec<u8> {
    use smoltcp::wire::{Icmpv4Packet, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket};
    let mut frame = frame.to_vec();
    let Some(bytes) = frame.get_mut(14..) else { return frame };
    let Ok(mut ip) = Ipv4Packet::new_checked(bytes) else { return frame };
    ip.fill_checksum();
    let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
    let protocol = ip.next_header();
    let payload = ip.payload_mut();
    match protocol {
        IpProtocol::Tcp => drop(TcpPacket::new_checked(payload).map(|mut tcp| tcp.fill_checksum(&from, &to))),
        IpProtocol::Udp => drop(UdpPacket::new_checked(payload).map(|mut udp| udp.fill_checksum(&from, &to))),
        IpProtocol::Icmp => drop(Icmpv4Packet::new_checked(payload).map(|mut icmp| icmp.fill_checksum())),
        _ => {}
    }
    frame
}
