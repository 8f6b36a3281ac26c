//! The transport to the host, and the sealed link on top of it.
//!
//! The transport is a virtio-serial port, or a vsock connection where the VMM has no such port.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use microvm_protocol::connection::Connection;
use microvm_protocol::handshake::{Ask, GuestHandshake, Offered};
use microvm_protocol::identity::Identity;
use microvm_protocol::message::Started;
use microvm_protocol::mux::{Incoming, Mux};
use microvm_protocol::record::Decoder;
use microvm_protocol::{ProtocolError, SERIAL_PORT_NAME};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, socket, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

use crate::boot;
use crate::memory;

/// Records are gathered up to about this many bytes for one write.
const WRITE_CHUNK: usize = 64 * 1024;
/// How long the kernel may take to show the port after PID 1 began.
const PORT_DEADLINE: Duration = Duration::from_secs(10);

/// The open port, before the handshake.
pub struct Port {
    file: File,
    /// The same open file for the session's other end.
    reading: File,
    decoder: Decoder,
    handshake: GuestHandshake,
    /// Where the host calls a clone that nobody tells that its template's connection is gone.
    listener: Option<OwnedFd>,
}

/// Opens the transport.
pub fn open(set_up_failed: bool) -> Result<Port, String> {
    let handshake = GuestHandshake::new(set_up_failed).map_err(|e| e.to_string())?;
    let (listener, file) = match boot::machine().vsock_port {
        Some(port) => (Some(listen(port)?), connect(port)?),
        None => (None, open_serial(SERIAL_PORT_NAME)?),
    };
    let reading = duplicate(&file)?;
    Ok(Port { file, reading, decoder: Decoder::default(), handshake, listener })
}

fn duplicate(file: &File) -> Result<File, String> {
    file.try_clone().map_err(|e| format!("dup: {e}"))
}

fn vsock() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

fn listen(port: u32) -> Result<OwnedFd, String> {
    let failed = |e: nix::Error| format!("vsock port {port}: {e}");
    let socket = vsock().map_err(failed)?;
    socket::bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port)).map_err(failed)?;
    socket::listen(&socket, Backlog::new(1).map_err(failed)?).map_err(failed)?;
    Ok(socket)
}

/// Connects to the host, which listens before it lets this guest boot.
fn connect(port: u32) -> Result<File, String> {
    let failed = |e: nix::Error| format!("vsock port {port} of the host: {e}");
    let socket = vsock().map_err(failed)?;
    socket::connect(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, port)).map_err(failed)?;
    Ok(File::from(socket))
}

/// Finds a virtio-serial port by its name.
pub fn open_serial(port_name: &str) -> Result<File, String> {
    let begun = Instant::now();
    loop {
        if let Some(name) = find(port_name) {
            let path = format!("/dev/{name}");
            return OpenOptions::new().read(true).write(true).open(&path).map_err(|e| format!("{path}: {e}"));
        }
        if begun.elapsed() > PORT_DEADLINE {
            return Err(format!("no virtio port is named {port_name}"));
        }
        // The port's name arrives by a control message of the device, a moment after the driver is up.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn find(port_name: &str) -> Option<String> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        (name.trim() == port_name).then(|| port.file_name().to_string_lossy().into_owned())
    })
}

impl Port {
    pub fn say_hello(&mut self) -> Result<(), String> {
        let hello = self.handshake.hello().map_err(|e| e.to_string())?;
        self.file.write_all(&hello).map_err(|e| format!("HELLO: {e}"))
    }

    /// Waits for the host's OFFER; a guest without an identity waits here for as long as its template exists. `warm_up`
    /// runs before it is frozen.
    pub fn wait_for_offer(&mut self, warm_up: impl Fn()) -> Result<(Vec<u8>, Instant), String> {
        loop {
            match self.decoder.next_record().map_err(|e| e.to_string())? {
                Some(record) => match Ask::decode(record) {
                    None => return Ok((record.to_vec(), Instant::now())),
                    Some(ask) => {
                        if ask == Ask::Freeze {
                            warm_up();
                        }
                        self.say_hello()?;
                    }
                },
                None => self.hear()?,
            }
        }
    }

