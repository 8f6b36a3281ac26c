//! JSON of a length that is known before it is built.

use std::io::{self, Write};

use serde::Serialize;

use crate::message::MAX_MESSAGE;

/// What was left of the message's limit for other fields when a text is put into it.
const ENVELOPE: usize = 64 << 10;

/// Why a document was not written.
#[derive(Debug, thiserror::Error)]
pub enum Unwritten {
    #[error("it has over {limit} bytes of JSON")]
    TooLong { limit: usize },
    #[error("{0}")]
    Invalid(serde_json::Error),
}

/// The document, unless it is longer than `limit`: then no more than that was built of it. `limit` is asked for once, by
/// a document of more than [`ENVELOPE`].
pub fn encode(document: &impl Serialize, limit: impl FnOnce() -> usize) -> Result<Vec<u8>, Unwritten> {
    let mut bounded = Bounded { bytes: Vec::new(), ask: Some(limit), limit: ENVELOPE, is_over: false };
    let written = serde_json::to_writer(&mut bounded, document);
    match written {
        Ok(()) => Ok(bounded.bytes),
        Err(_) if bounded.is_over => Err(Unwritten::TooLong { limit: bounded.limit }),
        Err(error) => Err(Unwritten::Invalid(error)),
    }
}

struct Bounded<F> {
    bytes: Vec<u8>,
    ask: Option<F>,
    limit: usize,
    is_over: bool,
}

impl<F: FnOnce() -> usize> Write for Bounded<F> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let length = self.bytes.len() + piece.len();
        if length > self.limit {
            if let Some(ask) = self.ask.take() {
                self.limit = ask().max(ENVELOPE);
            }
        }
        if length > self.limit {
            self.is_over = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many bytes of JSON a text has, without its quotes.
#[must_use]
pub fn escaped_len(text: &str) -> usize {
    let escaped = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
        0..=31 => 6,
        _ => 1,
    };
    text.bytes().map(escaped).sum()
}

/// Whether a text travels as base64: one of control characters, which JSON makes six times longer, and one that would not
/// fit a message. Quotes and line feeds alone, as tables and sources have them, leave it a text.
#[must_use]
pub fn prefers_base64(text: &str) -> bool {
    let escaped = escaped_len(text);
    escaped > 2 * text.len() || escaped > MAX_MESSAGE - ENVELOPE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_escaped_len_is_that_of_the_json() {
        let all: String = (0..=300u32).filter_map(char::from_u32).collect();
        assert_eq!(escaped_len(&all) + 2, serde_json::to_string(&all).unwrap().len());
    }

    #[test]
    fn test_prefers_base64_what_json_makes_long() {
        assert!(!prefers_base64(""));
        assert!(!prefers_base64("\"a\",\"b\"\n\n\n"));
        assert!(prefers_base64(&"\0".repeat(9)));
        assert!(!prefers_base64(&"\"".repeat(4 << 20)));
        assert!(prefers_base64(&"\"".repeat(MAX_MESSAGE / 2)));
    }

    #[test]
    fn test_encode_stops_at_the_limit() {
        let text = "x".repeat(1 << 20);
        assert!(matches!(encode(&text, || 1 << 19), Err(Unwritten::TooLong { limit }) if limit == 1 << 19));
        assert_eq!(encode(&text, || 1 << 21).unwrap().len(), text.len() + 2);
        assert_eq!(encode(&"short", || panic!("it is not asked for")).unwrap(), b"\"short\"");
    }
}
