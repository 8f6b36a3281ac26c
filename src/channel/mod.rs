//! Talking to the agent: one sealed session per VM, shared by all who ask.
//!
//! ```text
//! CommunicationChannel --- Unix socket ---> broker --+
//!        client.rs          framing.rs     broker.rs |--> agent.rs --> link.rs --- sealed records ---> the guest
//!                           send_command ------------+        |
//!                           stream, upload, download, connect +
//!                           process.rs, transfer.rs, port.rs  stream.rs, mailbox.rs
//! ```
//! An attached client has an [`Agent`], too; its link ends at the broker, which hands the calls on:
//!
//! ```text
//! stream, upload ... --> agent.rs --> link.rs --- records ---> broker.rs, attached.rs --> agent.rs --> the guest
//!       attach.rs                                                   operation.rs --> the owner
//! ```
//! Architecture invariant: asynchronous through and through; who blocks does so elsewhere (`py/gate.rs`). What a guest
//! sends is hostile: nothing here holds more of it than the windows and limits in `microvm_protocol::mux` allow.

mod agent;
mod attach;
mod attached;
mod broker;
mod client;
mod error;
pub mod framing;
mod link;
mod mailbox;
mod operation;
mod port;
mod process;
mod rehandshake;
mod stream;
mod transfer;

pub use agent::{patience, Agent, Answer};
pub use attach::attach;
pub use attached::{parse as parse_request, Asked};
pub use broker::{parse as parse_command, Broker};
pub use client::Client;
pub use error::SessionError;
pub use mailbox::Piece;
pub use operation::{Operation, Owner};
pub use port::PortConnection;
pub use process::{Exit, Process};
pub use stream::{Next, Stream};
pub use transfer::{Download, Fetched, Upload};
