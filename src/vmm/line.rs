//! Lines that a VMM writes, whatever it writes: no VMM fills this process's memory.

use libc::SIGKILL;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

use crate::host::process::Signals;
use crate::model::VmId;

/// Reads on until `line`, which may hold the beginning, ends; `false` at the end of the stream. Cancel safe. A line of more
/// than `limit` bytes is an error, now and at each further call: nothing more is read.
///
/// # Errors
/// [`std::io::ErrorKind::InvalidData`] for such a line, and what reading says.
pub async fn read_line(
    stream: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
    limit: usize,
) -> std::io::Result<bool> {
    // One byte over the limit tells a line that is too long from one that ends there.
    let room = (limit + 1).saturating_sub(line.len());
    let read = match room {
        0 => 0,
        _ => stream.take(room as u64).read_until(b'\n', line).await?,
    };
    match line.len() > limit {
        true => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, format!("a line of over {limit} bytes"))),
        false => Ok(read > 0),
    }
}

/// Ends a VMM that says more than it may.
pub fn end(vm_id: &VmId, way: &str, limit: usize, signals: Option<&Signals>) {
    log::error!("{vm_id}: the VMM wrote over {limit} bytes without an end ({way}): it is ended");
    if let Some(signals) = signals {
        signals.send(SIGKILL);
    }
}
