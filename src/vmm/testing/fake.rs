//! A VMM's API that answers as recorded from the real ones, or goes wrong: for faults that cannot be made for real.

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use crate::host::socket_dir::SocketDir;

/// What happens to one request.
#[derive(Debug, Clone, Copy)]
pub enum Does {
    /// Answers with this status and body.
    Answers(u16, &'static str),
    /// Answers half, and hangs up.
    HangsUp,
    /// Never answers.
    Sleeps,
}

/// A folder with an API in it; removed when dropped.
pub struct Fake {
    folder: TempDir,
    pub sockets: Arc<SocketDir>,
}

impl Fake {
    /// Serves one `Does` a request, in turn, on any number of connections.
    pub fn serve(script: Vec<Does>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sockets = Arc::new(SocketDir::open(folder.path(), None).unwrap());
        let listener = UnixListener::bind(folder.path().join("api")).unwrap();
        tokio::spawn(async move {
            let mut script = script.into_iter();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                while stream.read(&mut request).await.is_ok_and(|length| length > 0) {
                    let answer = match script.next() {
                        Some(Does::Answers(204, _)) => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
                        Some(Does::Answers(status, body)) => {
                            format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                        }
                        Some(Does::HangsUp) => {
                            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{").await.unwrap();
                            break;
                        }
                        Some(Does::Sleeps) | None => std::future::pending().await,
                    };
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        Self { folder, sockets }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}
