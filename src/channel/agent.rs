//! The host's end of the session with one agent: requests, and the streams that begin with one.

use std::sync::Arc;
use std::time::Duration;

use microvm_protocol::handshake::{HostHandshake, HostStep};
use microvm_protocol::identity::Credentials;
use microvm_protocol::message::{is_modest, refuse_internal, Outcome, Request, Response, MAX_MESSAGE};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::{Role, Session};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, OwnedSemaphorePermit};

use super::error::SessionError;
use super::link::{Link, Peer, ReplyTo};
use super::mailbox::Mailbox;
use super::operation::{Operation, OwnerAnswer};
use super::stream::Stream;
use crate::error::{Error, Result};
use crate::host::clock;
use crate::model::VmId;

/// The handshake is short; a guest that sends more than this before it is over is not one of ours.
const HANDSHAKE_CHUNK: usize = 4096;

/// What the agent answered: its own success or failure, in its own words.
pub type Answer = Response;

/// A session with one agent, for any number of callers. Dropping it closes the transport.
pub struct Agent {
    pub(super) link: Arc<Link>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.close();
    }
}

/// Gives a request up when its caller goes away.
struct Asking<'a> {
    link: &'a Link,
    id: u32,
    armed: bool,
}

impl Asking<'_> {
    fn cancel(&mut self) -> bool {
        self.armed = false;
        self.link.cancel(self.id)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.cancel();
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
        let hello = next_record(stream, &mut decoder).await.map_err(|reason| refused(vm_id, reason))?;
        // Nothing may follow before the host's OFFER.
        if decoder.is_empty() {
            Ok(hello)
        } else {
            Err(refused(vm_id, SessionError::OutOfTurn))
        }
    }

    /// Shakes hands with an agent that has said `hello`, and hears whether the guest is what it was told to be.
    ///
    /// # Errors
    /// [`Error::HandshakeFailed`]; a peer that does not hold the VM's key is logged. [`Error::StartFailed`] with what
    /// failed in the guest.
    pub async fn connect(vm_id: VmId, mut stream: UnixStream, credentials: Credentials, hello: &[u8]) -> Result<Self> {
        let mut decoder = Decoder::default();
        let shaken = shake_hands(&mut stream, &mut decoder, credentials, hello).await;
        let (session, said) = shaken.map_err(|reason| refused(&vm_id, reason))?;
        match serde_json::from_slice(&said) {
            Ok(Outcome::Ready) => {}
            Ok(Outcome::Failed { stage, message }) => {
                let source = SessionError::GuestSetup { stage, message }.into();
                return Err(Error::StartFailed { vm_id, stage: "guest setup", source, tails: Box::default() });
            }
            Err(error) => return Err(refused(&vm_id, SessionError::not_json("ACCEPT")(error))),
        }
        Ok(Self { link: Link::start(vm_id, Peer::Guest, stream, session, decoder) })
    }

    /// Talks to the guest of a VM of another process, through a broker that has agreed to it. `decoder` may hold its first
    /// records.
    pub(super) fn attached(vm_id: VmId, stream: UnixStream, decoder: Decoder) -> Self {
        Self { link: Link::start(vm_id, Peer::Owner, stream, Session::unsealed(Role::Host), decoder) }
    }

    /// Has the VM's owner do something, where this is an attached agent.
    ///
    /// # Errors
    /// The owner's own, and [`Agent::request`]'s.
    pub async fn operate(&self, operation: &Operation, deadline: Duration) -> Result<Value> {
        let what = operation.name();
        let body = serde_json::to_vec(operation).map_err(|error| Error::host("encode", what, error))?;
        let until = tokio::time::Instant::now() + deadline;
        let place = tokio::time::timeout_at(until, self.link.place()).await;
        let place = place.map_err(|_| self.timeout(what, deadline, false))??;
        match self.call(what, body, place, (deadline, until), true).await? {
            Answer::Ok { result } => Ok(result),
            Answer::Error { error } => Err(Error::Guest {
                vm_id: self.link.vm_id.to_string(),
                what: what.to_owned(),
                code: error.code.as_str(),
                message: error.message,
            }),
        }
    }

    /// Ends the session and all that is under way in it.
    pub fn close(&self) {
        self.link.close(match self.link.peer {
            Peer::Guest => SessionError::Stopped,
            Peer::Owner => SessionError::HandleClosed,
        });
    }

    /// Returns when the session has ended.
    pub async fn closed(&self) {
        self.link.ended().await;
    }

    /// Records that came from the agent so far.
    #[must_use]
    pub fn records_received(&self) -> u64 {
        self.link.records_received()
    }

    /// For how long nobody has used the VM; zero while a command or a stream is open.
    #[must_use]
    pub fn idle_for(&self) -> Duration {
        self.link.idle_for()
    }

    /// Asks for a sign of life, apart from all calls: an agent that is busy gives one, too.
    ///
    /// # Errors
    /// [`Error::ChannelTimeout`], [`Error::ChannelClosed`].
    pub async fn sign_of_life(&self, deadline: Duration) -> Result<()> {
        let waited = tokio::time::timeout(deadline, self.link.sign_of_life()).await;
        waited.map_err(|_| Error::ChannelTimeout {
            vm_id: self.link.vm_id.to_string(),
            what: "a sign of life".into(),
            limit_s: deadline.as_secs_f64(),
            sent: true,
        })?
    }

    /// As [`Agent::request`], but it does not count as use of the VM, and waits for no place: `None` when none is free.
    ///
    /// # Errors
    /// As [`Agent::request`]'s.
    pub async fn probe(&self, action: &str, params: Value, deadline: Duration) -> Option<Result<Answer>> {
        let place = self.link.place_now()?;
        let request = Request { action: action.to_owned(), params, stream: false };
        let body = match self.encode(&request) {
            Ok(body) => body,
            Err(error) => return Some(Err(error)),
        };
        let until = tokio::time::Instant::now() + deadline;
        Some(self.call(action, body, place, (deadline, until), false).await)
    }

    /// Asks the agent for a user's `action` and waits for the answer, at most `deadline`. The names in
    /// [`microvm_protocol::message::INTERNAL`] are refused here.
    ///
    /// # Errors
    /// [`Error::MessageTooLarge`] with nothing sent, [`Error::ChannelTimeout`] and [`Error::ChannelClosed`], which say
    /// whether the request was sent. A failure in the guest is an [`Answer`].
    pub async fn request(&self, action: &str, params: Value, deadline: Duration) -> Result<Answer> {
        match refuse_internal(action) {
            Some(error) => Ok(Answer::Error { error }),
            None => self.request_internal(action, params, deadline).await,
        }
    }

    /// As [`Agent::request`], for the host's own code: any action. No name of a user's may come here.
    ///
    /// # Errors
    /// As [`Agent::request`]'s.
    pub async fn request_internal(&self, action: &str, params: Value, deadline: Duration) -> Result<Answer> {
        let request = Request { action: action.to_owned(), params, stream: false };
        let body = self.encode(&request)?;
        let until = tokio::time::Instant::now() + deadline;
        let place = tokio::time::timeout_at(until, self.link.place()).await;
        let place = place.map_err(|_| self.timeout(action, deadline, false))??;
        self.call(action, body, place, (deadline, until), true).await
    }

    async fn call(
        &self,
        action: &str,
        body: Vec<u8>,
        place: OwnedSemaphorePermit,
        (deadline, until): (Duration, tokio::time::Instant),
        is_use: bool,
    ) -> Result<Answer> {
        let (reply, mut answer) = oneshot::channel();
        let id = self.link.ask(body, ReplyTo::Once(reply), place, is_use)?;
        let mut asking = Asking { link: &self.link, id, armed: true };
        let body = match tokio::time::timeout_at(until, &mut answer).await {
            Ok(Ok(body)) => body,
            Ok(Err(_)) => return Err(self.link.closed(asking.cancel())),
            Err(_) => return Err(self.timeout(action, deadline, asking.cancel())),
        };
        asking.armed = false;
        decode(&self.link, &body)
    }

    fn timeout(&self, action: &str, deadline: Duration, sent: bool) -> Error {
        Error::ChannelTimeout {
            vm_id: self.link.vm_id.to_string(),
            what: format!("command {action:?}"),
            limit_s: deadline.as_secs_f64(),
            sent,
        }
    }

    /// Begins a call whose channels stay open: see [`Stream`].
    ///
    /// # Errors
    /// As for [`Agent::request`].
    pub async fn open(&self, action: &str, params: Value, deadline: Duration) -> Result<Stream> {
        let request = Request { action: action.to_owned(), params, stream: true };
        let body = self.encode(&request)?;
        let places = async { Ok::<_, Error>((self.link.stream_place().await?, self.link.place().await?)) };
        let timeout = |_| Error::ChannelTimeout {
            vm_id: self.link.vm_id.to_string(),
            what: format!("{action:?}"),
            limit_s: deadline.as_secs_f64(),
            sent: false,
        };
        let (stream_place, place) = tokio::time::timeout(deadline, places).await.map_err(timeout)??;
        let mailbox = Arc::new(Mailbox::default());
        let id = self.link.ask(body, ReplyTo::Stream(mailbox.clone()), place, true)?;
        Ok(Stream::new(self.link.clone(), id, mailbox, action.to_owned(), stream_place))
    }

    fn encode(&self, request: &Request) -> Result<Vec<u8>> {
        let vm_id = &self.link.vm_id;
        let body = serde_json::to_vec(request).map_err(SessionError::not_json("the request is not JSON"));
        let body = body.map_err(|error| Error::channel_closed(vm_id, error, false))?;
        if body.len() > MAX_MESSAGE {
            let what = format!("command {:?}", request.action);
            return Err(Error::MessageTooLarge {
                vm_id: vm_id.to_string(),
                what,
                size: body.len(),
                limit: MAX_MESSAGE,
            });
        }
        Ok(body)
    }
}

