//! The session with one agent, and the tasks that serve it.
//!
//! Latency: whoever has something to send seals and writes it on its own thread, without a hop, unless somebody else is
//! writing already; then that one writes it, too. Only when the transport is full does the writer's task take over. The
//! reader's task wakes the asker directly.
//!
//! Locks: `writer` before `state`, both held for a few instructions or one `write(2)` that does not block; never across
//! an await or a log call.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use microvm_protocol::connection::Connection;
use microvm_protocol::mux::{Cancelled, Incoming, Mux, MAX_EXCHANGES};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::Session;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use super::mailbox::Mailbox;
use super::recess::{Recess, RecessAsker};
use crate::error::{Error, Result};
use crate::model::VmId;

/// Records are gathered up to about this many bytes for one write.
const WRITE_CHUNK: usize = 64 * 1024;
/// Writes that one caller does for others before it leaves the rest to the writer's task.
const ROUNDS: usize = 4;
/// Streams at once; the other exchanges are kept for commands.
const MAX_STREAMS: usize = MAX_EXCHANGES / 2;
/// Events that are logged: a hostile guest fills no log.
const STRANGE_EVENTS: u64 = 8;

/// Who waits for an exchange.
pub enum Asker {
    Once(oneshot::Sender<Vec<u8>>),
    Stream(Arc<Mailbox>),
    Recess(RecessAsker),
    /// The one who did gave up.
    Nobody,
}

pub(super) struct Open {
    asker: Asker,
    /// Whether someone uses the VM by it; a look at its health is no use.
    is_use: bool,
    /// Given back when the exchange is over, which may be long after its asker gave up.
    _place: OwnedSemaphorePermit,
}

impl Open {
    pub(super) fn new(asker: Asker, place: OwnedSemaphorePermit, is_use: bool) -> Self {
        Self { asker, is_use, _place: place }
    }
}

pub(super) struct State {
    pub(super) connection: Connection,
    pub(super) open: HashMap<u32, Open>,
    /// The guest is frozen, and there is no session.
    pub(super) recess: Option<Recess>,
    /// When somebody last began or ended an exchange.
    used: Instant,
    /// Why no answer will come any more.
    pub(super) closed: Option<String>,
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
    state: Mutex<State>,
    pub(super) writer: Mutex<Writer>,
    blocked: Notify,
    /// The last exchange is over.
    pub(super) idle: Notify,
    places: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    /// Records that came.
    heard: AtomicU64,
    /// Rings for each of them.
    sign: Notify,
    pings: AtomicU32,
    strange: AtomicU64,
    /// They hold the transport, too, and end with the session.
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Link {
    /// Takes over an established session.
    pub fn start(vm_id: VmId, stream: UnixStream, session: Session, decoder: Decoder) -> Arc<Self> {
        let stream = Arc::new(stream);
        let connection = Connection::new(session);
        let state = State { connection, open: HashMap::new(), recess: None, used: Instant::now(), closed: None };
        let link = Arc::new(Self {
            vm_id,
            state: Mutex::new(state),
            writer: Mutex::new(Writer { stream: Some(stream.clone()), bytes: Vec::new(), written: 0 }),
            blocked: Notify::new(),
            idle: Notify::new(),
            places: Arc::new(Semaphore::new(MAX_EXCHANGES)),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            heard: AtomicU64::new(0),
            sign: Notify::new(),
            pings: AtomicU32::new(0),
            strange: AtomicU64::new(0),
            tasks: Mutex::default(),
        });
        let tasks = [
            tokio::spawn(read(link.clone(), stream.clone(), decoder)).abort_handle(),
            tokio::spawn(write(link.clone(), stream)).abort_handle(),
        ];
        link.tasks().extend(tasks);
        // The session may have ended before its tasks were noted.
        if link.state().closed.is_some() {
            link.end_tasks();
        }
        link
    }

    fn tasks(&self) -> MutexGuard<'_, Vec<AbortHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_tasks(&self) {
        self.tasks().drain(..).for_each(|task| task.abort());
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the session; whoever waits is woken.
    pub fn close(&self, reason: &str) {
        let askers = {
            let mut state = self.state();
            state.closed.get_or_insert_with(|| reason.to_owned());
            state.recess = None;
            std::mem::take(&mut state.open)
        };
        self.idle.notify_waiters();
        for open in askers.into_values() {
            if let Asker::Stream(mailbox) = open.asker {
                mailbox.close();
            }
        }
        self.places.close();
        self.streams.close();
        self.sign.notify_waiters();
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).stream = None;
        self.end_tasks();
    }

