//! Calls: many conversations on one connection.
//!
//! A call is one request of the host and its one response. Between the two, both sides may stream bytes on its
//! channels, and the host may control or cancel it.
//!
//! ```text
//! host                                         guest
//!   REQUEST ............ REQUEST|LAST  ------->          begins it; many calls run side by side
//!           <-------  STARTED                            at most once: it runs, its channels are open
//!   DATA 0 .. DATA 0|LAST  ------------------->          as far as the guest's CREDIT goes
//!           <-------  DATA 1, DATA 2 .. |LAST            as far as the host's CREDIT goes
//!   CONTROL  --------------------------------->          a signal, a window's size
//!   CANCEL  ---------------------------------->          the caller waits no more
//!           <-------  RESPONSE ... RESPONSE|LAST         ends it, always, cancelled or not
//! ```
//! Flow control: each direction of a channel begins with [`WINDOW`] bytes of credit; what the receiver's user has taken
//! is given back by CREDIT. A slow reader so holds one window and no more, and delays nobody.
//!
//! A CANCEL that overtakes the rest of its own REQUEST undoes it: the guest forgets the call and sends no response.
//!
//! Scheduling (`outbox.rs`): one frame at a time. What is urgent and tiny goes first; then calls with little to send
//! and calls with much take turns, each of them round-robin. A `ping` waits for one frame, not for 16 MiB.

mod inbox;
mod outbox;

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::message::MAX_MESSAGE;
use crate::session::Role;
pub use inbox::Incoming;
use inbox::Inward;
use outbox::{Outbox, Outward};

/// Channels of a call, numbered as a program numbers its descriptors.
pub const CHANNELS: usize = 3;
/// Host to guest: a program's input, a file's bytes.
pub const STDIN: u8 = 0;
/// Guest to host: a program's output, a file's bytes.
pub const STDOUT: u8 = 1;
/// Guest to host.
pub const STDERR: u8 = 2;
/// The bytes that may be on their way on one direction of a channel.
pub const WINDOW: usize = 256 * 1024;
/// Calls that may be open at once.
pub const MAX_CALLS: usize = 128;
/// Messages of more than one frame are begun only while all that are begun have no more bytes than this together.
pub const MAX_ASSEMBLING: usize = 2 * MAX_MESSAGE;
/// A guest looks anew whether it has memory for requests each time that this many bytes of unfinished ones have come.
const ROOM_STEP: usize = 1 << 20;
/// CONTROLs of one call that may wait to be sent.
const MAX_CONTROLS: usize = 64;

/// Why something was not taken for sending; the connection is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("it is over the limit of {limit} bytes")]
    TooLarge { limit: usize },
    #[error("{MAX_CALLS} calls are open already")]
    TooManyCalls,
    #[error("the call is over")]
    Gone,
    #[error("too much waits to be sent already")]
    Full,
}

/// What became of a request that was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// The guest never saw it whole: it has no effect, and there will be no response.
    NeverSent,
    /// It is with the guest; a response still comes.
    Sent,
}

/// The phase of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The request is on its way.
    Asking,
    /// The request is whole, the response is not.
    Open,
    /// As Open, but the caller cancelled: its data is dropped.
    Cancelled,
}

#[derive(Debug)]
struct Call {
    phase: Phase,
    started: bool,
    /// The peer's message, as far as it came.
    assembling: Vec<u8>,
    /// There was no room for it: the rest of it is dropped.
    is_refused: bool,
    inward: [Inward; CHANNELS],
    outward: [Outward; CHANNELS],
    /// Our message: the host's request, the guest's response.
    message: Option<Outgoing>,
    /// CONTROLs of the host; the STARTED of the guest.
    notes: VecDeque<Vec<u8>>,
    /// The channel that the last DATA was of.
    last_channel: usize,
    /// In one of the outbox's queues.
    queued: bool,
}

#[derive(Debug)]
struct Outgoing {
    body: Vec<u8>,
    sent: usize,
    /// It has more than one frame, and room was made for it.
    begun: bool,
}

impl Outgoing {
    fn new(body: Vec<u8>) -> Option<Self> {
        Some(Self { body, sent: 0, begun: false })
    }
}