/// How long to wait for an action: `at_least`, or what its parameters allow a program, and the time to hear of that.
#[must_use]
pub fn patience(params: &Value, at_least: Duration) -> Duration {
    let asked = params.get("timeout").and_then(Value::as_f64).filter(|seconds| (0.0..=86_400.0).contains(seconds));
    // The agent reports its own timeout; the margin lets that answer come through.
    let asked = asked.map(|seconds| Duration::from_secs_f64(seconds) + Duration::from_secs(5));
    asked.unwrap_or_default().max(at_least)
}

/// Times the size of an answer that reading it takes at once: its text, and that as Python's.
const READ_COSTS: usize = 3;

/// A response of the guest, which may hold anything; an empty one stands for one that there was no memory for. Where the VM's
/// owner answers, its own errors are told from the guest's.
pub fn decode(link: &Link, body: &[u8]) -> Result<Answer> {
    let unreadable = |reason: SessionError| Error::channel_closed(&link.vm_id, reason, true);
    // What is read takes about as much again; a Vec or String that grows by itself ends the process when there is none.
    let no_memory = Vec::<u8>::new().try_reserve_exact(READ_COSTS * body.len()).is_err();
    if body.is_empty() || no_memory {
        return Err(unreadable(SessionError::NoMemory));
    }
    if !is_modest(body) {
        return Err(unreadable(SessionError::TooManyValues { what: "the answer" }));
    }
    let invalid = |error| unreadable(SessionError::not_json("the answer is not one")(error));
    match link.peer {
        Peer::Guest => serde_json::from_slice(body).map_err(invalid),
        Peer::Owner => serde_json::from_slice::<OwnerAnswer>(body).map_err(invalid)?.into(),
    }
}

