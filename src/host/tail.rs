//! Pipes of which only the end is kept: a guest's console, a VMM's stderr.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::error::{Cause, Error, Result};
use crate::mutex::Mutex;

/// How much of a stream is kept, in bytes.
const KEEP: usize = 16 * 1024;

/// The reading end: keeps the last [`KEEP`] bytes, however much is written.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    grows: Option<watch::Receiver<()>>,
}

impl Tail {
    /// A pipe whose writing end is for a child; a task keeps the end of what it writes.
    ///
    /// # Errors
    /// [`Error::Host`] when there are no descriptors left.
    pub fn pipe() -> Result<(Self, OwnedFd)> {
        let failed = |cause: Cause| Error::host("pipe", "a log pipe", cause);
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| failed(e.into()))?;
        let mut reader = tokio::net::unix::pipe::Receiver::from_owned_fd(reader).map_err(|e| failed(e.into()))?;
        let (growth, grows) = watch::channel(());
        let tail = Self { kept: Arc::default(), grows: Some(grows) };
        let kept = tail.kept.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                {
                    let mut kept = kept.lock();
                    kept.extend(&buffer[..length]);
                    let excess = kept.len().saturating_sub(KEEP);
                    kept.drain(..excess);
                }
                growth.send_replace(());
            }
        });
        Ok((tail, writer))
    }

    /// Waits until more was read than when this was last called; false: everything was read, and no process holds the
    /// writing end any more.
    pub async fn has_grown(&mut self) -> bool {
        match &mut self.grows {
            Some(grows) => grows.changed().await.is_ok(),
            None => false,
        }
    }

    /// Waits until everything was read: no process holds the writing end any more.
    pub async fn drained(&self) {
        let mut rest = self.clone();
        while rest.has_grown().await {}
    }

    /// What was kept, as text, without the control characters that a guest may send to a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        self.text_of_last(KEEP)
    }

    /// As [`Tail::text`], of the last `length` bytes alone.
    #[must_use]
    pub fn text_of_last(&self, length: usize) -> String {
        let kept = self.kept.lock();
        let bytes: Vec<u8> = kept.iter().skip(kept.len().saturating_sub(length)).copied().collect();
        String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect()
    }
}
