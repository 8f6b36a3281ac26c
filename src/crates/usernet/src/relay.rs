//! The gateway's DNS relay: questions that are under way, and connections that ask.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use microvm_isolation::net::{Question, Relayed, Transport};
use mio::net::{TcpStream, UdpSocket};

use crate::outward::Outward;

pub const DNS_PORT: u16 = 53;
/// A message over UDP; over TCP its length is a u16.
const MAX_MESSAGE: usize = 65_535;
/// Servers that are asked one after the other, and how often all of them; resolv.conf(5) has 3 and 2.
const MAX_SERVERS: usize = 3;
const ROUNDS: usize = 2;
const SERVER_DEADLINE: Duration = Duration::from_secs(2);
/// How long a TCP connection may stay silent.
pub const IDLE: Duration = Duration::from_secs(10);

/// A TCP connection of the VM with the relay: one question at a time.
#[derive(Debug, Default)]
pub struct Session {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// A question is under way.
    pub is_asking: bool,
    is_closed: bool,
}

impl Session {
    /// Takes bytes of the VM, as far as one message goes.
    pub fn take(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.wanted().saturating_sub(self.incoming.len()).min(bytes.len());
        self.incoming.extend_from_slice(bytes.get(..room).unwrap_or_default());
        Ok(room)
    }

    fn wanted(&self) -> usize {
        match self.incoming.first_chunk::<2>() {
            _ if self.is_asking => self.incoming.len(),
            None => 2,
            Some(length) => 2 + usize::from(u16::from_be_bytes(*length)),
        }
    }

    /// A whole message, if there is one and the last one has its answer.
    pub fn message(&mut self) -> Option<Vec<u8>> {
        let is_whole = self.incoming.len() >= 2 && self.incoming.len() == self.wanted();
        if self.is_asking || !is_whole {
            return None;
        }
        let message = std::mem::take(&mut self.incoming).split_off(2);
        self.is_asking = true;
        Some(message)
    }

    /// The answer to the message that was taken; `None` ends the connection.
    pub fn answer(&mut self, message: Option<&[u8]>) {
        self.is_asking = false;
        let length = message.and_then(|message| u16::try_from(message.len()).ok());
        let (Some(length), Some(message)) = (length, message) else { return self.close() };
        self.outgoing.extend_from_slice(&length.to_be_bytes());
        self.outgoing.extend_from_slice(message);
    }

    pub fn give(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let length = room.len().min(self.outgoing.len());
        if length == 0 {
            let is_over = self.is_closed && !self.is_asking;
            return if is_over { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        for (room, byte) in room.iter_mut().zip(self.outgoing.drain(..length)) {
            *room = byte;
        }
        Ok(length)
    }

    /// No more questions come.
    pub fn close(&mut self) {
        self.is_closed = true;
    }
}

/// Who hears the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyTo {
    /// A port of the VM.
    Port(u16),
    /// A connection, by its place and its number.
    Connection(usize, u64),
}

#[derive(Debug)]
enum Socket {
    Udp(UdpSocket),
    Tcp { stream: TcpStream, outgoing: Vec<u8>, incoming: Vec<u8> },
}

/// A question that is asked of one server after the other.
#[derive(Debug)]
pub struct Query {
    pub question: Box<Question>,
    pub reply_to: ReplyTo,
    servers: Vec<IpAddr>,
    tries: usize,
    id: u16,
    socket: Option<Socket>,
    pub deadline: Instant,
}

/// How a look at a query left it.
#[derive(Debug)]
pub enum Progress {
    Waits,
    Answered(Relayed),
    /// This server gives no answer.
    Failed(String),
}

impl Query {
    pub fn new(question: Box<Question>, reply_to: ReplyTo, servers: &[IpAddr], now: Instant) -> Self {
        let servers = servers.iter().copied().take(MAX_SERVERS).collect();
        Self { question, reply_to, servers, tries: 0, id: 0, socket: None, deadline: now }
    }

    fn transport(&self) -> Transport {
        match self.reply_to {
            ReplyTo::Port(_) => Transport::Udp,
            ReplyTo::Connection(..) => Transport::Tcp,
        }
    }

    /// The socket, for the list of those that are watched.
    pub fn source(&mut self) -> Option<&mut dyn mio::event::Source> {
        match self.socket.as_mut()? {
            Socket::Udp(socket) => Some(socket),
            Socket::Tcp { stream, .. } => Some(stream),
        }
    }

