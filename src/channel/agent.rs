//! The host's end of the session with one agent.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use microvm_protocol::frame::Kind;
use microvm_protocol::handshake::{HostHandshake, HostStep};
use microvm_protocol::identity::Key;
use microvm_protocol::message::{Outcome, Request, Response, MAX_MESSAGE};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::Session;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::error::{Error, Result};
use crate::host::clock;
use crate::model::VmId;

/// Requests that may wait to be written; more callers wait in `request`.
const QUEUE: usize = 64;
const READ_CHUNK: usize = 64 * 1024;

/// What the agent answered: its own success or failure, in its own words.
pub type Answer = Response;

struct Outgoing {
    kind: Kind,
    id: u32,
    body: Vec<u8>,
}

#[derive(Default)]
struct Pending {
    next_id: u32,
    waiting: HashMap<u32, oneshot::Sender<Vec<u8>>>,
    /// Why no answer will come any more.
    closed: Option<String>,
}

struct Shared {
    vm_id: VmId,
    pending: Mutex<Pending>,
    session: Mutex<Session>,
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, reason: &str) {
        let mut pending = self.pending();
        pending.closed.get_or_insert_with(|| reason.to_owned());
        // Dropping the senders wakes every caller.
        pending.waiting.clear();
    }
}

/// A session with one agent, for any number of callers. Dropping it closes the transport.
pub struct Agent {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Outgoing>,
    tasks: [AbortHandle; 2],
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.close("the VM was stopped");
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Forgets a request whose caller went away, and tells the agent.
struct Cancel<'a> {
    agent: &'a Agent,
    id: u32,
    armed: bool,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        self.agent.shared.pending().waiting.remove(&self.id);
        let cancel = Outgoing { kind: Kind::Cancel, id: self.id, body: Vec::new() };
        if self.agent.outgoing.try_send(cancel).is_err() {
            log::debug!("{}: the cancellation of request {} was not sent", self.agent.shared.vm_id, self.id);
        }
    }
}

impl Agent {
    /// Waits for the agent's HELLO: the guest is up and waits for an identity.
    ///
    /// # Errors
    /// [`Error::HandshakeFailed`].
    pub async fn hello(vm_id: &VmId, stream: &mut UnixStream) -> Result<Vec<u8>> {
        let mut decoder = Decoder::default();
        let hello = next_record(vm_id, stream, &mut decoder).await?;
        match decoder.next_record() {
            // Nothing may follow before the host's OFFER.
            Ok(None) => Ok(hello),
            _ => Err(Error::HandshakeFailed { vm_id: vm_id.clone(), reason: "the guest spoke out of turn".into() }),
        }
    }

    /// Shakes hands with an agent that has said `hello`, and hears whether the guest is what it was told to be.
    ///
    /// # Errors
    /// [`Error::HandshakeFailed`]; [`Error::StartFailed`] with what failed in the guest.
    pub async fn connect(vm_id: VmId, mut stream: UnixStream, key: Key, hello: &[u8]) -> Result<Self> {
        let failed = |reason: String| Error::HandshakeFailed { vm_id: vm_id.clone(), reason };
        let mut decoder = Decoder::default();
        let mut handshake = HostHandshake::new(key);
        let mut step = handshake.receive(hello, clock::unix_time_ns()).map_err(|e| failed(e.to_string()))?;
        let (session, said) = loop {
            match step {
                HostStep::Send(bytes) => stream.write_all(&bytes).await.map_err(|e| failed(e.to_string()))?,
                HostStep::Established(session, said) => break (*session, said),
            }
            let record = next_record(&vm_id, &mut stream, &mut decoder).await?;
            step = handshake.receive(&record, clock::unix_time_ns()).map_err(|e| failed(e.to_string()))?;
        };
        match serde_json::from_slice(&said).map_err(|e| failed(e.to_string()))? {
            Outcome::Ready => {}
            Outcome::Failed { stage, message } => {
                let reason = format!("{stage}: {message}");
                return Err(Error::StartFailed { vm_id, stage: "guest setup", reason, tails: Box::default() });
            }
        }
        let shared = Arc::new(Shared { vm_id, pending: Mutex::default(), session: Mutex::new(session) });
        let (reading, writing) = stream.into_split();
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let tasks = [
            tokio::spawn(read(shared.clone(), reading, decoder)).abort_handle(),
            tokio::spawn(write(shared.clone(), writing, queue)).abort_handle(),
        ];
        Ok(Self { shared, outgoing, tasks })
    }

    fn closed_reason(&self) -> String {
        self.shared.pending().closed.clone().unwrap_or_else(|| "the session ended".into())
    }

    fn closed(&self) -> Error {
        Error::ChannelClosed { vm_id: self.shared.vm_id.to_string(), reason: self.closed_reason() }
    }

