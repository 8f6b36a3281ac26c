//! A connection to a TCP port of the guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use microvm_protocol::message::Started;
use microvm_protocol::mux::STDIN;
use serde_json::Value;

use super::error::SessionError;
use super::stream::{Next, Stream};
use crate::error::{Error, Result};
use crate::host::stream_socket::StreamSocket;

/// Bytes that are read from the host's side at once.
const PIECE: usize = 64 * 1024;
/// How long a server may go on with a client that is gone: as long as Linux gives a closed socket (tcp_fin_timeout, tcp(7)).
const ORPHAN: Duration = Duration::from_secs(60);

/// A connection in the guest. Dropping it breaks that: its server sees a reset.
pub struct PortConnection {
    stream: Stream,
}

impl PortConnection {
    /// A connection that the guest is making: what is carried to it meanwhile waits there.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream }
    }

    /// Waits at most `stall` until the guest has connected.
    ///
    /// # Errors
    /// [`Error::Guest`] when it could not, with the code `connection_refused` where nothing listens,
    /// [`Error::ChannelClosed`], [`Error::ChannelTimeout`].
    pub async fn made(&self, stall: Duration) -> Result<()> {
        match self.stream.started(stall).await? {
            Started::Connection { .. } => Ok(()),
            Started::Program { .. } | Started::File { .. } => {
                let reason = SessionError::NeverBegan { what: "connect".into() };
                Err(Error::channel_closed(self.stream.vm_id(), reason, true))
            }
        }
    }

    /// Carries bytes between `local` and the guest until both have said all. Either may end its direction first.
    ///
    /// # Errors
    /// [`Error::Guest`] when the guest's connection failed or broke, [`Error::ChannelClosed`], and [`Error::Host`] when
    /// `local` did; the other side sees a connection that broke then.
    pub async fn carry(self, local: StreamSocket) -> Result<()> {
        let of = |operation: &'static str| move |error| Error::host(operation, "a connection to a port", error);
        let said_all = AtomicBool::new(false);
        let to_guest = async {
            let mut buffer = vec![0; PIECE];
            loop {
                let length = local.read(&mut buffer).await.map_err(of("read"))?;
                if length == 0 {
                    break;
                }
                if !self.stream.send(STDIN, &buffer[..length], None).await? {
                    // It is over: what ended it comes by the other direction.
                    return std::future::pending().await;
                }
            }
            self.stream.finish(STDIN);
            drop(buffer);
            local.hung_up().await.map_err(of("watch"))?;
            if said_all.load(Ordering::Relaxed) {
                // That was the end of both directions.
                return std::future::pending().await;
            }
            // What it said before is still on its way.
            tokio::time::sleep(ORPHAN).await;
            Err(of("write")(std::io::ErrorKind::BrokenPipe.into()))
        };
        let from_guest = async {
            loop {
                let piece = match self.stream.next_or_last::<Value>().await? {
                    Next::Piece(piece) => piece,
                    Next::End(_) => return Ok(()),
                };
                local.write_all(&piece.bytes).await.map_err(of("write"))?;
                if piece.last {
                    said_all.store(true, Ordering::Relaxed);
                    local.end_writing().map_err(of("shutdown"))?;
                }
            }
        };
        tokio::select! {
            ended = from_guest => ended?,
            failed = to_guest => failed?,
        }
        local.close().map_err(of("close"))
    }
}
