//! An established session: messages in, sealed bytes out, and back.

use std::collections::HashMap;

use snow::TransportState;

use crate::frame::{Frame, Kind, HEADER, MAX_PAYLOAD, TAG};
use crate::message::MAX_MESSAGE;
use crate::ProtocolError;

/// Records sealed under one key before both sides move on to the next one.
const REKEY_EVERY: u64 = 1 << 16;
/// Messages that a peer may leave unfinished at once.
const MAX_PARTIAL: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Host,
    Guest,
}

/// A whole message of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub kind: Kind,
    pub id: u32,
    pub body: Vec<u8>,
}

/// Both directions of one connection after the handshake.
#[derive(Debug)]
pub struct Session {
    noise: TransportState,
    partial: HashMap<(Kind, u32), Vec<u8>>,
    partial_bytes: usize,
    sealed: u64,
    opened: u64,
    plain: Vec<u8>,
}

impl Session {
    pub(crate) fn new(noise: TransportState) -> Self {
        Self { noise, partial: HashMap::new(), partial_bytes: 0, sealed: 0, opened: 0, plain: Vec::new() }
    }

    /// Seals a message, cut into frames, and appends the records to `out`.
    ///
    /// # Errors
    /// [`ProtocolError::MessageTooLarge`], with nothing appended.
    pub fn seal(&mut self, kind: Kind, id: u32, body: &[u8], out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        if body.len() > MAX_MESSAGE {
            return Err(ProtocolError::MessageTooLarge { limit: MAX_MESSAGE });
        }
        let frames = body.len().div_ceil(MAX_PAYLOAD).max(1);
        out.reserve(body.len() + frames * (2 + HEADER + TAG));
        let mut rest = body;
        loop {
            let (payload, tail) = rest.split_at(rest.len().min(MAX_PAYLOAD));
            self.seal_frame(&Frame { kind, last: tail.is_empty(), id, payload }, out)?;
            if tail.is_empty() {
                return Ok(());
            }
            rest = tail;
        }
    }

    fn seal_frame(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let cipher = |e: snow::Error| ProtocolError::Cipher { detail: e.to_string() };
        self.plain.clear();
        frame.encode(&mut self.plain);
        let body = self.plain.len() + TAG;
        let length = u16::try_from(body).map_err(|_| ProtocolError::Malformed { what: "frame: payload too long" })?;
        let start = out.len() + 2;
        out.extend_from_slice(&length.to_be_bytes());
        out.resize(start + body, 0);
        self.noise.write_message(&self.plain, &mut out[start..]).map_err(cipher)?;
        self.sealed += 1;
        if self.sealed.is_multiple_of(REKEY_EVERY) {
            self.noise.rekey_outgoing();
        }
        Ok(())
    }

