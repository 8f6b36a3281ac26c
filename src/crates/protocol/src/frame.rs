//! Frames: what a sealed record holds.
//!
//! ```text
//!  0      1       2            6
//!  +------+-------+------------+---------+
//!  | kind | flags | id (u32BE) | payload |      flags: bit 0 is LAST, the others are 0
//!  +------+-------+------------+---------+
//! ```
//!
//! | kind | from | id | payload | LAST |
//! |---|---|---|---|---|
//! | 1 REQUEST | host | a new call | a piece of its JSON | ends the request |
//! | 2 RESPONSE | guest | its call | a piece of its JSON | ends the call |
//! | 3 CANCEL | host | its call | none | |
//! | 4 EVENT | guest | 0 | JSON | |
//! | 5 DATA | both | its call | channel u8, bytes | ends this direction of the channel |
//! | 6 CREDIT | both | its call | channel u8, bytes u32 BE | |
//! | 7 CONTROL | host | its call | JSON | |
//! | 8 STARTED | guest | its call | JSON | |
//! | 9 PING | host | a token | none | |
//! | 10 PONG | guest | the token | none | |

use crate::{record, ProtocolError};

/// Bytes before the payload.
pub const HEADER: usize = 6;
/// What the AEAD adds to a record.
pub const TAG: usize = 16;
/// The longest payload of one frame.
pub const MAX_PAYLOAD: usize = record::MAX_BODY - TAG - HEADER;
/// The most bytes that one DATA frame carries.
pub const MAX_DATA: usize = MAX_PAYLOAD - 1;
const FLAG_LAST: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    Request = 1,
    Response = 2,
    Cancel = 3,
    Event = 4,
    Data = 5,
    Credit = 6,
    Control = 7,
    Started = 8,
    Ping = 9,
    Pong = 10,
}

impl Kind {
    pub const ALL: [Kind; 10] = [
        Kind::Request,
        Kind::Response,
        Kind::Cancel,
        Kind::Event,
        Kind::Data,
        Kind::Credit,
        Kind::Control,
        Kind::Started,
        Kind::Ping,
        Kind::Pong,
    ];

    /// Whether LAST means something on a frame of this kind.
    fn may_be_last(self) -> bool {
        matches!(self, Kind::Request | Kind::Response | Kind::Data)
    }
}

impl TryFrom<u8> for Kind {
    type Error = ProtocolError;

    fn try_from(kind: u8) -> Result<Self, ProtocolError> {
        let known = Kind::ALL.into_iter().find(|known| *known as u8 == kind);
        known.ok_or(ProtocolError::UnknownFrame { kind })
    }
}

/// One frame, borrowed from the record that held it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: Kind,
    pub last: bool,
    pub id: u32,
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_header(self.kind, self.last, self.id, out);
        out.extend_from_slice(self.payload);
    }

    /// # Errors
    /// [`ProtocolError::Malformed`] for a short frame or flags that mean nothing, [`ProtocolError::UnknownFrame`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ProtocolError> {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(ProtocolError::Malformed { what: "frame: shorter than its header" });
        };
        let [kind, flags, id @ ..] = *header;
        let (kind, last) = (Kind::try_from(kind)?, flags & FLAG_LAST != 0);
        if flags & !FLAG_LAST != 0 || (last && !kind.may_be_last()) {
            return Err(ProtocolError::Malformed { what: "frame: flags that mean nothing" });
        }
        Ok(Frame { kind, last, id: u32::from_be_bytes(id), payload })
    }
}

/// The header alone, for payloads that are gathered from several places.
pub(crate) fn encode_header(kind: Kind, last: bool, id: u32, out: &mut Vec<u8>) {
    out.push(kind as u8);
    out.push(if last { FLAG_LAST } else { 0 });
    out.extend_from_slice(&id.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn test_frame_round_trip_is_identity(kind in 1u8..=10, last: bool, id: u32, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let kind = Kind::try_from(kind).unwrap();
            let frame = Frame { kind, last: last && kind.may_be_last(), id, payload: &payload };
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            prop_assert_eq!(Frame::decode(&bytes).unwrap(), frame);
        }

        #[test]
        fn test_frame_any_bytes_decode_to_what_encodes_them(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(frame) = Frame::decode(&bytes) {
                let mut again = Vec::new();
                frame.encode(&mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }
}
