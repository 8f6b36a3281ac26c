//! One TCP connection of the VM: its near end is a socket of smoltcp, alone on an interface of its own, its far end a
//! socket of the host, or the gateway's DNS relay.
//!
//! Architecture invariant: what one side cannot take stays with the other. A near end takes no more from the VM than its
//! window, a far end is read only into room that is there.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use nix::sys::socket::{setsockopt, sockopt};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use crate::frame::MTU;
use crate::out::Out;
use crate::relay::Session;

/// What one pass moves of one connection, so that others have their turn.
const MOST_AT_ONCE: usize = 256 << 10;
/// Packets of one connection that wait for its turn; a window of any size that is given has no more.
const MOST_WAITING: usize = 512;
/// After which silence a peer is asked whether it is still there.
const KEEP_ALIVE_S: u64 = 120;

/// A connection, by the VM's port and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub from: u16,
    pub to: SocketAddrV4,
}

/// How a pass left a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Pass {
    /// It waits for an event or, if there is one, for this time.
    Waits(Option<Instant>),
    /// It has more to do at once, or as soon as there is room on the wire.
    GoesOn,
    Ended,
}

/// The far end.
#[derive(Debug)]
pub enum Far {
    /// The host's kernel connects; the VM's first packet is answered when it has.
    Dialing {
        stream: TcpStream,
        first: Vec<u8>,
    },
    Host(TcpStream),
    Relay(Box<Session>),
}

/// Packets for a near end, and what it sends.
struct Port<'a> {
    inbox: &'a mut VecDeque<Vec<u8>>,
    out: &'a mut Out,
    has_failed: &'a mut bool,
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a mut Out);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        self.0.packet(length, fill)
    }
}

fn capabilities() -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = MTU;
    // frame.rs has checked what comes in.
    capabilities.checksum.ipv4 = smoltcp::phy::Checksum::Tx;
    capabilities.checksum.tcp = smoltcp::phy::Checksum::Tx;
    capabilities
}

impl Device for Port<'_> {
    type RxToken<'t>
        = Received
    where
        Self: 't;
    type TxToken<'t>
        = Sent<'t>
    where
        Self: 't;

    fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        // An answer to a packet may overfill the wire's room: there is one for each packet at most.
        self.inbox.pop_front().map(|packet| (Received(packet), Sent(self.out)))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Sent<'_>> {
        if self.out.is_full() {
            *self.has_failed = true;
            return None;
        }
        Some(Sent(self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

/// Smoltcp's clock: microseconds since the gateway began.
#[derive(Debug, Clone, Copy)]
pub struct Clock(pub Instant);

impl Clock {
    fn of(self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.saturating_duration_since(self.0).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn back(self, at: smoltcp::time::Instant) -> Instant {
        self.0 + Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0))
    }
}

/// The VM's side of a connection.
struct Near {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    inbox: VecDeque<Vec<u8>>,
}

impl std::fmt::Debug for Near {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Near").field("waiting", &self.inbox.len()).finish_non_exhaustive()
    }
}

/// A buffer in each direction.
fn near(to: SocketAddrV4, guest: Ipv4Addr, buffer: usize, seed: u64, clock: Clock, now: Instant) -> Option<Near> {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = seed;
    struct Nothing;
    impl Device for Nothing {
        type RxToken<'t> = Received;
        type TxToken<'t> = Sent<'t>;
        fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
            None
        }
        fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Sent<'_>> {
            None
        }
        fn capabilities(&self) -> DeviceCapabilities {
            capabilities()
        }
    }
    let mut interface = Interface::new(config, &mut Nothing, clock.of(now));
    interface.update_ip_addrs(|addresses| {
        // The capacity is two.
        let _full = addresses.push(IpCidr::new(IpAddress::Ipv4(*to.ip()), 32));
    });
    interface.routes_mut().add_default_ipv4_route(guest).ok()?;
    let mut socket = Socket::new(SocketBuffer::new(vec![0; buffer]), SocketBuffer::new(vec![0; buffer]));
    // The wire loses nothing and takes no time: what there is to say is said at once.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_keep_alive(Some(smoltcp::time::Duration::from_secs(KEEP_ALIVE_S)));
    socket.listen((IpAddress::Ipv4(*to.ip()), to.port())).ok()?;
    let mut sockets = SocketSet::new(Vec::with_capacity(1));
    let handle = sockets.add(socket);
    Some(Near { interface, sockets, handle, inbox: VecDeque::new() })
}

#[derive(Debug)]
pub struct Connection {
    pub key: Key,
    pub far: Far,
    near: Near,
    clock: Clock,
    buffer: usize,
    /// What the kernel said last of the far socket; it says so once.
    pub readable: bool,
    pub writable: bool,
    /// The VM has said that it sends no more.
    fin_seen: bool,
    /// And the far end was told.
    near_is_done: bool,
    /// The far end has sent all that it will, and the VM was told.
    far_is_done: bool,
}

impl Connection {
    /// `buffer` is what it holds in each direction at most; `first` the VM's first packet.
    pub fn new(
        key: Key,
        guest: Ipv4Addr,
        far: Far,
        buffer: usize,
        seed: u64,
        clock: Clock,
        now: Instant,
    ) -> Option<Self> {
        let near = near(key.to, guest, buffer, seed, clock, now)?;
        let (readable, writable, fin_seen, near_is_done, far_is_done) = (false, false, false, false, false);
        Some(Self { key, far, near, clock, buffer, readable, writable, fin_seen, near_is_done, far_is_done })
    }

