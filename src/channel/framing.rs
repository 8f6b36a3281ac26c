//! The framing on a broker's socket: a 4-byte big-endian length, then UTF-8 JSON.

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};

use microvm_protocol::message::MAX_MESSAGE;

/// The longest JSON document on the socket, in bytes: a message of the session and the envelope around it.
pub const MAX_DOCUMENT: usize = MAX_MESSAGE + 4096;

/// Why a document could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum FramingError {
    #[error("a message of {0} bytes is over the limit of {MAX_DOCUMENT}")]
    TooLong(usize),
    #[error("a message is not JSON: {0}")]
    NotJson(#[source] serde_json::Error),
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// A document as bytes for the socket.
///
/// # Errors
/// [`FramingError::TooLong`].
pub fn encode(document: &Value) -> Result<Vec<u8>, FramingError> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, document).map_err(FramingError::NotJson)?;
    let length = out.len() - 4;
    let header = u32::try_from(length).ok().filter(|_| length <= MAX_DOCUMENT).ok_or(FramingError::TooLong(length))?;
    out[..4].copy_from_slice(&header.to_be_bytes());
    Ok(out)
}

/// What was read so far; giving up on [`Reader::next`] loses nothing.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: Vec<u8>,
    /// Where the next document begins; what is before it was taken.
    start: usize,
}

impl Reader {
    /// Whether nothing of the next document was read yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buffer.len() == self.start
    }

    /// What was read and not taken, of a stream that goes on by other rules.
    #[must_use]
    pub fn into_rest(mut self) -> Vec<u8> {
        self.buffer.split_off(self.start)
    }

    /// Whether a whole document's worth of bytes waits to be taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.buffer.len() - self.start >= MAX_DOCUMENT
    }

    /// Reads on without taking anything; false at the end. Cancellation-safe.
    ///
    /// # Errors
    /// The stream's.
    pub async fn read_ahead<S: AsyncRead + Unpin>(&mut self, stream: &mut S) -> std::io::Result<bool> {
        // Seldom enough that many short documents do not cost a move each.
        if self.start > self.buffer.len() / 2 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        Ok(stream.read_buf(&mut self.buffer).await? > 0)
    }

    /// The next document, `None` at a clean end. Cancellation-safe.
    ///
    /// # Errors
    /// [`FramingError::NotJson`] leaves the stream usable; the others do not.
    pub async fn next<S: AsyncRead + Unpin>(&mut self, stream: &mut S) -> Result<Option<Value>, FramingError> {
        loop {
            let waiting = &self.buffer[self.start..];
            if let Some(header) = waiting.first_chunk::<4>() {
                let length = u32::from_be_bytes(*header) as usize;
                if length > MAX_DOCUMENT {
                    return Err(FramingError::TooLong(length));
                }
                if let Some(body) = waiting.get(4..4 + length) {
                    let document = serde_json::from_slice(body).map_err(FramingError::NotJson);
                    self.start += 4 + length;
                    return document.map(Some);
                }
            }
            if !self.read_ahead(stream).await? {
                return match self.is_empty() {
                    true => Ok(None),
                    false => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[tokio::test]
    async fn test_next_documents_split_anywhere_arrive_whole() {
        let bytes = [encode(&json!({"a": 1})).unwrap(), encode(&json!("b")).unwrap()].concat();
        for cut in 0..bytes.len() {
            let (head, tail) = bytes.split_at(cut);
            let mut stream = tokio::io::AsyncReadExt::chain(head, tail);
            let mut reader = Reader::default();
            assert_eq!(reader.next(&mut stream).await.unwrap(), Some(json!({"a": 1})));
            assert_eq!(reader.next(&mut stream).await.unwrap(), Some(json!("b")));
            assert_eq!(reader.next(&mut stream).await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn test_next_lying_length_is_refused_before_it_is_read() {
        let mut stream: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1];
        assert!(matches!(Reader::default().next(&mut stream).await, Err(FramingError::TooLong(_))));
    }

    #[tokio::test]
    async fn test_next_after_bad_json_goes_on() {
        let bytes = [&[0, 0, 0, 2][..], b"{x", &encode(&json!(1)).unwrap()].concat();
        let (mut stream, mut reader) = (&bytes[..], Reader::default());
        assert!(matches!(reader.next(&mut stream).await, Err(FramingError::NotJson(_))));
        assert_eq!(reader.next(&mut stream).await.unwrap(), Some(json!(1)));
    }
}
