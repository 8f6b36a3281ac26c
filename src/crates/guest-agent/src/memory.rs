//! What PID 1 may take for a request. The kernel cannot end PID 1 for want of memory: it panics.

use std::cell::Cell;
use std::fs;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use microvm_protocol::message::{Code, Failure};

/// What is left to the kernel and to requests that ask for little.
const RESERVE: u64 = 6 << 20;
/// What any request may take, so that a VM whose programs have taken all memory can still be talked to: within the
/// reserve, and the kernel ends a program of the user's for it.
const SMALL: u64 = 2 << 20;
/// How long a request waits for the memory of those that came before it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that requests under way were promised. What they have taken of it by now is counted twice, here and as memory that
/// is not available any more: too little is promised, never too much.
static PROMISED: Mutex<u64> = Mutex::new(0);
static RETURNED: Condvar = Condvar::new();

thread_local! {
    /// Bytes that this thread's request was promised.
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// Memory that a request may take. Dropping it lets the next ones have it.
#[must_use]
#[derive(Debug)]
pub struct Promise(u64);

impl Drop for Promise {
    fn drop(&mut self) {
        if self.0 > 0 {
            *PROMISED.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
            OWN.with(|own| own.set(own.get() - self.0));
            RETURNED.notify_all();
        }
    }
}

/// A value of /proc/meminfo, in bytes.
fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

/// All that this VM has.
pub fn total() -> u64 {
    meminfo("MemTotal").unwrap_or(64 << 20)
}

fn available() -> u64 {
    meminfo("MemAvailable").unwrap_or(0).saturating_sub(RESERVE)
}

/// How much a request may take now.
pub fn spare() -> u64 {
    available().max(SMALL)
}

/// Whether the bytes of a request that is on its way may grow by so many more.
pub fn has_room(bytes: usize) -> bool {
    let promised = *PROMISED.lock().unwrap_or_else(PoisonError::into_inner);
    bytes as u64 <= available().saturating_sub(promised)
}

/// Promises memory to this thread's request, or refuses what the guest has not. Waits for requests that hold what it needs,
/// unless it was promised some itself: two would wait for each other.
pub fn afford(bytes: u64, what: &str) -> Result<Promise, Failure> {
    if bytes <= SMALL {
        return Ok(Promise(0));
    }
    let end = Instant::now() + PATIENCE;
    let mut promised = PROMISED.lock().unwrap_or_else(PoisonError::into_inner);
    let spare = loop {
        let spare = available().saturating_sub(*promised).max(SMALL);
        if bytes <= spare {
            *promised += bytes;
            OWN.with(|own| own.set(own.get() + bytes));
            return Ok(Promise(bytes));
        }
        let left = end.saturating_duration_since(Instant::now());
        if *promised == 0 || OWN.with(Cell::get) > 0 || left.is_zero() {
            break spare;
        }
        promised = RETURNED.wait_timeout(promised, left).unwrap_or_else(PoisonError::into_inner).0;
    };
    drop(promised);
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let (need, have) = (mib(bytes), spare >> 20);
    let message = format!("{what} needs {need} MiB of the VM's memory, {have} MiB can be spared: ask for less at once");
    Err(Failure { code: Code::TooLarge, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_promises_are_counted_and_come_back() {
        let all = || PROMISED.lock().unwrap();
        // Other programs of this host take and give memory meanwhile, but not quarters of it.
        let quarter = available() / 4;
        let first = afford(quarter, "it").unwrap();
        let second = afford(2 * quarter, "it").unwrap();
        assert_eq!((*all(), OWN.get()), (3 * quarter, 3 * quarter));
        drop(first);
        assert_eq!(*all(), 2 * quarter);
        // The thread that holds some is refused at once, another waits for what it holds.
        let most = 3 * quarter;
        assert_eq!(afford(most, "it").unwrap_err().code, Code::TooLarge);
        let waiter = std::thread::spawn(move || afford(most, "it").map(drop));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiter.is_finished());
        drop(second);
        waiter.join().unwrap().unwrap();
        assert_eq!((*all(), OWN.get()), (0, 0));
    }

    #[test]
    fn test_afford_refuses_more_than_there_is() {
        assert!(afford(0, "nothing").is_ok());
        let error = afford(u64::MAX / 2, "it").unwrap_err();
        assert_eq!(error.code, Code::TooLarge);
        assert!(total() > spare());
    }
}
