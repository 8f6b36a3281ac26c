//! The session and its exchanges: one side of an established connection.

use crate::mux::{Incoming, Mux};
use crate::session::Session;
use crate::ProtocolError;

/// Records in, [`Incoming`] out; calls on [`Connection::exchanges`] in, records out.
#[derive(Debug)]
pub struct Connection {
    session: Session,
    pub exchanges: Mux,
    frame: Vec<u8>,
}

impl Connection {
    #[must_use]
    pub fn new(session: Session) -> Self {
        let exchanges = Mux::new(session.role());
        Self { session, exchanges, frame: Vec::new() }
    }

    /// Takes the body of one record.
    ///
    /// # Errors
    /// Any [`ProtocolError`]; the connection cannot go on.
    pub fn receive(&mut self, body: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        self.exchanges.receive(self.session.open(body)?)
    }

    /// Appends sealed records to `out` until it holds `enough` bytes or nothing waits.
    ///
    /// # Errors
    /// [`ProtocolError::Cipher`]; the connection cannot go on.
    pub fn transmit(&mut self, out: &mut Vec<u8>, enough: usize) -> Result<(), ProtocolError> {
        while out.len() < enough && self.exchanges.next_frame(&mut self.frame) {
            self.session.seal(&self.frame, out)?;
        }
        Ok(())
    }
}
