//! The other end of a broker's socket.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::error::SessionError;
use super::framing::{self, FramingError, Reader, MAX_DOCUMENT};
use crate::error::{Cause, Error, Result};
use crate::model::VmId;
use crate::store::{self, Refusal};

/// A client that can connect again after it was closed; sending and receiving do not wait for each other.
#[derive(Debug)]
pub struct Client {
    vm_id: VmId,
    socket: PathBuf,
    reading: Mutex<Option<(OwnedReadHalf, Reader)>>,
    writing: Mutex<Option<OwnedWriteHalf>>,
}

/// Whose broker is spoken to: this user's or root's.
fn is_trusted(owner: u32, own: u32) -> bool {
    owner == own || owner == 0
}

/// Connects to a broker of this user's or root's; the inner error is that nobody listens.
///
/// # Errors
/// [`Error::ForeignSocket`], [`Error::UntrustedSocket`].
pub(super) async fn connect(vm_id: &VmId, socket: &Path) -> Result<io::Result<UnixStream>> {
    // Another user could lead the path, by a link in a folder of theirs, to the broker of another VM of this user.
    let found = store::to_socket(socket).map_err(|Refusal { cause, remedy }| {
        let (vm_id, socket) = (vm_id.to_string(), socket.to_owned());
        Error::UntrustedSocket { vm_id, socket, source: cause, remedy }
    })?;
    let Some(found) = found else { return Ok(Err(io::Error::from_raw_os_error(libc::ENOENT))) };
    // What was checked, whatever its path leads to by now (proc_pid_fd(5)).
    let connected = UnixStream::connect(format!("/proc/self/fd/{}", found.as_raw_fd())).await;
    let owner = match connected.as_ref().map(UnixStream::peer_cred) {
        Ok(Ok(owner)) => owner.uid(),
        Ok(Err(error)) => return Ok(Err(error)),
        Err(_) => return Ok(connected),
    };
    // A socket's path can be guessed: whoever made it first would be told all that is sent.
    if !is_trusted(owner, nix::unistd::geteuid().as_raw()) {
        return Err(Error::ForeignSocket { vm_id: vm_id.to_string(), socket: socket.to_owned(), uid: owner });
    }
    Ok(connected)
}

impl Client {
    #[must_use]
    pub fn new(vm_id: VmId, socket: PathBuf) -> Self {
        Self { vm_id, socket, reading: Mutex::new(None), writing: Mutex::new(None) }
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `sent`: whether a message of ours may have reached the agent. One that the broker did not get whole did not.
    fn closed(&self, reason: impl Into<Cause>, sent: bool) -> Error {
        Error::channel_closed(&self.vm_id, reason, sent)
    }

    fn timeout(&self, what: &str, deadline: Duration, sent: bool) -> Error {
        let (vm_id, limit_s) = (self.vm_id.to_string(), deadline.as_secs_f64());
        Error::ChannelTimeout { vm_id, what: what.into(), limit_s, sent }
    }

    /// Connects to the broker, dropping an older connection.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] when nobody listens, [`Error::ChannelTimeout`], [`Error::ForeignSocket`],
    /// [`Error::UntrustedSocket`].
    pub async fn connect(&self, deadline: Duration) -> Result<()> {
        let connected = tokio::time::timeout(deadline, connect(&self.vm_id, &self.socket)).await;
        let connected = connected.map_err(|_| self.timeout("connect", deadline, false))?;
        let unreachable = |error: io::Error| {
            let shown = self.socket.display();
            let text = format!("{shown}: {error}; is the VM running, and this process of its user?");
            self.closed(Cause::explained(error, text), false)
        };
        let (reading, writing) = connected?.map_err(unreachable)?.into_split();
        *self.writing.lock().await = Some(writing);
        *self.reading.lock().await = Some((reading, Reader::default()));
        Ok(())
    }

    /// Sends one document, whole or (after an error) not usably: the connection is then closed.
    ///
    /// # Errors
    /// [`Error::MessageTooLarge`], [`Error::ChannelClosed`], [`Error::ChannelTimeout`].
    pub async fn send(&self, document: &Value, deadline: Duration) -> Result<()> {
        let bytes = framing::encode(document).map_err(|error| match error {
            FramingError::TooLong(size) => Error::MessageTooLarge {
                vm_id: self.vm_id.to_string(),
                what: "message".into(),
                size,
                limit: MAX_DOCUMENT,
            },
            other => self.closed(SessionError::from(other), false),
        })?;
        let mut slot = self.writing.lock().await;
        // Taken out while it is in use: giving up half-way leaves no torn message for the next one to follow.
        let mut writing = slot.take().ok_or_else(|| self.closed(SessionError::NotConnected, false))?;
        tokio::time::timeout(deadline, writing.write_all(&bytes))
            .await
            .map_err(|_| self.timeout("send", deadline, false))?
            .map_err(|error| self.closed(SessionError::from(error), false))?;
        *slot = Some(writing);
        Ok(())
    }

    /// The next document.
    ///
    /// # Errors
    /// [`Error::ChannelTimeout`] (nothing is lost), [`Error::ChannelClosed`].
    pub async fn receive(&self, deadline: Duration) -> Result<Value> {
        let wait = async {
            let mut slot = self.reading.lock().await;
            let (stream, reader) = slot.as_mut().ok_or_else(|| self.closed(SessionError::NotConnected, false))?;
            match reader.next(stream).await {
                Ok(Some(document)) => Ok(document),
                Ok(None) => {
                    *slot = None;
                    Err(self.closed(SessionError::Stopped, true))
                }
                Err(error) => Err(self.closed(SessionError::from(error), true)),
            }
        };
        tokio::time::timeout(deadline, wait).await.map_err(|_| self.timeout("receive", deadline, true))?
    }

    /// Closes the connection; a receive that waits elsewhere ends with it.
    pub async fn close(&self) {
        // Shutting down the writing half ends the broker's task, and that the reading half.
        if let Some(mut writing) = self.writing.lock().await.take() {
            if let Err(error) = writing.shutdown().await {
                log::debug!("{}: channel shutdown: {error}", self.vm_id);
            }
        }
        *self.reading.lock().await = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_only_the_same_user_and_root_are_spoken_to() {
        assert!(is_trusted(1000, 1000) && is_trusted(0, 1000) && is_trusted(0, 0));
        assert!(!is_trusted(1001, 1000) && !is_trusted(1000, 0));
    }
}
