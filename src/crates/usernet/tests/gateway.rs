//! A guest in memory (smoltcp as the VM's side) behind a gateway whose far side are real sockets of this machine.
#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use domain::base::iana::Rcode;
use domain::base::{Message, MessageBuilder, Name};
use domain::rdata::A;
use microvm_isolation::host::net::Destination;
use microvm_isolation::model::EgressRule;
use microvm_usernet::frame::Wire;
use microvm_usernet::gateway::Gateway;
use microvm_usernet::outward::Outward;
use microvm_usernet::policy::Policy;
use mio::{Events, Poll};
use proptest::prelude::*;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpAddress, IpCidr, IpProtocol, Ipv4Packet,
};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 173, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 173, 0, 1);
/// Where the world has its machines.
const WEB: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
const GUEST_MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
const DEADLINE: Duration = Duration::from_secs(20);

/// Addresses that stand for sockets of this machine, and what was asked for.
#[derive(Debug, Default)]
struct World {
    places: HashMap<SocketAddr, SocketAddr>,
    asked: Vec<SocketAddr>,
}

impl World {
    fn place(&mut self, to: SocketAddr) -> io::Result<SocketAddr> {
        self.asked.push(to);
        self.places.get(&to).copied().ok_or_else(|| io::Error::from_raw_os_error(libc::EHOSTUNREACH))
    }
}

impl Outward for World {
    fn destination(&mut self, to: Ipv4Addr) -> Destination {
        // One address stands for the host's own.
        if to == Ipv4Addr::new(203, 0, 113, 2) {
            Destination::Local
        } else {
            Destination::Elsewhere
        }
    }

