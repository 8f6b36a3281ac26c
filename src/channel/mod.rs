//! Talking to the agent: one sealed session per VM, shared by all who ask.
//!
//! ```text
//! CommunicationChannel --- Unix socket ---> broker --+
//!        client.rs          framing.rs     broker.rs |--> agent.rs --- sealed records ---> the agent in the guest
//!                           send_command ------------+
//! ```

mod agent;
mod broker;
mod client;
mod framing;

pub use agent::{Agent, Answer};
pub use broker::Broker;
pub use client::Client;
