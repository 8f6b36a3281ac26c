//! Frames out of a stream of bytes: each has its length before it, four bytes, the highest first (QEMU, net/stream.c).

use std::io::{self, Read};

use crate::out::LENGTH_BYTES;

/// QEMU's NET_BUFSIZE: no frame of its is longer.
const MAX_FRAME: usize = 4096 + 65536;
/// What is read at once at most.
const MOST_AT_ONCE: usize = 128 << 10;

/// Bytes of the VMM that are not a whole frame yet.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    taken: usize,
}

impl Frames {
    /// Reads what there is, at most `room` bytes; how much that was.
    ///
    /// # Errors
    /// The kernel's; `UnexpectedEof` at the stream's end.
    pub fn read(&mut self, from: &mut impl Read, room: usize) -> io::Result<usize> {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        let before = self.bytes.len();
        self.bytes.resize(before + room.clamp(1, MOST_AT_ONCE), 0);
        let read = from.read(self.bytes.split_at_mut(before).1);
        self.bytes.truncate(before + *read.as_ref().unwrap_or(&0));
        match read? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => Ok(length),
        }
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// The stream is out of step: no VMM that is whole sends such a length.
    pub fn next_frame(&mut self) -> io::Result<Option<&[u8]>> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some(length) = rest.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
        }
        let begin = self.taken + LENGTH_BYTES;
        if self.bytes.len() < begin + length {
            return Ok(None);
        }
        self.taken = begin + length;
        Ok(self.bytes.get(begin..self.taken))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn test_frames_come_out_as_they_went_in_however_they_are_cut(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20), room in 1usize..400,
        ) {
            let mut stream = Vec::new();
            for frame in &frames {
                stream.extend_from_slice(&u32::try_from(frame.len()).unwrap().to_be_bytes());
                stream.extend_from_slice(frame);
            }
            let (mut reader, mut out, mut found) = (Frames::default(), &stream[..], Vec::new());
            while reader.read(&mut out, room).is_ok() {
                while let Some(frame) = reader.next_frame().unwrap() {
                    found.push(frame.to_vec());
                }
            }
            prop_assert_eq!(found, frames);
        }
    }

    #[test]
    fn test_frames_a_length_out_of_reason_is_an_error() {
        let mut frames = Frames::default();
        let mut stream = &0x7fff_ffffu32.to_be_bytes()[..];
        frames.read(&mut stream, 4).unwrap();
        assert_eq!(frames.next_frame().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(frames.read(&mut stream, 4).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