    /// Waits for more from the host, over whatever connection.
    fn hear(&mut self) -> Result<(), String> {
        if self.is_called()? {
            return self.take_call();
        }
        match (self.file.read(self.decoder.space()), boot::machine().vsock_port) {
            (Ok(length @ 1..), _) => self.decoder.filled(length),
            (Ok(_) | Err(_), Some(port)) => self.connect_again(port)?,
            (Ok(_), None) => return Err("handshake: the host closed the port".into()),
            (Err(error), None) => return Err(format!("handshake: {error}")),
        }
        Ok(())
    }

    /// Waits for the host's next word; `true`: it comes by another connection.
    fn is_called(&self) -> Result<bool, String> {
        let Some(listener) = &self.listener else { return Ok(false) };
        let mut waiting = [listener.as_fd(), self.file.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(waiting[0].any().unwrap_or(false)),
            Err(e) => Err(format!("poll: {e}")),
        }
    }

    /// The connection that a clone inherited leads nowhere, even if it seems to be open.
    fn take_call(&mut self) -> Result<(), String> {
        let Some(listener) = &self.listener else { return Ok(()) };
        let called =
            socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map_err(|e| format!("accept: {e}"))?;
        // SAFETY: a new descriptor that nothing else has.
        self.begin_anew(File::from(unsafe { OwnedFd::from_raw_fd(called) }))
    }

