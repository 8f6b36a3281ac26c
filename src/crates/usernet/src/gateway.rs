//! The VM's gateway: frames and readiness go in, frames come out.
//!
//! Architecture invariant: every flow is asked about ([`Policy`]) before anything is opened for it, and everything that
//! a VM can have more of has a most.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use microvm_isolation::net::{Decision, Relayed};
use mio::{Interest, Registry, Token};

use crate::chance::Chance;
use crate::datagram;
use crate::frame::{Content, Inbound, Packet, Unreachable, Wire};
use crate::out::Out;
use crate::outward::Outward;
use crate::policy::{Policy, Ruling};
use crate::relay::{Progress, Query, ReplyTo, DNS_PORT, IDLE};
use crate::tcp::{self, Clock, Connection, Far, Pass};

/// Flows that one VM may have; as in `net/rules.rs` of the core.
const MAX_FLOWS: usize = 2048;
/// Connections that the host's kernel may be making at once.
const MAX_DIALING: usize = 256;
/// Flows without a connection: each has a socket until it has been silent for long.
const MAX_DATAGRAM_FLOWS: usize = 512;
/// Questions that may be under way at once; more are lost, as they might be on any network.
const MAX_QUESTIONS: usize = 64;
/// Connections with the relay.
const MAX_SESSIONS: usize = 16;
/// Buffers of connections, by what all have together: many connections have less each, and all of them together at most
/// 44 MiB.
const BUFFERS: [(usize, usize); 4] =
    [(8 << 20, 256 << 10), (16 << 20, 64 << 10), (32 << 20, 16 << 10), (usize::MAX, 4 << 10)];
/// How often the gateway may warn.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// The tokens of the loop itself; those of flows come after.
pub const FIRST_TOKEN: usize = 2;

#[derive(Debug)]
enum Flow {
    Tcp(Box<Connection>),
    Datagram(datagram::Flow),
    Query(Box<Query>),
}

/// A flow in its place.
#[derive(Debug)]
struct Slot {
    flow: Flow,
    /// No two flows ever have the same.
    number: u64,
    /// When it is looked at if nothing happens before.
    due: Option<Instant>,
    /// It is in the list of those that have something to do.
    is_waiting: bool,
}

#[derive(Debug)]
pub struct Gateway<O> {
    wire: Wire,
    policy: Policy,
    resolvers: Vec<IpAddr>,
    outward: O,
    registry: Registry,
    pub out: Out,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    connections: HashMap<tcp::Key, usize>,
    datagrams: HashMap<datagram::Key, usize>,
    due: BTreeSet<(Instant, usize)>,
    /// Those that have something to do.
    waiting: VecDeque<usize>,
    dialing: usize,
    sessions: usize,
    queries: usize,
    memory: usize,
    number: u64,
    clock: Clock,
    chance: Chance,
    warned: Option<Instant>,
    left_out: u64,
}

impl<O: Outward> Gateway<O> {
    pub fn new(
        wire: Wire,
        policy: Policy,
        resolvers: Vec<IpAddr>,
        outward: O,
        registry: Registry,
        now: Instant,
    ) -> Self {
        Self {
            wire,
            policy,
            resolvers,
            outward,
            registry,
            out: Out::new(wire, now),
            slots: Vec::new(),
            free: Vec::new(),
            connections: HashMap::new(),
            datagrams: HashMap::new(),
            due: BTreeSet::new(),
            waiting: VecDeque::new(),
            dialing: 0,
            sessions: 0,
            queries: 0,
            memory: 0,
            number: 0,
            clock: Clock(now),
            chance: Chance::default(),
            warned: None,
            left_out: 0,
        }
    }

    /// Takes a frame of the VM. [`Gateway::run`] does what comes of it.
    pub fn receive(&mut self, frame: &[u8], now: Instant) {
        match self.wire.parse(frame) {
            None => {}
            Some(Inbound::Arp(answer)) => self.out.push(Some(answer)),
            Some(Inbound::Packet(packet)) => self.packet(&packet, now),
        }
    }

