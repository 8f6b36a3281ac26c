//! The owner's end of the richer protocol: one attached client, whose calls are handed on to the guest.
//!
//! The client holds the host's end of the calls, this process the guest's. A stream is carried as it flows: a piece is taken
//! of one side when the other side has taken the one before, so a slow client, or a slow program, costs a window and a piece.
//! A client that stands still may do so for as long as it likes, unless a long answer waits for it. Its end ends its calls.
//!
//! Locks: `state` for a few instructions, never with the session's own lock, and never across an await.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use microvm_protocol::connection::Connection;
use microvm_protocol::message::{is_modest, refuse_internal, Control, Request, Response, MAX_MESSAGE};
use microvm_protocol::mux::{Incoming, MAX_CALLS, STDIN};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::{Role, Session};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::{watch, Notify, Semaphore};
use tokio::task::{AbortHandle, JoinSet};

use super::agent::Agent;
use super::broker::{patience_for, Place};
use super::error::SessionError;
use super::link::MAX_STREAMS;
use super::mailbox::{Mailbox, Taken};
use super::operation::{Operation, Owner, OwnerAnswer};
use super::stream::{Next, Stream};
use crate::error::{Error, Result};
use crate::model::VmId;
use crate::mutex::Mutex;

/// Calls of all attached clients together: the rest of the session's places is for the owner and its other clients.
const SHARED_CALLS: usize = MAX_CALLS * 3 / 4;
/// Streams among them: the same share of the session's.
const SHARED_STREAMS: usize = MAX_STREAMS * 3 / 4;
/// Calls of one client that are worked on at once; its others wait.
const CLIENT_CALLS: usize = 32;
/// Operations at once. What was begun goes on without its client, so that one who comes and goes heaps up no more.
const OPERATIONS: usize = 8;
/// Bytes of requests that are worked on, of all attached clients together.
const MAX_REQUESTS: usize = 2 * MAX_MESSAGE;
/// The longest answer that may wait for as long as a client stands still.
const MODEST_ANSWER: usize = 64 * 1024;
/// Records are gathered up to about this many bytes for one write.
const WRITE_CHUNK: usize = 64 * 1024;
/// A command has no other end than its client's patience.
const LONGEST: Duration = Duration::from_secs(86_400);
/// How long an operation waits for a VM whose start has not come to its end.
const STARTING: Duration = Duration::from_secs(10);
/// How long the answer of an operation that ended the broker may take to be written.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// What all attached clients of a VM share.
pub(super) struct Services {
    pub vm_id: VmId,
    pub agent: Arc<Agent>,
    /// How long the guest may take to begin a stream.
    pub deadline: Duration,
    owner: watch::Sender<Option<Arc<dyn Owner>>>,
    calls: Semaphore,
    streams: Semaphore,
    operations: Arc<Semaphore>,
    requests: AtomicUsize,
}

impl Services {
    pub fn new(vm_id: VmId, agent: Arc<Agent>, deadline: Duration) -> Self {
        Self {
            vm_id,
            agent,
            deadline,
            owner: watch::Sender::new(None),
            calls: Semaphore::new(SHARED_CALLS),
            streams: Semaphore::new(SHARED_STREAMS),
            operations: Arc::new(Semaphore::new(OPERATIONS)),
            requests: AtomicUsize::new(0),
        }
    }

    pub fn set_owner(&self, owner: Arc<dyn Owner>) {
        self.owner.send_replace(Some(owner));
    }

    async fn owner(&self) -> Result<Arc<dyn Owner>> {
        let mut owner = self.owner.subscribe();
        let found = tokio::time::timeout(STARTING, owner.wait_for(Option::is_some)).await;
        let found = found.ok().and_then(std::result::Result::ok).and_then(|owner| owner.clone());
        found.ok_or_else(|| Error::channel_closed(&self.vm_id, SessionError::Starting, false))
    }
}

/// Bytes of a request, counted for as long as they are held.
struct Held<'a>(&'a Services, usize);