    /// Asks the next server, by a socket of its own and under a number of its own; `false`: all were asked often enough.
    pub fn ask_next(&mut self, outward: &mut impl Outward, id: u16, now: Instant) -> bool {
        self.socket = None;
        while self.tries < self.servers.len() * ROUNDS {
            let server = self.servers.get(self.tries % self.servers.len()).copied();
            self.tries += 1;
            self.deadline = now + SERVER_DEADLINE;
            let Some(server) = server else { continue };
            let Some(message) = self.question.asked_as(id) else { return false };
            self.id = id;
            match self.ask(outward, SocketAddr::new(server, DNS_PORT), message) {
                Ok(socket) => {
                    self.socket = Some(socket);
                    return true;
                }
                Err(error) => log::debug!("DNS server {server}: {error}"),
            }
        }
        false
    }

    fn ask(&self, outward: &mut impl Outward, server: SocketAddr, message: Vec<u8>) -> io::Result<Socket> {
        match self.transport() {
            Transport::Udp => {
                let socket = outward.udp(server)?;
                socket.send(&message)?;
                Ok(Socket::Udp(socket))
            }
            Transport::Tcp => {
                let stream = outward.tcp(server)?;
                let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
                let outgoing = [&length.to_be_bytes(), message.as_slice()].concat();
                Ok(Socket::Tcp { stream, outgoing, incoming: Vec::new() })
            }
        }
    }

    /// Reads and writes what can be.
    pub fn look(&mut self) -> Progress {
        let transport = self.transport();
        let failed = |error: io::Error| Progress::Failed(error.to_string());
        match self.socket.as_mut() {
            None => Progress::Failed("it has no socket".into()),
            Some(Socket::Udp(socket)) => loop {
                let mut buffer = vec![0; MAX_MESSAGE];
                match socket.recv(&mut buffer) {
                    Ok(length) => {
                        let message = buffer.get(..length).unwrap_or_default();
                        if let Some(relayed) = self.question.answered(self.id, message, transport) {
                            return Progress::Answered(relayed);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waits,
                    Err(error) => return failed(error),
                }
            },
            Some(Socket::Tcp { stream, outgoing, incoming }) => match exchange(stream, outgoing, incoming) {
                Err(error) => failed(error),
                Ok(None) => Progress::Waits,
                Ok(Some(message)) => match self.question.answered(self.id, &message, transport) {
                    Some(relayed) => Progress::Answered(relayed),
                    None => Progress::Failed("it answered something else".into()),
                },
            },
        }
    }
}

/// Writes a question and reads the answer, as far as that goes without waiting.
fn exchange(stream: &mut TcpStream, outgoing: &mut Vec<u8>, incoming: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    while !outgoing.is_empty() {
        match stream.write(outgoing) {
            Ok(length) => drop(outgoing.drain(..length)),
            Err(error) if is_early(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    loop {
        let wanted = incoming.first_chunk::<2>().map_or(2, |length| 2 + usize::from(u16::from_be_bytes(*length)));
        if incoming.len() >= 2 && incoming.len() >= wanted {
            return Ok(Some(incoming.drain(..wanted).skip(2).collect()));
        }
        let mut buffer = vec![0; wanted - incoming.len()];
        match stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => incoming.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            Err(error) if is_early(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn test_session_takes_one_message_at_a_time() {
        let mut session = Session::default();
        let two = b"\0\x03abc\0\x02de";
        let mut taken = 0;
        for _ in 0..4 {
            taken += session.take(&two[taken..]).unwrap();
        }
        assert_eq!((taken, session.message().as_deref()), (5, Some(&b"abc"[..])));
        assert_eq!((session.take(&two[5..]).unwrap(), session.message()), (0, None));
        session.answer(Some(b"xyz"));
        let mut room = [0; 4];
        assert_eq!((session.give(&mut room).unwrap(), room), (4, *b"\0\x03xy"));
        assert_eq!(session.give(&mut room).unwrap(), 1);
        assert_eq!(session.give(&mut room).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        session.close();
        assert_eq!(session.give(&mut room).unwrap(), 0);
    }

    #[test]
    fn test_session_an_empty_message_is_a_message() {
        let mut session = Session::default();
        assert_eq!(session.take(b"\0\0").unwrap(), 2);
        assert_eq!(session.message().as_deref(), Some(&b""[..]));
        session.answer(None);
        assert_eq!(session.give(&mut [0; 4]).unwrap(), 0);
    }
}
