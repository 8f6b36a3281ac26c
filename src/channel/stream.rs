//! A call whose channels are open: what programs, uploads and downloads are made of.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use microvm_protocol::message::{Control, Response, Started};
use microvm_protocol::mux::Refused;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::agent::decode;
use super::error::SessionError;
use super::link::Link;
use super::mailbox::{Mailbox, Piece, Taken};
use crate::error::{Error, Result};

/// Bytes both ways until the guest ends it. Dropping it cancels it; its program is then killed.
///
/// Whoever does not take what comes holds one window of it; the guest waits. All methods may be used from several tasks
/// at once.
pub struct Stream {
    link: Arc<Link>,
    id: u32,
    mailbox: Arc<Mailbox>,
    what: String,
    _place: OwnedSemaphorePermit,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Stream {
    pub(super) fn new(
        link: Arc<Link>,
        id: u32,
        mailbox: Arc<Mailbox>,
        what: String,
        _place: OwnedSemaphorePermit,
    ) -> Self {
        Self { link, id, mailbox, what, _place }
    }

    #[must_use]
    pub fn vm_id(&self) -> String {
        self.link.vm_id.to_string()
    }

    /// Does `work`, which is one step and not all of it, within `stall`.
    ///
    /// # Errors
    /// Its own, and [`Error::ChannelTimeout`].
    pub async fn within<T>(&self, stall: Duration, step: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(stall, work).await.unwrap_or_else(|_| {
            let (vm_id, what, sent) = (self.vm_id(), format!("{step} of {:?}", self.what), self.was_sent());
            Err(Error::ChannelTimeout { vm_id, what, limit_s: stall.as_secs_f64(), sent })
        })
    }

    /// Waits at most `stall` until the guest has begun.
    ///
    /// # Errors
    /// [`Error::Guest`] when it could not, [`Error::ChannelClosed`], [`Error::ChannelTimeout`].
    pub async fn started(&self, stall: Duration) -> Result<Started> {
        self.within(stall, "the beginning", self.begun()).await
    }

    async fn begun(&self) -> Result<Started> {
        if let Some(started) = self.has_begun().await? {
            return Ok(started);
        }
        match self.mailbox.take().await {
            Taken::Response(body) => {
                let never = || self.nonsense(SessionError::NeverBegan { what: self.what.clone() });
                Err(self.ended::<Value>(&body).err().unwrap_or_else(never))
            }
            _ => Err(self.link.closed(self.was_sent())),
        }
    }

    /// How the guest has begun; `None` when it ended without.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] when what it said is nothing.
    pub(super) async fn has_begun(&self) -> Result<Option<Started>> {
        let Some(body) = self.mailbox.started().await else { return Ok(None) };
        serde_json::from_slice(&body).map(Some).map_err(|error| self.not_read(error))
    }

    fn was_sent(&self) -> bool {
        self.link.with(|calls| calls.is_sent(self.id)).unwrap_or(true)
    }

    fn nonsense(&self, reason: SessionError) -> Error {
        Error::channel_closed(&self.link.vm_id, reason, true)
    }

    fn not_read(&self, error: serde_json::Error) -> Error {
        self.nonsense(SessionError::not_json(format!("{}: the agent's answer", self.what))(error))
    }

    /// The result in the guest's response.
    fn ended<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T> {
        match decode(&self.link, body)? {
            Response::Ok { result } => serde_json::from_value(result).map_err(|error| self.not_read(error)),
            Response::Error { error } => Err(Error::Guest {
                vm_id: self.vm_id(),
                what: self.what.clone(),
                code: error.code.as_str(),
                message: error.message,
            }),
        }
    }

    /// The next bytes, or the end with its result. Cancellation-safe.
    ///
    /// # Errors
    /// [`Error::Guest`] when it ended in failure, [`Error::ChannelClosed`].
    pub async fn next<T: DeserializeOwned>(&self) -> Result<Next<T>> {
        loop {
            match self.take().await? {
                // The end of a channel, which the response tells, too.
                Next::Piece(piece) if piece.bytes.is_empty() => {}
                Next::Piece(piece) => return Ok(Next::Piece(piece)),
                Next::End(body) => return self.ended(&body).map(Next::End),
            }
        }
    }

    /// As [`Stream::next`], with the ends of the channels.
    ///
    /// # Errors
    /// As for [`Stream::next`].
    pub(super) async fn next_or_last<T: DeserializeOwned>(&self) -> Result<Next<T>> {
        match self.take().await? {
            Next::Piece(piece) => Ok(Next::Piece(piece)),
            Next::End(body) => self.ended(&body).map(Next::End),
        }
    }

    async fn take(&self) -> Result<Next<Vec<u8>>> {
        match self.mailbox.take().await {
            Taken::Piece(piece) => {
                self.link.with(|calls| calls.consumed(self.id, piece.channel, piece.bytes.len()));
                Ok(Next::Piece(piece))
            }
            Taken::Response(body) => Ok(Next::End(body)),
            Taken::Closed => Err(self.link.closed(true)),
        }
    }

    /// As [`Stream::next`], with the ends of the channels and the guest's own answer at the end, for one who hands it on.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`].
    pub(super) async fn next_or_answer(&self) -> Result<Next<Response>> {
        match self.take().await? {
            Next::Piece(piece) => Ok(Next::Piece(piece)),
            Next::End(body) => decode(&self.link, &body).map(Next::End),
        }
    }

    /// Sends bytes on a channel, as fast as the guest takes them; it may take none for `stall` at most. Returns false when
    /// it takes no more.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`], [`Error::ChannelTimeout`].
    pub async fn send(&self, channel: u8, mut bytes: &[u8], stall: Option<Duration>) -> Result<bool> {
        while !bytes.is_empty() {
            if self.mailbox.is_closed() {
                return Err(self.link.closed(true));
            }
            let sent = self.mailbox.until_credited(|| {
                // A call that is over has no room, and never will.
                match self.link.with(|calls| calls.send(self.id, channel, bytes)) {
                    Ok(0) if !self.mailbox.is_over() => None,
                    Ok(0) | Err(_) => Some(None),
                    Ok(taken) => Some(Some(taken)),
                }
            });
            let sent = match stall {
                Some(stall) => self.within(stall, "the next piece", async { Ok(sent.await) }).await?,
                None => sent.await,
            };
            match sent {
                Some(taken) => bytes = &bytes[taken..],
                None if !self.mailbox.is_closed() => return Ok(false),
                None => {}
            }
        }
        Ok(true)
    }

    /// Ends a channel; the guest reads end-of-file after what was sent.
    pub fn finish(&self, channel: u8) {
        // Gone: it has ended already.
        self.link.with(|calls| calls.finish(self.id, channel).ok());
    }

    /// Tells the guest something about its program; nothing when that has ended.
    ///
    /// # Errors
    /// [`Error::ChannelTimeout`] when too much waits to be told already.
    pub fn control(&self, control: &Control) -> Result<()> {
        self.try_control(control).map_err(|refused| Error::ChannelTimeout {
            vm_id: self.vm_id(),
            what: format!("{}: {refused}; it", self.what),
            limit_s: 0.0,
            sent: false,
        })
    }

    /// As [`Stream::control`], with the reason as it is.
    pub(super) fn try_control(&self, control: &Control) -> std::result::Result<(), SessionError> {
        let body = serde_json::to_vec(control).map_err(SessionError::not_json("CONTROL"))?;
        match self.link.with(|calls| calls.control(self.id, body)) {
            Ok(()) | Err(Refused::Gone) => Ok(()),
            Err(refused) => Err(refused.into()),
        }
    }

    /// Its result, where that has come already, whatever is left to be taken before it.
    pub fn response<T: DeserializeOwned>(&self) -> Option<Result<T>> {
        self.mailbox.response().map(|body| self.ended(&body))
    }

    /// Whether nothing more comes of it but what is here already.
    pub fn is_over(&self) -> bool {
        self.mailbox.is_over()
    }

    /// Ends it in the guest: its program is killed, its draft removed.
    pub fn cancel(&self) {
        if !self.mailbox.is_over() {
            self.link.cancel(self.id);
            self.mailbox.close();
        }
    }
}

/// What came next on a stream.
pub enum Next<T> {
    Piece(Piece),
    End(T),
}
