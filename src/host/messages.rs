//! Messages between processes that carry descriptors (unix(7), `SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    recvmsg, sendmsg, socketpair, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
};

/// Descriptors in one message.
const DESCRIPTORS: usize = 4;

/// Two ends that no program inherits.
///
/// # Errors
/// What socketpair(2) failed with.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one message.
///
/// # Errors
/// What sendmsg(2) failed with.
pub fn send(socket: &impl AsFd, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(text)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Waits for the next message, of at most `limit` bytes; `None` when the other end is closed.
///
/// # Errors
/// What recvmsg(2) failed with; `InvalidData` for a message that is longer.
pub fn receive(socket: &impl AsFd, limit: usize) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut text = vec![0; limit];
    let (length, cut, descriptors) = {
        let mut slices = [IoSliceMut::new(&mut text)];
        let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
        let raw = socket.as_fd().as_raw_fd();
        let message = loop {
            match recvmsg::<()>(raw, &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Err(Errno::EINTR) => {}
                received => break received?,
            }
        };
        let mut descriptors = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel made these descriptors for this message; they belong to nobody else.
                descriptors.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC), descriptors)
    };
    if cut {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut"));
    }
    text.truncate(length);
    Ok((length > 0).then_some((text, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn test_messages_arrive_whole_each_with_its_descriptors() {
        let (ours, theirs) = pair().unwrap();
        let file = File::open("/proc/self/comm").unwrap();
        send(&ours, b"one", &[file.as_fd(), ours.as_fd()]).unwrap();
        send(&ours, b"two", &[]).unwrap();
        send(&ours, b"long", &[]).unwrap();
        let (text, descriptors) = receive(&theirs, 16).unwrap().unwrap();
        assert_eq!((text.as_slice(), descriptors.len()), (&b"one"[..], 2));
        let mut name = String::new();
        File::from(descriptors.into_iter().next().unwrap()).read_to_string(&mut name).unwrap();
        assert!(!name.is_empty());
        assert_eq!(receive(&theirs, 16).unwrap().unwrap().0, b"two");
        assert_eq!(receive(&theirs, 3).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(ours);
        assert!(receive(&theirs, 16).unwrap().is_none());
    }
}