    fn packet(&mut self, packet: &Packet<'_>, now: Instant) {
        // What belongs to a flow was asked about when the flow began.
        match packet.content {
            Content::Tcp { from, to, is_syn, is_rst } => {
                let key = tcp::Key { from, to: SocketAddrV4::new(packet.to, to) };
                match self.connections.get(&key).copied() {
                    Some(at) => self.segment(at, packet, is_rst),
                    None if is_syn => self.connect(key, packet, now),
                    None => self.stray(packet, now),
                }
            }
            Content::Udp { from, to, payload } => {
                let key = datagram::Key::Udp { from, to: packet.to, port: to };
                self.datagram(key, packet, 0, payload, now);
            }
            Content::Echo { id, sequence, payload } => {
                let key = datagram::Key::Echo { id, to: packet.to };
                self.datagram(key, packet, sequence, payload, now);
            }
            Content::Other => match self.ruling(packet, now) {
                Ruling::Drop => {}
                _ => self.refuse(packet, Unreachable::Prohibited, now),
            },
        }
    }

    fn ruling(&mut self, packet: &Packet<'_>, now: Instant) -> Ruling {
        let outward = &mut self.outward;
        self.policy.ruling(packet.to, packet.content.port(), now, |to| outward.destination(to))
    }

    fn refuse(&mut self, packet: &Packet<'_>, why: Unreachable, now: Instant) {
        let frame = self.wire.unreachable(packet.bytes, why);
        self.out.refuse(frame, now);
    }

    /// A segment of no connection: one that was, before the VM was moved or this process began, is reset. Others learn as
    /// much as the first segment would have.
    fn stray(&mut self, packet: &Packet<'_>, now: Instant) {
        match self.ruling(packet, now) {
            Ruling::Pass | Ruling::Gateway => {
                let frame = self.wire.reset(packet.bytes);
                self.out.refuse(frame, now);
            }
            Ruling::Refuse => self.refuse(packet, Unreachable::Prohibited, now),
            Ruling::NoRoute | Ruling::Drop => {}
        }
    }

    fn segment(&mut self, at: usize, packet: &Packet<'_>, is_rst: bool) {
        let Some(Slot { flow: Flow::Tcp(connection), .. }) = self.slot(at) else { return };
        if connection.is_dialing() {
            if is_rst {
                self.remove(at);
            }
            return;
        }
        connection.receive(packet.bytes);
        self.wake(at);
    }

    /// The VM's first packet to somewhere.
    fn connect(&mut self, key: tcp::Key, packet: &Packet<'_>, now: Instant) {
        match self.ruling(packet, now) {
            Ruling::Drop => return,
            Ruling::Refuse => return self.refuse(packet, Unreachable::Prohibited, now),
            Ruling::NoRoute => return self.refuse(packet, Unreachable::Network, now),
            Ruling::Gateway if key.to.port() != DNS_PORT || self.resolvers.is_empty() => {
                return self.refuse(packet, Unreachable::Prohibited, now);
            }
            Ruling::Gateway if self.sessions >= MAX_SESSIONS => return,
            Ruling::Pass if self.dialing >= MAX_DIALING => return,
            Ruling::Gateway | Ruling::Pass => {}
        }
        if self.connections.len() + self.datagrams.len() >= MAX_FLOWS {
            return self.warn("it has as many connections as a VM may have; more are dropped", now);
        }
        let is_relay = key.to.ip() == &self.wire.gateway;
        let far = match is_relay {
            true => Far::Relay(Box::default()),
            false => match self.outward.tcp(SocketAddr::V4(key.to)) {
                Ok(stream) => Far::Dialing { stream, first: packet.bytes.to_vec() },
                Err(error) => return self.not_connected(packet.bytes, &error, now),
            },
        };
        let seed = self.chance.next_u64();
        let memory = self.memory;
        let buffer = BUFFERS.iter().find(|(until, _)| memory < *until).map_or(4 << 10, |(_, buffer)| *buffer);
        let connection = Connection::new(key, self.wire.guest, far, buffer, seed, self.clock, now);
        let Some(mut connection) = connection else { return };
        if is_relay {
            connection.receive(packet.bytes);
            connection.writable = true;
        }
        self.memory += connection.memory();
        self.dialing += usize::from(connection.is_dialing());
        self.sessions += usize::from(is_relay);
        let at = self.add(Flow::Tcp(Box::new(connection)));
        self.connections.insert(key, at);
        if is_relay {
            self.schedule(at, Some(now + IDLE));
            self.wake(at);
        } else if let Err(error) = self.watch(at) {
            self.remove(at);
            self.not_connected(packet.bytes, &error, now);
        }
    }

