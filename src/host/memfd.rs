//! Anonymous files that nobody can change once they are made.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};

/// Makes a file of `length` bytes, has it filled, and seals it: whoever opens it, for writing even, cannot write.
///
/// # Errors
/// What `fill` or the kernel says.
pub fn sealed(name: &str, length: u64, fill: impl FnOnce(&File) -> io::Result<()>) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(length)?;
    fill(&file)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Another open description of the same file, with an offset of its own, at 0.
///
/// # Errors
/// None but a lack of descriptors.
pub fn reopen(fd: &OwnedFd) -> io::Result<OwnedFd> {
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(OwnedFd::from)
}

/// The bytes of a file that no page was made for yet.
///
/// # Errors
/// fstat(2)'s.
pub fn untouched_bytes(fd: &OwnedFd) -> io::Result<u64> {
    let stat = nix::sys::stat::fstat(fd)?;
    let (length, blocks) = (u64::try_from(stat.st_size).unwrap_or(0), u64::try_from(stat.st_blocks).unwrap_or(0));
    Ok(length.saturating_sub(blocks * 512))
}

/// The parts of a sparse file that may hold anything but zeros, in order.
///
/// # Errors
/// lseek(2)'s.
pub fn data_extents(file: &File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let seek = |from: u64, whence: libc::c_int| -> io::Result<u64> {
        let from = libc::off_t::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: lseek takes three integers.
        match Errno::result(unsafe { libc::lseek(file.as_raw_fd(), from, whence) }) {
            Ok(at) => Ok(u64::try_from(at).unwrap_or(length).min(length)),
            // No data behind `from`.
            Err(Errno::ENXIO) => Ok(length),
            Err(errno) => Err(errno.into()),
        }
    };
    let (mut extents, mut at) = (Vec::new(), 0);
    while at < length {
        let start = seek(at, libc::SEEK_DATA)?;
        if start >= length {
            break;
        }
        at = seek(start, libc::SEEK_HOLE)?;
        extents.push(start..at);
    }
    Ok(extents)
}

/// Gives the file's blocks in `range` back; it reads as zeros afterwards.
///
/// # Errors
/// fallocate(2)'s; file systems without holes say `EOPNOTSUPP`.
pub fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    use nix::fcntl::{fallocate, FallocateFlags};
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    Ok(fallocate(file, flags, number(range.start)?, number(range.end - range.start)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    #[test]
    fn test_sealed_opened_for_writing_cannot_be_written() {
        let fd = sealed("test", 4096, |file| file.write_all_at(b"x", 0)).unwrap();
        let again =
            OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        assert_eq!(again.write_all_at(b"y", 0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(again.set_len(0).is_err());
    }

    #[test]
    fn test_untouched_bytes_are_those_that_no_page_holds() {
        let fd = sealed("test", 1 << 20, |file| file.write_all_at(&[1; 8192], 0)).unwrap();
        assert_eq!(untouched_bytes(&fd).unwrap(), (1 << 20) - 8192);
    }

    #[test]
    fn test_data_extents_leave_the_holes_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 512 << 10).unwrap();
        assert_eq!(data_extents(&file, 1 << 20).unwrap(), vec![Range { start: 512 << 10, end: 516 << 10 }]);
        punch_hole(&file, (512 << 10)..(516 << 10)).unwrap();
        assert_eq!(data_extents(&file, 1 << 20).unwrap(), []);
    }
}
