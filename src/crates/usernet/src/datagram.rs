//! What the VM sends to one peer without a connection: datagrams of UDP, and echo requests.

use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use mio::net::UdpSocket;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};

use crate::frame::{Unreachable, Wire, MTU};
use crate::out::Out;

/// How long a flow lasts after its last datagram: one that was answered, and one that was not. As conntrack has it
/// (nf_conntrack_udp_timeout_stream, nf_conntrack_udp_timeout).
const ANSWERED: Duration = Duration::from_secs(120);
const UNANSWERED: Duration = Duration::from_secs(30);
/// Datagrams that are taken of one flow at once, so that others have their turn.
const MOST_AT_ONCE: usize = 64;

/// A flow, by what both ends know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Key {
    Udp { from: u16, to: Ipv4Addr, port: u16 },
    Echo { id: u16, to: Ipv4Addr },
}

#[derive(Debug)]
pub struct Flow {
    pub key: Key,
    pub socket: UdpSocket,
    pub deadline: Instant,
    is_answered: bool,
}

impl Flow {
    pub fn new(key: Key, socket: UdpSocket, now: Instant) -> Self {
        Self { key, socket, deadline: now + UNANSWERED, is_answered: false }
    }

    fn touch(&mut self, now: Instant) {
        self.deadline = now + if self.is_answered { ANSWERED } else { UNANSWERED };
    }

    /// Sends what the VM sent; what the kernel has no room for is lost, as on any network.
    pub fn send(&mut self, sequence: u16, payload: &[u8], out: &mut Out, now: Instant) {
        self.touch(now);
        let sent = match self.key {
            Key::Udp { .. } => self.socket.send(payload),
            Key::Echo { id, .. } => {
                let request = Icmpv4Repr::EchoRequest { ident: id, seq_no: sequence, data: payload };
                let mut bytes = vec![0; request.buffer_len()];
                request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &ChecksumCapabilities::default());
                self.socket.send(&bytes)
            }
        };
        if let Err(error) = sent {
            self.failed(&error, out);
        }
    }

    /// Hands on what has come; whether there may be more.
    pub fn receive(&mut self, out: &mut Out, now: Instant) -> bool {
        for _ in 0..MOST_AT_ONCE {
            // One byte more than fits: what is longer is seen to be.
            let mut buffer = [0; MTU + 1];
            match self.socket.recv(&mut buffer) {
                Ok(length) => {
                    self.is_answered = true;
                    self.touch(now);
                    let payload = buffer.get(..length).unwrap_or_default();
                    let wire = out.wire;
                    out.push(answer(&wire, self.key, payload));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => self.failed(&error, out),
            }
        }
        true
    }

    /// Tells the VM what the kernel was told about a datagram.
    fn failed(&self, error: &io::Error, out: &mut Out) {
        let Key::Udp { from, to, port } = self.key else { return };
        let why = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Unreachable::Port,
            Some(libc::EHOSTUNREACH) => Unreachable::Host,
            Some(libc::ENETUNREACH) => Unreachable::Network,
            Some(libc::EACCES | libc::EPERM) => Unreachable::Prohibited,
            _ => return,
        };
        let about = out.wire.sent(to, from, port);
        let frame = out.wire.unreachable(&about, why);
        out.push(frame);
    }
}

fn answer(wire: &Wire, key: Key, payload: &[u8]) -> Option<Vec<u8>> {
    match key {
        Key::Udp { from, to, port } => wire.udp(to, port, from, payload),
        Key::Echo { id, to } => {
            let packet = Icmpv4Packet::new_checked(payload).ok()?;
            match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::ignored()).ok()? {
                // The number is the VM's: the host's socket has another.
                Icmpv4Repr::EchoReply { seq_no, data, .. } => wire.echo(to, id, seq_no, data),
                _ => None,
            }
        }
    }
}
