//! Frames on their way to the VM, and the rate at which both ways go.

use std::time::{Duration, Instant};

use smoltcp::wire::{EthernetProtocol, ETHERNET_HEADER_LEN};

use crate::frame::{Wire, MTU};

/// Bytes that may wait for the VM: 20 ms at 100 Mbit/s. More stays where it is, in the sockets of the host.
const MOST: usize = 256 << 10;
/// Bytes that must be sent before what is left is moved to the front.
const WORN: usize = 64 << 10;
/// Each frame has its length before it (QEMU's stream of frames).
pub const LENGTH_BYTES: usize = 4;
/// An Ethernet frame of the longest packet.
const WHOLE_FRAME: usize = ETHERNET_HEADER_LEN + MTU;
/// Refusals that the VM is told by the second, as in `net/rules.rs` of the core.
const REFUSALS_PER_S: u32 = 20;

/// What the VM is sent: frames, one after the other, each with its length before it.
#[derive(Debug)]
pub struct Out {
    pub wire: Wire,
    bytes: Vec<u8>,
    sent: usize,
    refusals: (Instant, u32),
    /// A flow had more to send than there was room.
    pub was_full: bool,
}

impl Out {
    #[must_use]
    pub fn new(wire: Wire, now: Instant) -> Self {
        Self { wire, bytes: Vec::new(), sent: 0, refusals: (now, 0), was_full: false }
    }

    #[must_use]
    pub fn waiting(&self) -> &[u8] {
        self.bytes.get(self.sent..).unwrap_or_default()
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.bytes.len() - self.sent >= MOST
    }

    /// So much of what waited is on its way.
    pub fn sent(&mut self, length: usize) {
        self.sent += length;
        if self.sent == self.bytes.len() || self.sent >= WORN {
            self.bytes.drain(..self.sent.min(self.bytes.len()));
            self.sent = 0;
        }
    }

    /// A whole frame; one for which there is no room is lost, as on any network.
    pub fn push(&mut self, frame: Option<Vec<u8>>) {
        let Some(frame) = frame.filter(|_| !self.is_full()) else { return };
        self.bytes.extend_from_slice(&u32::try_from(frame.len()).unwrap_or_default().to_be_bytes());
        self.bytes.extend_from_slice(&frame);
    }

    /// A frame with an IP packet that `fill` writes.
    pub fn packet<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let whole = ETHERNET_HEADER_LEN + length;
        self.bytes.extend_from_slice(&u32::try_from(whole).unwrap_or_default().to_be_bytes());
        let begin = self.bytes.len();
        self.bytes.resize(begin + whole, 0);
        let frame = self.bytes.split_at_mut(begin).1;
        fill(self.wire.header(frame, EthernetProtocol::Ipv4))
    }

    /// Tells the VM of a refusal, but not as often as it likes.
    pub fn refuse(&mut self, frame: Option<Vec<u8>>, now: Instant) {
        if now.saturating_duration_since(self.refusals.0) >= Duration::from_secs(1) {
            self.refusals = (now, 0);
        }
        self.refusals.1 += 1;
        if self.refusals.1 <= REFUSALS_PER_S {
            self.push(frame);
        }
    }
}

/// A bucket of bytes that fills itself, and that one piece may overdraw.
#[derive(Debug)]
pub struct Meter {
    bytes_per_s: u64,
    most: i64,
    bytes: i64,
    since: Instant,
}

impl Meter {
    /// 10 ms of burst, and at least some frames.
    #[must_use]
    pub fn new(mbit_per_s: u64, now: Instant) -> Self {
        let bytes_per_s = mbit_per_s.saturating_mul(125_000).max(1);
        let most = i64::try_from(bytes_per_s / 100).unwrap_or(i64::MAX).max(16 << 10);
        Self { bytes_per_s, most, bytes: most, since: now }
    }

    /// Bytes that may go now; none before there is room for a whole frame, or each byte would go by itself.
    pub fn room(&mut self, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.since).as_nanos();
        let fresh = passed.saturating_mul(u128::from(self.bytes_per_s)) / 1_000_000_000;
        if fresh > 0 {
            self.bytes = self.bytes.saturating_add(i64::try_from(fresh).unwrap_or(i64::MAX)).min(self.most);
            // What is less than a byte stays in the time that passed.
            let used = fresh.saturating_mul(1_000_000_000) / u128::from(self.bytes_per_s);
            self.since += Duration::from_nanos(u64::try_from(used).unwrap_or(u64::MAX));
        }
        usize::try_from(self.bytes).ok().filter(|bytes| *bytes >= WHOLE_FRAME).unwrap_or(0)
    }

    pub fn take(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// When there will be room for a frame.
    #[must_use]
    pub fn refilled(&self) -> Instant {
        let missing = u64::try_from((WHOLE_FRAME as i64).saturating_sub(self.bytes)).unwrap_or(0);
        self.since + Duration::from_nanos(missing.saturating_mul(1_000_000_000) / self.bytes_per_s + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_meter_gives_its_burst_and_then_its_rate() {
        let begun = Instant::now();
        let mut meter = Meter::new(80, begun);
        assert_eq!(meter.room(begun), 100_000);
        meter.take(101_514);
        assert_eq!(meter.room(begun), 0);
        // 1,500 bytes: not a frame's length yet.
        assert_eq!(meter.room(begun + Duration::from_nanos(301_401)), 0);
        assert_eq!(meter.refilled(), begun + Duration::from_nanos(302_801));
        assert_eq!(meter.room(begun + Duration::from_millis(1)), 8_486);
        assert_eq!(meter.room(begun + Duration::from_secs(9)), 100_000);
    }

    #[test]
    fn test_refusals_are_rationed_by_the_second() {
        let wire = Wire {
            guest_mac: smoltcp::wire::EthernetAddress([2, 0, 0, 0, 0, 2]),
            guest: [10, 0, 0, 2].into(),
            gateway_mac: smoltcp::wire::EthernetAddress([2, 0, 0, 0, 0, 1]),
            gateway: [10, 0, 0, 1].into(),
        };
        let begun = Instant::now();
        let mut out = Out::new(wire, begun);
        (0..100).for_each(|_| out.refuse(Some(vec![7; 60]), begun));
        assert_eq!(out.waiting().len(), 20 * 64);
        out.refuse(Some(vec![7; 60]), begun + Duration::from_secs(1));
        assert_eq!(out.waiting().len(), 21 * 64);
        out.sent(21 * 64);
        assert!(out.waiting().is_empty());
        (0..5000).for_each(|_| out.push(Some(vec![7; 60])));
        assert!(out.is_full() && out.waiting().len() <= MOST + 64);
    }
}