    pub fn closed_reason(&self) -> String {
        self.state().closed.clone().unwrap_or_else(|| "the session ended".into())
    }

    pub fn closed(&self, sent: bool) -> Error {
        Error::ChannelClosed { vm_id: self.vm_id.to_string(), reason: self.closed_reason(), sent }
    }

    /// Records that came so far.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// For how long nobody has used the VM: no exchange of a user's is open, and none was.
    pub fn idle_for(&self) -> Duration {
        let state = self.state();
        match state.open.values().any(|open| open.is_use) {
            true => Duration::ZERO,
            false => state.used.elapsed(),
        }
    }

    /// Asks for a sign of life, which any record is, and waits for it; a peer that talks anyway need not be asked.
    pub async fn sign_of_life(&self) -> Result<()> {
        let sign = self.sign.notified();
        let token = self.pings.fetch_add(1, Ordering::Relaxed);
        // A PING that was not answered yet will do as well.
        self.with(|exchanges| exchanges.ping(token));
        if self.state().closed.is_some() {
            return Err(self.closed(true));
        }
        sign.await;
        match self.state().closed.is_some() {
            true => Err(self.closed(true)),
            false => Ok(()),
        }
    }

    /// A place for an exchange, if one is free.
    pub fn place_now(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    /// A place for an exchange; waits while all are taken.
    pub async fn place(&self) -> Result<OwnedSemaphorePermit> {
        self.places.clone().acquire_owned().await.map_err(|_| self.closed(false))
    }

    /// A place for a stream.
    pub async fn stream_place(&self) -> Result<OwnedSemaphorePermit> {
        self.streams.clone().acquire_owned().await.map_err(|_| self.closed(false))
    }

    /// Begins an exchange and sends what can be sent at once.
    pub fn ask(&self, body: Vec<u8>, asker: Asker, place: OwnedSemaphorePermit, is_use: bool) -> Result<u32> {
        let id = {
            let mut state = self.state();
            if let Some(reason) = state.closed.clone() {
                return Err(Error::ChannelClosed { vm_id: self.vm_id.to_string(), reason, sent: false });
            }
            let refused =
                |error| Error::ChannelClosed { vm_id: self.vm_id.to_string(), reason: format!("{error}"), sent: false };
            let id = state.connection.exchanges.request(body).map_err(refused)?;
            state.open.insert(id, Open::new(asker, place, is_use));
            if is_use {
                state.used = Instant::now();
            }
            id
        };
        self.flush();
        Ok(id)
    }

    /// Gives an exchange up; returns whether the guest may have begun it.
    pub fn give_up(&self, id: u32) -> bool {
        let sent = {
            let mut state = self.state();
            let sent = state.connection.exchanges.cancel(id) != Ok(Cancelled::NeverSent);
            if let Some(open) = state.open.get_mut(&id).filter(|_| sent) {
                open.asker = Asker::Nobody;
            } else {
                state.open.remove(&id);
                self.tell_idle(&state);
            }
            sent
        };
        self.flush();
        sent
    }

    fn tell_idle(&self, state: &State) {
        if state.open.is_empty() {
            self.idle.notify_waiters();
        }
    }

    /// Does something to the exchanges and sends what comes of it.
    pub fn with<T>(&self, act: impl FnOnce(&mut Mux) -> T) -> T {
        let done = act(&mut self.state().connection.exchanges);
        self.flush();
        done
    }

    /// Writes what waits, as far as the transport takes it. Never blocks.
    pub(super) fn flush(&self) {
        for _ in 0..ROUNDS {
            let mut writer = match self.writer.try_lock() {
                Ok(writer) => writer,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // The other one looks again before it goes.
                Err(TryLockError::WouldBlock) => return,
            };
            let Some(stream) = writer.stream.clone() else { return };
            if let Err(reason) = self.write_some(&mut writer, &stream) {
                drop(writer);
                return self.close(&reason);
            }
            let is_stuck = writer.written < writer.bytes.len();
            drop(writer);
            if is_stuck {
                break;
            }
            if !self.state().connection.has_outgoing() {
                return;
            }
        }
        self.blocked.notify_one();
    }

    fn write_some(&self, writer: &mut Writer, stream: &UnixStream) -> std::result::Result<(), String> {
        if writer.written == writer.bytes.len() {
            (writer.written, _) = (0, writer.bytes.clear());
            let sealed = self.state().connection.transmit(&mut writer.bytes, WRITE_CHUNK);
            sealed.map_err(|error| error.to_string())?;
        }
        while writer.written < writer.bytes.len() {
            match stream.try_write(&writer.bytes[writer.written..]) {
                Ok(length) => writer.written += length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("the transport failed: {error}")),
            }
        }
        Ok(())
    }

