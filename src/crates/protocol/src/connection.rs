//! The session and its exchanges: one side of an established connection.
//!
//! The exchanges may outlive their session: one side asks for a recess by a request, which is the last that it says, and
//! the other one's response is the last, too. Then both lay their session down, keys and all, shake hands anew, and go
//! on where they were. A guest is frozen in between.

use crate::mux::{Incoming, Mux};
use crate::session::Session;
use crate::ProtocolError;

/// Records in, [`Incoming`] out; calls on [`Connection::exchanges`] in, records out.
#[derive(Debug)]
pub struct Connection {
    /// `None` between two sessions.
    session: Option<Session>,
    pub exchanges: Mux,
    frame: Vec<u8>,
    /// This session's last record was sealed; what waits is for the next one.
    concluded: bool,
}

impl Connection {
    #[must_use]
    pub fn new(session: Session) -> Self {
        let exchanges = Mux::new(session.role());
        Self { session: Some(session), exchanges, frame: Vec::new(), concluded: false }
    }

    /// Takes the body of one record.
    ///
    /// # Errors
    /// Any [`ProtocolError`]; the connection cannot go on.
    pub fn receive(&mut self, body: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let between = ProtocolError::RuleBroken { rule: "no record between two sessions" };
        let session = self.session.as_mut().ok_or(between)?;
        self.exchanges.receive(session.open(body)?)
    }

    /// Whether [`Connection::transmit`] has anything to append.
    #[must_use]
    pub fn has_outgoing(&self) -> bool {
        self.session.is_some() && !self.concluded && self.exchanges.has_outgoing()
    }

    /// Appends sealed records to `out` until it holds `enough` bytes or nothing waits.
    ///
    /// # Errors
    /// [`ProtocolError::Cipher`]; the connection cannot go on.
    pub fn transmit(&mut self, out: &mut Vec<u8>, enough: usize) -> Result<(), ProtocolError> {
        let Some(session) = self.session.as_mut().filter(|_| !self.concluded) else { return Ok(()) };
        while out.len() < enough && self.exchanges.next_frame(&mut self.frame) {
            session.seal(&self.frame, out)?;
        }
        Ok(())
    }

    /// Appends sealed records to `out` up to the one that ends this side's message of exchange `id`: the last one of
    /// this session.
    ///
    /// # Errors
    /// As [`Connection::transmit`]'s; [`ProtocolError::RuleBroken`] when there is no such message to send.
    pub fn conclude(&mut self, id: u32, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let nothing = ProtocolError::RuleBroken { rule: "a session ends with a message" };
        let session = self.session.as_mut().filter(|_| !self.concluded).ok_or(nothing.clone())?;
        if !self.exchanges.is_saying(id) {
            return Err(nothing);
        }
        while self.exchanges.is_saying(id) {
            if !self.exchanges.next_frame(&mut self.frame) {
                return Err(nothing);
            }
            session.seal(&self.frame, out)?;
        }
        self.concluded = true;
        Ok(())
    }

    /// The other side refused to lay its session down: this one goes on.
    pub fn go_on(&mut self) {
        self.concluded = false;
    }

    /// Forgets the session and its keys; the exchanges wait for another one.
    pub fn lay_down(&mut self) {
        self.session = None;
    }

    /// Goes on in another session.
    pub fn take_up(&mut self, session: Session) {
        (self.session, self.concluded) = (Some(session), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Key;
    use crate::mux::STDOUT;
    use crate::session::tests::{pair, records};

    fn connections() -> (Connection, Connection) {
        let (host, guest) = pair(Key([1; 32]), Key([1; 32])).unwrap();
        (Connection::new(host), Connection::new(guest))
    }

    fn pass(bytes: &[u8], to: &mut Connection) -> Vec<Incoming> {
        records(bytes).iter().filter_map(|body| to.receive(body).unwrap()).collect()
    }

    #[test]
    fn test_exchanges_go_on_in_another_session() {
        let (mut host, mut guest) = connections();
        let mut bytes = Vec::new();
        let running = host.exchanges.request(b"{}".to_vec()).unwrap();
        let recess = host.exchanges.request(b"{}".to_vec()).unwrap();
        host.conclude(recess, &mut bytes).unwrap();
        let later = host.exchanges.request(b"later".to_vec()).unwrap();
        assert!(!host.has_outgoing());
        assert_eq!(pass(&bytes, &mut guest).len(), 2);

        bytes.clear();
        guest.exchanges.send(running, STDOUT, b"output").unwrap();
        guest.exchanges.respond(recess, b"{}".to_vec()).unwrap();
        guest.conclude(recess, &mut bytes).unwrap();
        guest.lay_down();
        guest.exchanges.respond(running, b"done".to_vec()).unwrap();
        assert!(!guest.has_outgoing());
        assert!(matches!(pass(&bytes, &mut host).last(), Some(Incoming::Response { id, .. }) if *id == recess));
        host.lay_down();

        let (other_host, other_guest) = pair(Key([2; 32]), Key([2; 32])).unwrap();
        host.take_up(other_host);
        guest.take_up(other_guest);
        let mut bytes = Vec::new();
        host.transmit(&mut bytes, usize::MAX).unwrap();
        let came = pass(&bytes, &mut guest);
        assert!(matches!(&came[..], [Incoming::Request { id, body }] if *id == later && body == b"later"), "{came:?}");
        bytes.clear();
        guest.transmit(&mut bytes, usize::MAX).unwrap();
        let came = pass(&bytes, &mut host);
        assert!(matches!(came.last(), Some(Incoming::Response { id, body }) if *id == running && body == b"done"));
    }

    #[test]
    fn test_receive_between_two_sessions_is_refused() {
        let (mut host, mut guest) = connections();
        let mut bytes = Vec::new();
        host.exchanges.request(b"{}".to_vec()).unwrap();
        host.transmit(&mut bytes, usize::MAX).unwrap();
        guest.lay_down();
        assert!(matches!(guest.receive(&records(&bytes)[0]), Err(ProtocolError::RuleBroken { .. })));
        assert!(host.conclude(99, &mut bytes).is_err());
    }

    #[test]
    fn test_go_on_sends_what_waited() {
        let (mut host, _) = connections();
        let mut bytes = Vec::new();
        let recess = host.exchanges.request(b"{}".to_vec()).unwrap();
        host.conclude(recess, &mut bytes).unwrap();
        host.exchanges.request(b"{}".to_vec()).unwrap();
        assert!(!host.has_outgoing());
        host.go_on();
        assert!(host.has_outgoing());
    }
}