    fn tcp(&mut self, to: SocketAddr) -> io::Result<mio::net::TcpStream> {
        mio::net::TcpStream::connect(self.place(to)?)
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<mio::net::UdpSocket> {
        let socket = mio::net::UdpSocket::bind("127.0.0.1:0".parse().unwrap())?;
        socket.connect(self.place(to)?)?;
        Ok(socket)
    }

    fn ping(&mut self, _to: Ipv4Addr) -> io::Result<mio::net::UdpSocket> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// The guest's card.
#[derive(Default)]
struct Card {
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; length];
        let filled = fill(&mut frame);
        self.0.push(frame);
        filled
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        self.received.pop_front().map(|frame| (Received(frame), Sent(&mut self.sent)))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct Lab {
    gateway: Gateway<World>,
    poll: Poll,
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    begun: Instant,
    /// Frames of ICMP that the guest got, by type and code.
    icmp: Vec<(u8, u8)>,
    most_waiting: usize,
    port: u16,
}

impl Lab {
    fn new(world: World, egress: Option<&[&str]>, relayed: bool) -> Self {
        let poll = Poll::new().unwrap();
        let wire = Wire { guest_mac: GUEST_MAC, guest: GUEST, gateway_mac: GATEWAY_MAC, gateway: GATEWAY };
        let rules = egress.map(|texts| texts.iter().map(|text| EgressRule::parse(text).unwrap()).collect());
        let policy = Policy::new(GUEST, GATEWAY, rules);
        let begun = Instant::now();
        let resolvers = if relayed { vec![RESOLVER.into()] } else { Vec::new() };
        let registry = poll.registry().try_clone().unwrap();
        let gateway = Gateway::new(wire, policy, resolvers, world, registry, begun);
        let mut card = Card::default();
        let config = Config::new(HardwareAddress::Ethernet(GUEST_MAC));
        let mut interface = Interface::new(config, &mut card, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|all| all.push(IpCidr::new(IpAddress::Ipv4(GUEST), 30)).unwrap());
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        let sockets = SocketSet::new(Vec::new());
        Self { gateway, poll, card, interface, sockets, begun, icmp: Vec::new(), most_waiting: 0, port: 40_000 }
    }

    fn turn(&mut self) {
        let now = Instant::now();
        let at = smoltcp::time::Instant::from_micros(i64::try_from((now - self.begun).as_micros()).unwrap());
        self.interface.poll(at, &mut self.card, &mut self.sockets);
        for frame in std::mem::take(&mut self.card.sent) {
            self.gateway.receive(&frame, now);
        }
        self.gateway.run(now);
        let mut waiting = self.gateway.out.waiting().to_vec();
        self.most_waiting = self.most_waiting.max(waiting.len());
        self.gateway.out.sent(waiting.len());
        while !waiting.is_empty() {
            let length = u32::from_be_bytes(waiting[..4].try_into().unwrap()) as usize;
            let frame: Vec<u8> = waiting.drain(..4 + length).skip(4).collect();
            self.note(&frame);
            self.card.received.push_back(frame);
        }
        let mut events = Events::with_capacity(64);
        self.poll.poll(&mut events, Some(Duration::from_millis(1))).unwrap();
        let now = Instant::now();
        for event in &events {
            let over = event.is_error() || event.is_read_closed() || event.is_write_closed();
            self.gateway.ready(event.token(), event.is_readable() || over, event.is_writable() || over, now);
        }
    }

    fn note(&mut self, frame: &[u8]) {
        let frame = EthernetFrame::new_checked(frame).unwrap();
        assert_eq!((frame.src_addr(), frame.dst_addr()), (GATEWAY_MAC, GUEST_MAC));
        if frame.ethertype() == EthernetProtocol::Ipv4 {
            let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
            assert!(packet.verify_checksum() && packet.dst_addr() == GUEST);
            if packet.next_header() == IpProtocol::Icmp {
                self.icmp.push((packet.payload()[0], packet.payload()[1]));
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < DEADLINE, "{what}: nothing for {DEADLINE:?}");
            self.turn();
        }
    }

    fn for_a_while(&mut self) {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            self.turn();
        }
    }

    fn connect(&mut self, to: Ipv4Addr, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 64 << 10]);
        let handle = self.sockets.add(tcp::Socket::new(buffer(), buffer()));
        self.port += 1;
        let socket = self.sockets.get_mut::<tcp::Socket<'static>>(handle);
        socket.connect(self.interface.context(), (IpAddress::Ipv4(to), port), self.port).unwrap();
        handle
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 32 << 10]);
        let handle = self.sockets.add(udp::Socket::new(buffer(), buffer()));
        self.sockets.get_mut::<udp::Socket<'static>>(handle).bind(port).unwrap();
        handle
    }

    fn send_to(&mut self, handle: SocketHandle, to: Ipv4Addr, port: u16, bytes: &[u8]) {
        let socket = self.sockets.get_mut::<udp::Socket<'static>>(handle);
        socket.send_slice(bytes, (IpAddress::Ipv4(to), port)).unwrap();
    }

    fn heard(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut heard = None;
        self.until("a datagram", |lab| {
            let socket = lab.sockets.get_mut::<udp::Socket<'static>>(handle);
            heard = socket.recv().ok().map(|(bytes, _)| bytes.to_vec());
            heard.is_some()
        });
        heard.unwrap()
    }
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::V4(SocketAddrV4::new(address, port))
}

/// A world with a listener at 192.0.2.1:80.
fn web() -> (World, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut world = World::default();
    world.places.insert(at(WEB, 80), listener.local_addr().unwrap());
    (world, listener)
}

/// Takes one connection in a thread of its own.
fn serve<T: Send + 'static>(
    listener: TcpListener,
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(move || serve(listener.accept().unwrap().0))
}

