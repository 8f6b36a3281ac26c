//! The failed writes to its disk that the guest's kernel has logged: not every VMM counts them for the host.
//!
//! Documentation/ABI/testing/dev-kmsg: each read(2) gives one record, `priority,sequence,time,flags;text`. The kernel limits
//! how many of these it logs (10 in 5 s), so the count says that writes fail, and not exactly how many.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

/// A longer record is never given; with less room the kernel answers EINVAL.
const MAX_RECORD: usize = 8192;
/// How many records are read for one question: a program may write to the log without end.
const RECORDS: usize = 512;
/// The first priority that is not the kernel's own: what a program writes to the log has no lower one.
const FIRST_OF_PROGRAMS: u32 = 8;

static LOG: Mutex<Option<Log>> = Mutex::new(None);

struct Log {
    file: File,
    disk_write_errors: u64,
}

/// From here on the log is counted; what the kernel said while it booted is not read.
pub fn watch() {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    let log = file.and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| Log { file, disk_write_errors: 0 }));
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = log.ok();
}

/// How many were logged so far; 0 where there is no log.
pub fn disk_write_errors() -> u64 {
    let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    log.as_mut().map_or(0, |log| {
        log.disk_write_errors += count(&mut log.file);
        log.disk_write_errors
    })
}

fn count(log: &mut impl Read) -> u64 {
    let mut record = vec![0; MAX_RECORD];
    let mut errors = 0;
    for _ in 0..RECORDS {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(length) => errors += u64::from(is_disk_write_error(&record[..length])),
            // Records that were not read were overwritten: the next one is there.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
    }
    errors
}

/// `blk_print_req_error` of the kernel's block/blk-mq.c, or of blk-core.c.
fn is_disk_write_error(record: &[u8]) -> bool {
    let record = String::from_utf8_lossy(record);
    let Some((head, text)) = record.split_once(';') else { return false };
    let priority = head.split(',').next().and_then(|priority| priority.parse::<u32>().ok());
    let text = text.lines().next().unwrap_or_default();
    let is_of_disk = text.contains("I/O error, dev vd") && !text.contains("(READ)");
    is_of_disk && priority.is_some_and(|priority| priority < FIRST_OF_PROGRAMS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::io;

    struct Records(VecDeque<io::Result<&'static str>>);

    impl Read for Records {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let next = self.0.pop_front().unwrap_or_else(|| Err(ErrorKind::WouldBlock.into()));
            next.and_then(|text| text.as_bytes().read(buffer))
        }
    }

    const FAILED: &str =
        "3,412,9124387,-;I/O error, dev vda, sector 2048 op 0x1:(WRITE) flags 0x4800 phys_seg 4 prio class 2\n";

    #[test]
    fn test_writes_of_the_disk_that_failed_are_counted_and_nothing_else() {
        let other = [
            "3,413,9124387,-;I/O error, dev vda, sector 2048 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2\n",
            "3,414,9124387,-;I/O error, dev sr0, sector 2048 op 0x1:(WRITE) flags 0x0 phys_seg 1 prio class 2\n",
            "3,415,9124387,-;Buffer I/O error on dev vda, logical block 0, lost async page write\n",
            "12,416,9124387,-;I/O error, dev vda, sector 0 op 0x1:(WRITE) from a program\n",
            "6,417,9124387,-;x\n SUBSYSTEM=I/O error, dev vda\n",
            "I/O error, dev vda",
        ];
        let of_511 = "3,411,9124387,-;blk_update_request: I/O error, dev vda, sector 8 op 0x1:(WRITE) flags 0x0\n";
        let mut records: VecDeque<_> = other.into_iter().map(Ok).collect();
        records.extend([Ok(FAILED), Err(ErrorKind::BrokenPipe.into()), Ok(of_511)]);
        assert_eq!(count(&mut Records(records)), 2);
    }

    #[test]
    fn test_a_log_without_end_is_left_after_a_while_and_gone_on_with() {
        let mut endless = Records((0..RECORDS + 3).map(|_| Ok(FAILED)).collect());
        assert_eq!(count(&mut endless), RECORDS as u64);
        assert_eq!((count(&mut endless), count(&mut endless)), (3, 0));
    }
}
