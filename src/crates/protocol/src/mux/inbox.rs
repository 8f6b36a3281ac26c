//! Receiving: the rules that a peer must keep, and what each frame means.

use super::{Call, Mux, Outward, Phase, CHANNELS, MAX_ASSEMBLING, MAX_CALLS, ROOM_STEP, WINDOW};
use crate::frame::{Frame, Kind};
use crate::message::MAX_MESSAGE;
use crate::session::Role;
use crate::ProtocolError;

/// What a frame led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// Guest: a whole request.
    Request { id: u32, body: Vec<u8> },
    /// Guest: a whole request that there was no memory for; it must still be answered.
    Refused { id: u32 },
    /// Host: the call is over. The body is empty when it had been cancelled.
    Response { id: u32, body: Vec<u8> },
    /// Guest: the host waits no more for this call; it must still be answered.
    Cancel { id: u32 },
    /// Guest.
    Control { id: u32, body: Vec<u8> },
    /// Host: the call runs.
    Started { id: u32, body: Vec<u8> },
    /// Bytes, or the end of the peer's direction of a channel, or both. Give them back by [`Mux::consumed`].
    Data { id: u32, channel: u8, bytes: Vec<u8>, last: bool },
    /// More may be sent on a channel.
    Credit { id: u32, channel: u8 },
    /// Host: the guest says something unasked.
    Event { body: Vec<u8> },
    /// Host: the guest lives.
    Pong,
}

/// One direction of a channel, at its receiver.
#[derive(Debug)]
pub(super) struct Inward {
    /// What the peer may still send.
    window: usize,
    /// What was consumed and not yet given back.
    consumed: usize,
    /// A CREDIT for it waits to be sent.
    due: bool,
    ended: bool,
}

impl Default for Inward {
    fn default() -> Self {
        Self { window: WINDOW, consumed: 0, due: false, ended: false }
    }
}

impl Inward {
    /// Takes what is to be given back.
    pub(super) fn give_back(&mut self) -> usize {
        let bytes = std::mem::take(&mut self.consumed);
        self.window += bytes;
        self.due = false;
        bytes
    }
}

fn broken(rule: &'static str) -> ProtocolError {
    ProtocolError::RuleBroken { rule }
}

impl Mux {
    /// Takes one opened record.
    ///
    /// # Errors
    /// Any [`ProtocolError`]: the peer broke a rule, and the connection cannot go on.
    pub fn receive(&mut self, plain: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let Frame { kind, last, id, payload } = Frame::decode(plain)?;
        let from_host = matches!(kind, Kind::Request | Kind::Cancel | Kind::Control | Kind::Ping);
        let from_guest = matches!(kind, Kind::Response | Kind::Event | Kind::Started | Kind::Pong);
        if (from_host && self.role == Role::Host) || (from_guest && self.role == Role::Guest) {
            return Err(broken("each kind of frame has its sender"));
        }
        match kind {
            Kind::Request => self.on_request(id, last, payload),
            Kind::Response => self.on_response(id, last, payload),
            Kind::Cancel => Ok(self.on_cancel(id)),
            Kind::Event if id == 0 => Ok(Some(Incoming::Event { body: payload.to_vec() })),
            Kind::Event => Err(broken("an event has id 0")),
            Kind::Data => self.on_data(id, last, payload),
            Kind::Credit => self.on_credit(id, payload),
            Kind::Control => Ok(self.open(id).map(|_| Incoming::Control { id, body: payload.to_vec() })),
            Kind::Started => self.on_started(id, payload),
            Kind::Ping => {
                self.outbox.beat = Some(id);
                Ok(None)
            }
            Kind::Pong if self.pinging == Some(id) => {
                self.pinging = None;
                Ok(Some(Incoming::Pong))
            }
            Kind::Pong => Err(broken("a PONG answers a PING")),
        }
    }

    fn open(&mut self, id: u32) -> Option<&mut Call> {
        self.calls.get_mut(&id).filter(|call| call.phase == Phase::Open)
    }

    /// The call that a frame belongs to. The host keeps a call until its response came, so a frame without one
    /// is wrong; to the guest it may just be late, and is dropped (`None`).
    fn call_of(&mut self, id: u32) -> Result<Option<&mut Call>, ProtocolError> {
        let role = self.role;
        match self.calls.get_mut(&id) {
            Some(call) if call.phase != Phase::Asking => Ok(Some(call)),
            None if role == Role::Guest => Ok(None),
            _ => Err(broken("a frame belongs to a call that was asked for")),
        }
    }

    /// Adds a piece to a message; returns the message when it is whole.
    fn assemble(
        call: &mut Call,
        assembling: &mut usize,
        last: bool,
        payload: &[u8],
    ) -> Result<Option<Vec<u8>>, ProtocolError> {
        if last && call.assembling.is_empty() {
            return Ok(Some(payload.to_vec()));
        }
        if payload.is_empty() && !last {
            return Err(broken("only the last piece of a message may be empty"));
        }
        // The cap holds over all unfinished messages together: a peer that begins many gains nothing.
        let whole = call.assembling.len() + payload.len();
        if whole > MAX_MESSAGE || *assembling + payload.len() > MAX_ASSEMBLING {
            return Err(ProtocolError::MessageTooLarge { limit: MAX_MESSAGE });
        }
        // A Vec that grows by itself ends the process when there is no memory.
        call.assembling.try_reserve(payload.len()).map_err(|_| ProtocolError::OutOfMemory { bytes: whole })?;
        call.assembling.extend_from_slice(payload);
        *assembling += payload.len();
        if !last {
            return Ok(None);
        }
        let body = std::mem::take(&mut call.assembling);
        *assembling -= body.len();
        Ok(Some(body))
    }

