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
/// How many bytes a reader may take at once, at least.
pub const READ_AT_ONCE: usize = 64 * 1024;
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
///
/// Read into [`Decoder::space`], say how much by [`Decoder::filled`], then take records until there is none; so it holds
/// no more than one unfinished record and what was read at once.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What is between `start` and `end` was read and not taken.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Decoder {
    /// Where the next bytes are to be read to; [`READ_AT_ONCE`] bytes or more.
    pub fn space(&mut self) -> &mut [u8] {
        self.make_room(READ_AT_ONCE);
        &mut self.buffer[self.end..]
    }

    /// Says that so many bytes of the space were filled.
    pub fn filled(&mut self, bytes: usize) {
        self.end = (self.end + bytes).min(self.buffer.len());
    }

    /// Takes bytes that are somewhere else.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.make_room(bytes.len());
        self.buffer[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// Whether all that came was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn make_room(&mut self, bytes: usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.buffer.len() - self.end < bytes && self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() - self.end < bytes {
            self.buffer.resize(self.end + bytes, 0);
        }
    }

    /// The next complete record's body, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`ProtocolError::EmptyRecord`].
    pub fn next_record(&mut self) -> Result<Option<&[u8]>, ProtocolError> {
        let pending = &self.buffer[self.start..self.end];
        let Some(header) = pending.first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes(*header));
        if length == 0 {
            return Err(ProtocolError::EmptyRecord);
        }
        if pending.len() < HEADER + length {
            return Ok(None);
        }
        let body = self.start + HEADER;
        self.start = body + length;
        Ok(Some(&self.buffer[body..self.start]))
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
        fn test_decoder_that_is_read_into_holds_one_record_and_one_read(
            sizes in prop::collection::vec(1usize..MAX_BODY, 1..12),
            step in 1usize..READ_AT_ONCE,
        ) {
            let mut stream = Vec::new();
            for (number, size) in sizes.iter().enumerate() {
                encode(&vec![number as u8; *size], &mut stream).unwrap();
            }
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for piece in stream.chunks(step) {
                decoder.space()[..piece.len()].copy_from_slice(piece);
                decoder.filled(piece.len());
                while let Some(record) = decoder.next_record().unwrap() {
                    prop_assert!(record.iter().all(|byte| usize::from(*byte) == got.len()));
                    got.push(record.len());
                }
                prop_assert!(decoder.buffer.len() <= HEADER + MAX_BODY + READ_AT_ONCE);
            }
            prop_assert_eq!(got, sizes);
        }

        #[test]
        fn test_decoder_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            while let Ok(Some(_)) = decoder.next_record() {}
        }
    }
}