fn refused(vm_id: &VmId, reason: SessionError) -> Error {
    log::warn!("{vm_id}: whoever is on the transport was refused: {reason}");
    Error::HandshakeFailed { vm_id: vm_id.clone(), source: reason.into() }
}

async fn shake_hands(
    stream: &mut UnixStream,
    decoder: &mut Decoder,
    credentials: Credentials,
    hello: &[u8],
) -> std::result::Result<(Session, Vec<u8>), SessionError> {
    let mut handshake = HostHandshake::new(credentials);
    let mut step = handshake.receive(hello, clock::unix_time_ns())?;
    loop {
        match step {
            HostStep::Send(bytes) => stream.write_all(&bytes).await?,
            HostStep::Established(session, said) => return Ok((*session, said)),
        }
        let record = next_record(stream, decoder).await?;
        step = handshake.receive(&record, clock::unix_time_ns())?;
    }
}

async fn next_record(stream: &mut UnixStream, decoder: &mut Decoder) -> std::result::Result<Vec<u8>, SessionError> {
    let mut chunk = [0; HANDSHAKE_CHUNK];
    loop {
        if let Some(record) = decoder.next_record()? {
            return Ok(record.to_vec());
        }
        match stream.read(&mut chunk).await? {
            0 => return Err(SessionError::TransportClosed),
            length => decoder.feed(&chunk[..length]),
        }
    }
}