#[test]
fn test_tcp_carries_both_ways_and_half_an_end_is_half_an_end() {
    const LENGTH: usize = 3 << 20;
    let (world, listener) = web();
    let peer = serve(listener, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        // The VM has said that it is done, and still hears.
        stream.write_all(&all).unwrap();
        all.len()
    });
    let mut lab = Lab::new(world, None, false);
    let handle = lab.connect(WEB, 80);
    let sent: Vec<u8> = (0..LENGTH).map(|n| (n * 7 % 251) as u8).collect();
    let (mut written, mut read) = (0, Vec::new());
    lab.until("the echo", |lab| {
        let socket = lab.tcp(handle);
        if socket.can_send() && written < LENGTH {
            written += socket.send_slice(&sent[written..]).unwrap();
            if written == LENGTH {
                socket.close();
            }
        }
        let mut buffer = [0; 65536];
        while socket.can_recv() {
            let length = socket.recv_slice(&mut buffer).unwrap();
            read.extend_from_slice(&buffer[..length]);
        }
        read.len() == LENGTH && !socket.may_recv()
    });
    assert!(read == sent);
    assert_eq!(peer.join().unwrap(), LENGTH);
    lab.until("the end", |lab| lab.gateway.flows() == 0);
}

#[test]
fn test_tcp_the_peers_end_comes_first_and_the_vm_still_sends() {
    let (world, listener) = web();
    let peer = serve(listener, |mut stream| {
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let mut lab = Lab::new(world, None, false);
    let handle = lab.connect(WEB, 80);
    lab.until("CLOSE-WAIT", |lab| lab.tcp(handle).state() == tcp::State::CloseWait);
    let mut buffer = [0; 16];
    assert_eq!(lab.tcp(handle).recv_slice(&mut buffer), Ok(5));
    lab.tcp(handle).send_slice(b"and a last word").unwrap();
    lab.tcp(handle).close();
    lab.until("the end", |lab| lab.gateway.flows() == 0);
    assert_eq!(peer.join().unwrap(), b"and a last word");
}

#[test]
fn test_tcp_a_port_without_a_listener_is_a_reset_and_a_host_that_is_not_there_is_told() {
    let (mut world, listener) = web();
    drop(listener);
    world.places.insert(at(WEB, 81), "127.0.0.1:1".parse().unwrap());
    let mut lab = Lab::new(world, None, false);
    let handle = lab.connect(WEB, 80);
    lab.until("the reset", |lab| lab.tcp(handle).state() == tcp::State::Closed);
    let _unanswered = lab.connect(Ipv4Addr::new(192, 0, 2, 99), 80);
    lab.until("the error", |lab| lab.icmp.contains(&(3, 1)));
    assert_eq!(lab.gateway.flows(), 0);
}

#[test]
fn test_tcp_a_reset_of_either_side_reaches_the_other() {
    let (world, listener) = web();
    let peer = serve(listener, |mut stream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        stream.read(&mut byte).unwrap_err().kind()
    });
    let mut lab = Lab::new(world, None, false);
    let handle = lab.connect(WEB, 80);
    lab.until("a connection", |lab| lab.tcp(handle).may_send());
    lab.tcp(handle).send_slice(b"x").unwrap();
    lab.for_a_while();
    lab.tcp(handle).abort();
    lab.until("the end", |lab| lab.gateway.flows() == 0);
    assert_eq!(peer.join().unwrap(), io::ErrorKind::ConnectionReset);

    let (world, listener) = web();
    // What was not read makes the end a reset.
    let peer = serve(listener, |stream| {
        std::thread::sleep(Duration::from_millis(200));
        drop(stream);
    });
    let mut lab = Lab::new(world, None, false);
    let handle = lab.connect(WEB, 80);
    lab.until("a connection", |lab| lab.tcp(handle).may_send());
    lab.tcp(handle).send_slice(b"x").unwrap();
    lab.until("the reset", |lab| lab.tcp(handle).state() == tcp::State::Closed);
    peer.join().unwrap();
    lab.until("the end", |lab| lab.gateway.flows() == 0);
}

#[test]
fn test_tcp_a_peer_that_does_not_read_holds_a_window() {
    let (world, listener) = web();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let peer = serve(listener, move |stream| {
        wait.recv().unwrap();
        drop(stream);
    });
    let mut lab = Lab::new(world, None, false);
    let handle = lab.connect(WEB, 80);
    lab.until("a connection", |lab| lab.tcp(handle).may_send());
    let (chunk, mut written, mut last) = (vec![7; 65536], 0, Instant::now());
    while last.elapsed() < Duration::from_millis(400) {
        if lab.tcp(handle).can_send() {
            written += lab.tcp(handle).send_slice(&chunk).unwrap();
            last = Instant::now();
        }
        lab.turn();
    }
    // The guest's and the gateway's buffer, and what the kernel takes for both ends of a loopback connection.
    assert!(written < 16 << 20, "{written}");
    assert!(lab.card.received.len() < 64);
    done.send(()).unwrap();
    peer.join().unwrap();
}

#[test]
fn test_tcp_a_vm_that_does_not_read_holds_a_window() {
    let (world, listener) = web();
    let peer = serve(listener, |mut stream| {
        stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let (chunk, mut written) = (vec![7; 65536], 0);
        while let Ok(length) = stream.write(&chunk) {
            written += length;
        }
        written
    });
    let mut lab = Lab::new(world, None, false);
    let _silent = lab.connect(WEB, 80);
    lab.until("a full pipe", |_| peer.is_finished());
    assert!(peer.join().unwrap() < 16 << 20);
    assert!(lab.most_waiting < 512 << 10, "{}", lab.most_waiting);
}

#[test]
fn test_policy_refuses_before_anything_is_opened() {
    let (world, _listener) = web();
    let mut lab = Lab::new(world, Some(&["192.0.2.0/24:80", "203.0.113.2", "127.0.0.0/8"]), false);
    // This machine, metadata, the host's own address, the gateway, a port and an address that are not listed.
    let never = [
        (Ipv4Addr::LOCALHOST, 80),
        (Ipv4Addr::new(169, 254, 169, 254), 80),
        (Ipv4Addr::new(203, 0, 113, 2), 80),
        (GATEWAY, 22),
        (WEB, 81),
        (Ipv4Addr::new(198, 51, 100, 1), 80),
    ];
    let udp = lab.udp(4000);
    for (to, port) in never {
        lab.connect(to, port);
        lab.send_to(udp, to, port, b"x");
    }
    lab.until("the refusals", |lab| lab.icmp.len() >= 2 * never.len());
    assert!(lab.icmp.iter().all(|message| *message == (3, 13)), "{:?}", lab.icmp);
    lab.send_to(udp, Ipv4Addr::new(224, 0, 0, 251), 5353, b"x");
    lab.for_a_while();
    assert_eq!(lab.gateway.flows(), 0);
    assert!(lab.gateway.outward().asked.is_empty());
    let handle = lab.connect(WEB, 80);
    lab.until("what is listed", |lab| lab.tcp(handle).may_send());
}

#[test]
fn test_udp_is_answered_and_a_closed_port_is_told() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut world = World::default();
    world.places.insert(at(WEB, 7), peer.local_addr().unwrap());
    world.places.insert(at(WEB, 9), "127.0.0.1:9".parse().unwrap());
    let mut lab = Lab::new(world, None, false);
    let handle = lab.udp(4000);
    lab.send_to(handle, WEB, 7, b"hello");
    peer.set_nonblocking(true).unwrap();
    let mut buffer = [0; 2000];
    let mut from = None;
    lab.until("the datagram", |_| {
        from = peer.recv_from(&mut buffer).ok();
        from.is_some()
    });
    assert_eq!(&buffer[..5], b"hello");
    // One that fits no packet is lost.
    peer.send_to(&[7; 1473], from.unwrap().1).unwrap();
    peer.send_to(&[8; 1472], from.unwrap().1).unwrap();
    assert_eq!(lab.heard(handle), [8; 1472]);
    lab.send_to(handle, WEB, 9, b"hello");
    lab.until("the error", |lab| lab.icmp.contains(&(3, 3)));
}

