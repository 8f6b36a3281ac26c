//! Re-handshake across a freeze: the Noise session is suspended while the guest is frozen, and the calls in flight go on
//! in the session that replaces it.
//!
//! Requests made meanwhile wait in the mux, as they do behind a slow transport. The reader's task itself does what a
//! record leads to, so nothing that follows an ACCEPT is missed.

use std::future::Future;
use std::time::Duration;

use microvm_protocol::connection::Connection;
use microvm_protocol::handshake::{Ask, HostHandshake, HostStep};
use microvm_protocol::identity::Credentials;
use microvm_protocol::message::{Failure, Outcome, Request, Response, FREEZE, WRITE_DISK};
use serde_json::{json, Value};
use tokio::sync::oneshot;
use tokio::time::{timeout, Instant};

use super::agent::Agent;
use super::error::SessionError;
use super::link::{InFlight, Link, LinkState, ReplyTo};
use crate::error::{Error, Result};
use crate::host::clock;

/// What a guest without a session must say next.
pub(super) enum Rehandshake {
    /// Nothing: any record is out of turn.
    Quiet,
    Hello(oneshot::Sender<Vec<u8>>),
    Accept(Box<HostHandshake>, oneshot::Sender<Vec<u8>>),
}

impl Rehandshake {
    /// Takes a record; returns the next state, `None` when the new session is established. An error ends the session.
    pub(super) fn take(
        self,
        record: &[u8],
        connection: &mut Connection,
    ) -> std::result::Result<Option<Self>, SessionError> {
        match self {
            Rehandshake::Quiet => Err(SessionError::OutOfTurn),
            Rehandshake::Hello(reply) => {
                // The caller may have timed out this very moment: then its freeze ends in an error anyway.
                drop(reply.send(record.to_vec()));
                Ok(Some(Rehandshake::Quiet))
            }
            Rehandshake::Accept(mut handshake, reply) => match handshake.receive(record, clock::unix_time_ns())? {
                HostStep::Established(session, said) => {
                    connection.resume(*session);
                    drop(reply.send(said));
                    Ok(None)
                }
                HostStep::Send(_) => Err(SessionError::NotAccepted),
            },
        }
    }
}

/// Tells the caller of a freeze whether the guest agreed.
pub(super) type RehandshakeReply = oneshot::Sender<std::result::Result<(), Failure>>;

impl LinkState {
    /// Takes the guest's answer to FREEZE: the session is suspended, or goes on.
    pub(super) fn begin_rehandshake(
        &mut self,
        body: &[u8],
        reply: RehandshakeReply,
    ) -> std::result::Result<(), SessionError> {
        let unread = SessionError::not_json(format!("the answer to {FREEZE:?}"));
        let answer = match serde_json::from_slice(body).map_err(unread)? {
            Response::Ok { .. } => {
                self.connection.suspend();
                self.rehandshake = Some(Rehandshake::Quiet);
                Ok(())
            }
            Response::Error { error } => {
                self.connection.cancel_suspend();
                Err(error)
            }
        };
        drop(reply.send(answer));
        Ok(())
    }
}

impl Link {
    /// Sends FREEZE as the last record of this session.
    async fn request_rehandshake(&self, params: Value) -> Result<oneshot::Receiver<std::result::Result<(), Failure>>> {
        let refused = |reason: SessionError| Error::channel_closed(&self.vm_id, reason, false);
        let place = self.place().await?;
        let request = Request { action: FREEZE.to_owned(), params, stream: false };
        let body =
            serde_json::to_vec(&request).map_err(SessionError::not_json("the request is not JSON")).map_err(refused)?;
        let (reply, answer) = oneshot::channel();
        {
            let mut writer = self.writer.lock();
            let mut state = self.state.lock();
            if let Some(reason) = state.closed.clone() {
                return Err(Error::channel_closed(&self.vm_id, reason, false));
            }
            let id = state.connection.calls.request(body).map_err(|error| refused(error.into()))?;
            state.in_flight.insert(id, InFlight::new(ReplyTo::Rehandshake(reply), place, false));
            // After what is sealed already and not yet written.
            let sealed = state.connection.seal_last(id, &mut writer.bytes);
            sealed.map_err(|error| refused(error.into()))?;
        }
        self.flush();
        Ok(answer)
    }

