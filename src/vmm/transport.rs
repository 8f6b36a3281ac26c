//! The way to the agent: open from the start, or a connection that the guest or this process makes.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::error::{Error, Result};
use crate::host::socket_dir::SocketDir;

/// The VMM's socket for the guest's vsock, in its folder.
pub const VSOCK: &str = "vsock";
/// `OK` and a port.
const MAX_LINE: usize = 32;
/// The VMM gives a guest that does not answer two seconds, and hangs up.
const CALL_AGAIN: Duration = Duration::from_millis(5);

/// A transport, or where it will come from.
#[derive(Debug)]
pub enum Transport {
    Open(UnixStream),
    Awaited(Awaited),
    Called(Called),
}

/// A guest that listens at [`microvm_protocol::VSOCK_PORT`]: a clone that would never hear that its template's connection
/// is gone. A hybrid vsock connects whoever says `CONNECT PORT` at its socket.
#[derive(Debug)]
pub struct Called {
    sockets: Arc<SocketDir>,
}

/// A guest's connection to [`microvm_protocol::VSOCK_PORT`] of its host, which a hybrid vsock makes a connection to
/// a Unix socket named after the port (firecracker/docs/vsock.md; cloud-hypervisor/docs/vsock.md). One is taken, the
/// agent's: it comes before any other program of the guest runs.
#[derive(Debug)]
pub struct Awaited {
    listener: UnixListener,
    sockets: Arc<SocketDir>,
}

fn name() -> String {
    format!("{VSOCK}_{}", microvm_protocol::VSOCK_PORT)
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

impl Called {
    #[must_use]
    pub fn at(sockets: Arc<SocketDir>) -> Self {
        Self { sockets }
    }

    async fn call(&self) -> Result<UnixStream> {
        loop {
            let mut stream = self.sockets.connect(VSOCK).await?;
            if is_answered(&mut stream).await.unwrap_or(false) {
                return Ok(stream);
            }
            tokio::time::sleep(CALL_AGAIN).await;
        }
    }
}

/// Asks for the guest's port; `false` when nobody listens there.
async fn is_answered(stream: &mut UnixStream) -> std::io::Result<bool> {
    stream.write_all(format!("CONNECT {}\n", microvm_protocol::VSOCK_PORT).as_bytes()).await?;
    let mut line = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    while line.len() < MAX_LINE && line.last() != Some(&b'\n') {
        line.push(stream.read_u8().await?);
    }
    Ok(line.starts_with(b"OK "))
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.sockets.remove(&name());
    }
}

impl Transport {
    /// Whether it is there already; else its beginning is the agent's HELLO, a clone's as well.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self, Transport::Open(_))
    }

    /// Waits until the agent is connected. Has no deadline of its own.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub async fn open(self) -> Result<UnixStream> {
        match self {
            Transport::Open(stream) => Ok(stream),
            Transport::Called(called) => called.call().await,
            Transport::Awaited(awaited) => {
                let accepted = awaited.listener.accept().await;
                accepted.map(|(stream, _)| stream).map_err(|error| Error::host("accept", "the agent", error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn test_call_is_repeated_until_it_is_answered_and_leaves_the_guests_words() {
        let folder = tempfile::tempdir().unwrap();
        let sockets = Arc::new(SocketDir::open(folder.path(), None).unwrap());
        let listener = UnixListener::bind(folder.path().join(VSOCK)).unwrap();
        let called = async {
            for answer in ["", "nonsense that is longer than any answer may be", "OK 1073741824\nhello"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 13];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 5005\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let (stream, ()) = tokio::join!(Transport::Called(Called::at(sockets)).open(), called);
        let mut said = String::new();
        stream.unwrap().read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hello");
    }
}