/// A server of names: every name has this address.
fn resolver(address: Ipv4Addr, questions: usize) -> (SocketAddr, std::thread::JoinHandle<Vec<String>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        let mut names = Vec::new();
        while names.len() < questions {
            let mut buffer = [0; 2000];
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            let answer = resolve(&buffer[..length], address, &mut names);
            socket.send_to(&answer, from).unwrap();
        }
        names
    });
    (at, serving)
}

fn resolve(message: &[u8], address: Ipv4Addr, names: &mut Vec<String>) -> Vec<u8> {
    let question = Message::from_octets(message).unwrap();
    let name: Name<Vec<u8>> = domain::base::ToName::to_name(question.sole_question().unwrap().qname());
    names.push(name.to_string());
    let mut answer = MessageBuilder::new_vec().start_answer(&question, Rcode::NOERROR).unwrap();
    answer.push((name, 60, A::new(address))).unwrap();
    answer.finish()
}

fn query(name: &str) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(7);
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    let name: Name<Vec<u8>> = name.parse().unwrap();
    builder.push((name, domain::base::iana::Rtype::A)).unwrap();
    builder.finish()
}

#[test]
fn test_relay_a_listed_name_opens_its_address_and_no_other_is_asked_for() {
    let (mut world, _listener) = web();
    let (place, resolver) = resolver(WEB, 1);
    world.places.insert(at(RESOLVER, 53), place);
    let mut lab = Lab::new(world, Some(&["web.test:80"]), true);
    let before = lab.connect(WEB, 80);
    lab.until("the refusal", |lab| lab.icmp == [(3, 13)]);
    lab.tcp(before).abort();
    let handle = lab.udp(4000);
    lab.send_to(handle, GATEWAY, 53, &query("secret.evil.test"));
    let refused = lab.heard(handle);
    assert_eq!(Message::from_octets(&refused).unwrap().header().rcode(), Rcode::REFUSED);
    lab.send_to(handle, GATEWAY, 53, &query("web.test"));
    let answer = lab.heard(handle);
    let answer = Message::from_octets(&answer).unwrap();
    assert_eq!((answer.header().id(), answer.header_counts().ancount()), (7, 1));
    assert_eq!(resolver.join().unwrap(), ["web.test"]);
    let after = lab.connect(WEB, 80);
    lab.until("a connection", |lab| lab.tcp(after).may_send());
}

