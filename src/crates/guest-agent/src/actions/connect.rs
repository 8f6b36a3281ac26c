//! A TCP connection to a server in the guest, whose two directions are the call's channels.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use microvm_protocol::frame::MAX_DATA;
use microvm_protocol::message::{fail, Code, Failure, Reason, Started};
use microvm_protocol::mux::STDOUT;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, setsockopt, socket, sockopt, AddressFamily, SockFlag, SockType, SockaddrStorage};
use serde::Deserialize;
use serde_json::{json, Value};

use super::{read_params, Outcome};
use crate::job::{cancelled, Input, Job};

/// Where a server of the guest listens, unless the host says it.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    port: u16,
    /// Absent: the loopback, by IPv4, and where that refuses by IPv6.
    address: Option<IpAddr>,
}

pub fn connect(params: Value, job: &Job) -> Outcome {
    let Params { port, address } = read_params(params)?;
    if port == 0 {
        return fail(Code::BadParams, "port: 0 is no port to connect to");
    }
    let stream = match address {
        Some(address) => open(&[address], port, job)?,
        None => open(&LOOPBACK, port, job)?,
    };
    let address = stream.peer_addr().map_err(|error| failure(&shown(port), &error))?;
    job.started(&Started::Connection { address: address.to_string() })?;
    Connection { stream, shown: shown(port), piece: Vec::new(), written: 0, input: To::Server }.carry(job)
}

fn shown(port: u16) -> String {
    format!("port {port} of the guest")
}

/// Connects to the first of these addresses that does not refuse.
fn open(addresses: &[IpAddr], port: u16, job: &Job) -> Result<TcpStream, Failure> {
    let mut first = None;
    for address in addresses {
        match reach(SocketAddr::new(*address, port), job) {
            Ok(stream) => return Ok(stream),
            Err(_) if job.is_cancelled() => return Err(cancelled(&shown(port))),
            Err(error) => {
                let refused = error.kind() == ErrorKind::ConnectionRefused;
                first.get_or_insert(error);
                if !refused {
                    break;
                }
            }
        }
    }
    let tried: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    let what = format!("{} ({})", shown(port), tried.join(", "));
    Err(failure(&what, &first.unwrap_or_else(|| ErrorKind::ConnectionRefused.into())))
}

fn failure(what: &str, error: &io::Error) -> Failure {
    let (code, why) = match error.kind() {
        ErrorKind::ConnectionRefused => (Code::ConnectionRefused, "no program listens there".to_owned()),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            (Code::ConnectionReset, "the server ended the connection".to_owned())
        }
        ErrorKind::TimedOut => (Code::NetworkError(Reason::Timeout), error.to_string()),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable => {
            (Code::NetworkError(Reason::Unreachable), error.to_string())
        }
        _ => (Code::IoError, error.to_string()),
    };
    Failure { code, message: format!("{what}: {why}") }
}

/// Connects, however long that takes; a cancelled job ends the wait.
fn reach(to: SocketAddr, job: &Job) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    let under_way = match socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => false,
        Err(Errno::EINPROGRESS) => true,
        Err(error) => return Err(error.into()),
    };
    let stream = TcpStream::from(fd);
    // Closed before its end, it broke: the server is to see that, and not an end.
    linger(&stream, Some(0))?;
    while under_way && !wait(job, &stream, PollFlags::POLLOUT)? {
        if job.is_cancelled() {
            return Err(ErrorKind::Interrupted.into());
        }
    }
    match stream.take_error()? {
        Some(error) => Err(error),
        None => {
            // Each piece is sent as it came: the host's side has joined what belongs together.
            stream.set_nodelay(true)?;
            Ok(stream)
        }
    }
}

/// With `Some(0)` closing sends RST and drops what is not sent yet (socket(7)).
fn linger(stream: &TcpStream, seconds: Option<libc::c_int>) -> io::Result<()> {
    let linger = libc::linger { l_onoff: seconds.is_some().into(), l_linger: seconds.unwrap_or(0) };
    Ok(setsockopt(stream, sockopt::Linger, &linger)?)
}

/// Waits for `events` of the socket, or until the host says something; whether it was the socket.
fn wait(job: &Job, stream: &TcpStream, events: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(job.notifier().as_fd(), PollFlags::POLLIN), PollFd::new(stream.as_fd(), events)];
    // A socket that hung up is always ready: one of which nothing is wanted must not be looked at.
    let watched = if events.is_empty() { 1 } else { 2 };
    match poll(&mut fds[..watched], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let [told, ready] = fds.map(|fd| fd.any().unwrap_or(false));
    if told {
        job.notifier().wait();
    }
    Ok(ready)
}

/// What becomes of the host's bytes.
#[derive(PartialEq)]
enum To {
    Server,
    /// It was told their end.
    Ended,
    /// It reads no more, and may have something to say yet: they are dropped.
    Nobody,
}

struct Connection {
    stream: TcpStream,
    shown: String,
    piece: Vec<u8>,
    written: usize,
    input: To,
}

impl Connection {
    /// Carries bytes until both sides have said all. No side is read faster than the other takes.
    fn carry(mut self, job: &Job) -> Outcome {
        let mut buffer = vec![0; MAX_DATA];
        let mut heard_all = false;
        loop {
            if job.is_cancelled() {
                return Err(cancelled(&self.shown));
            }
            let is_full = self.write(job)?;
            if heard_all && self.input != To::Server {
                linger(&self.stream, None).map_err(|error| failure(&self.shown, &error))?;
                return Ok(json!({}));
            }
            let room = if heard_all { 0 } else { job.room(STDOUT).min(buffer.len()) };
            let mut wanted = PollFlags::empty();
            if room > 0 {
                match self.stream.read(buffer.get_mut(..room).unwrap_or_default()) {
                    Ok(0) => {
                        heard_all = true;
                        job.finish(STDOUT)?;
                        continue;
                    }
                    // None: the host cancelled meanwhile, which the loop is about to see.
                    Ok(length) => {
                        job.send(STDOUT, buffer.get(..length).unwrap_or_default())?;
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => wanted |= PollFlags::POLLIN,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => return Err(failure(&self.shown, &error)),
                }
            }
            if is_full {
                wanted |= PollFlags::POLLOUT;
            }
            wait(job, &self.stream, wanted).map_err(|error| failure(&self.shown, &error))?;
        }
    }

    /// Writes what the host said, as far as the server takes it; whether it takes no more now.
    fn write(&mut self, job: &Job) -> Result<bool, Failure> {
        loop {
            let rest = self.piece.get(self.written..).unwrap_or_default();
            if rest.is_empty() {
                match job.input() {
                    Input::Bytes(bytes) => (self.piece, self.written) = (bytes, 0),
                    Input::Empty => return Ok(false),
                    Input::Ended => {
                        if self.input == To::Server {
                            self.input = To::Ended;
                            // Not connected any more: the server has ended it meanwhile, which reading tells.
                            self.stream.shutdown(Shutdown::Write).unwrap_or_default();
                        }
                        return Ok(false);
                    }
                }
                continue;
            }
            let written = match self.input {
                To::Nobody => Ok(rest.len()),
                To::Server | To::Ended => self.stream.write(rest),
            };
            match written {
                Ok(length) => {
                    self.written += length;
                    job.consumed(length)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.input = To::Nobody,
            }
        }
    }
}