    /// What the VM hears about a connection that the host's kernel did not make.
    fn not_connected(&mut self, first: &[u8], error: &io::Error, now: Instant) {
        let why = match error.raw_os_error() {
            Some(libc::ENETUNREACH) => Some(Unreachable::Network),
            Some(libc::EHOSTUNREACH | libc::ETIMEDOUT) => Some(Unreachable::Host),
            Some(libc::EACCES | libc::EPERM) => Some(Unreachable::Prohibited),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL) => {
                return self.warn(&format!("a connection was not made: {error}"), now);
            }
            _ => None,
        };
        let frame = match why {
            Some(why) => self.wire.unreachable(first, why),
            None => self.wire.reset(first),
        };
        self.out.push(frame);
    }

    /// A packet without a connection.
    fn datagram(&mut self, key: datagram::Key, packet: &Packet<'_>, sequence: u16, payload: &[u8], now: Instant) {
        let at = match self.datagrams.get(&key).copied() {
            Some(at) => at,
            None => match self.begin_datagrams(key, packet, sequence, payload, now) {
                Some(at) => at,
                None => return,
            },
        };
        let Some(Some(Slot { flow: Flow::Datagram(flow), .. })) = self.slots.get_mut(at) else { return };
        flow.send(sequence, payload, &mut self.out, now);
        let deadline = flow.deadline;
        self.schedule(at, Some(deadline));
    }

    /// The place of a new flow; `None`: there is none, and what is to be said has been.
    fn begin_datagrams(
        &mut self,
        key: datagram::Key,
        packet: &Packet<'_>,
        sequence: u16,
        payload: &[u8],
        now: Instant,
    ) -> Option<usize> {
        match self.ruling(packet, now) {
            Ruling::Drop => return None,
            Ruling::Refuse => {
                self.refuse(packet, Unreachable::Prohibited, now);
                return None;
            }
            Ruling::NoRoute => {
                self.refuse(packet, Unreachable::Network, now);
                return None;
            }
            Ruling::Gateway => {
                match key {
                    datagram::Key::Udp { from, port: DNS_PORT, .. } if !self.resolvers.is_empty() => {
                        self.ask(payload, ReplyTo::Port(from), now);
                    }
                    datagram::Key::Echo { id, .. } => {
                        let answer = self.wire.echo(self.wire.gateway, id, sequence, payload);
                        self.out.push(answer);
                    }
                    datagram::Key::Udp { .. } => self.refuse(packet, Unreachable::Prohibited, now),
                }
                return None;
            }
            Ruling::Pass => {}
        }
        if self.datagrams.len() >= MAX_DATAGRAM_FLOWS || self.connections.len() + self.datagrams.len() >= MAX_FLOWS {
            // The one that would end first gives way.
            let oldest = self.due.iter().map(|(_, at)| *at).find(|at| self.is_datagram(*at))?;
            self.remove(oldest);
        }
        let socket = match key {
            datagram::Key::Udp { to, port, .. } => self.outward.udp(SocketAddr::V4(SocketAddrV4::new(to, port))),
            datagram::Key::Echo { to, .. } => self.outward.ping(to),
        };
        let socket = match (socket, key) {
            (Ok(socket), _) => socket,
            (Err(error), datagram::Key::Echo { .. }) => {
                log::debug!("an echo request was not sent: {error}");
                self.refuse(packet, Unreachable::Prohibited, now);
                return None;
            }
            (Err(error), datagram::Key::Udp { .. }) => {
                match error.raw_os_error() {
                    Some(libc::ENETUNREACH) => self.refuse(packet, Unreachable::Network, now),
                    Some(libc::EHOSTUNREACH) => self.refuse(packet, Unreachable::Host, now),
                    Some(libc::EACCES | libc::EPERM) => self.refuse(packet, Unreachable::Prohibited, now),
                    _ => self.warn(&format!("a datagram was not sent: {error}"), now),
                }
                return None;
            }
        };
        let at = self.add(Flow::Datagram(datagram::Flow::new(key, socket, now)));
        self.datagrams.insert(key, at);
        if let Err(error) = self.watch(at) {
            self.warn(&format!("a datagram was not sent: {error}"), now);
            self.remove(at);
            return None;
        }
        Some(at)
    }

    fn is_datagram(&self, at: usize) -> bool {
        matches!(self.slots.get(at), Some(Some(Slot { flow: Flow::Datagram(_), .. })))
    }

    /// A question to the relay.
    fn ask(&mut self, message: &[u8], reply_to: ReplyTo, now: Instant) {
        let question = match Decision::on(message, self.policy.egress()) {
            Decision::Ask(question) => question,
            Decision::Answer(answer) => return self.tell(reply_to, Some(&answer), now),
            Decision::Drop => return self.tell(reply_to, None, now),
        };
        if self.queries >= MAX_QUESTIONS {
            return match reply_to {
                ReplyTo::Port(_) => {}
                ReplyTo::Connection(..) => self.tell(reply_to, question.failed().as_deref(), now),
            };
        }
        self.queries += 1;
        let at = self.add(Flow::Query(Box::new(Query::new(question, reply_to, &self.resolvers, now))));
        self.ask_next(at, false, now);
    }

    /// Asks the next server, or tells the VM that there is none.
    fn ask_next(&mut self, at: usize, was_watched: bool, now: Instant) {
        let id = self.chance.next_u16();
        if was_watched {
            self.unwatch(at);
        }
        let Some(Some(Slot { flow: Flow::Query(query), .. })) = self.slots.get_mut(at) else { return };
        let is_asking = query.ask_next(&mut self.outward, id, now);
        let (deadline, reply_to) = (query.deadline, query.reply_to);
        let failed = query.question.failed();
        if is_asking && self.watch(at).is_ok() {
            return self.schedule(at, Some(deadline));
        }
        self.remove(at);
        self.tell(reply_to, failed.as_deref(), now);
    }

    fn look_at_query(&mut self, at: usize, now: Instant) {
        let Some(Some(Slot { flow: Flow::Query(query), .. })) = self.slots.get_mut(at) else { return };
        match query.look() {
            Progress::Waits if query.deadline > now => {}
            Progress::Waits => self.ask_next(at, true, now),
            Progress::Failed(why) => {
                log::debug!("a DNS server failed: {why}");
                self.ask_next(at, true, now);
            }
            Progress::Answered(relayed) => {
                let (reply_to, name, failed) = (query.reply_to, query.question.name(), query.question.failed());
                self.remove(at);
                self.answered(reply_to, &name, failed, &relayed, now);
            }
        }
    }

    fn answered(&mut self, reply_to: ReplyTo, name: &str, failed: Option<Vec<u8>>, relayed: &Relayed, now: Instant) {
        if let Some(address) = relayed.withheld {
            let what = format!("{name} stands for {address}, a private address that its allow-list does not name");
            self.warn(&what, now);
        }
        match self.policy.pin(relayed, now) {
            Ok(()) => self.tell(reply_to, Some(&relayed.message), now),
            Err(reason) => {
                self.warn(&format!("{name} could not be let pass: {reason}"), now);
                self.tell(reply_to, failed.as_deref(), now);
            }
        }
    }

    /// Sends the VM what it is to hear, if anything.
    fn tell(&mut self, reply_to: ReplyTo, message: Option<&[u8]>, now: Instant) {
        match reply_to {
            ReplyTo::Port(port) => {
                let answer = message.and_then(|message| self.wire.udp(self.wire.gateway, DNS_PORT, port, message));
                self.out.push(answer);
            }
            ReplyTo::Connection(at, number) => {
                let Some(Slot { flow: Flow::Tcp(connection), number: its, .. }) = self.slot(at) else { return };
                if *its != number {
                    return;
                }
                let Far::Relay(session) = &mut connection.far else { return };
                session.answer(message);
                (connection.readable, connection.writable) = (true, true);
                self.schedule(at, Some(now + IDLE));
                self.wake(at);
            }
        }
    }

    /// The kernel says that something can be read or written.
    pub fn ready(&mut self, token: Token, readable: bool, writable: bool, now: Instant) {
        let at = token.0 - FIRST_TOKEN;
        let Some(Slot { flow, .. }) = self.slot(at) else { return };
        match flow {
            Flow::Tcp(connection) => {
                connection.readable |= readable;
                connection.writable |= writable;
                self.wake(at);
            }
            Flow::Datagram(_) => self.wake(at),
            Flow::Query(_) => self.look_at_query(at, now),
        }
    }

    /// Does what is to be done: until the wire is full, or there is nothing more.
    pub fn run(&mut self, now: Instant) {
        while let Some((_, at)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.schedule(at, None);
            self.is_due(at, now);
        }
        // Those that have more to do come again behind the others, and after the wire has been written to.
        for _ in 0..self.waiting.len() {
            if self.out.is_full() {
                break;
            }
            let Some(at) = self.waiting.pop_front() else { break };
            let Some(slot) = self.slot(at) else { continue };
            slot.is_waiting = false;
            match slot.flow {
                Flow::Tcp(_) => self.pass(at, now),
                Flow::Datagram(_) => self.hand_on(at, now),
                Flow::Query(_) => {}
            }
        }
    }

    /// When to run if nothing happens before; `now`: at once, when the wire has room.
    #[must_use]
    pub fn next(&self, now: Instant) -> Option<Instant> {
        let due = self.due.first().map(|(due, _)| *due);
        let at_once = (!self.waiting.is_empty() && !self.out.is_full()).then_some(now);
        due.into_iter().chain(at_once).min()
    }

    fn is_due(&mut self, at: usize, now: Instant) {
        let Some(slot) = self.slot(at) else { return };
        match &slot.flow {
            Flow::Tcp(connection) => match &connection.far {
                Far::Relay(session) if !session.is_asking => self.remove(at),
                _ => self.wake(at),
            },
            Flow::Datagram(_) => self.remove(at),
            Flow::Query(_) => self.look_at_query(at, now),
        }
    }

    fn pass(&mut self, at: usize, now: Instant) {
        let Some(Some(Slot { flow: Flow::Tcp(connection), number, .. })) = self.slots.get_mut(at) else { return };
        let number = *number;
        let was_dialing = connection.is_dialing();
        if was_dialing && (connection.readable || connection.writable) {
            let first = match &connection.far {
                Far::Dialing { first, .. } => first.clone(),
                _ => Vec::new(),
            };
            if let Err(error) = connection.dialed() {
                self.remove(at);
                return self.not_connected(&first, &error, now);
            }
        }
        if was_dialing && !connection.is_dialing() {
            self.dialing -= 1;
        }
        let pass = connection.pass(&mut self.out, now);
        let question = match &mut connection.far {
            Far::Relay(session) => session.message(),
            _ => None,
        };
        let is_relay = matches!(connection.far, Far::Relay(_));
        match pass {
            Pass::Ended => return self.remove(at),
            Pass::GoesOn => self.wake(at),
            // A session has a time of its own.
            Pass::Waits(due) if !is_relay => self.schedule(at, due),
            Pass::Waits(_) => {}
        }
        if let Some(question) = question {
            self.schedule(at, Some(now + IDLE));
            self.ask(&question, ReplyTo::Connection(at, number), now);
        }
    }

    fn hand_on(&mut self, at: usize, now: Instant) {
        let Some(Some(Slot { flow: Flow::Datagram(flow), .. })) = self.slots.get_mut(at) else { return };
        let has_more = flow.receive(&mut self.out, now);
        let deadline = flow.deadline;
        self.schedule(at, Some(deadline));
        if has_more {
            self.wake(at);
        }
    }

    fn slot(&mut self, at: usize) -> Option<&mut Slot> {
        self.slots.get_mut(at)?.as_mut()
    }

    fn wake(&mut self, at: usize) {
        let Some(slot) = self.slot(at) else { return };
        if !std::mem::replace(&mut slot.is_waiting, true) {
            self.waiting.push_back(at);
        }
    }

    fn schedule(&mut self, at: usize, due: Option<Instant>) {
        let Some(slot) = self.slots.get_mut(at).and_then(Option::as_mut) else { return };
        if slot.due == due {
            return;
        }
        let before = std::mem::replace(&mut slot.due, due);
        before.map(|before| self.due.remove(&(before, at)));
        due.map(|due| self.due.insert((due, at)));
    }

    fn add(&mut self, flow: Flow) -> usize {
        self.number += 1;
        let slot = Some(Slot { flow, number: self.number, due: None, is_waiting: false });
        match self.free.pop() {
            Some(at) => {
                if let Some(place) = self.slots.get_mut(at) {
                    *place = slot;
                }
                at
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        }
    }

    /// Has the kernel say when a flow's socket is ready.
    fn watch(&mut self, at: usize) -> io::Result<()> {
        let (token, both) = (Token(at + FIRST_TOKEN), Interest::READABLE | Interest::WRITABLE);
        let Some(Some(slot)) = self.slots.get_mut(at) else { return Ok(()) };
        let registry = &self.registry;
        let register = |source: &mut dyn mio::event::Source, interest| source.register(registry, token, interest);
        match &mut slot.flow {
            Flow::Tcp(connection) => match &mut connection.far {
                Far::Dialing { stream, .. } | Far::Host(stream) => register(stream, both),
                Far::Relay(_) => Ok(()),
            },
            Flow::Datagram(flow) => register(&mut flow.socket, Interest::READABLE),
            Flow::Query(query) => query.source().map_or(Ok(()), |source| register(source, both)),
        }
    }

    fn unwatch(&mut self, at: usize) {
        let Some(Some(slot)) = self.slots.get_mut(at) else { return };
        let source: Option<&mut dyn mio::event::Source> = match &mut slot.flow {
            Flow::Tcp(connection) => match &mut connection.far {
                Far::Dialing { stream, .. } | Far::Host(stream) => Some(stream),
                Far::Relay(_) => None,
            },
            Flow::Datagram(flow) => Some(&mut flow.socket),
            Flow::Query(query) => query.source(),
        };
        if let Some(Err(error)) = source.map(|source| source.deregister(&self.registry)) {
            log::debug!("a socket was not watched: {error}");
        }
    }

    fn remove(&mut self, at: usize) {
        self.schedule(at, None);
        self.unwatch(at);
        let Some(slot) = self.slots.get_mut(at).and_then(Option::take) else { return };
        match slot.flow {
            Flow::Tcp(connection) => {
                self.connections.remove(&connection.key);
                self.memory -= connection.memory();
                self.dialing -= usize::from(connection.is_dialing());
                self.sessions -= usize::from(matches!(connection.far, Far::Relay(_)));
            }
            Flow::Datagram(flow) => drop(self.datagrams.remove(&flow.key)),
            Flow::Query(_) => self.queries -= 1,
        }
        if slot.is_waiting {
            self.waiting.retain(|waiting| *waiting != at);
        }
        self.free.push(at);
    }

    /// Warns, but not as often as a guest likes; the next warning says how many were left out.
    fn warn(&mut self, what: &str, now: Instant) {
        if self.warned.is_some_and(|warned| now.saturating_duration_since(warned) < WARNING_INTERVAL) {
            self.left_out += 1;
            return log::debug!("{what}");
        }
        self.warned = Some(now);
        match std::mem::take(&mut self.left_out) {
            0 => log::warn!("{what}"),
            more => log::warn!("{what} ({more} such warnings were left out)"),
        }
    }

    #[must_use]
    pub fn outward(&self) -> &O {
        &self.outward
    }

    /// Flows of all kinds.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.connections.len() + self.datagrams.len() + self.queries
    }
}