#[test]
fn test_relay_serves_connections_too() {
    let (mut world, listener) = web();
    // The server's own TCP side.
    world.places.insert(at(RESOLVER, 53), listener.local_addr().unwrap());
    let server = serve(listener, |mut stream| {
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut message).unwrap();
        let answer = resolve(&message, WEB, &mut Vec::new());
        stream.write_all(&u16::try_from(answer.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&answer).unwrap();
    });
    let mut lab = Lab::new(world, None, true);
    let handle = lab.connect(GATEWAY, 53);
    lab.until("a connection", |lab| lab.tcp(handle).may_send());
    let question = query("a.test");
    let framed = [&u16::try_from(question.len()).unwrap().to_be_bytes()[..], &question].concat();
    // In two pieces.
    lab.tcp(handle).send_slice(&framed[..5]).unwrap();
    lab.for_a_while();
    lab.tcp(handle).send_slice(&framed[5..]).unwrap();
    let mut read = Vec::new();
    lab.until("the answer", |lab| {
        let mut buffer = [0; 1000];
        if lab.tcp(handle).can_recv() {
            let length = lab.tcp(handle).recv_slice(&mut buffer).unwrap();
            read.extend_from_slice(&buffer[..length]);
        }
        read.len() > 2 && read.len() == 2 + usize::from(u16::from_be_bytes([read[0], read[1]]))
    });
    assert_eq!(Message::from_octets(&read[2..]).unwrap().header_counts().ancount(), 1);
    server.join().unwrap();
    lab.tcp(handle).close();
    lab.until("the end", |lab| lab.gateway.flows() == 0);
}

#[test]
fn test_relay_a_server_that_does_not_answer_is_a_failure_in_time() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut world = World::default();
    world.places.insert(at(RESOLVER, 53), silent.local_addr().unwrap());
    let mut lab = Lab::new(world, None, true);
    let handle = lab.udp(4000);
    lab.send_to(handle, GATEWAY, 53, &query("a.test"));
    let begun = Instant::now();
    let answer = lab.heard(handle);
    assert_eq!(Message::from_octets(&answer).unwrap().header().rcode(), Rcode::SERVFAIL);
    // One server, asked twice.
    assert!((3..6).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert_eq!(lab.gateway.flows(), 0);
}