    /// Takes one record. The error is the end of the session.
    fn take(&self, record: &[u8]) -> std::result::Result<(), String> {
        self.heard.fetch_add(1, Ordering::Relaxed);
        self.sign.notify_waiters();
        let mut state = self.state();
        if let Some(recess) = state.recess.take() {
            let next = recess.take(record, &mut state.connection)?;
            // It may have been closed meanwhile.
            state.recess = next.filter(|_| state.closed.is_none());
            return Ok(());
        }
        let Some(incoming) = state.connection.receive(record).map_err(|error| error.to_string())? else {
            return Ok(());
        };
        let mailbox = |state: &State, id: u32| match state.open.get(&id) {
            Some(Open { asker: Asker::Stream(mailbox), .. }) => Some(mailbox.clone()),
            _ => None,
        };
        match incoming {
            Incoming::Response { id, body } => {
                let Some(open) = state.open.remove(&id) else { return Ok(()) };
                self.tell_idle(&state);
                if let Asker::Recess(asker) = open.asker {
                    return state.begin_recess(&body, asker);
                }
                if open.is_use {
                    state.used = Instant::now();
                }
                drop(state);
                match open.asker {
                    // Gave up this very moment: then the answer is dropped.
                    Asker::Once(asker) => drop(asker.send(body)),
                    Asker::Stream(mailbox) => mailbox.respond(body),
                    Asker::Nobody | Asker::Recess(_) => {}
                }
            }
            // A command that streams is heard by nobody, and gets no more credit.
            Incoming::Data { id, channel, bytes, .. } => {
                if let Some(mailbox) = mailbox(&state, id) {
                    drop(state);
                    mailbox.push(channel, bytes);
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
            Incoming::Request { .. } | Incoming::Cancel { .. } | Incoming::Control { .. } => {
                return Err("the agent sent what only a host may send".into());
            }
        }
        Ok(())
    }

    /// Today's agents say nothing unasked; what another one says is of no consequence.
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
                Err(error) => break 'session error.to_string(),
            }
        }
        // Credit and the like.
        if link.state().connection.has_outgoing() {
            link.flush();
        }
        match stream.try_read(decoder.space()) {
            Ok(0) => break "the transport was closed".to_owned(),
            Ok(length) => decoder.filled(length),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if let Err(error) = stream.readable().await {
                    break error.to_string();
                }
            }
            Err(error) => break error.to_string(),
        }
        // A guest that never stops talking must not keep a worker to itself.
        tokio::task::coop::consume_budget().await;
    };
    if link.state().closed.is_none() {
        log::debug!("{}: the session ended: {reason}", link.vm_id);
    }
    link.close(&reason);
}

async fn write(link: Arc<Link>, stream: Arc<UnixStream>) {
    loop {
        link.blocked.notified().await;
        if let Err(error) = stream.writable().await {
            return link.close(&error.to_string());
        }
        link.flush();
    }
}