impl<'a> Held<'a> {
    fn count(services: &'a Services, bytes: usize) -> Option<Self> {
        let before = services.requests.fetch_add(bytes, Ordering::Relaxed);
        let held = Self(services, bytes);
        (before + bytes <= MAX_REQUESTS).then_some(held)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// A call that is worked on.
struct Call {
    task: AbortHandle,
    relay: Arc<Relay>,
}

/// What the reader and the task of a call share.
#[derive(Default)]
struct Relay {
    /// What the client streams; its "response" is the end of it.
    mailbox: Mailbox,
    /// In the guest, once it was asked for.
    stream: Mutex<Option<Arc<Stream>>>,
}

struct State {
    connection: Connection,
    calls: HashMap<u32, Call>,
}

#[derive(Default)]
struct Written {
    bytes: Vec<u8>,
    written: usize,
}

struct Client {
    vm_id: VmId,
    stream: UnixStream,
    state: Mutex<State>,
    writing: tokio::sync::Mutex<Written>,
    /// There may be something to write.
    queued: Notify,
    /// Something was written.
    progress: Notify,
    places: Semaphore,
    /// It does not read its answers.
    is_deaf: Notify,
}

/// Ends what a client's calls do in the guest, also while an operation still holds the client.
struct Ended(Arc<Client>);

impl Drop for Ended {
    fn drop(&mut self) {
        let calls = std::mem::take(&mut self.0.state.lock().calls);
        drop(calls);
    }
}

/// Serves a client to its end; `rest` came after its wish to attach. Returns why it ended.
pub(super) async fn serve(services: Arc<Services>, stream: UnixStream, rest: &[u8], place: &Place) -> SessionError {
    let connection = Connection::new(Session::unsealed(Role::Guest));
    let client = Arc::new(Client {
        vm_id: services.vm_id.clone(),
        stream,
        state: Mutex::new(State { connection, calls: HashMap::new() }),
        writing: tokio::sync::Mutex::default(),
        queued: Notify::new(),
        progress: Notify::new(),
        places: Semaphore::new(CLIENT_CALLS),
        is_deaf: Notify::new(),
    });
    let _ended = Ended(client.clone());
    // Dropping them cancels what they do in the guest.
    let mut tasks = JoinSet::new();
    tokio::select! {
        reason = read(&client, &services, &mut tasks, rest, place) => reason,
        reason = write(&client) => reason,
        () = client.is_deaf.notified() => SessionError::Deaf,
    }
}

async fn read(
    client: &Arc<Client>,
    services: &Arc<Services>,
    tasks: &mut JoinSet<()>,
    rest: &[u8],
    place: &Place,
) -> SessionError {
    let mut decoder = Decoder::default();
    decoder.feed(rest);
    loop {
        loop {
            match decoder.next_record() {
                Ok(Some(record)) => {
                    if let Err(reason) = client.take(record, services, tasks) {
                        return reason;
                    }
                }
                Ok(None) => break,
                Err(error) => return error.into(),
            }
        }
        while tasks.try_join_next().is_some() {}
        match client.state.lock().calls.is_empty() {
            true => place.answered(),
            false => place.asked(),
        }
        client.queued.notify_one();
        match client.stream.try_read(decoder.space()) {
            Ok(0) => return SessionError::HungUp,
            Ok(length) => decoder.filled(length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                tokio::select! {
                    ready = client.stream.readable() => if let Err(error) = ready { return error.into() },
                    // Its place is free for others once it has no call.
                    Some(_) = tasks.join_next() => {}
                }
            }
            Err(error) => return error.into(),
        }
        // A client that never stops talking must not keep a worker to itself.
        tokio::task::coop::consume_budget().await;
    }
}

async fn write(client: &Client) -> SessionError {
    loop {
        client.queued.notified().await;
        if let Err(error) = client.flush().await {
            return error.into();
        }
    }
}

impl Client {
    /// Writes what waits. What was half written when it is dropped is written on by the next.
    async fn flush(&self) -> std::io::Result<()> {
        let mut writing = self.writing.lock().await;
        loop {
            if writing.written == writing.bytes.len() {
                (writing.written, _) = (0, writing.bytes.clear());
                let sealed = self.state.lock().connection.transmit(&mut writing.bytes, WRITE_CHUNK);
                sealed.map_err(std::io::Error::other)?;
                if writing.bytes.is_empty() {
                    return Ok(());
                }
            }
            match self.stream.try_write(&writing.bytes[writing.written..]) {
                Ok(length) => {
                    writing.written += length;
                    self.progress.notify_waiters();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes one record. The error is the end of the client.
    fn take(
        self: &Arc<Self>,
        record: &[u8],
        services: &Arc<Services>,
        tasks: &mut JoinSet<()>,
    ) -> std::result::Result<(), SessionError> {
        let mut state = self.state.lock();
        let relay = |state: &State, id: u32| state.calls.get(&id).map(|call| call.relay.clone());
        let incoming = state.connection.receive(record)?;
        match incoming {
            None => {}
            Some(Incoming::Request { id, body }) => {
                let relay = Arc::new(Relay::default());
                let task = tasks.spawn(call(self.clone(), services.clone(), relay.clone(), id, body));
                state.calls.insert(id, Call { task, relay });
            }
            Some(Incoming::Cancel { id }) => {
                if let Some(call) = state.calls.remove(&id) {
                    call.task.abort();
                }
                // Every request has its response; nobody reads this one.
                state.connection.calls.respond(id, b"{}".to_vec()).ok();
            }
            Some(Incoming::Data { id, channel, bytes, last }) => {
                let Some(relay) = relay(&state, id).filter(|_| channel == STDIN) else { return Ok(()) };
                drop(state);
                relay.mailbox.push(channel, bytes, false);
                if last {
                    relay.mailbox.respond(Vec::new());
                }
            }
            Some(Incoming::Credit { id, .. }) => {
                let relay = relay(&state, id);
                drop(state);
                if let Some(relay) = relay {
                    relay.mailbox.credit();
                }
            }
            Some(Incoming::Control { id, body }) => {
                let relay = relay(&state, id);
                drop(state);
                let control = serde_json::from_slice::<Control>(&body).map_err(SessionError::not_json("CONTROL"))?;
                if let Some(stream) = relay.and_then(|relay| relay.stream.lock().clone()) {
                    stream.try_control(&control)?;
                }
            }
            Some(Incoming::Refused { id }) => {
                state.connection.calls.respond(id, Vec::new()).ok();
            }
            Some(_) => return Err(SessionError::WrongSide { peer: "it", other: "a guest" }),
        }
        Ok(())
    }

    /// Answers a call; returns how many bytes wait for the client by that.
    fn answer(&self, id: u32, answer: OwnerAnswer) -> usize {
        let too_long = |length: usize| {
            let (vm_id, what) = (self.vm_id.to_string(), "the answer".to_owned());
            OwnerAnswer::from(Err(Error::MessageTooLarge { vm_id, what, size: length, limit: MAX_MESSAGE }))
        };
        let encode = |answer: &OwnerAnswer| serde_json::to_vec(answer).unwrap_or_default();
        let mut body = encode(&answer);
        if body.len() > MAX_MESSAGE {
            body = encode(&too_long(body.len()));
        }
        let length = body.len();
        let mut state = self.state.lock();
        state.calls.remove(&id);
        // Gone: it was cancelled.
        state.connection.calls.respond(id, body).ok();
        drop(state);
        self.queued.notify_one();
        length
    }

    /// Waits until the answer has left. A client that does not read a long one is cut off: what is held for it is given back.
    async fn left(&self, id: u32, length: usize) {
        let left = async {
            loop {
                let progress = self.progress.notified();
                if !self.state.lock().connection.calls.is_saying(id) {
                    return;
                }
                progress.await;
            }
        };
        if length <= MODEST_ANSWER {
            left.await;
        } else if tokio::time::timeout(patience_for(length), left).await.is_err() {
            self.is_deaf.notify_one();
        }
    }
}

/// A request of a client.
#[derive(Debug)]
pub enum Asked {
    Guest(Request),
    Owner(Operation),
}

/// A client's request, which may be any bytes.
///
/// # Errors
/// What is wrong with it.
pub fn parse(body: &[u8]) -> std::result::Result<Asked, SessionError> {
    if !is_modest(body) {
        return Err(SessionError::TooManyValues { what: "it" });
    }
    let value: Value = serde_json::from_slice(body).map_err(SessionError::not_json("its JSON"))?;
    let asked = match value.get("operation") {
        Some(_) => serde_json::from_value(value).map(Asked::Owner),
        None => serde_json::from_value(value).map(Asked::Guest),
    };
    asked.map_err(SessionError::not_json("its JSON"))
}

/// Works on one call to its answer. Dropping it cancels the call in the guest.
async fn call(client: Arc<Client>, services: Arc<Services>, relay: Arc<Relay>, id: u32, body: Vec<u8>) {
    let vm_id = &services.vm_id;
    // None of them is ever closed.
    let Ok(_place) = client.places.acquire().await else { return };
    let mut _shared = None;
    let refused =
        |reason| Error::of_owner("invalid_value", format!("{vm_id}: a request is none: {reason}"), Value::Null);
    let answer = match (Held::count(&services, body.len()), parse(&body)) {
        (None, _) => {
            Err(Error::of_owner("busy", format!("{vm_id}: other clients' requests take all room"), Value::Null))
        }
        (_, Err(reason)) => Err(refused(reason)),
        (Some(_held), Ok(Asked::Owner(operation))) => {
            drop(body);
            return operate(&client, &services, id, operation).await;
        }
        (Some(held), Ok(Asked::Guest(request))) => {
            drop(body);
            // An operation needs no place in the guest: a VM that is busy with others can be stopped.
            let Ok(shared) = services.calls.acquire().await else { return };
            _shared = Some(shared);
            let answered = match refuse_internal(&request.action) {
                Some(error) => Ok(Response::Error { error }),
                None if request.stream => stream(&client, &services, &relay, id, request, held).await,
                None => services.agent.request(&request.action, request.params, LONGEST).await,
            };
            // One of the pool is known by its first name further down.
            answered.map_err(|error| error.of(vm_id))
        }
    };
    let length = client.answer(id, answer.into());
    client.left(id, length).await;
}

async fn operate(client: &Arc<Client>, services: &Arc<Services>, id: u32, operation: Operation) {
    let Ok(turn) = services.operations.clone().acquire_owned().await else { return };
    let owner = match services.owner().await {
        Ok(owner) => owner,
        Err(error) => {
            client.answer(id, Err(error).into());
            return;
        }
    };
    let answering = client.clone();
    // One that ends the VM ends the broker, and this task with it.
    let done = tokio::spawn(async move {
        let _turn = turn;
        let result = owner.operate(operation).await;
        answering.answer(id, result.map(|result| Response::Ok { result }).into());
        if tokio::time::timeout(LAST_WRITE, answering.flush()).await.is_err() {
            log::debug!("an attached client does not read the answer to its operation");
        }
    });
    if let Err(error) = done.await {
        log::error!("{}: an operation of an attached client failed: {error}", services.vm_id);
    }
}

/// Carries a stream both ways until the guest ends it.
async fn stream(
    client: &Client,
    services: &Services,
    relay: &Relay,
    id: u32,
    request: Request,
    held: Held<'_>,
) -> Result<Response> {
    let Ok(_shared) = services.streams.acquire().await else { return std::future::pending().await };
    let stream = Arc::new(services.agent.open(&request.action, request.params, services.deadline).await?);
    *relay.stream.lock() = Some(stream.clone());
    let started = stream.has_begun().await?;
    drop(held);
    if let Some(started) = started {
        let body = serde_json::to_vec(&started).map_err(|error| Error::host("encode", "STARTED", error))?;
        // Gone: it was cancelled.
        client.state.lock().connection.calls.started(id, body).ok();
        client.queued.notify_one();
    }
    let input = async {
        give_input(client, relay, id, &stream).await?;
        // The end of the input is not that of the stream.
        std::future::pending().await
    };
    tokio::select! {
        ended = take_output(client, relay, id, &stream) => ended,
        failed = input => failed,
    }
}

async fn give_input(client: &Client, relay: &Relay, id: u32, stream: &Stream) -> Result<()> {
    loop {
        match relay.mailbox.take().await {
            Taken::Piece(piece) => {
                if !stream.send(STDIN, &piece.bytes, None).await? {
                    return Ok(());
                }
                client.state.lock().connection.calls.consumed(id, STDIN, piece.bytes.len());
                client.queued.notify_one();
            }
            Taken::Response(_) | Taken::Closed => {
                stream.finish(STDIN);
                return Ok(());
            }
        }
    }
}

async fn take_output(client: &Client, relay: &Relay, id: u32, stream: &Stream) -> Result<Response> {
    loop {
        let piece = match stream.next_or_answer().await? {
            Next::Piece(piece) => piece,
            Next::End(answer) => return Ok(answer),
        };
        let mut rest = &piece.bytes[..];
        while !rest.is_empty() {
            let sent = relay.mailbox.until_credited(|| {
                match client.state.lock().connection.calls.send(id, piece.channel, rest) {
                    Ok(0) => None,
                    sent => Some(sent),
                }
            });
            let Ok(sent) = sent.await else {
                // It was cancelled, and this task is about to be.
                return std::future::pending().await;
            };
            rest = &rest[sent..];
            client.queued.notify_one();
        }
        if piece.last {
            // Gone: it was cancelled.
            client.state.lock().connection.calls.finish(id, piece.channel).ok();
            client.queued.notify_one();
        }
    }
}
