//! Frames: what a sealed record holds.
//!
//! ```text
//!  0      1       2            6
//!  +------+-------+------------+---------+
//!  | kind | flags | id (u32BE) | payload |
//!  +------+-------+------------+---------+
//! ```

use crate::{record, ProtocolError};

/// Bytes before the payload.
pub const HEADER: usize = 6;
/// What the AEAD adds to a record.
pub const TAG: usize = 16;
/// The longest payload of one frame.
pub const MAX_PAYLOAD: usize = record::MAX_BODY - TAG - HEADER;
/// Set on the last frame of a message.
pub const FLAG_LAST: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Host to guest: a [`crate::message::Request`].
    Request = 1,
    /// Guest to host: a [`crate::message::Response`] to the request of the same id.
    Response = 2,
    /// Host to guest: the answer to this request is no longer wanted.
    Cancel = 3,
    /// Guest to host: a [`crate::message::Event`]; id 0.
    Event = 4,
}

impl TryFrom<u8> for Kind {
    type Error = ProtocolError;

    fn try_from(kind: u8) -> Result<Self, ProtocolError> {
        match kind {
            1 => Ok(Kind::Request),
            2 => Ok(Kind::Response),
            3 => Ok(Kind::Cancel),
            4 => Ok(Kind::Event),
            kind => Err(ProtocolError::UnknownFrame { kind }),
        }
    }
}

/// One frame, borrowed from the record that held it.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: Kind,
    pub last: bool,
    pub id: u32,
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.kind as u8);
        out.push(if self.last { FLAG_LAST } else { 0 });
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(self.payload);
    }

    /// # Errors
    /// [`ProtocolError::Malformed`] for a short frame or unknown flags, [`ProtocolError::UnknownFrame`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ProtocolError> {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(ProtocolError::Malformed { what: "frame: shorter than its header" });
        };
        let [kind, flags, id @ ..] = *header;
        if flags & !FLAG_LAST != 0 {
            return Err(ProtocolError::Malformed { what: "frame: unknown flags" });
        }
        Ok(Frame { kind: Kind::try_from(kind)?, last: flags & FLAG_LAST != 0, id: u32::from_be_bytes(id), payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn test_frame_round_trip_is_identity(kind in 1u8..=4, last: bool, id: u32, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let frame = Frame { kind: Kind::try_from(kind).unwrap(), last, id, payload: &payload };
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            prop_assert_eq!(Frame::decode(&bytes).unwrap(), frame);
        }

        #[test]
        fn test_frame_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(Frame::decode(&bytes).is_ok() || Frame::decode(&bytes).is_err());
        }
    }
}
