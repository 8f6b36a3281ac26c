//! The JSON documents inside messages.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The longest message, in bytes of JSON.
pub const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// What the host asks of the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub action: String,
    #[serde(default)]
    pub params: Value,
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Response {
    Ok { result: Value },
    Error { error: Failure },
}

/// A failure with a code that callers may branch on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

/// The stable codes of the agent's failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    UnknownAction,
    BadParams,
    ProgramNotFound,
    PermissionDenied,
    Timeout,
    Killed,
    FileNotFound,
    TooLarge,
    NoSpace,
    NetworkIsolated,
    NetworkError,
    ActionFailed,
    Cancelled,
    Busy,
    IoError,
}

/// What an ACCEPT says, sealed: whether the guest is what it was told to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "guest", rename_all = "snake_case")]
pub enum Outcome {
    /// Disks are mounted, the network is up: requests may come. The last stage of a start.
    Ready,
    Failed {
        stage: String,
        message: String,
    },
}
