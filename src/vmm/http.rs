//! The HTTP of a VMM's API: one connection, one request at a time, each with a deadline.
//!
//! Architecture invariant: knows no VMM. What an answer means is the caller's business, and so is an error's mention of the
//! request.

use std::borrow::Cow;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{handshake, SendRequest};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::error::ControlError;
use crate::error;
use crate::host::rights::{FdStream, PendingFd};

/// Answers are some kilobytes; no VMM gets to fill this process's memory.
const MAX_ANSWER_BYTES: usize = 4 << 20;

type Path = Cow<'static, str>;

/// Something to ask of a VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub method: Method,
    pub path: Path,
    /// JSON.
    pub body: Option<Vec<u8>>,
}

impl Call {
    #[must_use]
    pub fn get(path: impl Into<Path>) -> Self {
        Self { method: Method::GET, path: path.into(), body: None }
    }

    /// A request that says nothing beyond its path.
    #[must_use]
    pub fn put_nothing(path: impl Into<Path>) -> Self {
        Self { method: Method::PUT, path: path.into(), body: None }
    }

    #[must_use]
    pub fn put(path: impl Into<Path>, body: &impl Serialize) -> Self {
        Self::with_body(Method::PUT, path, body)
    }

    #[must_use]
    pub fn patch(path: impl Into<Path>, body: &impl Serialize) -> Self {
        Self::with_body(Method::PATCH, path, body)
    }

    fn with_body(method: Method, path: impl Into<Path>, body: &impl Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("a struct of strings and numbers is JSON");
        Self { method, path: path.into(), body: Some(body) }
    }
}

/// What the VMM answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
}

/// The API of one VMM.
pub struct Client {
    sender: Mutex<Option<SendRequest<Full<Bytes>>>>,
    pending_fd: PendingFd,
    deadline: Duration,
}

impl Client {
    #[must_use]
    pub fn new(deadline: Duration) -> Self {
        Self { sender: Mutex::new(None), pending_fd: PendingFd::default(), deadline }
    }

    /// Asks, over the connection that is there or one that `connect` makes. After an error the next call connects anew:
    /// what was left of an answer belongs to nobody. `fd` goes along with the request.
    ///
    /// # Errors
    /// Anything but a refusal, which is an [`Answer`].
    pub async fn ask<C>(&self, call: Call, fd: Option<OwnedFd>, connect: impl Fn() -> C) -> Result<Answer, ControlError>
    where
        C: Future<Output = error::Result<UnixStream>>,
    {
        let asked = async {
            let mut place = self.sender.lock().await;
            // Taken out, so that giving up in the middle leaves none.
            let mut sender = match place.take().filter(|sender| !sender.is_closed()) {
                Some(sender) => sender,
                None => {
                    let stream = connect().await.map_err(|error| ControlError::NotConnected(error.into()))?;
                    open(FdStream::new(stream, self.pending_fd.clone())).await?
                }
            };
            *self.pending_fd.lock() = fd;
            let answer = send(&mut sender, call).await?;
            *place = Some(sender);
            Ok(answer)
        };
        tokio::time::timeout(self.deadline, asked).await.unwrap_or(Err(ControlError::NoAnswer(self.deadline)))
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

async fn open(stream: FdStream) -> Result<SendRequest<Full<Bytes>>, ControlError> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(ControlError::http)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            log::debug!("a VMM's API connection ended: {error}");
        }
    });
    Ok(sender)
}

async fn send(sender: &mut SendRequest<Full<Bytes>>, call: Call) -> Result<Answer, ControlError> {
    sender.ready().await.map_err(ControlError::http)?;
    let mut request = Request::builder().method(call.method).uri(&*call.path).header("Host", "localhost");
    if call.body.is_some() {
        request = request.header("Content-Type", "application/json");
    }
    let body = Full::new(Bytes::from(call.body.unwrap_or_default()));
    let request = request.body(body).map_err(ControlError::http)?;
    let answer = sender.send_request(request).await.map_err(ControlError::http)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(ControlError::http)?;
    Ok(Answer { status, body: body.to_bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What a VMM's API does wrong, at the far end of a connection.
    enum Peer {
        /// Answers each request with these bytes.
        Says(&'static [u8]),
        /// Answers with these bytes and hangs up.
        HangsUp(&'static [u8]),
        Silent,
    }

    async fn connection(peer: &Peer) -> error::Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (bytes, stays) = match peer {
            Peer::Says(bytes) => (*bytes, true),
            Peer::HangsUp(bytes) => (*bytes, false),
            Peer::Silent => (&b""[..], true),
        };
        tokio::spawn(async move {
            let mut request = [0; 4096];
            while theirs.read(&mut request).await.is_ok_and(|length| length > 0) {
                if theirs.write_all(bytes).await.is_err() || !stays {
                    return;
                }
            }
        });
        Ok(ours)
    }

    async fn ask(client: &Client, peer: &Peer) -> Result<Answer, ControlError> {
        client.ask(Call::put("/vm", &serde_json::json!({"state": "Paused"})), None, || connection(peer)).await
    }

    #[tokio::test]
    async fn test_ask_keeps_status_and_words() {
        let client = Client::new(Duration::from_secs(5));
        let refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 23\r\n\r\n{\"fault_message\": \"no\"}";
        let answer = ask(&client, &Peer::Says(refusal)).await.unwrap();
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (400, &b"{\"fault_message\": \"no\"}"[..]));
        let done = ask(&client, &Peer::Silent).await.unwrap();
        assert_eq!(done.status.as_u16(), 400, "the connection is kept");
    }

    #[tokio::test]
    async fn test_half_an_answer_is_an_error_and_the_next_call_connects_anew() {
        let client = Client::new(Duration::from_secs(5));
        let half = ask(&client, &Peer::HangsUp(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{\"a\"")).await;
        assert!(matches!(half, Err(ControlError::Http(_))), "{half:?}");
        let whole = ask(&client, &Peer::Says(b"HTTP/1.1 204 No Content\r\n\r\n")).await.unwrap();
        assert_eq!(whole.status.as_u16(), 204);
    }

    #[tokio::test]
    async fn test_silence_ends_at_the_deadline() {
        let client = Client::new(Duration::from_millis(50));
        assert_eq!(ask(&client, &Peer::Silent).await.unwrap_err().to_string(), "no answer within 0.05 s");
        let closed = ask(&client, &Peer::HangsUp(b"")).await;
        assert!(matches!(closed, Err(ControlError::Http(_))), "{closed:?}");
    }

    #[tokio::test]
    async fn test_nonsense_and_floods_are_errors() {
        let client = Client::new(Duration::from_millis(200));
        assert!(ask(&client, &Peer::Says(b"SSH-2.0-no\r\n")).await.is_err());
        for (length, is_taken) in [(MAX_ANSWER_BYTES, true), (MAX_ANSWER_BYTES + 1, false)] {
            // Another would go on with the connection of the first.
            let client = Client::new(Duration::from_secs(30));
            let answer =
                [format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes(), vec![b' '; length]];
            let answer = ask(&client, &Peer::Says(answer.concat().leak())).await;
            assert_eq!(answer.is_ok(), is_taken, "{length}");
        }
    }
}
