//! The transport to the host, and the sealed link on top of it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use microvm_protocol::frame::Kind;
use microvm_protocol::handshake::{Ask, GuestHandshake};
use microvm_protocol::identity::Identity;
use microvm_protocol::record::Decoder;
use microvm_protocol::session::{Message, Session};
use microvm_protocol::{ProtocolError, SERIAL_PORT_NAME};

const READ_CHUNK: usize = 64 * 1024;
/// How long the kernel may take to show the port after PID 1 began.
const PORT_DEADLINE: Duration = Duration::from_secs(10);

/// The open port, before the handshake.
pub struct Port {
    file: File,
    decoder: Decoder,
    handshake: GuestHandshake,
}

/// Finds the virtio-serial port by its name.
pub fn open(set_up_failed: bool) -> Result<Port, String> {
    let handshake = GuestHandshake::new(set_up_failed).map_err(|e| e.to_string())?;
    let begun = Instant::now();
    loop {
        if let Some(name) = find() {
            let path = format!("/dev/{name}");
            let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| format!("{path}: {e}"))?;
            return Ok(Port { file, decoder: Decoder::default(), handshake });
        }
        if begun.elapsed() > PORT_DEADLINE {
            return Err(format!("no virtio port is named {SERIAL_PORT_NAME}"));
        }
        // The port's name arrives by a control message of the device, a moment after the driver is up.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn find() -> Option<String> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        (name.trim() == SERIAL_PORT_NAME).then(|| port.file_name().to_string_lossy().into_owned())
    })
}

impl Port {
    pub fn say_hello(&mut self) -> Result<(), String> {
        let hello = self.handshake.hello().map_err(|e| e.to_string())?;
        self.file.write_all(&hello).map_err(|e| format!("HELLO: {e}"))
    }

    /// Waits for the host's OFFER; a guest without an identity stands here for as long as its template is kept. `rehearse`
    /// runs before it is frozen.
    pub fn wait_for_offer(&mut self, rehearse: impl Fn()) -> Result<(Vec<u8>, Instant), String> {
        let mut chunk = vec![0; READ_CHUNK];
        loop {
            match self.decoder.next_record().map_err(|e| e.to_string())? {
                Some(record) => match Ask::decode(record) {
                    None => return Ok((record.to_vec(), Instant::now())),
                    Some(ask) => {
                        if ask == Ask::Freeze {
                            rehearse();
                        }
                        self.say_hello()?;
                    }
                },
                None => match self.file.read(&mut chunk).map_err(|e| format!("handshake: {e}"))? {
                    0 => return Err("handshake: the host closed the port".into()),
                    length => self.decoder.feed(chunk.get(..length).unwrap_or_default()),
                },
            }
        }
    }

    /// Has the host prove the key, and then proves it; `outcome` says how the guest is.
    pub fn shake_hands(mut self, offer: &[u8], identity: &Identity, outcome: &[u8]) -> Result<(Link, u64), String> {
        let failed = |e: ProtocolError| format!("handshake: {e}");
        let offered = self.handshake.receive(offer, &identity.key, &identity.ephemeral).map_err(failed)?;
        let time = offered.unix_time_ns;
        let (accept, session) = offered.accept(outcome).map_err(failed)?;
        self.file.write_all(&accept).map_err(|e| format!("ACCEPT: {e}"))?;
        let reading = self.file.try_clone().map_err(|e| format!("dup: {e}"))?;
        let shared = Shared { session: Mutex::new(session), writing: Mutex::new(self.file) };
        Ok((Link { shared: Arc::new(shared), reading, decoder: self.decoder, chunk: vec![0; READ_CHUNK] }, time))
    }
}

struct Shared {
    session: Mutex<Session>,
    writing: Mutex<File>,
}

/// The receiving end of the session.
pub struct Link {
    shared: Arc<Shared>,
    reading: File,
    decoder: Decoder,
    chunk: Vec<u8>,
}

/// The sending end, for any thread.
#[derive(Clone)]
pub struct Sender(Arc<Shared>);

impl Sender {
    pub fn send(&self, kind: Kind, id: u32, body: &[u8]) -> Result<(), String> {
        // Sealed and written under one lock: the records must leave in the order of their nonces.
        let mut file = self.0.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = Vec::new();
        {
            let mut session = self.0.session.lock().unwrap_or_else(PoisonError::into_inner);
            session.seal(kind, id, body, &mut bytes).map_err(|e| e.to_string())?;
        }
        file.write_all(&bytes).map_err(|e| e.to_string())
    }
}

impl Link {
    pub fn sender(&self) -> Sender {
        Sender(self.shared.clone())
    }

    /// The next message; `None` when the host closed the port.
    pub fn receive(&mut self) -> Result<Option<Message>, String> {
        loop {
            if let Some(record) = self.decoder.next_record().map_err(|e| e.to_string())? {
                let mut session = self.shared.session.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(message) = session.open(record).map_err(|e| e.to_string())? {
                    return Ok(Some(message));
                }
                continue;
            }
            match self.reading.read(&mut self.chunk).map_err(|e| format!("port: {e}"))? {
                0 => return Ok(None),
                length => self.decoder.feed(self.chunk.get(..length).unwrap_or_default()),
            }
        }
    }
}