    /// Writes a record of the handshake: nothing else is written meanwhile.
    fn say(&self, record: &[u8], next: Rehandshake) {
        {
            let mut writer = self.writer.lock();
            writer.bytes.extend_from_slice(record);
            self.state.lock().rehandshake = Some(next);
        }
        self.flush();
    }

    /// Waits until no call is in flight.
    async fn idle(&self) {
        loop {
            let became = self.idle.notified();
            tokio::pin!(became);
            // From here on a notification counts, also one that comes before the next line.
            became.as_mut().enable();
            if self.state.lock().in_flight.is_empty() {
                return;
            }
            became.await;
        }
    }
}

impl Agent {
    /// Waits until no call is in flight, at most `deadline`; returns how many still are.
    pub async fn idle(&self, deadline: Duration) -> usize {
        match timeout(deadline, self.link.idle()).await {
            Ok(()) => 0,
            Err(_) => self.link.state.lock().in_flight.len(),
        }
    }

    /// Has the guest stop its programs and wait for another OFFER; returns the HELLO that [`Agent::thaw`] goes on from.
    /// Calls in flight wait. `writes_disk`: the guest writes what it caches to its disk.
    ///
    /// # Errors
    /// [`Error::Guest`] with the code `busy`, and nothing changed. After any other the session is closed.
    pub async fn freeze(&self, writes_disk: bool, deadline: Duration) -> Result<Vec<u8>> {
        let until = Instant::now() + deadline;
        let frozen = async {
            let answer = self
                .link
                .request_rehandshake(json!({WRITE_DISK: writes_disk}))
                .await?
                .await
                .map_err(|_| self.link.closed(true))?;
            answer.map_err(|failure| Error::Guest {
                vm_id: self.link.vm_id.to_string(),
                what: "freeze".into(),
                code: failure.code.as_str(),
                message: failure.message,
            })?;
            let again = Ask::Again.encode().map_err(|error| Error::host("encode", "a record", error))?;
            let (reply, hello) = oneshot::channel();
            self.link.say(&again, Rehandshake::Hello(reply));
            hello.await.map_err(|_| self.link.closed(true))
        };
        self.or_close("freeze the guest", until, deadline, frozen).await
    }

    /// Shakes hands with a frozen guest; the calls in flight go on.
    ///
    /// # Errors
    /// [`Error::HandshakeFailed`], [`Error::ChannelTimeout`], [`Error::ChannelClosed`]; the session is closed then.
    pub async fn thaw(&self, credentials: Credentials, hello: &[u8], deadline: Duration) -> Result<()> {
        let until = Instant::now() + deadline;
        let refused =
            |reason: SessionError| Error::HandshakeFailed { vm_id: self.link.vm_id.clone(), source: reason.into() };
        let thawed = async {
            let mut handshake = HostHandshake::new(credentials);
            let step = handshake.receive(hello, clock::unix_time_ns()).map_err(|error| refused(error.into()))?;
            let HostStep::Send(offer) = step else { return Err(refused(SessionError::OutOfTurn)) };
            let (reply, said) = oneshot::channel();
            self.link.say(&offer, Rehandshake::Accept(Box::new(handshake), reply));
            let said = said.await.map_err(|_| self.link.closed(true))?;
            match serde_json::from_slice(&said) {
                Ok(Outcome::Ready) => Ok(()),
                Ok(Outcome::Failed { stage, message }) => Err(refused(SessionError::GuestSetup { stage, message })),
                Err(error) => Err(refused(SessionError::not_json("ACCEPT")(error))),
            }
        };
        self.or_close("wake the guest", until, deadline, thawed).await?;
        self.link.flush();
        Ok(())
    }

    async fn or_close<T>(
        &self,
        what: &str,
        until: Instant,
        deadline: Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let outcome = tokio::time::timeout_at(until, work).await.unwrap_or_else(|_| {
            let (vm_id, limit_s) = (self.link.vm_id.to_string(), deadline.as_secs_f64());
            Err(Error::ChannelTimeout { vm_id, what: what.to_owned(), limit_s, sent: true })
        });
        if let Err(error) = &outcome {
            if !matches!(error, Error::Guest { .. }) {
                self.link.close(error.clone());
            }
        }
        outcome
    }
}
