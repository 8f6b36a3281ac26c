//! A descriptor that becomes readable when another thread says so: eventfd(2).

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Wakes an event loop that polls its descriptor.
#[derive(Debug)]
pub struct Notifier(EventFd);

impl Notifier {
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?))
    }

    /// Makes the descriptor readable.
    pub fn notify(&self) {
        // A counter that is full (EAGAIN) is readable already.
        if let Err(error) = self.0.write(1) {
            if error != Errno::EAGAIN {
                log::error!("an event loop was not woken: {error}");
            }
        }
    }

    /// Makes the descriptor unreadable until the next [`Notifier::notify`].
    pub fn clear(&self) {
        if let Err(error) = self.0.read() {
            if error != Errno::EAGAIN {
                log::error!("an eventfd was not read: {error}");
            }
        }
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        std::os::fd::AsFd::as_fd(&self.0).as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
    use std::os::fd::AsFd;

    #[test]
    fn test_notifier_is_readable_from_notify_to_clear() {
        let notifier = Notifier::new().unwrap();
        let readable = || {
            let mut fds = [PollFd::new(notifier.0.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
        };
        assert!(!readable());
        notifier.notify();
        notifier.notify();
        assert!(readable());
        notifier.clear();
        notifier.clear();
        assert!(!readable());
    }
}
