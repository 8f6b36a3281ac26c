//! Descriptors that travel along with the bytes of a socket (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{ready, Context, Poll};

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use crate::mutex::Mutex;

/// Sends bytes, at least one, and a descriptor with the first; for [`UnixStream::try_io`] and its kin.
///
/// # Errors
/// sendmsg(2)'s, among them `WouldBlock`.
pub fn send_with(stream: &UnixStream, bytes: &[u8], fd: &OwnedFd) -> io::Result<usize> {
    let rights = [fd.as_raw_fd()];
    let slices = [IoSlice::new(bytes)];
    let message = [ControlMessage::ScmRights(&rights)];
    Ok(sendmsg::<()>(stream.as_raw_fd(), &slices, &message, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Where a descriptor waits for the next bytes that are written.
pub type PendingFd = Arc<Mutex<Option<OwnedFd>>>;

/// A socket whose next write carries the pending descriptor along.
#[derive(Debug)]
pub struct FdStream {
    stream: UnixStream,
    pending_fd: PendingFd,
}

impl FdStream {
    #[must_use]
    pub fn new(stream: UnixStream, pending_fd: PendingFd) -> Self {
        Self { stream, pending_fd }
    }
}

impl AsyncRead for FdStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let pending_fd = self.pending_fd.clone();
        let mut pending_fd = pending_fd.lock();
        let Some(fd) = pending_fd.as_ref() else { return Pin::new(&mut self.stream).poll_write(cx, bytes) };
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_io(Interest::WRITABLE, || send_with(&self.stream, bytes, fd)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    *pending_fd = None;
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{recvmsg, ControlMessageOwned};
    use std::io::IoSliceMut;
    use std::os::fd::FromRawFd;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn test_fd_stream_sends_the_descriptor_once_with_the_first_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let pending_fd = PendingFd::default();
        let mut stream = FdStream::new(ours, pending_fd.clone());
        *pending_fd.lock() = Some(std::fs::File::open("/dev/null").unwrap().into());
        stream.write_all(b"ab").await.unwrap();
        let received = |theirs: &UnixStream| {
            let (mut bytes, mut space) = ([0; 8], nix::cmsg_space!([i32; 2]));
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(theirs.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
            let fds: Vec<i32> = message
                .cmsgs()
                .unwrap()
                .flat_map(|message| match message {
                    ControlMessageOwned::ScmRights(fds) => fds,
                    _ => Vec::new(),
                })
                .collect();
            (message.bytes, fds)
        };
        theirs.readable().await.unwrap();
        let (length, fds) = received(&theirs);
        assert_eq!((length, fds.len()), (2, 1));
        // SAFETY: the kernel has just made this descriptor; nothing else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fds[0]) });
        stream.write_all(b"c").await.unwrap();
        theirs.readable().await.unwrap();
        assert_eq!(received(&theirs), (1, Vec::new()));
    }
}
