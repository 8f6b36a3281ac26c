//! An established session: plaintext in, sealed records out, and back.

use snow::TransportState;

use crate::frame::TAG;
use crate::{record, ProtocolError};

/// Records sealed under one key before both sides move on to the next one.
pub const REKEY_EVERY: u64 = 1 << 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Host,
    Guest,
}

/// Both directions of one connection after the handshake.
#[derive(Debug)]
pub struct Session {
    /// `None`: nothing is sealed.
    noise: Option<TransportState>,
    role: Role,
    sealed: u64,
    opened: u64,
    /// As long as the longest record so far.
    plain: Vec<u8>,
}

impl Session {
    pub(crate) fn new(noise: TransportState, role: Role) -> Self {
        Self { noise: Some(noise), role, sealed: 0, opened: 0, plain: Vec::new() }
    }

    /// Of two processes of one host, on a socket that the kernel keeps between them: records hold their frames as they are.
    #[must_use]
    pub fn unsealed(role: Role) -> Self {
        Self { noise: None, role, sealed: 0, opened: 0, plain: Vec::new() }
    }

    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Appends `plain` to `out` as one sealed record.
    ///
    /// # Errors
    /// [`ProtocolError::Malformed`] when it does not fit a record, [`ProtocolError::Cipher`].
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let Some(noise) = &mut self.noise else { return record::encode(plain, out) };
        let body = plain.len() + TAG;
        let length = u16::try_from(body).map_err(|_| ProtocolError::Malformed { what: "frame: payload too long" })?;
        out.extend_from_slice(&length.to_be_bytes());
        let start = out.len();
        out.resize(start + body, 0);
        let sealed = noise.write_message(plain, &mut out[start..]);
        sealed.map_err(|e| ProtocolError::Cipher { detail: e.to_string() })?;
        self.sealed += 1;
        if self.sealed.is_multiple_of(REKEY_EVERY) {
            noise.rekey_outgoing();
        }
        Ok(())
    }

    /// Opens one record's body.
    ///
    /// # Errors
    /// [`ProtocolError::Unsealed`]; the session cannot go on.
    pub fn open<'a>(&'a mut self, body: &'a [u8]) -> Result<&'a [u8], ProtocolError> {
        let Some(noise) = &mut self.noise else { return Ok(body) };
        if self.plain.len() < body.len() {
            self.plain.resize(body.len(), 0);
        }
        let length = noise.read_message(body, &mut self.plain).map_err(|_| ProtocolError::Unsealed)?;
        self.opened += 1;
        if self.opened.is_multiple_of(REKEY_EVERY) {
            noise.rekey_incoming();
        }
        Ok(&self.plain[..length])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::handshake::{GuestHandshake, HostHandshake, HostStep};
    use crate::identity::{Credentials, Key};
    use crate::record::Decoder;
    use proptest::prelude::*;

    pub(crate) const NOW: u64 = 1_764_000_000_000_000_000;

    pub(crate) fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut decoder = Decoder::default();
        decoder.feed(bytes);
        let mut all = Vec::new();
        while let Some(record) = decoder.next_record().unwrap() {
            all.push(record.to_vec());
        }
        all
    }

    /// A guest's, for the handshake of this number.
    fn credentials(key: Key, number: u8) -> Credentials {
        Credentials::agree(key, &Key([number; 32]), &Key([number + 1; 32]))
    }

    pub(crate) fn pair(host_key: Key, guest_key: Key) -> Result<(Session, Session), ProtocolError> {
        let guest = GuestHandshake::new(false).unwrap();
        let mut host = HostHandshake::new(credentials(host_key, 2).of_peer());
        let hello = records(&guest.hello()?).remove(0);
        let HostStep::Send(offer) = host.receive(&hello, NOW)? else { panic!("no offer") };
        let offered = guest.receive(&records(&offer)[0], &credentials(guest_key, 2))?;
        assert_eq!(offered.unix_time_ns, NOW);
        let (accept, guest_session) = offered.accept(b"ready")?;
        let HostStep::Established(session, said) = host.receive(&records(&accept)[0], NOW)? else {
            panic!("no session")
        };
        assert_eq!(said, b"ready");
        Ok((*session, guest_session))
    }

    fn same_key() -> (Session, Session) {
        pair(Key([1; 32]), Key([1; 32])).unwrap()
    }

    #[test]
    fn test_handshake_with_another_key_is_refused_by_the_guest() {
        let error = pair(Key([1; 32]), Key([2; 32])).unwrap_err();
        assert!(matches!(error, ProtocolError::Authentication { .. }), "{error}");
    }

    #[test]
    fn test_handshake_with_other_public_keys_than_agreed_is_refused_by_both() {
        let key = || Key([1; 32]);
        let hello = |guest: &GuestHandshake| records(&guest.hello().unwrap()).remove(0);
        let (guest, mut host) =
            (GuestHandshake::new(false).unwrap(), HostHandshake::new(credentials(key(), 2).of_peer()));
        let HostStep::Send(offer) = host.receive(&hello(&guest), NOW).unwrap() else { panic!() };
        let offered = guest.receive(&records(&offer)[0], &credentials(key(), 4)).unwrap();
        assert!(matches!(offered.accept(b""), Err(ProtocolError::Authentication { .. })));

        let (own, other) = (credentials(key(), 2), Credentials { public: [9; 32], ..credentials(key(), 2) });
        let (guest, mut host) = (GuestHandshake::new(false).unwrap(), HostHandshake::new(own.of_peer()));
        let HostStep::Send(offer) = host.receive(&hello(&guest), NOW).unwrap() else { panic!() };
        let (accept, _) = guest.receive(&records(&offer)[0], &other).unwrap().accept(b"").unwrap();
        assert!(matches!(host.receive(&records(&accept)[0], NOW), Err(ProtocolError::Authentication { .. })));
    }

    #[test]
    fn test_handshake_of_a_recorded_session_is_refused_by_the_host() {
        let guest = GuestHandshake::new(false).unwrap();
        let hello = records(&guest.hello().unwrap()).remove(0);
        let own = credentials(Key([1; 32]), 2);
        let mut first = HostHandshake::new(own.of_peer());
        let HostStep::Send(offer) = first.receive(&hello, NOW).unwrap() else { panic!() };
        let (accept, _) = guest.receive(&records(&offer)[0], &own).unwrap().accept(b"").unwrap();
        let mut second = HostHandshake::new(credentials(Key([1; 32]), 4).of_peer());
        second.receive(&hello, NOW).unwrap();
        assert!(matches!(second.receive(&records(&accept)[0], NOW), Err(ProtocolError::Authentication { .. })));
    }

    #[test]
    fn test_handshake_of_a_future_generation_is_refused() {
        let mut host = HostHandshake::new(credentials(Key([1; 32]), 2).of_peer());
        let error = host.receive(b"\x01TWMV\x7e\x7f\0", NOW).unwrap_err();
        assert_eq!(error, ProtocolError::NoCommonGeneration { min: 126, max: 127 });
    }

    #[test]
    fn test_session_past_the_rekey_still_opens() {
        let (mut host, mut guest) = same_key();
        let mut out = Vec::new();
        for number in 0..(REKEY_EVERY + 10) {
            out.clear();
            host.seal(&number.to_be_bytes(), &mut out).unwrap();
            assert_eq!(guest.open(&out[2..]).unwrap(), number.to_be_bytes());
        }
    }

    #[test]
    fn test_session_unsealed_carries_the_longest_frame_as_it_is() {
        let (mut host, mut guest) = (Session::unsealed(Role::Host), Session::unsealed(Role::Guest));
        let mut out = Vec::new();
        let frame = vec![7; crate::frame::HEADER + crate::frame::MAX_PAYLOAD];
        host.seal(&frame, &mut out).unwrap();
        assert_eq!(guest.open(&records(&out)[0]).unwrap(), frame);
    }

    #[test]
    fn test_session_record_sent_twice_is_refused() {
        let (mut host, mut guest) = same_key();
        let mut out = Vec::new();
        host.seal(b"once", &mut out).unwrap();
        assert!(guest.open(&out[2..]).is_ok());
        assert_eq!(guest.open(&out[2..]), Err(ProtocolError::Unsealed));
    }

    #[test]
    fn test_session_records_out_of_order_are_refused() {
        let (mut host, mut guest) = same_key();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        host.seal(b"first", &mut first).unwrap();
        host.seal(b"second", &mut second).unwrap();
        assert_eq!(guest.open(&second[2..]), Err(ProtocolError::Unsealed));
    }

    #[test]
    fn test_session_record_reflected_to_its_sender_is_refused() {
        let (mut host, _) = same_key();
        let mut out = Vec::new();
        host.seal(b"mine", &mut out).unwrap();
        assert_eq!(host.open(&out[2..]), Err(ProtocolError::Unsealed));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn test_session_flipped_bit_or_cut_is_refused(byte in 0usize..30, bit in 0u8..8, cut in 1usize..30) {
            let (mut host, mut guest) = same_key();
            let mut out = Vec::new();
            host.seal(b"thirty bytes of plaintext here", &mut out).unwrap();
            let body = &out[2..];
            prop_assert_eq!(guest.open(&body[..body.len() - cut]), Err(ProtocolError::Unsealed));
            let mut flipped = body.to_vec();
            flipped[byte] ^= 1 << bit;
            prop_assert_eq!(guest.open(&flipped), Err(ProtocolError::Unsealed));
            prop_assert!(guest.open(body).is_ok());
        }
    }
}
