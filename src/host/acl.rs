//! Access lists (acl(5)).

use std::os::fd::{AsRawFd, OwnedFd};

/// Whether a file has an access list beyond its mode. One that cannot be told counts as set.
#[must_use]
pub fn is_set(file: &OwnedFd) -> bool {
    // By the magic link: the descriptor may be one of O_PATH, which fgetxattr(2) refuses.
    let Ok(path) = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return true };
    // SAFETY: two strings that end in a NUL, and no buffer: the call answers with the value's size.
    let size = unsafe { libc::getxattr(path.as_ptr(), c"system.posix_acl_access".as_ptr(), std::ptr::null_mut(), 0) };
    size >= 0 || !matches!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_plain_file_has_no_list() {
        let file = std::fs::File::open("/etc/passwd").unwrap();
        assert!(!is_set(&file.into()));
    }
}