    /// A clone wakes up without the connection that its template had.
    fn connect_again(&mut self, port: u32) -> Result<(), String> {
        let begun = Instant::now();
        let file = loop {
            match connect(port) {
                Ok(file) => break file,
                Err(error) if begun.elapsed() > PORT_DEADLINE => return Err(error),
                // The device is being reset: the host listens already.
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        self.begin_anew(file)
    }

    fn begin_anew(&mut self, file: File) -> Result<(), String> {
        self.reading = duplicate(&file)?;
        self.file = file;
        self.decoder = Decoder::default();
        self.say_hello()
    }

    /// Has the host prove the key.
    pub fn take_offer(self, offer: &[u8], identity: &Identity) -> Result<Half, String> {
        let Self { file, reading, decoder, handshake, .. } = self;
        let offered = handshake.receive(offer, &identity.credentials).map_err(failed)?;
        Ok(Half { file, reading, decoder, offered })
    }
}

fn failed(error: ProtocolError) -> String {
    format!("handshake: {error}")
}

/// A handshake in which the host has proved the key and the guest has not yet; its outcome says how the guest is.
pub struct Half {
    file: File,
    reading: File,
    decoder: Decoder,
    offered: Offered,
}

impl Half {
    /// The host's clock when it made the offer.
    pub fn unix_time_ns(&self) -> u64 {
        self.offered.unix_time_ns
    }

    /// Proves the key.
    pub fn accept(mut self, outcome: &[u8]) -> Result<Link, String> {
        let (accept, session) = self.offered.accept(outcome).map_err(failed)?;
        self.file.write_all(&accept).map_err(|e| format!("ACCEPT: {e}"))?;
        let writing = Writing { file: self.file, bytes: Vec::new() };
        let mut connection = Connection::new(session);
        connection.calls.ask_for_room(memory::has_room);
        let shared = Shared { connection: Mutex::new(connection), writing: Mutex::new(writing) };
        Ok(Link { sender: Sender(Arc::new(shared)), reading: self.reading, decoder: self.decoder })
    }

    /// Proves the key and resumes the calls of `link`.
    pub fn accept_for(self, link: &Link, outcome: &[u8]) -> Result<(), String> {
        let (accept, session) = self.offered.accept(outcome).map_err(failed)?;
        {
            let mut writing = link.sender.writing();
            writing.file.write_all(&accept).map_err(|e| format!("ACCEPT: {e}"))?;
            link.sender.connection().resume(session);
        }
        link.sender.flush()
    }
}

struct Shared {
    connection: Mutex<Connection>,
    /// Taken before `connection`, and held while records are written.
    writing: Mutex<Writing>,
}

struct Writing {
    file: File,
    bytes: Vec<u8>,
}

/// The receiving end of the session.
pub struct Link {
    sender: Sender,
    reading: File,
    decoder: Decoder,
}

/// The sending end, for any thread.
#[derive(Clone)]
pub struct Sender(Arc<Shared>);

impl Sender {
    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.0.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.0.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a request and suspends the session: it drops the keys, and other frames wait for the next session.
    pub fn suspend(&self, id: u32, body: Vec<u8>) -> Result<(), String> {
        let mut writing = self.writing();
        writing.bytes.clear();
        {
            let mut connection = self.connection();
            connection.calls.respond(id, body).map_err(|e| e.to_string())?;
            connection.seal_last(id, &mut writing.bytes).map_err(|e| e.to_string())?;
            connection.suspend();
        }
        let Writing { file, bytes } = &mut *writing;
        file.write_all(bytes).map_err(|e| format!("port: {e}"))
    }

    /// Runs `act` on the calls and sends what it queued.
    fn with<T>(&self, act: impl FnOnce(&mut Mux) -> T) -> Result<T, String> {
        let done = act(&mut self.connection().calls);
        self.flush()?;
        Ok(done)
    }

    /// Writes what waits. Whoever finds another thread writing leaves it to that one, which looks again before it goes.
    fn flush(&self) -> Result<(), String> {
        while self.connection().has_outgoing() {
            match self.0.writing.try_lock() {
                Ok(mut writing) => self.write(&mut writing)?,
                Err(TryLockError::Poisoned(poisoned)) => self.write(&mut poisoned.into_inner())?,
                Err(TryLockError::WouldBlock) => return Ok(()),
            }
        }
        Ok(())
    }

    fn write(&self, writing: &mut Writing) -> Result<(), String> {
        loop {
            writing.bytes.clear();
            self.connection().transmit(&mut writing.bytes, WRITE_CHUNK).map_err(|e| e.to_string())?;
            if writing.bytes.is_empty() {
                return Ok(());
            }
            writing.file.write_all(&writing.bytes).map_err(|e| format!("port: {e}"))?;
        }
    }

    /// Returns when everything is written, by whomever.
    pub fn drain(&self) -> Result<(), String> {
        self.write(&mut self.0.writing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn respond(&self, id: u32, body: Vec<u8>) -> Result<(), String> {
        self.with(|calls| calls.respond(id, body))?.map_err(|e| format!("answer {id}: {e}"))
    }

    pub fn started(&self, id: u32, started: &Started) -> Result<(), String> {
        let body = serde_json::to_vec(started).map_err(|e| e.to_string())?;
        // Gone: the host cancelled it meanwhile, which its thread is about to hear.
        self.with(|calls| calls.started(id, body)).map(drop)
    }

    /// How many bytes a channel would take now.
    pub fn room(&self, id: u32, channel: u8) -> usize {
        self.connection().calls.room(id, channel)
    }

    /// Sends as many bytes as the host has given credit for; `None` when the call is over.
    pub fn send(&self, id: u32, channel: u8, bytes: &[u8]) -> Result<Option<usize>, String> {
        Ok(self.with(|calls| calls.send(id, channel, bytes))?.ok())
    }

    /// Ends a channel.
    pub fn finish(&self, id: u32, channel: u8) -> Result<(), String> {
        self.with(|calls| calls.finish(id, channel)).map(drop)
    }

    /// Lets the host send as many bytes more.
    pub fn consumed(&self, id: u32, channel: u8, bytes: usize) -> Result<(), String> {
        self.with(|calls| calls.consumed(id, channel, bytes))
    }
}

impl Link {
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// The port for another handshake, once the session is suspended.
    pub fn port(&self) -> Result<Port, String> {
        let dup = || self.reading.try_clone().map_err(|e| format!("dup: {e}"));
        let (file, reading) = (dup()?, dup()?);
        let handshake = GuestHandshake::new(false).map_err(failed)?;
        Ok(Port { file, reading, decoder: Decoder::default(), handshake, listener: None })
    }

    /// What the host says next; `None` when it closed the port.
    pub fn receive(&mut self) -> Result<Option<Incoming>, String> {
        loop {
            if let Some(record) = self.decoder.next_record().map_err(|e| e.to_string())? {
                let incoming = self.sender.connection().receive(record).map_err(|e| e.to_string())?;
                match incoming {
                    Some(incoming) => return Ok(Some(incoming)),
                    // A PING, perhaps.
                    None => self.sender.flush()?,
                }
                continue;
            }
            match self.reading.read(self.decoder.space()).map_err(|e| format!("port: {e}"))? {
                0 => return Ok(None),
                length => self.decoder.filled(length),
            }
        }
    }
}
