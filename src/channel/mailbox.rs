//! What the guest streamed and nobody has taken yet.

use std::collections::VecDeque;

use tokio::sync::Notify;

use crate::mutex::Mutex;

/// Small pieces of one channel are joined up to this size.
const PIECE: usize = 64 * 1024;
/// Pieces kept apart; beyond that even those of other channels between them do not keep two of one channel apart. So a
/// guest that sends its window byte by byte costs a window, and not a hundred times as much.
const MAX_PIECES: usize = 256;

/// Bytes of one channel, in the order in which they came.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    pub channel: u8,
    /// Empty only where `last` is all that there is to say.
    pub bytes: Vec<u8>,
    /// Nothing more comes on the channel.
    pub last: bool,
}

#[derive(Default)]
struct Mail {
    pieces: VecDeque<Piece>,
    started: Option<Vec<u8>>,
    response: Option<Vec<u8>>,
    closed: bool,
}

/// The next thing in a mailbox.
pub enum Taken {
    Piece(Piece),
    /// Everything was taken, and the call is over.
    Response(Vec<u8>),
    /// The session ended before the call did.
    Closed,
}

#[derive(Default)]
pub struct Mailbox {
    mail: Mutex<Mail>,
    changed: Notify,
    credited: Notify,
}

impl Mailbox {
    pub fn push(&self, channel: u8, bytes: Vec<u8>, last: bool) {
        if bytes.is_empty() && !last {
            return;
        }
        let mut mail = self.mail.lock();
        let many = mail.pieces.len() >= MAX_PIECES;
        let joined = mail.pieces.iter_mut().rev().take(if many { MAX_PIECES } else { 1 });
        let joined = joined.into_iter().find(|piece| piece.channel == channel);
        match joined.filter(|piece| many || piece.bytes.len() + bytes.len() <= PIECE) {
            Some(piece) => {
                piece.bytes.extend_from_slice(&bytes);
                piece.last |= last;
            }
            None => mail.pieces.push_back(Piece { channel, bytes, last }),
        }
        drop(mail);
        self.changed.notify_waiters();
    }

    pub fn start(&self, body: Vec<u8>) {
        self.mail.lock().started = Some(body);
        self.changed.notify_waiters();
    }

    pub fn respond(&self, body: Vec<u8>) {
        self.mail.lock().response = Some(body);
        self.wake();
    }

    pub fn close(&self) {
        self.mail.lock().closed = true;
        self.wake();
    }

    pub fn credit(&self) {
        self.credited.notify_waiters();
    }

    fn wake(&self) {
        self.changed.notify_waiters();
        self.credited.notify_waiters();
    }

    /// Waits for credit, or for the end. `take` is asked first, and again after each change.
    pub async fn until_credited<T>(&self, mut take: impl FnMut() -> Option<T>) -> T {
        loop {
            let credited = self.credited.notified();
            tokio::pin!(credited);
            credited.as_mut().enable();
            if let Some(taken) = take() {
                return taken;
            }
            credited.await;
        }
    }

    async fn until<T>(&self, take: impl Fn(&mut Mail) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(taken) = take(&mut self.mail.lock()) {
                return taken;
            }
            changed.await;
        }
    }

    /// The payload of STARTED; `None` when the call ended without.
    pub async fn started(&self) -> Option<Vec<u8>> {
        self.until(|mail| match mail.started.take() {
            Some(body) => Some(Some(body)),
            None if mail.response.is_some() || mail.closed => Some(None),
            None => None,
        })
        .await
    }

    /// The next piece; the response, again and again, once there is none left.
    pub async fn take(&self) -> Taken {
        self.until(|mail| match (mail.pieces.pop_front(), &mail.response) {
            (Some(piece), _) => Some(Taken::Piece(piece)),
            (None, Some(response)) => Some(Taken::Response(response.clone())),
            (None, None) if mail.closed => Some(Taken::Closed),
            (None, None) => None,
        })
        .await
    }

    pub fn response(&self) -> Option<Vec<u8>> {
        self.mail.lock().response.clone()
    }

    pub fn is_closed(&self) -> bool {
        self.mail.lock().closed
    }

    pub fn is_over(&self) -> bool {
        let mail = self.mail.lock();
        mail.closed || mail.response.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_push_byte_by_byte_on_two_channels_stays_small() {
        let mailbox = Mailbox::default();
        for byte in 0..100_000u32 {
            mailbox.push(1 + (byte % 2) as u8, vec![byte as u8], false);
        }
        let mail = mailbox.mail.lock();
        assert!(mail.pieces.len() <= MAX_PIECES);
        assert_eq!(mail.pieces.iter().map(|piece| piece.bytes.len()).sum::<usize>(), 100_000);
    }

    #[tokio::test]
    async fn test_take_keeps_order_joins_small_pieces_and_ends_with_the_response() {
        let mailbox = Mailbox::default();
        for (channel, bytes) in [(1, "a"), (1, "b"), (2, "c"), (1, "d")] {
            mailbox.push(channel, bytes.into(), false);
        }
        mailbox.respond(b"end".to_vec());
        let mut heard = Vec::new();
        while let Taken::Piece(piece) = mailbox.take().await {
            heard.push((piece.channel, String::from_utf8(piece.bytes).unwrap()));
        }
        assert_eq!(heard, [(1, "ab".into()), (2, "c".into()), (1, "d".into())]);
        assert!(matches!(mailbox.take().await, Taken::Response(body) if body == b"end"));
    }

    #[tokio::test]
    async fn test_take_tells_the_end_of_a_channel_with_its_last_bytes_or_alone() {
        let mailbox = Mailbox::default();
        for (channel, bytes, last) in [(1, "a", false), (1, "", true), (2, "b", false), (0, "", true)] {
            mailbox.push(channel, bytes.into(), last);
        }
        mailbox.respond(Vec::new());
        let mut heard = Vec::new();
        while let Taken::Piece(piece) = mailbox.take().await {
            heard.push((piece.channel, String::from_utf8(piece.bytes).unwrap(), piece.last));
        }
        assert_eq!(heard, [(1, "a".into(), true), (2, "b".into(), false), (0, String::new(), true)]);
    }
}
