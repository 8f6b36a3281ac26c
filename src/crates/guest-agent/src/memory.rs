//! What PID 1 may take for a request. The kernel cannot end PID 1 for want of memory: it panics.

use std::fs;

use microvm_protocol::message::{Code, Failure};

/// What is left to the kernel and to requests that ask for little.
const RESERVE: u64 = 6 << 20;
/// What any request may take, so that a VM whose programs have taken all memory can still be talked to: within the
/// reserve, and the kernel ends a program of the user's for it.
const SMALL: u64 = 2 << 20;

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

/// How much a request may take now.
pub fn spare() -> u64 {
    meminfo("MemAvailable").unwrap_or(0).saturating_sub(RESERVE).max(SMALL)
}

/// Refuses what the guest has not the memory for.
pub fn afford(bytes: u64, what: &str) -> Result<(), Failure> {
    if bytes <= SMALL {
        return Ok(());
    }
    let spare = spare();
    if bytes <= spare {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let (need, have) = (mib(bytes), spare >> 20);
    let message = format!("{what} needs {need} MiB of the VM's memory, {have} MiB can be spared: ask for less at once");
    Err(Failure { code: Code::TooLarge, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_afford_refuses_more_than_there_is() {
        assert!(afford(0, "nothing").is_ok());
        let error = afford(u64::MAX / 2, "it").unwrap_err();
        assert_eq!(error.code, Code::TooLarge);
        assert!(total() > spare());
    }
}
