//! The session with one agent, and the tasks that serve it.
//!
//! Latency: a caller seals and writes its own bytes on its own thread, without a hop; a thread that is writing already
//! writes them, too. Only when the transport is full does the writer's task take over. The reader's task wakes the
//! caller directly.
//!
//! Locks: `writer` before `state`, both held for a few instructions or one `write(2)` that does not block; never across
//! an await or a log call.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::connection::Connection;
use microvm_protocol::mux::{Cancelled, Incoming, Mux, MAX_CALLS};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::Session;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use super::error::SessionError;
use super::mailbox::Mailbox;
use super::rehandshake::{Rehandshake, RehandshakeReply};
use crate::error::{Cause, Error, Result};
use crate::model::VmId;
use crate::mutex::Mutex;

/// Records are gathered up to about this many bytes for one write.
const WRITE_CHUNK: usize = 64 * 1024;
/// Writes that one caller does for others before it leaves the rest to the writer's task.
const ROUNDS: usize = 4;
/// Streams at once; the other places are kept for commands.
pub(super) const MAX_STREAMS: usize = MAX_CALLS / 2;
/// Events that are logged: a hostile guest fills no log.
const STRANGE_EVENTS: u64 = 8;

/// Who answers the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Guest,
    /// The process that has the VM; it hands calls on to the guest, and does what the guest cannot.
    Owner,
}

impl Peer {
    /// What the end of the byte stream means.
    fn left(self) -> SessionError {
        match self {
            Peer::Guest => SessionError::TransportClosed,
            Peer::Owner => SessionError::OwnerGone,
        }
    }
}

/// Where the reply to a call goes.
pub enum ReplyTo {
    Once(oneshot::Sender<Vec<u8>>),
    Stream(Arc<Mailbox>),
    Rehandshake(RehandshakeReply),
    /// The caller cancelled: the reply is discarded.
    Nobody,
}

/// A call whose response has not come yet.
pub(super) struct InFlight {
    reply_to: ReplyTo,
    /// Counts as user activity. Health probes do not.
    is_use: bool,
    /// Released when the response has come, which may be long after the caller cancelled.
    _place: OwnedSemaphorePermit,
}

impl InFlight {
    pub(super) fn new(reply_to: ReplyTo, place: OwnedSemaphorePermit, is_use: bool) -> Self {
        Self { reply_to, is_use, _place: place }
    }
}

pub(super) struct LinkState {
    pub(super) connection: Connection,
    pub(super) in_flight: HashMap<u32, InFlight>,
    /// The guest is frozen, and there is no session.
    pub(super) rehandshake: Option<Rehandshake>,
    /// When a call of a user last began or ended.
    used: Instant,
    /// Why no answer will come any more.
    pub(super) closed: Option<Cause>,
}

/// Everything about the transport's writing end.
pub(super) struct Writer {
    /// `None` once the session is closed.
    stream: Option<Arc<UnixStream>>,
    pub(super) bytes: Vec<u8>,
    written: usize,
}

