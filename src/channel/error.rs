//! Why there is no session, or none any more.

use std::borrow::Cow;
use std::io;

use microvm_protocol::mux::Refused;
use microvm_protocol::ProtocolError;

use super::framing::FramingError;

/// Why a session with a guest, an owner or a client did not come about, ended, or has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the VM was stopped")]
    Stopped,
    #[error("the handle was closed")]
    HandleClosed,
    #[error("the transport was closed")]
    TransportClosed,
    #[error("the process that has the VM has ended, or let go of the VM")]
    OwnerGone,
    #[error("the guest shut itself down")]
    GuestShutDown,
    #[error("the session ended")]
    Ended,
    #[error("not connected")]
    NotConnected,
    #[error("the VM is still being started")]
    Starting,
    #[error("the process that has the VM is of another version: {answer}")]
    OtherVersion { answer: String },
    /// A client of the broker.
    #[error("it hung up")]
    HungUp,
    #[error("it stalled in the middle of a message")]
    Stalled,
    #[error("it does not read its answers")]
    Deaf,
    #[error("the agent spoke out of turn")]
    OutOfTurn,
    #[error("the agent did not accept")]
    NotAccepted,
    #[error("{peer} sent what only {other} may send")]
    WrongSide { peer: &'static str, other: &'static str },
    /// The guest's own account of what it could not do.
    #[error("{stage}: {message}")]
    GuestSetup { stage: String, message: String },
    #[error("{what}: the agent's answer: it never began")]
    NeverBegan { what: String },
    #[error("the guest ended the upload")]
    UploadEnded,
    #[error("this process has no memory for the answer")]
    NoMemory,
    #[error("{what} holds too many values to be read")]
    TooManyValues { what: &'static str },
    #[error("{what}: {source}")]
    NotJson { what: Cow<'static, str>, source: serde_json::Error },
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("{0}")]
    Refused(#[from] Refused),
    #[error("{0}")]
    Framing(#[from] FramingError),
    // Not `transparent`: that would leave the error itself out of the chain, and its number with it.
    #[error("the transport failed: {0}")]
    Io(#[from] io::Error),
}

impl SessionError {
    /// For `map_err`: `what` is not what it should be.
    pub(super) fn not_json(what: impl Into<Cow<'static, str>>) -> impl FnOnce(serde_json::Error) -> Self {
        let what = what.into();
        move |source| SessionError::NotJson { what, source }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::error::{errno, Error};

    #[test]
    fn test_number_of_a_transport_that_failed_is_found_from_the_top() {
        let failed = || io::Error::from(Errno::EPIPE);
        let text = "vm: the channel to the agent is closed";
        for (cause, said) in [
            (SessionError::from(failed()), format!("the transport failed: {}", failed())),
            (FramingError::from(failed()).into(), failed().to_string()),
        ] {
            let error = Error::channel_closed("vm", cause, false);
            assert_eq!(errno(&error), Some(Errno::EPIPE), "{error:?}");
            assert!(error.to_string().starts_with(&format!("{text}: {said}; nothing of it reached")), "{error}");
        }
    }
}
