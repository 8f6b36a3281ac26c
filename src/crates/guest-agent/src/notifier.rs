//! An eventfd(2) that wakes one thread, which may wait for other descriptors as well.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use microvm_protocol::message::{Code, Failure};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub struct Notifier(EventFd);

impl Notifier {
    pub fn new() -> Result<Arc<Self>, Failure> {
        let made = EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
        let failed = |e| Failure { code: Code::Busy, message: format!("eventfd: {e}") };
        made.map(|fd| Arc::new(Self(fd))).map_err(failed)
    }

    pub fn notify(&self) {
        // The counter would have to stand near 2^64 for this to fail.
        if let Err(error) = self.0.write(1) {
            eprintln!("microvm-agent: eventfd: {error}");
        }
    }

    /// Waits for a notification, unless one came since the last wait.
    pub fn wait(&self) {
        if let Err(error) = self.0.read() {
            eprintln!("microvm-agent: eventfd: {error}");
        }
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
