//! The way to the agent: open from the start, or a connection that the guest makes.

use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};

use crate::error::{Error, Result};
use crate::host::socket_dir::SocketDir;

/// The VMM's socket for the guest's vsock, in its folder.
pub const VSOCK: &str = "vsock";

/// A transport, or where it will come from.
#[derive(Debug)]
pub enum Transport {
    Open(UnixStream),
    Awaited(Awaited),
}

/// A guest's connection to [`microvm_protocol::VSOCK_HOST_PORT`] of its host, which a hybrid vsock makes a connection to
/// a Unix socket named after the port (firecracker/docs/vsock.md; cloud-hypervisor/docs/vsock.md). One is taken, the
/// agent's: it comes before any other program of the guest runs.
#[derive(Debug)]
pub struct Awaited {
    listener: UnixListener,
    sockets: Arc<SocketDir>,
}

fn name() -> String {
    format!("{VSOCK}_{}", microvm_protocol::VSOCK_HOST_PORT)
}

impl Awaited {
    /// Listens; the guest may start any time afterwards.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn listen(sockets: Arc<SocketDir>) -> Result<Self> {
        Ok(Self { listener: sockets.listen(&name())?, sockets })
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.sockets.remove(&name());
    }
}

impl Transport {
    /// Whether the agent is yet to connect, be it that of a clone.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        matches!(self, Transport::Awaited(_))
    }

    /// Waits until the agent is connected. Has no deadline of its own.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub async fn open(self) -> Result<UnixStream> {
        match self {
            Transport::Open(stream) => Ok(stream),
            Transport::Awaited(awaited) => {
                let accepted = awaited.listener.accept().await;
                accepted.map(|(stream, _)| stream).map_err(|error| Error::host("accept", "the agent", error))
            }
        }
    }
}
