//! Files that share their blocks until one of them is written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

// ioctl_ficlone(2).
nix::ioctl_write_int!(ficlone, 0x94, 9);

/// Makes `copy` hold what `original` holds.
///
/// # Errors
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL` where the file systems cannot; nothing has changed then.
pub fn share(original: &File, copy: &File) -> io::Result<()> {
    // libc's type for the argument is wider than a descriptor.
    let original = original.as_raw_fd() as libc::c_ulong;
    // SAFETY: both are open descriptors, and the kernel touches no memory of ours.
    unsafe { ficlone(copy.as_raw_fd(), original) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_share_has_the_content_or_leaves_the_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("original"), vec![7; 8192]).unwrap();
        let (original, copy) =
            (File::open(dir.path().join("original")).unwrap(), File::create(dir.path().join("copy")).unwrap());
        let expected = if share(&original, &copy).is_ok() { vec![7; 8192] } else { Vec::new() };
        assert_eq!(std::fs::read(dir.path().join("copy")).unwrap(), expected);
    }
}
