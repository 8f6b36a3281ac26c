//! The launcher's end of the control socket.
//!
//! Architecture invariant: the only place that reads from or writes to the manager. The descriptor is close-on-exec
//! for ever: the VMM must never hold it, or the manager's death would not be noticed.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::{JailEvent, JailRequest, LaunchSpec, Stage, MAX_FDS, MAX_PACKET_BYTES, SETUP_FAILED};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::socket::{getsockopt, recv, recvmsg, send, sockopt, ControlMessageOwned, MsgFlags, SockType};

use super::descriptors;
use super::failure::Failure;

/// The control socket.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

/// What there was to read once the control socket was ready.
#[derive(Debug)]
pub enum Incoming {
    Request(JailRequest),
    /// Nothing more for now.
    Drained,
    /// The manager has closed its end, or died.
    Closed,
}

impl ControlSocket {
    /// Takes over stdin as the control socket; stdin itself stays open until something else is put there.
    pub fn take_stdin() -> Result<Self, Failure> {
        let stdin = std::io::stdin();
        match getsockopt(&stdin, sockopt::SockType) {
            Ok(SockType::SeqPacket) => {}
            Ok(_) | Err(_) => {
                let message = "stdin must be one end of an AF_UNIX SOCK_SEQPACKET socket pair; \
                               microvm-jail is started by the microVM manager, not by hand";
                return Err(Failure::new(Stage::Control, message));
            }
        }
        let failed = |errno| Failure::errno(Stage::Control, errno, "taking over stdin as the control socket");
        let control = descriptors::duplicate_from(stdin.as_fd(), descriptors::LOWEST).map_err(failed)?;
        // Sends must wait for a slow manager; reads that must not wait say so themselves.
        let flags = OFlag::from_bits_retain(fcntl(&control, FcntlArg::F_GETFL).map_err(failed)?);
        fcntl(&control, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).map_err(failed)?;
        Ok(Self(control))
    }

    /// Moves the socket to a descriptor number of at least `lowest`.
    pub fn raise(self, lowest: RawFd) -> Result<Self, (Self, Errno)> {
        match descriptors::duplicate_from(self.0.as_fd(), lowest) {
            Ok(raised) => Ok(Self(raised)),
            Err(errno) => Err((self, errno)),
        }
    }

    /// Waits for the launch spec and the descriptors that come with it, and checks both.
    pub fn receive_spec(&self) -> Result<(LaunchSpec, Vec<OwnedFd>), Failure> {
        let failed = |errno| Failure::errno(Stage::Spec, errno, "receiving the launch spec");
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let mut ancillary = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let message = loop {
            // Close-on-exec from birth: only what is put in place by name reaches the VMM.
            match recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut ancillary), MsgFlags::MSG_CMSG_CLOEXEC) {
                Err(Errno::EINTR) => {}
                other => break other.map_err(failed)?,
            }
        };
        let (length, flags) = (message.bytes, message.flags);
        if flags.contains(MsgFlags::MSG_CTRUNC) {
            let message = format!(
                "some of the descriptors passed with the launch spec did not arrive; pass at most {MAX_FDS} and keep \
                 the limit of open files (RLIMIT_NOFILE) above that"
            );
            return Err(Failure::new(Stage::Spec, message));
        }
        let mut passed = Vec::new();
        for cmsg in message.cmsgs().map_err(failed)? {
            if let ControlMessageOwned::ScmRights(raw) = cmsg {
                // SAFETY: the kernel has just made these descriptors for us; nothing else owns them.
                passed.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if flags.contains(MsgFlags::MSG_TRUNC) {
            let message = format!("the launch spec is longer than {MAX_PACKET_BYTES} bytes; shorten argv or env");
            return Err(Failure::new(Stage::Spec, message));
        }
        if length == 0 {
            let message = "the manager closed the control socket before it sent a launch spec";
            return Err(Failure::new(Stage::Spec, message));
        }
        let spec: LaunchSpec = serde_json::from_slice(&buffer[..length])
            .map_err(|error| Failure::new(Stage::Spec, format!("the launch spec is not valid: {error}")))?;
        spec.validate()
            .and_then(|()| spec.validate_passed(passed.len()))
            .map_err(|error| Failure::new(Stage::Spec, error))?;
        Ok((spec, passed))
    }

    /// Reads one packet, without waiting.
    pub fn receive_request(&self) -> Result<Incoming, Failure> {
        // A request is `{"signal":64}`; what does not fit is refused by the parser.
        let mut buffer = [0; 256];
        let length = loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Ok(Incoming::Closed),
                Ok(length) => break length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Incoming::Drained),
                // The manager died with unread events in its end.
                Err(Errno::ECONNRESET) => return Ok(Incoming::Closed),
                Err(errno) => return Err(Failure::errno(Stage::Supervise, errno, "reading a request")),
            }
        };
        let request: JailRequest = serde_json::from_slice(&buffer[..length])
            .map_err(|error| Failure::new(Stage::Supervise, format!("a request is not valid: {error}")))?;
        request.validate().map_err(|error| Failure::new(Stage::Supervise, error))?;
        Ok(Incoming::Request(request))
    }

    /// Sends one event; waits while the manager's queue is full, fails when the manager is gone.
    pub fn send(&self, event: &JailEvent) -> Result<(), Failure> {
        let packet = serde_json::to_vec(event)
            .map_err(|error| Failure::new(Stage::Control, format!("encoding an event: {error}")))?;
        loop {
            match send(self.0.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Failure::errno(Stage::Control, errno, "sending an event")),
            }
        }
    }

    /// Reports a failure and gives the exit code that goes with it.
    pub fn report(&self, failure: &Failure) -> i32 {
        match self.send(&failure.to_event()) {
            Ok(()) => SETUP_FAILED,
            // Nobody is left to be told; the exit code says that something went wrong, and the caller exits anyway.
            Err(_manager_gone) => SETUP_FAILED,
        }
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
