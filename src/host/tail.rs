//! Pipes of which only the end is kept: a guest's console, a VMM's stderr.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::error::{Error, Result};

/// How much of a stream is kept, in bytes.
const KEEP: usize = 16 * 1024;

/// The reading end: keeps the last [`KEEP`] bytes, however much is written.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    drained: Option<watch::Receiver<()>>,
}

impl Tail {
    /// A pipe whose writing end is for a child; a task keeps the end of what it writes.
    ///
    /// # Errors
    /// [`Error::Host`] when there are no descriptors left.
    pub fn pipe() -> Result<(Self, OwnedFd)> {
        let failed = |error: &dyn std::fmt::Display| Error::host("pipe", "a log pipe", error);
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(&e))?;
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| failed(&e))?;
        let mut reader = tokio::net::unix::pipe::Receiver::from_owned_fd(reader).map_err(|e| failed(&e))?;
        let (ended, drained) = watch::channel(());
        let tail = Self { kept: Arc::default(), drained: Some(drained) };
        let kept = tail.kept.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(&buffer[..length]);
                let excess = kept.len().saturating_sub(KEEP);
                kept.drain(..excess);
            }
            drop(ended);
        });
        Ok((tail, writer))
    }

    /// Waits until everything was read: no process holds the writing end any more.
    pub async fn drained(&self) {
        if let Some(mut drained) = self.drained.clone() {
            // Nothing is ever sent; the sender's end is the event.
            while drained.changed().await.is_ok() {}
        }
    }

    /// What was kept, as text, without the control characters that a guest may send to a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect()
    }
}