    /// The memory that it was given.
    pub fn memory(&self) -> usize {
        2 * self.buffer
    }

    pub fn is_dialing(&self) -> bool {
        matches!(self.far, Far::Dialing { .. })
    }

    /// Takes a packet of the VM; one too many is lost, and sent again.
    pub fn receive(&mut self, packet: &[u8]) {
        if self.near.inbox.len() < MOST_WAITING {
            self.near.inbox.push_back(packet.to_vec());
        }
    }

    /// Whether the host's kernel has connected; the first packet is taken if it has.
    ///
    /// # Errors
    /// Why it has not; the connection is over.
    pub fn dialed(&mut self) -> io::Result<bool> {
        let Far::Dialing { stream, .. } = &self.far else { return Ok(true) };
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        match stream.peer_addr() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(false),
            Err(error) => return Err(error),
        }
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        if let Far::Dialing { stream, first } = std::mem::replace(&mut self.far, Far::Relay(Box::default())) {
            self.far = Far::Host(stream);
            self.near.inbox.push_back(first);
        }
        Ok(true)
    }

    /// Moves what can be moved.
    pub fn pass(&mut self, out: &mut Out, now: Instant) -> Pass {
        if self.is_dialing() {
            self.near.inbox.clear();
            return Pass::Waits(None);
        }
        let mut has_failed = self.poll(out, now);
        let outcome = self.transfer();
        if outcome.is_err() {
            // The far end is gone without a farewell: so is the near one.
            self.socket().abort();
        }
        has_failed |= self.poll(out, now);
        let state = self.socket().state();
        match (outcome, state) {
            (Err(_), _) => Pass::Ended,
            // What is left has been said to both, and the wire loses nothing.
            (Ok(_), State::TimeWait | State::Closed) if self.socket().recv_queue() == 0 || !self.fin_seen => {
                self.end();
                Pass::Ended
            }
            (Ok(true), _) => Pass::GoesOn,
            (Ok(false), _) if has_failed => Pass::GoesOn,
            (Ok(false), _) => {
                let at = self.near.interface.poll_at(self.clock.of(now), &self.near.sockets);
                Pass::Waits(at.map(|at| self.clock.back(at).max(now)))
            }
        }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.near.sockets.get_mut(self.near.handle)
    }

    /// Has the near end take its packets and send what it has; whether the wire had no room.
    fn poll(&mut self, out: &mut Out, now: Instant) -> bool {
        let mut has_failed = false;
        let now = self.clock.of(now);
        let Near { interface, sockets, inbox, .. } = &mut self.near;
        interface.poll(now, &mut Port { inbox, out, has_failed: &mut has_failed }, sockets);
        has_failed
    }

    /// Moves bytes both ways; whether there is more at once.
    fn transfer(&mut self) -> io::Result<bool> {
        let Self { far, near, readable, writable, fin_seen, near_is_done, far_is_done, .. } = self;
        let socket = near.sockets.get_mut::<Socket<'static>>(near.handle);
        let mut moved = 0;
        while *writable && moved < MOST_AT_ONCE && socket.can_recv() {
            let mut outcome = Ok(0);
            let taken = socket.recv(|bytes| {
                outcome = far.write(bytes);
                (*outcome.as_ref().unwrap_or(&0), ())
            });
            taken.map_err(io::Error::other)?;
            match outcome {
                Ok(0) => *writable = false,
                Ok(length) => moved += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => *writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // What was before the FIN is handed on first.
        *fin_seen |= matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if *fin_seen && !*near_is_done && socket.recv_queue() == 0 {
            *near_is_done = true;
            far.close();
        }
        while *readable && moved < MOST_AT_ONCE && socket.can_send() {
            let mut outcome = Ok(0);
            let given = socket.send(|room| {
                if room.is_empty() {
                    return (0, ());
                }
                outcome = far.read(room);
                (*outcome.as_ref().unwrap_or(&0), ())
            });
            given.map_err(io::Error::other)?;
            match outcome {
                Ok(0) => {
                    *readable = false;
                    *far_is_done = true;
                    socket.close();
                }
                Ok(length) => moved += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => *readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(moved >= MOST_AT_ONCE)
    }

    /// Lets go of the far end: in peace, or as the VM did.
    fn end(&mut self) {
        if !(self.near_is_done && self.far_is_done) {
            self.far.reset();
        }
    }
}

impl Far {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Far::Dialing { .. } => Err(io::ErrorKind::WouldBlock.into()),
            Far::Host(stream) => stream.write(bytes),
            Far::Relay(session) => session.take(bytes),
        }
    }

    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Far::Dialing { .. } => Err(io::ErrorKind::WouldBlock.into()),
            Far::Host(stream) => stream.read(room),
            Far::Relay(session) => session.give(room),
        }
    }

    fn close(&mut self) {
        match self {
            Far::Dialing { .. } => {}
            Far::Host(stream) => {
                if let Err(error) = stream.shutdown(Shutdown::Write) {
                    log::debug!("a peer was gone before it was told of the end: {error}");
                }
            }
            Far::Relay(session) => session.close(),
        }
    }

    /// Has the peer hear of a reset, not of an end.
    fn reset(&mut self) {
        let (Far::Host(stream) | Far::Dialing { stream, .. }) = self else { return };
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        if let Err(errno) = setsockopt(&stream.as_fd(), sockopt::Linger, &linger) {
            log::debug!("a peer hears of an end where there was a reset: {errno}");
        }
    }
}
