//! The frequency of the CPU's time stamp counter.
//!
//! An emulated guest reads the host's counter and has nothing exact to measure it against: it is told. Without that it
//! keeps time by counting ticks of 10 ms.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::fork::PerProcess;

/// The error of reading counter and clock is about 50 ns at each end; over this time it is a few millionths.
const SPAN: Duration = Duration::from_millis(20);

/// What stands for no frequency yet, and for none to be had.
const UNKNOWN: u64 = 0;
const UNEVEN: u64 = u64::MAX;

/// A moment on both clocks.
#[derive(Debug, Clone, Copy)]
struct Moment {
    ticks: u64,
    time: Instant,
}

impl Moment {
    /// The best of a few readings: the one that was interrupted least.
    fn now() -> Self {
        let read = |_| {
            let (before, time, after) = (ticks(), Instant::now(), ticks());
            (after.wrapping_sub(before), Self { ticks: before + after.wrapping_sub(before) / 2, time })
        };
        let readings = (0..8).map(read);
        readings.min_by_key(|(width, _)| *width).map_or(Self { ticks: 0, time: Instant::now() }, |(_, moment)| moment)
    }
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets processes use it unless they ask it not to.
    unsafe { core::arch::x86_64::_rdtsc() }
}

static BEGUN: PerProcess<Moment> = PerProcess::new();

/// Begins to measure, if nothing has yet.
pub fn begin() {
    BEGUN.get_or_init(Moment::now);
}

/// The frequency in kHz, measured once; `None` where the counter does not run evenly. Blocks for up to 20 ms, less when
/// [`begin`] was called before.
#[must_use]
pub fn frequency_khz() -> Option<u64> {
    /// Of the machine, so a forked child may have its parent's. No lock: two threads may both measure.
    static MEASURED: AtomicU64 = AtomicU64::new(UNKNOWN);
    let mut measured = MEASURED.load(Ordering::Acquire);
    if measured == UNKNOWN {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let even = ["constant_tsc", "nonstop_tsc"].iter().all(|flag| cpuinfo.split_whitespace().any(|f| f == *flag));
        measured = if even { measure() } else { UNEVEN };
        MEASURED.store(measured, Ordering::Release);
    }
    (measured != UNEVEN).then_some(measured)
}

fn measure() -> u64 {
    let begun = *BEGUN.get_or_init(Moment::now);
    std::thread::sleep(SPAN.saturating_sub(begun.time.elapsed()));
    let end = Moment::now();
    let (ticks, nanos) = (u128::from(end.ticks - begun.ticks), (end.time - begun.time).as_nanos().max(1));
    u64::try_from((ticks * 1_000_000 + nanos / 2) / nanos).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_measure_twice_agrees_to_a_thousandth() {
        let (one, two) = (measure(), measure());
        assert!(one > 100_000 && one.abs_diff(two) < one / 1000, "{one} and {two} kHz");
    }
}
