//! Sending: one frame at a time, fairly.

use std::collections::VecDeque;

use super::{Call, Mux, Outgoing, Phase, Refused, CHANNELS, MAX_ASSEMBLING, WINDOW};
use crate::frame::{encode_header, Kind, MAX_DATA, MAX_PAYLOAD};
use crate::session::Role;

/// A call with no more bytes than this to send counts as one with little.
const LITTLE: usize = 4096;
/// Events that may wait.
const MAX_EVENTS: usize = 64;

/// What waits to be sent; bodies and bytes are with their calls.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// A PING of the host or a PONG of the guest; of several unanswered PINGs only the newest counts.
    pub beat: Option<u32>,
    pub cancels: VecDeque<u32>,
    /// Call and channel.
    pub credits: VecDeque<(u32, u8)>,
    events: VecDeque<Vec<u8>>,
    /// Calls with little to send, and those with much.
    little: VecDeque<u32>,
    much: VecDeque<u32>,
    /// The last one was one with little: if there is one with much, it is its turn.
    much_next: bool,
    /// Long messages that wait until those begun leave them room.
    held: VecDeque<u32>,
    /// The size of all long messages that are begun.
    begun: usize,
}

impl Outbox {
    pub fn push_event(&mut self, body: Vec<u8>) -> Result<(), Refused> {
        if body.len() > MAX_PAYLOAD {
            return Err(Refused::TooLarge { limit: MAX_PAYLOAD });
        }
        if self.events.len() == MAX_EVENTS {
            return Err(Refused::Full);
        }
        self.events.push_back(body);
        Ok(())
    }

    fn next_call(&mut self) -> Option<u32> {
        let (first, second) = match self.much_next {
            true => (&mut self.much, &mut self.little),
            false => (&mut self.little, &mut self.much),
        };
        let id = first.pop_front().or_else(|| second.pop_front())?;
        self.much_next = !self.much_next;
        Some(id)
    }
}

/// One direction of a channel, at its sender.
#[derive(Debug)]
pub(super) struct Outward {
    credit: usize,
    queue: VecDeque<u8>,
    /// LAST is to be sent, or was.
    finished: bool,
    ended: bool,
}

impl Default for Outward {
    fn default() -> Self {
        Self { credit: WINDOW, queue: VecDeque::new(), finished: false, ended: false }
    }
}

impl Outward {
    pub fn is_open(&self) -> bool {
        !self.finished
    }

    pub fn room(&self) -> usize {
        self.credit - self.queue.len()
    }

    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.queue.extend(&bytes[..taken]);
        taken
    }

    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// Forgets what waits; nothing more is sent.
    pub fn close(&mut self) {
        (self.queue, self.finished, self.ended) = (VecDeque::new(), true, true);
    }

    /// Takes credit; false when the peer gives more than one window.
    pub fn earn(&mut self, bytes: usize) -> bool {
        self.credit += bytes;
        self.credit <= WINDOW
    }

    fn has_frame(&self) -> bool {
        !self.queue.is_empty() || (self.finished && !self.ended)
    }

    /// Appends the next frame to `out`.
    fn take(&mut self, id: u32, channel: u8, out: &mut Vec<u8>) {
        let length = self.queue.len().min(MAX_DATA);
        self.ended = self.finished && self.queue.len() == length;
        encode_header(Kind::Data, self.ended, id, out);
        out.push(channel);
        let (front, back) = self.queue.as_slices();
        let from_front = front.len().min(length);
        out.extend_from_slice(&front[..from_front]);
        out.extend_from_slice(&back[..length - from_front]);
        self.queue.drain(..length);
        self.credit -= length;
    }
}

impl Mux {
    /// Whether [`Mux::next_frame`] has one.
    #[must_use]
    pub fn has_outgoing(&self) -> bool {
        let out = &self.outbox;
        out.beat.is_some()
            || !(out.cancels.is_empty()
                && out.credits.is_empty()
                && out.events.is_empty()
                && out.little.is_empty()
                && out.much.is_empty())
    }

    /// Puts a call that has something to send into its queue.
    pub(super) fn enqueue(&mut self, id: u32) {
        let Some(call) = self.calls.get_mut(&id).filter(|call| !call.queued) else { return };
        let message = call.message.as_ref().map_or(0, |message| message.body.len() - message.sent);
        let waiting = message + call.outward.iter().map(|outward| outward.queue.len()).sum::<usize>();
        let any = call.message.is_some() || !call.notes.is_empty() || call.outward.iter().any(Outward::has_frame);
        if !any {
            return;
        }
        call.queued = true;
        let queue = if waiting <= LITTLE { &mut self.outbox.little } else { &mut self.outbox.much };
        queue.push_back(id);
    }

