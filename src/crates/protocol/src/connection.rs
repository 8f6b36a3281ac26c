//! The session and its calls: one side of an established connection.
//!
//! Calls outlive their session: one side asks for a re-handshake by a request that is the last record it seals, and the
//! response is the other side's last. Then both suspend the session, drop its keys, shake hands anew and resume the calls
//! in the new session. A guest is frozen in between.

use crate::mux::{Incoming, Mux};
use crate::session::Session;
use crate::ProtocolError;

/// Records in, [`Incoming`] out; what is queued on [`Connection::calls`] in, records out.
#[derive(Debug)]
pub struct Connection {
    /// `None` between two sessions.
    session: Option<Session>,
    pub calls: Mux,
    frame: Vec<u8>,
    /// The last record of this session is sealed; what is queued waits for the next session.
    last_sealed: bool,
}

impl Connection {
    #[must_use]
    pub fn new(session: Session) -> Self {
        let calls = Mux::new(session.role());
        Self { session: Some(session), calls, frame: Vec::new(), last_sealed: false }
    }

    /// Takes the body of one record.
    ///
    /// # Errors
    /// Any [`ProtocolError`]; the connection cannot go on.
    pub fn receive(&mut self, body: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let between = ProtocolError::RuleBroken { rule: "no record between two sessions" };
        let session = self.session.as_mut().ok_or(between)?;
        self.calls.receive(session.open(body)?)
    }

    /// Whether [`Connection::transmit`] has anything to append.
    #[must_use]
    pub fn has_outgoing(&self) -> bool {
        self.session.is_some() && !self.last_sealed && self.calls.has_outgoing()
    }

    /// Appends sealed records to `out` until it holds `enough` bytes or nothing waits.
    ///
    /// # Errors
    /// [`ProtocolError::Cipher`]; the connection cannot go on.
    pub fn transmit(&mut self, out: &mut Vec<u8>, enough: usize) -> Result<(), ProtocolError> {
        let Some(session) = self.session.as_mut().filter(|_| !self.last_sealed) else { return Ok(()) };
        while out.len() < enough && self.calls.next_frame(&mut self.frame) {
            session.seal(&self.frame, out)?;
        }
        Ok(())
    }

    /// Appends sealed records to `out` up to the one that ends this side's message of call `id`: the last one of
    /// this session.
    ///
    /// # Errors
    /// As [`Connection::transmit`]'s; [`ProtocolError::RuleBroken`] when there is no such message to send.
    pub fn seal_last(&mut self, id: u32, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let nothing = ProtocolError::RuleBroken { rule: "a session ends with a message" };
        let session = self.session.as_mut().filter(|_| !self.last_sealed).ok_or(nothing.clone())?;
        if !self.calls.is_saying(id) {
            return Err(nothing);
        }
        while self.calls.is_saying(id) {
            if !self.calls.next_frame(&mut self.frame) {
                return Err(nothing);
            }
            session.seal(&self.frame, out)?;
        }
        self.last_sealed = true;
        Ok(())
    }

    /// The peer refused to suspend the session: it goes on.
    pub fn cancel_suspend(&mut self) {
        self.last_sealed = false;
    }

    /// Drops the session and its keys; the calls wait for the next session.
    pub fn suspend(&mut self) {
        self.session = None;
    }

    /// Resumes the calls in a new session.
    pub fn resume(&mut self, session: Session) {
        (self.session, self.last_sealed) = (Some(session), false);
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
    fn test_resume_continues_the_calls_in_another_session() {
        let (mut host, mut guest) = connections();
        let mut bytes = Vec::new();
        let running = host.calls.request(b"{}".to_vec()).unwrap();
        let freeze = host.calls.request(b"{}".to_vec()).unwrap();
        host.seal_last(freeze, &mut bytes).unwrap();
        let later = host.calls.request(b"later".to_vec()).unwrap();
        assert!(!host.has_outgoing());
        assert_eq!(pass(&bytes, &mut guest).len(), 2);

        bytes.clear();
        guest.calls.send(running, STDOUT, b"output").unwrap();
        guest.calls.respond(freeze, b"{}".to_vec()).unwrap();
        guest.seal_last(freeze, &mut bytes).unwrap();
        guest.suspend();
        guest.calls.respond(running, b"done".to_vec()).unwrap();
        assert!(!guest.has_outgoing());
        assert!(matches!(pass(&bytes, &mut host).last(), Some(Incoming::Response { id, .. }) if *id == freeze));
        host.suspend();

        let (other_host, other_guest) = pair(Key([2; 32]), Key([2; 32])).unwrap();
        host.resume(other_host);
        guest.resume(other_guest);
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
        host.calls.request(b"{}".to_vec()).unwrap();
        host.transmit(&mut bytes, usize::MAX).unwrap();
        guest.suspend();
        assert!(matches!(guest.receive(&records(&bytes)[0]), Err(ProtocolError::RuleBroken { .. })));
        assert!(host.seal_last(99, &mut bytes).is_err());
    }

    #[test]
    fn test_cancel_suspend_sends_what_waited() {
        let (mut host, _) = connections();
        let mut bytes = Vec::new();
        let freeze = host.calls.request(b"{}".to_vec()).unwrap();
        host.seal_last(freeze, &mut bytes).unwrap();
        host.calls.request(b"{}".to_vec()).unwrap();
        assert!(!host.has_outgoing());
        host.cancel_suspend();
        assert!(host.has_outgoing());
    }
}