    fn on_request(&mut self, id: u32, last: bool, payload: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        if id == 0 {
            return Err(broken("calls are numbered from 1"));
        }
        let full = self.calls.len() >= MAX_CALLS && !self.calls.contains_key(&id);
        if full {
            return Err(ProtocolError::TooManyCalls { limit: MAX_CALLS });
        }
        let call = self.calls.entry(id).or_insert_with(Call::new);
        if call.phase != Phase::Asking {
            return Err(broken("an id is used again only when its call is over"));
        }
        let is_step = self.assembling / ROOM_STEP != (self.assembling + payload.len()) / ROOM_STEP;
        if !call.is_refused && is_step && !(self.has_room)(ROOM_STEP) {
            call.is_refused = true;
            self.assembling -= std::mem::take(&mut call.assembling).len();
        }
        if call.is_refused {
            call.phase = if last { Phase::Open } else { Phase::Asking };
            return Ok(last.then_some(Incoming::Refused { id }));
        }
        let Some(body) = Self::assemble(call, &mut self.assembling, last, payload)? else { return Ok(None) };
        call.phase = Phase::Open;
        Ok(Some(Incoming::Request { id, body }))
    }

    fn on_response(&mut self, id: u32, last: bool, payload: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let call = match self.calls.get_mut(&id) {
            Some(call) if call.phase != Phase::Asking => call,
            _ => return Err(broken("a frame belongs to a call that was asked for")),
        };
        let body = if call.phase == Phase::Cancelled {
            last.then(Vec::new)
        } else {
            match Self::assemble(call, &mut self.assembling, last, payload) {
                // Only this answer is lost: what comes of it is dropped, and its caller gets an empty one.
                Err(ProtocolError::OutOfMemory { .. }) => {
                    self.assembling -= std::mem::take(&mut call.assembling).len();
                    call.phase = Phase::Cancelled;
                    last.then(Vec::new)
                }
                assembled => assembled?,
            }
        };
        let Some(body) = body else { return Ok(None) };
        self.calls.remove(&id);
        Ok(Some(Incoming::Response { id, body }))
    }

    fn on_cancel(&mut self, id: u32) -> Option<Incoming> {
        let call = self.calls.get_mut(&id)?;
        match call.phase {
            Phase::Asking => {
                self.assembling -= call.assembling.len();
                self.calls.remove(&id);
                None
            }
            Phase::Open => {
                call.phase = Phase::Cancelled;
                call.outward.iter_mut().for_each(Outward::close);
                Some(Incoming::Cancel { id })
            }
            Phase::Cancelled => None,
        }
    }

    fn on_started(&mut self, id: u32, payload: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let Some(call) = self.call_of(id)? else { return Ok(None) };
        if std::mem::replace(&mut call.started, true) {
            return Err(broken("a call starts once"));
        }
        let wanted = call.phase == Phase::Open;
        Ok(wanted.then(|| Incoming::Started { id, body: payload.to_vec() }))
    }

    fn on_data(&mut self, id: u32, last: bool, payload: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let Some((&channel, bytes)) = payload.split_first().filter(|(channel, _)| usize::from(**channel) < CHANNELS)
        else {
            return Err(ProtocolError::Malformed { what: "DATA" });
        };
        let Some(call) = self.call_of(id)? else { return Ok(None) };
        let inward = &mut call.inward[usize::from(channel)];
        if inward.ended || (bytes.is_empty() && !last) {
            return Err(broken("a channel carries bytes until its one end"));
        }
        if bytes.len() > inward.window {
            return Err(ProtocolError::CreditExceeded { id, channel });
        }
        inward.window -= bytes.len();
        inward.ended = last;
        // Nobody reads what was cancelled: it gets no more credit and soon ends.
        let wanted = call.phase == Phase::Open;
        Ok(wanted.then(|| Incoming::Data { id, channel, bytes: bytes.to_vec(), last }))
    }

    fn on_credit(&mut self, id: u32, payload: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let &[channel, b0, b1, b2, b3] = payload else { return Err(ProtocolError::Malformed { what: "CREDIT" }) };
        if usize::from(channel) >= CHANNELS {
            return Err(ProtocolError::Malformed { what: "CREDIT" });
        }
        let bytes = u32::from_be_bytes([b0, b1, b2, b3]) as usize;
        let Some(call) = self.call_of(id)? else { return Ok(None) };
        let outward = &mut call.outward[usize::from(channel)];
        if !outward.earn(bytes) {
            return Err(ProtocolError::CreditExceeded { id, channel });
        }
        let wanted = call.phase == Phase::Open && outward.is_open();
        Ok(wanted.then_some(Incoming::Credit { id, channel }))
    }

    /// Says that `bytes` of a channel were taken by their user; the peer may send as many more.
    pub fn consumed(&mut self, id: u32, channel: u8, bytes: usize) {
        let Some(call) = self.open(id) else { return };
        let Some(inward) = call.inward.get_mut(usize::from(channel)) else { return };
        // Never more than was received: the sum of window and credit stays WINDOW.
        inward.consumed = (inward.consumed + bytes).min(WINDOW - inward.window);
        // A quarter at a time: a CREDIT for each read would cost more than the data.
        if inward.consumed >= WINDOW / 4 && !inward.ended && !std::mem::replace(&mut inward.due, true) {
            self.outbox.credits.push_back((id, channel));
        }
    }
}