    /// A message is finished or given up: others that were held may begin.
    pub(super) fn message_left(&mut self, message: &Outgoing) {
        if !message.begun {
            return;
        }
        self.outbox.begun -= message.body.len();
        while let Some(&id) = self.outbox.held.front() {
            // None: it was cancelled while it was held.
            let held = self.calls.get_mut(&id).and_then(|call| call.message.as_mut());
            if let Some(held) = held {
                if self.outbox.begun + held.body.len() > MAX_ASSEMBLING {
                    return;
                }
                held.begun = true;
                self.outbox.begun += held.body.len();
                self.outbox.much.push_back(id);
            }
            self.outbox.held.pop_front();
        }
    }

    /// Puts the next frame into `out`, which it clears; false when there is none.
    pub fn next_frame(&mut self, out: &mut Vec<u8>) -> bool {
        out.clear();
        if let Some(token) = self.outbox.beat.take() {
            let kind = if self.role == Role::Host { Kind::Ping } else { Kind::Pong };
            encode_header(kind, false, token, out);
            return true;
        }
        if let Some(id) = self.outbox.cancels.pop_front() {
            encode_header(Kind::Cancel, false, id, out);
            return true;
        }
        while let Some((id, channel)) = self.outbox.credits.pop_front() {
            let Some(call) = self.calls.get_mut(&id).filter(|e| e.phase == Phase::Open) else { continue };
            let Some(inward) = call.inward.get_mut(usize::from(channel)) else { continue };
            let bytes = u32::try_from(inward.give_back()).unwrap_or(0);
            encode_header(Kind::Credit, false, id, out);
            out.push(channel);
            out.extend_from_slice(&bytes.to_be_bytes());
            return true;
        }
        if let Some(body) = self.outbox.events.pop_front() {
            encode_header(Kind::Event, false, 0, out);
            out.extend_from_slice(&body);
            return true;
        }
        while let Some(id) = self.outbox.next_call() {
            if self.frame_of(id, out) {
                return true;
            }
        }
        false
    }

    /// The next frame of one call. The host's order: request, controls, data. The guest's: started, data, response.
    fn frame_of(&mut self, id: u32, out: &mut Vec<u8>) -> bool {
        let Some(call) = self.calls.get_mut(&id) else { return false };
        call.queued = false;
        let is_host = self.role == Role::Host;
        let asks_first = is_host && call.message.is_some();
        let sent = !asks_first && (call.note_frame(is_host, id, out) || call.data_frame(id, out));
        if !sent {
            return self.message_frame(id, out);
        }
        self.enqueue(id);
        true
    }

    fn message_frame(&mut self, id: u32, out: &mut Vec<u8>) -> bool {
        let is_host = self.role == Role::Host;
        let Some(call) = self.calls.get_mut(&id) else { return false };
        let Some(message) = &mut call.message else { return false };
        let length = message.body.len();
        if length > MAX_PAYLOAD && !message.begun {
            if !self.outbox.held.is_empty() || self.outbox.begun + length > MAX_ASSEMBLING {
                call.queued = true;
                self.outbox.held.push_back(id);
                return false;
            }
            message.begun = true;
            self.outbox.begun += length;
        }
        let piece = &message.body[message.sent..length.min(message.sent + MAX_PAYLOAD)];
        message.sent += piece.len();
        let last = message.sent == length;
        encode_header(if is_host { Kind::Request } else { Kind::Response }, last, id, out);
        out.extend_from_slice(piece);
        if !last {
            self.enqueue(id);
            return true;
        }
        if let Some(message) = call.message.take() {
            call.phase = Phase::Open;
            self.message_left(&message);
        }
        if is_host {
            self.enqueue(id);
        } else {
            self.calls.remove(&id);
        }
        true
    }
}

impl Call {
    fn note_frame(&mut self, is_host: bool, id: u32, out: &mut Vec<u8>) -> bool {
        let Some(body) = self.notes.pop_front() else { return false };
        encode_header(if is_host { Kind::Control } else { Kind::Started }, false, id, out);
        out.extend_from_slice(&body);
        true
    }

    /// The channels take turns, too.
    fn data_frame(&mut self, id: u32, out: &mut Vec<u8>) -> bool {
        let channels = (1..=CHANNELS).map(|step| (self.last_channel + step) % CHANNELS);
        let Some(channel) = channels.into_iter().find(|channel| self.outward[*channel].has_frame()) else {
            return false;
        };
        self.last_channel = channel;
        self.outward[channel].take(id, channel as u8, out);
        true
    }
}