/// A SYN of the guest's, as a frame.
fn syn(from: u16, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let caps = smoltcp::phy::ChecksumCapabilities::default();
    let tcp = smoltcp::wire::TcpRepr {
        src_port: from,
        dst_port: port,
        control: smoltcp::wire::TcpControl::Syn,
        seq_number: smoltcp::wire::TcpSeqNumber(1),
        ack_number: None,
        window_len: 1000,
        window_scale: None,
        max_seg_size: Some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let ip = smoltcp::wire::Ipv4Repr {
        src_addr: GUEST,
        dst_addr: to,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let mut frame = vec![0; 14 + 20 + tcp.buffer_len()];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
    let header =
        smoltcp::wire::EthernetRepr { src_addr: GUEST_MAC, dst_addr: GATEWAY_MAC, ethertype: EthernetProtocol::Ipv4 };
    header.emit(&mut ethernet);
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &caps);
    let mut segment = smoltcp::wire::TcpPacket::new_unchecked(&mut frame[34..]);
    tcp.emit(&mut segment, &GUEST.into(), &to.into(), &caps);
    frame
}

#[test]
fn test_flood_of_connections_has_a_most() {
    let (world, listener) = web();
    let mut lab = Lab::new(world, None, false);
    for from in 1000..6000 {
        lab.gateway.receive(&syn(from, WEB, 80), Instant::now());
    }
    // The listener's queue is full long before: the rest is being connected.
    assert!(lab.gateway.flows() <= 256, "{}", lab.gateway.flows());
    for _ in 0..20 {
        lab.turn();
    }
    drop(listener);
}

#[test]
fn test_frames_that_are_not_the_vms_own_are_nothing() {
    let (world, _listener) = web();
    let mut lab = Lab::new(world, None, false);
    let good = syn(4000, WEB, 80);
    let changed = |at: usize, value: u8| {
        let mut frame = good.clone();
        frame[at] = value;
        let mut packet = Ipv4Packet::new_unchecked(&mut frame[14..]);
        packet.fill_checksum();
        frame
    };
    // Its MAC, the gateway's, IPv6, options, a fragment, its address, and a checksum that does not fit.
    for (at, value) in [(11, 0), (5, 9), (12, 0x86), (14, 0x46), (20, 0x20), (21, 1), (29, 9), (50, 7)] {
        lab.gateway.receive(&changed(at, value), Instant::now());
        lab.for_a_while();
        assert!(lab.gateway.flows() == 0 && lab.gateway.out.waiting().is_empty(), "byte {at}");
    }
    assert!(lab.gateway.outward().asked.is_empty());
    lab.gateway.receive(&good, Instant::now());
    assert_eq!(lab.gateway.outward().asked.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Valid heads with whatever behind them.
    #[test]
    fn test_any_frames_leave_the_gateway_whole(
        frames in prop::collection::vec((0usize..4, prop::collection::vec(any::<u8>(), 0..200)), 1..40),
    ) {
        let mut lab = Lab::new(World::default(), None, true);
        let head = syn(4000, WEB, 80);
        for (kept, bytes) in frames {
            let kept = [0, 14, 34, 54][kept];
            let mut frame = [&head[..kept], &bytes[..]].concat();
            if kept >= 34 {
                let length = u16::try_from(frame.len() - 14).unwrap();
                let mut packet = Ipv4Packet::new_unchecked(&mut frame[14..]);
                packet.set_total_len(length);
                packet.fill_checksum();
            }
            lab.gateway.receive(&frame, Instant::now());
            lab.gateway.run(Instant::now());
        }
        prop_assert!(lab.gateway.flows() <= 64);
        prop_assert!(lab.gateway.out.waiting().len() <= 512 << 10);
    }
}