    /// Asks the agent for `action` and waits for the answer, at most `deadline`.
    ///
    /// # Errors
    /// [`Error::MessageTooLarge`] with nothing sent, [`Error::ChannelTimeout`], [`Error::ChannelClosed`]. A failure in
    /// the guest is an [`Answer`].
    pub async fn request(&self, action: &str, params: Value, deadline: Duration) -> Result<Answer> {
        let request = Request { action: action.to_owned(), params };
        let vm_id = || self.shared.vm_id.to_string();
        let unreadable =
            |e: serde_json::Error| Error::ChannelClosed { vm_id: vm_id(), reason: format!("bad JSON: {e}") };
        let body = serde_json::to_vec(&request).map_err(unreadable)?;
        if body.len() > MAX_MESSAGE {
            let what = format!("command {action:?}");
            return Err(Error::MessageTooLarge { vm_id: vm_id(), what, size: body.len(), limit: MAX_MESSAGE });
        }
        let (answer_tx, answer) = oneshot::channel();
        let id = {
            let mut pending = self.shared.pending();
            if let Some(reason) = &pending.closed {
                return Err(Error::ChannelClosed { vm_id: vm_id(), reason: reason.clone() });
            }
            // Ids come round after 2^32 requests; one that still waits is passed over.
            while {
                pending.next_id = pending.next_id.wrapping_add(1);
                pending.waiting.contains_key(&pending.next_id)
            } {}
            let id = pending.next_id;
            pending.waiting.insert(id, answer_tx);
            id
        };
        let mut cancel = Cancel { agent: self, id, armed: true };
        let exchange = async {
            self.outgoing.send(Outgoing { kind: Kind::Request, id, body }).await.map_err(|_| self.closed())?;
            answer.await.map_err(|_| self.closed())
        };
        let timeout = || Error::ChannelTimeout {
            vm_id: vm_id(),
            what: format!("command {action:?}"),
            limit_s: deadline.as_secs_f64(),
        };
        let body = tokio::time::timeout(deadline, exchange).await.map_err(|_| timeout())??;
        cancel.armed = false;
        serde_json::from_slice(&body).map_err(unreadable)
    }
}

async fn next_record(vm_id: &VmId, stream: &mut UnixStream, decoder: &mut Decoder) -> Result<Vec<u8>> {
    let failed = |reason: String| Error::HandshakeFailed { vm_id: vm_id.clone(), reason };
    let mut chunk = [0; 1024];
    loop {
        if let Some(record) = decoder.next_record().map_err(|e| failed(e.to_string()))? {
            return Ok(record.to_vec());
        }
        match stream.read(&mut chunk).await.map_err(|e| failed(e.to_string()))? {
            0 => return Err(failed("the VMM closed the transport".into())),
            length => decoder.feed(&chunk[..length]),
        }
    }
}

async fn read(shared: Arc<Shared>, mut stream: OwnedReadHalf, mut decoder: Decoder) {
    let reason = loop {
        let next = match decoder.next_record() {
            Ok(Some(record)) => {
                let mut session = shared.session.lock().unwrap_or_else(PoisonError::into_inner);
                session.open(record).map(Some)
            }
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        match next {
            Ok(Some(Some(message))) => match message.kind {
                Kind::Response => {
                    // No one waits any more when the caller gave up: then the answer is dropped.
                    if let Some(caller) = shared.pending().waiting.remove(&message.id) {
                        drop(caller.send(message.body));
                    }
                }
                kind => break format!("the agent sent a {kind:?}"),
            },
            Ok(Some(None)) => {}
            Ok(None) => {
                let mut chunk = vec![0; READ_CHUNK];
                match stream.read(&mut chunk).await {
                    Ok(0) => break "the transport was closed".to_owned(),
                    Ok(length) => decoder.feed(&chunk[..length]),
                    Err(error) => break error.to_string(),
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    shared.close(&reason);
}

async fn write(shared: Arc<Shared>, mut stream: OwnedWriteHalf, mut queue: mpsc::Receiver<Outgoing>) {
    let mut bytes = Vec::new();
    while let Some(first) = queue.recv().await {
        bytes.clear();
        let mut next = Some(first);
        // Whatever waits goes out in one write.
        while let Some(message) = next {
            let mut session = shared.session.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = session.seal(message.kind, message.id, &message.body, &mut bytes) {
                shared.close(&error.to_string());
                return;
            }
            drop(session);
            next = if bytes.len() < READ_CHUNK { queue.try_recv().ok() } else { None };
        }
        if let Err(error) = stream.write_all(&bytes).await {
            shared.close(&error.to_string());
            return;
        }
    }
}