pub struct Link {
    pub vm_id: VmId,
    pub(super) peer: Peer,
    pub(super) state: Mutex<LinkState>,
    pub(super) writer: Mutex<Writer>,
    blocked: Notify,
    /// Notified when no call is in flight.
    pub(super) idle: Notify,
    places: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    /// Records received.
    records_received: AtomicU64,
    /// Notified for each record.
    sign: Notify,
    pings: AtomicU32,
    strange: AtomicU64,
    /// They hold the transport, too, and end with the session.
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Link {
    /// Takes over an established session.
    pub fn start(vm_id: VmId, peer: Peer, stream: UnixStream, session: Session, decoder: Decoder) -> Arc<Self> {
        let stream = Arc::new(stream);
        let connection = Connection::new(session);
        let state =
            LinkState { connection, in_flight: HashMap::new(), rehandshake: None, used: Instant::now(), closed: None };
        let link = Arc::new(Self {
            vm_id,
            peer,
            state: Mutex::new(state),
            writer: Mutex::new(Writer { stream: Some(stream.clone()), bytes: Vec::new(), written: 0 }),
            blocked: Notify::new(),
            idle: Notify::new(),
            places: Arc::new(Semaphore::new(MAX_CALLS)),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            records_received: AtomicU64::new(0),
            sign: Notify::new(),
            pings: AtomicU32::new(0),
            strange: AtomicU64::new(0),
            tasks: Mutex::default(),
        });
        let tasks = [
            tokio::spawn(read(link.clone(), stream.clone(), decoder)).abort_handle(),
            tokio::spawn(write(link.clone(), stream)).abort_handle(),
        ];
        link.tasks.lock().extend(tasks);
        // The session may have ended before its tasks were noted.
        if link.state.lock().closed.is_some() {
            link.end_tasks();
        }
        link
    }

    fn end_tasks(&self) {
        self.tasks.lock().drain(..).for_each(|task| task.abort());
    }

    /// Ends the session and wakes all callers.
    pub fn close(&self, reason: impl Into<Cause>) {
        let calls = {
            let mut state = self.state.lock();
            state.closed.get_or_insert(reason.into());
            state.rehandshake = None;
            std::mem::take(&mut state.in_flight)
        };
        self.idle.notify_waiters();
        for call in calls.into_values() {
            if let ReplyTo::Stream(mailbox) = call.reply_to {
                mailbox.close();
            }
        }
        self.places.close();
        self.streams.close();
        self.sign.notify_waiters();
        self.writer.lock().stream = None;
        self.end_tasks();
    }

    /// The lock is given back before the caller asks why: a guard in a `match` lives as long as its arms.
    fn is_closed(&self) -> bool {
        self.state.lock().closed.is_some()
    }

    /// Returns when the session has ended.
    pub async fn ended(&self) {
        loop {
            let sign = self.sign.notified();
            tokio::pin!(sign);
            sign.as_mut().enable();
            if self.is_closed() {
                return;
            }
            sign.await;
        }
    }

    pub fn closed(&self, sent: bool) -> Error {
        let reason = self.state.lock().closed.clone();
        Error::channel_closed(&self.vm_id, reason.unwrap_or_else(|| SessionError::Ended.into()), sent)
    }

    /// Records received so far.
    pub fn records_received(&self) -> u64 {
        self.records_received.load(Ordering::Relaxed)
    }

    /// How long ago the last call of a user ended; zero while one is in flight.
    pub fn idle_for(&self) -> Duration {
        let state = self.state.lock();
        match state.in_flight.values().any(|call| call.is_use) {
            true => Duration::ZERO,
            false => state.used.elapsed(),
        }
    }

    /// Asks for a sign of life, which any record is, and waits for it; a peer that talks anyway need not be asked.
    pub async fn sign_of_life(&self) -> Result<()> {
        let sign = self.sign.notified();
        let token = self.pings.fetch_add(1, Ordering::Relaxed);
        // A PING that was not answered yet will do as well.
        self.with(|calls| calls.ping(token));
        if self.is_closed() {
            return Err(self.closed(true));
        }
        sign.await;
        match self.is_closed() {
            true => Err(self.closed(true)),
            false => Ok(()),
        }
    }

    /// A place for a call, if one is free.
    pub fn place_now(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    /// A place for a call; waits while all are taken.
    pub async fn place(&self) -> Result<OwnedSemaphorePermit> {
        self.places.clone().acquire_owned().await.map_err(|_| self.closed(false))
    }

    /// A place for a stream.
    pub async fn stream_place(&self) -> Result<OwnedSemaphorePermit> {
        self.streams.clone().acquire_owned().await.map_err(|_| self.closed(false))
    }

    /// Begins a call and sends what can be sent at once.
    pub fn ask(&self, body: Vec<u8>, reply_to: ReplyTo, place: OwnedSemaphorePermit, is_use: bool) -> Result<u32> {
        let id = {
            let mut state = self.state.lock();
            if let Some(reason) = state.closed.clone() {
                return Err(Error::channel_closed(&self.vm_id, reason, false));
            }
            let refused = |error| Error::channel_closed(&self.vm_id, SessionError::Refused(error), false);
            let id = state.connection.calls.request(body).map_err(refused)?;
            state.in_flight.insert(id, InFlight::new(reply_to, place, is_use));
            if is_use {
                state.used = Instant::now();
            }
            id
        };
        self.flush();
        Ok(id)
    }

    /// Cancels a call; returns whether the guest may have begun it.
    pub fn cancel(&self, id: u32) -> bool {
        let sent = {
            let mut state = self.state.lock();
            let sent = state.connection.calls.cancel(id) != Ok(Cancelled::NeverSent);
            if let Some(call) = state.in_flight.get_mut(&id).filter(|_| sent) {
                call.reply_to = ReplyTo::Nobody;
            } else {
                state.in_flight.remove(&id);
                self.tell_idle(&state);
            }
            sent
        };
        self.flush();
        sent
    }

    fn tell_idle(&self, state: &LinkState) {
        if state.in_flight.is_empty() {
            self.idle.notify_waiters();
        }
    }

    /// Runs `act` on the calls and sends what it queued.
    pub fn with<T>(&self, act: impl FnOnce(&mut Mux) -> T) -> T {
        let done = act(&mut self.state.lock().connection.calls);
        self.flush();
        done
    }

    /// Writes what waits, as far as the transport takes it. Never blocks.
    pub(super) fn flush(&self) {
        for _ in 0..ROUNDS {
            // The thread that holds it looks again before it goes.
            let Some(mut writer) = self.writer.try_lock() else { return };
            let Some(stream) = writer.stream.clone() else { return };
            if let Err(reason) = self.write_some(&mut writer, &stream) {
                drop(writer);
                return self.close(reason);
            }
            let is_stuck = writer.written < writer.bytes.len();
            drop(writer);
            if is_stuck {
                break;
            }
            if !self.state.lock().connection.has_outgoing() {
                return;
            }
        }
        self.blocked.notify_one();
    }

    fn write_some(&self, writer: &mut Writer, stream: &UnixStream) -> std::result::Result<(), SessionError> {
        if writer.written == writer.bytes.len() {
            (writer.written, _) = (0, writer.bytes.clear());
            self.state.lock().connection.transmit(&mut writer.bytes, WRITE_CHUNK)?;
        }
        while writer.written < writer.bytes.len() {
            match stream.try_write(&writer.bytes[writer.written..]) {
                Ok(length) => writer.written += length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes one record. The error is the end of the session.
    fn take(&self, record: &[u8]) -> std::result::Result<(), SessionError> {
        self.records_received.fetch_add(1, Ordering::Relaxed);
        self.sign.notify_waiters();
        let mut state = self.state.lock();
        if let Some(rehandshake) = state.rehandshake.take() {
            let next = rehandshake.take(record, &mut state.connection)?;
            // It may have been closed meanwhile.
            state.rehandshake = next.filter(|_| state.closed.is_none());
            return Ok(());
        }
        let Some(incoming) = state.connection.receive(record)? else {
            return Ok(());
        };
        let mailbox = |state: &LinkState, id: u32| match state.in_flight.get(&id) {
            Some(InFlight { reply_to: ReplyTo::Stream(mailbox), .. }) => Some(mailbox.clone()),
            _ => None,
        };
        match incoming {
            Incoming::Response { id, body } => {
                let Some(call) = state.in_flight.remove(&id) else { return Ok(()) };
                self.tell_idle(&state);
                if let ReplyTo::Rehandshake(reply) = call.reply_to {
                    return state.begin_rehandshake(&body, reply);
                }
                if call.is_use {
                    state.used = Instant::now();
                }
                drop(state);
                match call.reply_to {
                    // The caller may have cancelled this very moment: then the reply is dropped.
                    ReplyTo::Once(reply) => drop(reply.send(body)),
                    ReplyTo::Stream(mailbox) => mailbox.respond(body),
                    ReplyTo::Nobody | ReplyTo::Rehandshake(_) => {}
                }
            }
            // Data of a call that is no stream is dropped, and gets no more credit.
            Incoming::Data { id, channel, bytes, last } => {
                if let Some(mailbox) = mailbox(&state, id) {
                    drop(state);
                    mailbox.push(channel, bytes, last);
                }
            }
            Incoming::Started { id, body } => {
                if let Some(mailbox) = mailbox(&state, id) {
                    mailbox.start(body);
                }
            }
            Incoming::Credit { id, .. } => {
                if let Some(mailbox) = mailbox(&state, id) {
                    mailbox.credit();
                }
            }
            Incoming::Event { body } => {
                drop(state);
                self.take_event(&body);
            }
            Incoming::Pong => {}
            Incoming::Request { .. }
            | Incoming::Refused { .. }
            | Incoming::Cancel { .. }
            | Incoming::Control { .. } => {
                return Err(SessionError::WrongSide { peer: "the agent", other: "a host" });
            }
        }
        Ok(())
    }

    /// EVENT frames are reserved: the host logs the first ones and ignores them.
    fn take_event(&self, body: &[u8]) {
        if self.strange.fetch_add(1, Ordering::Relaxed) < STRANGE_EVENTS {
            let said: String = String::from_utf8_lossy(body).chars().take(200).collect();
            log::debug!("{}: the agent said {said:?}", self.vm_id);
        }
    }
}

async fn read(link: Arc<Link>, stream: Arc<UnixStream>, mut decoder: Decoder) {
    let reason = 'session: loop {
        loop {
            match decoder.next_record() {
                Ok(Some(record)) => {
                    if let Err(reason) = link.take(record) {
                        break 'session reason;
                    }
                }
                Ok(None) => break,
                Err(error) => break 'session error.into(),
            }
        }
        // Credit and the like.
        if link.state.lock().connection.has_outgoing() {
            link.flush();
        }
        match stream.try_read(decoder.space()) {
            Ok(0) => break link.peer.left(),
            Ok(length) => decoder.filled(length),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if let Err(error) = stream.readable().await {
                    break error.into();
                }
            }
            Err(error) => break error.into(),
        }
        // A guest that never stops talking must not keep a worker to itself.
        tokio::task::coop::consume_budget().await;
    };
    if link.state.lock().closed.is_none() {
        log::debug!("{}: the session ended: {reason}", link.vm_id);
    }
    link.close(reason);
}

async fn write(link: Arc<Link>, stream: Arc<UnixStream>) {
    loop {
        link.blocked.notified().await;
        if let Err(error) = stream.writable().await {
            return link.close(SessionError::from(error));
        }
        link.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use microvm_protocol::handshake::{GuestHandshake, HostHandshake, HostStep};
    use microvm_protocol::identity::{Credentials, Key};

    fn session() -> Session {
        let credentials = Credentials::agree(Key([1; 32]), &Key([2; 32]), &Key([3; 32]));
        let record = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            decoder.next_record().unwrap().unwrap().to_vec()
        };
        let (guest, mut host) = (GuestHandshake::new(false).unwrap(), HostHandshake::new(credentials.of_peer()));
        let HostStep::Send(offer) = host.receive(&record(&guest.hello().unwrap()), 1).unwrap() else { panic!() };
        let (accept, _) = guest.receive(&record(&offer), &credentials).unwrap().accept(b"").unwrap();
        let HostStep::Established(session, _) = host.receive(&record(&accept), 1).unwrap() else { panic!() };
        *session
    }

    #[test]
    fn test_sign_of_life_that_the_end_of_the_session_interrupts_is_an_error() {
        let (told, ended) = std::sync::mpsc::channel();
        // On a thread of its own: a deadlock is to fail the test, not to hang it.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let waited = runtime.block_on(async {
                let (host, guest) = UnixStream::pair().unwrap();
                let link = Link::start(VmId::parse("vm").unwrap(), Peer::Guest, host, session(), Decoder::default());
                let end = async {
                    tokio::task::yield_now().await;
                    drop(guest);
                };
                tokio::join!(link.sign_of_life(), end).0
            });
            told.send(waited).unwrap();
        });
        let waited = ended.recv_timeout(Duration::from_secs(20)).expect("it waits for a lock that it holds");
        assert!(matches!(waited, Err(Error::ChannelClosed { .. })), "{waited:?}");
    }
}