impl Call {
    fn new() -> Self {
        Self {
            phase: Phase::Asking,
            started: false,
            assembling: Vec::new(),
            is_refused: false,
            inward: Default::default(),
            outward: Default::default(),
            message: None,
            notes: VecDeque::new(),
            last_channel: 0,
            queued: false,
        }
    }

    /// Whether a side may stream: the host from the start (it is sent after the request), the guest from the whole
    /// request to its response.
    fn may_talk(&self, role: Role) -> bool {
        match role {
            Role::Host => self.phase != Phase::Cancelled,
            Role::Guest => self.phase == Phase::Open && self.message.is_none(),
        }
    }
}

/// All calls of one side of a connection. Plaintext frames in, [`Incoming`] out; and the other way round.
#[derive(Debug)]
pub struct Mux {
    role: Role,
    /// Ids are the host's own, so nobody floods one bucket; a guest has fewer instructions to run for the first time.
    calls: FxHashMap<u32, Call>,
    newest: u32,
    /// Bytes of the peer's unfinished messages.
    assembling: usize,
    /// Whether so many bytes more may be taken for a request.
    has_room: fn(usize) -> bool,
    outbox: Outbox,
    /// The host's PING that was not answered yet.
    pinging: Option<u32>,
}

impl Mux {
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self {
            role,
            calls: FxHashMap::default(),
            newest: 0,
            assembling: 0,
            has_room: |_| true,
            outbox: Outbox::default(),
            pinging: None,
        }
    }

    /// Guest: refuses requests for which there is no memory ([`Incoming::Refused`]); until then all are taken.
    pub fn ask_for_room(&mut self, has_room: fn(usize) -> bool) {
        self.has_room = has_room;
    }

    /// Calls that are open, cancelled ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Host: begins a call.
    ///
    /// # Errors
    /// [`Refused::TooLarge`], [`Refused::TooManyCalls`].
    pub fn request(&mut self, body: Vec<u8>) -> Result<u32, Refused> {
        debug_assert_eq!(self.role, Role::Host);
        if body.len() > MAX_MESSAGE {
            return Err(Refused::TooLarge { limit: MAX_MESSAGE });
        }
        if self.calls.len() == MAX_CALLS {
            return Err(Refused::TooManyCalls);
        }
        // Ids come round after 2^32 requests; one that is still open is passed over, and 0 belongs to events.
        while {
            self.newest = self.newest.wrapping_add(1);
            self.newest == 0 || self.calls.contains_key(&self.newest)
        } {}
        let id = self.newest;
        self.calls.insert(id, Call { message: Outgoing::new(body), ..Call::new() });
        self.enqueue(id);
        Ok(id)
    }

    /// Host: cancels a call.
    ///
    /// # Errors
    /// [`Refused::Gone`] when it is over: its response came.
    pub fn cancel(&mut self, id: u32) -> Result<Cancelled, Refused> {
        let call = self.calls.get_mut(&id).ok_or(Refused::Gone)?;
        match call.phase {
            Phase::Asking => {
                let message = call.message.take();
                self.calls.remove(&id);
                if let Some(message) = message {
                    self.message_left(&message);
                    // The guest holds a piece of it.
                    self.outbox.cancels.extend((message.sent > 0).then_some(id));
                }
                Ok(Cancelled::NeverSent)
            }
            Phase::Open => {
                call.phase = Phase::Cancelled;
                self.assembling -= std::mem::take(&mut call.assembling).len();
                call.outward.iter_mut().for_each(Outward::close);
                call.notes.clear();
                self.outbox.cancels.push_back(id);
                Ok(Cancelled::Sent)
            }
            Phase::Cancelled => Ok(Cancelled::Sent),
        }
    }

    /// Host: whether the request left whole; `None` when the call is over.
    #[must_use]
    pub fn is_sent(&self, id: u32) -> Option<bool> {
        self.calls.get(&id).map(|call| call.phase != Phase::Asking)
    }

    /// Whether this side's message of a call is on its way.
    #[must_use]
    pub fn is_saying(&self, id: u32) -> bool {
        self.calls.get(&id).is_some_and(|call| call.message.is_some())
    }

    /// Host: a CONTROL for the program that runs.
    ///
    /// # Errors
    /// [`Refused::Gone`], [`Refused::Full`], [`Refused::TooLarge`].
    pub fn control(&mut self, id: u32, body: Vec<u8>) -> Result<(), Refused> {
        debug_assert_eq!(self.role, Role::Host);
        self.note(id, body)
    }

    /// Guest: the call runs. To be said at most once.
    ///
    /// # Errors
    /// [`Refused::Gone`], [`Refused::Full`] when it was said already, [`Refused::TooLarge`].
    pub fn started(&mut self, id: u32, body: Vec<u8>) -> Result<(), Refused> {
        debug_assert_eq!(self.role, Role::Guest);
        let call = self.calls.get_mut(&id).ok_or(Refused::Gone)?;
        if std::mem::replace(&mut call.started, true) {
            return Err(Refused::Full);
        }
        self.note(id, body)
    }

    fn note(&mut self, id: u32, body: Vec<u8>) -> Result<(), Refused> {
        if body.len() > crate::frame::MAX_PAYLOAD {
            return Err(Refused::TooLarge { limit: crate::frame::MAX_PAYLOAD });
        }
        let call = self.calls.get_mut(&id).filter(|call| call.may_talk(self.role));
        let call = call.ok_or(Refused::Gone)?;
        if call.notes.len() == MAX_CONTROLS {
            return Err(Refused::Full);
        }
        call.notes.push_back(body);
        self.enqueue(id);
        Ok(())
    }

    /// Guest: ends a call, after whatever its channels still hold.
    ///
    /// # Errors
    /// [`Refused::TooLarge`], [`Refused::Gone`] when it was answered already.
    pub fn respond(&mut self, id: u32, body: Vec<u8>) -> Result<(), Refused> {
        debug_assert_eq!(self.role, Role::Guest);
        if body.len() > MAX_MESSAGE {
            return Err(Refused::TooLarge { limit: MAX_MESSAGE });
        }
        let call = self.calls.get_mut(&id).ok_or(Refused::Gone)?;
        if call.phase == Phase::Asking || call.message.is_some() {
            return Err(Refused::Gone);
        }
        call.message = Outgoing::new(body);
        self.enqueue(id);
        Ok(())
    }

    /// Guest: says something unasked.
    ///
    /// # Errors
    /// [`Refused::TooLarge`], [`Refused::Full`].
    pub fn event(&mut self, body: Vec<u8>) -> Result<(), Refused> {
        debug_assert_eq!(self.role, Role::Guest);
        self.outbox.push_event(body)
    }

    /// Host: asks for a sign of life. A PING that is not answered yet is not followed by another one.
    pub fn ping(&mut self, token: u32) -> bool {
        debug_assert_eq!(self.role, Role::Host);
        if self.pinging.is_some() {
            return false;
        }
        self.pinging = Some(token);
        self.outbox.beat = Some(token);
        true
    }

    /// How many bytes [`Mux::send`] would take now.
    #[must_use]
    pub fn room(&self, id: u32, channel: u8) -> usize {
        self.outward(id, channel).map_or(0, Outward::room)
    }

    /// Queues bytes on a channel, as many as the peer's credit allows; returns how many.
    ///
    /// # Errors
    /// [`Refused::Gone`] when the call is over or cancelled, or the channel was finished.
    pub fn send(&mut self, id: u32, channel: u8, bytes: &[u8]) -> Result<usize, Refused> {
        let taken = self.outward_mut(id, channel)?.push(bytes);
        if taken > 0 {
            self.enqueue(id);
        }
        Ok(taken)
    }

    /// Ends this side's direction of a channel, after what is queued.
    ///
    /// # Errors
    /// [`Refused::Gone`], as for [`Mux::send`].
    pub fn finish(&mut self, id: u32, channel: u8) -> Result<(), Refused> {
        self.outward_mut(id, channel)?.finish();
        self.enqueue(id);
        Ok(())
    }

    fn outward(&self, id: u32, channel: u8) -> Option<&Outward> {
        let call = self.calls.get(&id).filter(|call| call.may_talk(self.role))?;
        call.outward.get(usize::from(channel)).filter(|outward| outward.is_open())
    }

    fn outward_mut(&mut self, id: u32, channel: u8) -> Result<&mut Outward, Refused> {
        let call = self.calls.get_mut(&id).filter(|call| call.may_talk(self.role));
        let outward = call.and_then(|call| call.outward.get_mut(usize::from(channel)));
        outward.filter(|outward| outward.is_open()).ok_or(Refused::Gone)
    }
}

#[cfg(test)]
mod tests;
