//! Clocks, fresh randomness.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// Unix time in nanoseconds.
#[must_use]
pub fn unix_time_ns() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}

/// Fills an array from the kernel's generator.
///
/// # Errors
/// [`Error::Host`] when getrandom(2) fails.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::host("getrandom", "the kernel's generator", error))?;
    Ok(bytes)
}

/// Lower-case hexadecimal digits of `bytes`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
