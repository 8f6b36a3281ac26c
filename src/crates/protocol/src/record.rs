//! Records: the unit that a byte stream is cut into.
//!
//! ```text
//!  0        2                 2+length
//!  +--------+------------------+
//!  | length | body             |      length: u16, big-endian, 1..=65535
//!  +--------+------------------+
//! ```
//! A u16 cannot name more than a Noise message may hold, so a hostile length costs at most 64 KiB.

use crate::ProtocolError;

/// The longest body of a record; also the longest Noise message.
pub const MAX_BODY: usize = 65_535;
const HEADER: usize = 2;

/// Appends `body` as a record to `out`.
///
/// # Errors
/// [`ProtocolError::EmptyRecord`] or [`ProtocolError::Malformed`] when the body does not fit a record.
pub fn encode(body: &[u8], out: &mut Vec<u8>) -> Result<(), ProtocolError> {
    if body.is_empty() {
        return Err(ProtocolError::EmptyRecord);
    }
    let length =
        u16::try_from(body.len()).map_err(|_| ProtocolError::Malformed { what: "record: body over 65535 bytes" })?;
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(body);
    Ok(())
}

/// Cuts a byte stream into records.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl Decoder {
    /// Takes bytes as they came; any split is fine.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.consumed == self.buffer.len() {
            self.buffer.clear();
            self.consumed = 0;
        } else if self.consumed > MAX_BODY {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete record's body, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`ProtocolError::EmptyRecord`].
    pub fn next_record(&mut self) -> Result<Option<&[u8]>, ProtocolError> {
        let pending = &self.buffer[self.consumed..];
        let Some(header) = pending.first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes(*header));
        if length == 0 {
            return Err(ProtocolError::EmptyRecord);
        }
        if pending.len() < HEADER + length {
            return Ok(None);
        }
        let start = self.consumed + HEADER;
        self.consumed = start + length;
        Ok(Some(&self.buffer[start..start + length]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn test_decoder_any_split_gives_the_records_back(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..20),
            step in 1usize..50,
        ) {
            let mut stream = Vec::new();
            for body in &bodies {
                encode(body, &mut stream).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for piece in stream.chunks(step) {
                decoder.feed(piece);
                while let Some(record) = decoder.next_record().unwrap() {
                    got.push(record.to_vec());
                }
            }
            prop_assert_eq!(got, bodies);
        }

        #[test]
        fn test_decoder_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            while let Ok(Some(_)) = decoder.next_record() {}
        }
    }
}