    /// Opens one record's body; returns the message that it completed, if any.
    ///
    /// # Errors
    /// Any [`ProtocolError`]; the session cannot go on.
    pub fn open(&mut self, body: &[u8]) -> Result<Option<Message>, ProtocolError> {
        self.plain.resize(body.len(), 0);
        let length = self.noise.read_message(body, &mut self.plain).map_err(|_| ProtocolError::Unsealed)?;
        self.opened += 1;
        if self.opened.is_multiple_of(REKEY_EVERY) {
            self.noise.rekey_incoming();
        }
        let frame = Frame::decode(&self.plain[..length])?;
        let slot = (frame.kind, frame.id);
        if frame.last && !self.partial.contains_key(&slot) {
            return Ok(Some(Message { kind: frame.kind, id: frame.id, body: frame.payload.to_vec() }));
        }
        if !self.partial.contains_key(&slot) && self.partial.len() == MAX_PARTIAL {
            return Err(ProtocolError::TooManyPartial { limit: MAX_PARTIAL });
        }
        // The cap holds over all unfinished messages together: a peer that opens many gains nothing.
        if self.partial_bytes + frame.payload.len() > 2 * MAX_MESSAGE {
            return Err(ProtocolError::MessageTooLarge { limit: MAX_MESSAGE });
        }
        let message = self.partial.entry(slot).or_default();
        if message.len() + frame.payload.len() > MAX_MESSAGE {
            return Err(ProtocolError::MessageTooLarge { limit: MAX_MESSAGE });
        }
        message.extend_from_slice(frame.payload);
        self.partial_bytes += frame.payload.len();
        if !frame.last {
            return Ok(None);
        }
        let body = self.partial.remove(&slot).unwrap_or_default();
        self.partial_bytes -= body.len();
        Ok(Some(Message { kind: frame.kind, id: frame.id, body }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::{GuestHandshake, HostHandshake, HostStep};
    use crate::identity::Key;
    use crate::record::Decoder;
    use proptest::prelude::*;

    const NOW: u64 = 1_764_000_000_000_000_000;

    fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut decoder = Decoder::default();
        decoder.feed(bytes);
        let mut all = Vec::new();
        while let Some(record) = decoder.next_record().unwrap() {
            all.push(record.to_vec());
        }
        all
    }

    fn pair(host_key: Key, guest_key: Key) -> Result<(Session, Session), ProtocolError> {
        let guest = GuestHandshake::new(false).unwrap();
        let mut host = HostHandshake::new(host_key);
        let hello = records(&guest.hello()?).remove(0);
        let HostStep::Send(offer) = host.receive(&hello, NOW)? else { panic!("no offer") };
        let offered = guest.receive(&records(&offer)[0], &guest_key, &Key([3; 32]))?;
        assert_eq!(offered.unix_time_ns, NOW);
        let (accept, guest_session) = offered.accept(b"ready")?;
        let HostStep::Established(session, said) = host.receive(&records(&accept)[0], NOW)? else {
            panic!("no session")
        };
        assert_eq!(said, b"ready");
        Ok((*session, guest_session))
    }

    #[test]
    fn test_handshake_with_another_key_is_refused_by_the_guest() {
        let error = pair(Key([1; 32]), Key([2; 32])).unwrap_err();
        assert!(matches!(error, ProtocolError::Authentication { .. }), "{error}");
    }

    #[test]
    fn test_handshake_of_a_recorded_session_is_refused_by_the_host() {
        let guest = GuestHandshake::new(false).unwrap();
        let hello = records(&guest.hello().unwrap()).remove(0);
        let mut first = HostHandshake::new(Key([1; 32]));
        let HostStep::Send(offer) = first.receive(&hello, NOW).unwrap() else { panic!() };
        let (accept, _) =
            guest.receive(&records(&offer)[0], &Key([1; 32]), &Key([3; 32])).unwrap().accept(b"").unwrap();
        let mut second = HostHandshake::new(Key([1; 32]));
        second.receive(&hello, NOW).unwrap();
        assert!(matches!(second.receive(&records(&accept)[0], NOW), Err(ProtocolError::Authentication { .. })));
    }

    #[test]
    fn test_handshake_of_a_future_generation_is_refused() {
        let mut host = HostHandshake::new(Key([1; 32]));
        let error = host.receive(b"\x01TWMV\x7e\x7f\0", NOW).unwrap_err();
        assert_eq!(error, ProtocolError::NoCommonGeneration { min: 126, max: 127 });
    }

    #[test]
    fn test_session_past_the_rekey_still_opens() {
        let (mut host, mut guest) = pair(Key([1; 32]), Key([1; 32])).unwrap();
        for id in 0..(REKEY_EVERY as u32 + 10) {
            let mut out = Vec::new();
            host.seal(Kind::Request, id, b"x", &mut out).unwrap();
            assert_eq!(guest.open(&records(&out)[0]).unwrap().unwrap().id, id);
        }
    }

    #[test]
    fn test_session_record_sent_twice_is_refused() {
        let (mut host, mut guest) = pair(Key([1; 32]), Key([1; 32])).unwrap();
        let mut out = Vec::new();
        host.seal(Kind::Request, 1, b"once", &mut out).unwrap();
        let record = records(&out).remove(0);
        assert!(guest.open(&record).unwrap().is_some());
        assert_eq!(guest.open(&record), Err(ProtocolError::Unsealed));
    }

    #[test]
    fn test_session_unfinished_messages_are_capped() {
        let (mut host, mut guest) = pair(Key([1; 32]), Key([1; 32])).unwrap();
        let mut last = Ok(None);
        for id in 0..=(MAX_PARTIAL as u32) {
            let mut out = Vec::new();
            host.seal_frame(&Frame { kind: Kind::Request, last: false, id, payload: b"never ends" }, &mut out).unwrap();
            last = guest.open(&records(&out)[0]);
        }
        assert_eq!(last, Err(ProtocolError::TooManyPartial { limit: MAX_PARTIAL }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn test_session_messages_of_any_size_arrive_whole(size in 0usize..300_000, id: u32) {
            let (mut host, mut guest) = pair(Key([1; 32]), Key([1; 32])).unwrap();
            let body: Vec<u8> = (0..size).map(|i| (i * 7) as u8).collect();
            let mut out = Vec::new();
            guest.seal(Kind::Response, id, &body, &mut out).unwrap();
            let mut got = None;
            for record in records(&out) {
                prop_assert!(got.is_none());
                got = host.open(&record).unwrap();
            }
            prop_assert_eq!(got, Some(Message { kind: Kind::Response, id, body }));
        }

        #[test]
        fn test_session_flipped_bit_is_refused(byte in 2usize..40, bit in 0u8..8) {
            let (mut host, mut guest) = pair(Key([1; 32]), Key([1; 32])).unwrap();
            let mut out = Vec::new();
            host.seal(Kind::Request, 3, b"forty bytes or so of a request's body", &mut out).unwrap();
            out[byte] ^= 1 << bit;
            prop_assert_eq!(guest.open(&records(&out)[0]), Err(ProtocolError::Unsealed));
        }
    }
}
