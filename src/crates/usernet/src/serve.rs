//! The program: one loop over the wire, the manager's socket and the sockets of the flows.
//!
//! Descriptor 0 is the wire, a stream of frames whose other end the VMM has. Descriptor 1 is the manager's: one line of
//! JSON comes in ([`UserNetwork`]), lines go out ([`UserReport`]). When either ends, so does the program.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use microvm_isolation::net::{UserNetwork, UserReport, MAX_USER_NETWORK};
use mio::net::UnixStream;
use mio::{Events, Interest, Poll, Token};
use smoltcp::wire::EthernetAddress;

use crate::frame::Wire;
use crate::gateway::Gateway;
use crate::out::Meter;
use crate::outward::Host;
use crate::policy::Policy;
use crate::stream::Frames;

const WIRE: Token = Token(0);
const MANAGER: Token = Token(1);
/// How often the manager hears what was moved.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);
const EVENTS: usize = 256;

/// Lines for the manager. It reads them at once, or is gone: none is waited for.
struct Reports(Mutex<StdStream>);

impl Reports {
    fn send(&self, report: &UserReport) {
        let (Ok(mut line), Ok(mut stream)) = (serde_json::to_vec(report), self.0.lock()) else { return };
        line.push(b'\n');
        // Cut lines would be worse than none, but a line is a thousandth of what the socket takes.
        drop(stream.write(&line));
    }
}

impl log::Log for Reports {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn && metadata.target().starts_with("microvm")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.send(&UserReport::Warning(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

/// What the manager wants.
fn told(manager: &StdStream) -> io::Result<UserNetwork> {
    let mut line = Vec::new();
    BufReader::new(manager.take(MAX_USER_NETWORK)).read_until(b'\n', &mut line)?;
    serde_json::from_slice(&line).map_err(io::Error::other)
}

/// Serves the VM until it or its manager is gone.
///
/// # Errors
/// What keeps it from being a gateway.
pub fn serve() -> io::Result<()> {
    let wire = StdStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let manager = StdStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    let network = told(&manager)?;
    let rules = network.rules().ok_or_else(|| invalid("an entry of egress is none"))?;
    let (guest_mac, gateway_mac) = network.macs().ok_or_else(|| invalid("a MAC address is none"))?;
    let ends = Wire {
        guest_mac: EthernetAddress(guest_mac.octets()),
        guest: network.address,
        gateway_mac: EthernetAddress(gateway_mac.octets()),
        gateway: network.gateway,
    };
    let mut poll = Poll::new()?;
    let outward = Host::open()?;
    for stream in [&wire, &manager] {
        stream.set_nonblocking(true)?;
    }
    let (mut wire, mut watched) = (UnixStream::from_std(wire), UnixStream::from_std(manager.try_clone()?));
    poll.registry().register(&mut wire, WIRE, Interest::READABLE | Interest::WRITABLE)?;
    poll.registry().register(&mut watched, MANAGER, Interest::READABLE)?;
    let reports: &'static Reports = Box::leak(Box::new(Reports(Mutex::new(manager))));
    log::set_logger(reports).map_err(io::Error::other)?;
    log::set_max_level(log::LevelFilter::Warn);
    let now = Instant::now();
    let policy = Policy::new(network.address, network.gateway, rules);
    let resolvers = if network.is_relayed { network.resolvers } else { Vec::new() };
    let gateway = Gateway::new(ends, policy, resolvers, outward, poll.registry().try_clone()?, now);
    reports.send(&UserReport::Ready);
    let rate = network.bandwidth_mbps;
    let mut served = Served {
        wire,
        gateway,
        frames: Frames::default(),
        from_vm: Meter::new(rate, now),
        to_vm: Meter::new(rate, now),
        readable: true,
        writable: true,
        moved: (0, 0),
    };
    let (mut events, mut reported) = (Events::with_capacity(EVENTS), (now, (0, 0)));
    loop {
        let now = Instant::now();
        if !served.turn(now)? {
            return Ok(());
        }
        if served.moved != reported.1 && now >= reported.0 + REPORT_INTERVAL {
            reported = (now, served.moved);
            let (from_vm_bytes, to_vm_bytes) = served.moved;
            reports.send(&UserReport::Moved { from_vm_bytes, to_vm_bytes });
        }
        let report = (served.moved != reported.1).then(|| reported.0 + REPORT_INTERVAL);
        let next = served.next(now).into_iter().chain(report).min();
        match poll.poll(&mut events, next.map(|next| next.saturating_duration_since(now))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        let now = Instant::now();
        for event in &events {
            let over = event.is_error() || event.is_read_closed() || event.is_write_closed();
            let (readable, writable) = (event.is_readable() || over, event.is_writable() || over);
            match event.token() {
                WIRE => {
                    served.readable |= readable;
                    served.writable |= writable;
                }
                MANAGER if is_over(&watched)? => return Ok(()),
                MANAGER => {}
                token => served.gateway.ready(token, readable, writable, now),
            }
        }
    }
}

/// Whether the manager is gone; it has nothing more to say.
fn is_over(mut manager: &UnixStream) -> io::Result<bool> {
    let mut bytes = [0; 64];
    loop {
        match manager.read(&mut bytes) {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// The wire and the gateway behind it.
struct Served {
    wire: UnixStream,
    gateway: Gateway<Host>,
    frames: Frames,
    from_vm: Meter,
    to_vm: Meter,
    readable: bool,
    writable: bool,
    /// Bytes from and to the VM.
    moved: (u64, u64),
}

impl Served {
    /// Reads, works and writes once; `false`: the VMM is gone.
    fn turn(&mut self, now: Instant) -> io::Result<bool> {
        let room = self.from_vm.room(now);
        if self.readable && room > 0 && !self.gateway.out.is_full() {
            match self.frames.read(&mut self.wire, room) {
                Ok(length) => {
                    self.from_vm.take(length);
                    self.moved.0 += length as u64;
                    while let Some(frame) = self.frames.next_frame()? {
                        self.gateway.receive(frame, now);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_gone(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.gateway.run(now);
        let room = self.to_vm.room(now);
        let waiting = self.gateway.out.waiting();
        if self.writable && room > 0 && !waiting.is_empty() {
            match self.wire.write(waiting.get(..room).unwrap_or(waiting)) {
                Ok(length) => {
                    self.to_vm.take(length);
                    self.moved.1 += length as u64;
                    self.gateway.out.sent(length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_gone(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// When the next turn is, if nothing happens before.
    fn next(&mut self, now: Instant) -> Option<Instant> {
        let after = |meter: &mut Meter| if meter.room(now) > 0 { now } else { meter.refilled() };
        let read = (self.readable && !self.gateway.out.is_full()).then(|| after(&mut self.from_vm));
        let write = (self.writable && !self.gateway.out.waiting().is_empty()).then(|| after(&mut self.to_vm));
        read.into_iter().chain(write).chain(self.gateway.next(now)).min()
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
