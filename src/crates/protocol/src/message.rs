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
    #[serde(flatten)]
    pub code: Code,
    pub message: String,
}

/// The stable codes of the agent's failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", content = "reason", rename_all = "snake_case")]
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
    NetworkError(Reason),
    ActionFailed,
    Cancelled,
    Busy,
    IoError,
}

/// Why a URL was not fetched; beside the code `network_error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The name has no address, or nobody could be asked.
    Dns,
    /// Nobody listens there.
    Refused,
    /// The network lets no packet pass to there.
    Unreachable,
    Timeout,
    /// No secure connection: the certificate, or what both sides speak.
    Tls,
    /// What came back was not HTTP, or ended half-way.
    Protocol,
}

/// What the agent says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Disks are mounted, the network is up: requests may come. The last stage of a start.
    Ready,
    /// The guest cannot be what it was told to be.
    StartFailed { stage: String, message: String },
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_failure_has_a_reason_where_its_code_has_one() {
        let failure = |code| serde_json::to_value(Failure { code, message: "m".into() }).unwrap();
        assert_eq!(failure(Code::BadParams), json!({"code": "bad_params", "message": "m"}));
        let expected = json!({"code": "network_error", "reason": "dns", "message": "m"});
        assert_eq!(failure(Code::NetworkError(Reason::Dns)), expected);
        let back: Failure = serde_json::from_value(expected).unwrap();
        assert_eq!(back.code, Code::NetworkError(Reason::Dns));
    }
}
