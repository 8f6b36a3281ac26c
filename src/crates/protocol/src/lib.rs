//! What host and guest say to each other, and nothing about how the bytes travel.
//!
//! Architecture invariant: sans-IO. This crate turns bytes into events and events into bytes; it never touches a
//! socket, a clock or a thread, so the blocking agent and the asynchronous host share it. A peer's bytes are hostile:
//! every length is capped before anything is allocated, and no input panics.
//!
//! ```text
//! transport (virtio-serial, vsock)   a byte stream
//!   record     | length u16 BE | body |                                     record.rs
//!     prelude  | kind u8 | ... |            plaintext, before the session   handshake.rs
//!     frame    | kind u8 | flags u8 | id u32 BE | payload |   sealed        frame.rs, session.rs
//!       call       a request, its response, the streams between them        mux/
//!         JSON     what requests, responses and events say                  message.rs
//! identity     | magic | length u32 BE | fields | zeros |                   identity.rs
//! ```
//! A whole conversation, from the guest's first byte:
//!
//! ```text
//! guest -> host   HELLO    the generations it speaks
//! host  -> guest  OFFER    the generation chosen, and proof of the VM's key
//! guest -> host   ACCEPT   proof of the VM's key, {"guest":"ready"}; from here on everything is sealed
//! host  -> guest  REQUEST  1 {"action":"ping","params":null}
//! guest -> host   RESPONSE 1 {"status":"ok","result":"pong"}
//! ```
//! [`connection::Connection`] is the session and its calls together: what both sides hold.
//!
//! A **generation** is everything above, down to the byte. Generation 1 is frozen by `golden/` and the tests that read
//! it: an agent in an old template goes on talking to a new host. What changes the bytes is a new generation.
#![forbid(unsafe_code)]

pub mod cmdline;
pub mod connection;
pub mod frame;
#[cfg(test)]
mod golden;
pub mod handshake;
pub mod identity;
pub mod json;
pub mod message;
pub mod mux;
pub mod record;
mod secrets;
pub mod session;

/// The oldest generation of the wire format that this build speaks.
pub const GENERATION_MIN: u8 = 1;
/// The newest generation of the wire format that this build speaks.
pub const GENERATION_MAX: u8 = 1;

/// The vsock port on the host (CID 2) to which an agent connects, and at which a guest without an identity listens.
pub const VSOCK_PORT: u32 = 5005;
/// The name of the agent's virtio-serial port, as it appears in `/sys/class/virtio-ports/*/name`.
pub const SERIAL_PORT_NAME: &str = "microvm.agent";
/// The name of the port that delivers the identity to a guest without a config drive.
pub const IDENTITY_PORT_NAME: &str = "microvm.identity";

/// Why a peer's bytes were refused. After any of these the connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("record of length 0")]
    EmptyRecord,
    #[error("unexpected prelude record of kind {kind} while waiting for {expected}")]
    UnexpectedPrelude { kind: u8, expected: &'static str },
    #[error("malformed {what}")]
    Malformed { what: &'static str },
    #[error("the peer speaks generations {min} to {max}, this side {GENERATION_MIN} to {GENERATION_MAX}")]
    NoCommonGeneration { min: u8, max: u8 },
    #[error("the peer failed to prove the VM's key: {detail}")]
    Authentication { detail: String },
    #[error("a sealed record does not open: altered, replayed or out of order")]
    Unsealed,
    #[error("frame of unknown kind {kind}")]
    UnknownFrame { kind: u8 },
    #[error("message of more than {limit} bytes")]
    MessageTooLarge { limit: usize },
    #[error("no memory for a message of {bytes} bytes")]
    OutOfMemory { bytes: usize },
    #[error("more than {limit} calls at once")]
    TooManyCalls { limit: usize },
    #[error("call {id}, channel {channel}: more bytes or credit than the window holds")]
    CreditExceeded { id: u32, channel: u8 },
    #[error("the peer broke a rule: {rule}")]
    RuleBroken { rule: &'static str },
    #[error("the cipher failed: {detail}")]
    Cipher { detail: String },
}
