//! A program that runs in the guest, live.

use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::message::{Control, Started};
use microvm_protocol::mux::STDIN;
use serde::Deserialize;
use tokio::sync::watch;

use super::mailbox::Piece;
use super::stream::{Next, Stream};
use crate::error::{Error, Result};
use crate::mutex::Mutex;

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Exit {
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub duration_seconds: f64,
}

/// A running program. Dropping it kills the program and all its descendants.
pub struct Process {
    vm_id: String,
    /// `None` once it was killed.
    stream: Mutex<Option<Arc<Stream>>>,
    pid: u32,
    begun: Instant,
    ended: watch::Sender<Option<Result<Exit>>>,
}

impl Process {
    /// # Errors
    /// [`Error::Guest`] when the program could not be started, [`Error::ChannelTimeout`] when that takes too long.
    pub async fn start(stream: Stream, deadline: Duration) -> Result<Self> {
        let pid = match stream.started(deadline).await? {
            Started::Program { pid } => pid,
            Started::File { .. } | Started::Connection { .. } => 0,
        };
        let vm_id = stream.vm_id();
        let (stream, ended) = (Mutex::new(Some(stream.into())), watch::Sender::new(None));
        Ok(Self { vm_id, stream, pid, begun: Instant::now(), ended })
    }

    #[must_use]
    pub fn vm_id(&self) -> &str {
        &self.vm_id
    }

    /// Its process id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, once all of its output was taken.
    #[must_use]
    pub fn ended(&self) -> Option<Result<Exit>> {
        self.ended.borrow().clone()
    }

    /// Whether it has ended, also where output is left to be taken.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stream().is_none_or(|stream| stream.is_over())
    }

    fn stream(&self) -> Option<Arc<Stream>> {
        self.stream.lock().clone()
    }

    /// Notes how it ended; what was noted first holds.
    fn end(&self, how: Result<Exit>) -> Result<Exit> {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(how);
            first
        });
        self.ended().unwrap_or_else(|| Ok(self.killed()))
    }

    /// As a parent sees a child that it killed (Python's `Popen.kill`, then `wait`): not an error.
    fn killed(&self) -> Exit {
        Exit { exit_code: None, signal: Some(libc::SIGKILL), duration_seconds: self.begun.elapsed().as_secs_f64() }
    }

    /// The next output; `None` at its end. Cancellation-safe.
    ///
    /// # Errors
    /// [`Error::Guest`] when it was killed by its timeout, [`Error::ChannelClosed`].
    pub async fn next(&self) -> Result<Option<Piece>> {
        let ended = match self.stream() {
            None => self.end(Ok(self.killed())),
            Some(stream) => match stream.next().await {
                Ok(Next::Piece(piece)) => return Ok(Some(piece)),
                Ok(Next::End(exit)) => self.end(Ok(exit)),
                // Killed in the guest by its own limit of time: that is told once, and how it ended from then on.
                Err(error @ Error::Guest { code: "timeout", .. }) => match self.ended() {
                    None => {
                        drop(self.end(Ok(self.killed())));
                        Err(error)
                    }
                    Some(ended) => ended,
                },
                Err(error) => self.end(Err(error)),
            },
        };
        ended.map(|_| None)
    }

    /// Writes to its input, as fast as it reads. Returns false when it reads no more.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`].
    pub async fn write(&self, bytes: &[u8]) -> Result<bool> {
        match self.stream() {
            Some(stream) => stream.send(STDIN, bytes, None).await,
            None => Ok(false),
        }
    }

    pub fn close_stdin(&self) {
        if let Some(stream) = self.stream() {
            stream.finish(STDIN);
        }
    }

    /// Sends a signal or a window's size; nothing when the program has ended.
    ///
    /// # Errors
    /// As for [`Stream::control`].
    pub fn control(&self, control: &Control) -> Result<()> {
        self.stream().map_or(Ok(()), |stream| stream.control(control))
    }

    /// Kills the program and all its descendants; output that was not taken is dropped. Nothing when it has ended.
    pub fn kill(&self) {
        let stream = self.stream.lock().take();
        if let Some(stream) = stream.filter(|_| self.ended().is_none()) {
            // One that ended by itself before, its output not taken, keeps its own end.
            let how = stream.response().unwrap_or_else(|| Ok(self.killed()));
            drop(self.end(how));
            // Whoever waits for output is woken, and finds how it ended.
            stream.cancel();
        }
    }
}
