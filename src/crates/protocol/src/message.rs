//! The JSON documents inside messages.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The longest message, in bytes of JSON.
pub const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// What the host asks of the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub action: String,
    #[serde(default)]
    pub params: Value,
    /// The host holds the call's channels: [`STREAM`], [`UPLOAD`], [`DOWNLOAD`] and [`CONNECT`] need that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
}

/// The action that runs a program with its descriptors on the call's channels.
pub const STREAM: &str = "stream";
/// The action that writes what comes on channel 0 to a file.
pub const UPLOAD: &str = "upload";
/// The action that sends a file on channel 1.
pub const DOWNLOAD: &str = "download";

/// The action that connects to a TCP port of the guest: what comes on channel 0 goes there, what it says comes on channel 1,
/// and LAST ends a direction, as FIN does.
pub const CONNECT: &str = "connect";
/// The request that ends a session for a while: the guest's programs stand still, and it waits for another OFFER.
pub const FREEZE: &str = "freeze";
/// The parameter of [`FREEZE`], true or false: what the guest caches is written to its disk. An earlier guest ignores it.
pub const WRITE_DISK: &str = "write_disk";
/// The request that gives a guest of the pool the names of the VM that it becomes.
pub const ADOPT: &str = "adopt";
/// Actions that only the host's own code asks for. The host refuses them from users before they are sent, so a guest of
/// generation 1 needs no mark on them; the guest refuses them where one action names another.
pub const INTERNAL: [&str; 2] = [FREEZE, ADOPT];

/// The answer to a user who asks for an action of [`INTERNAL`].
#[must_use]
pub fn refuse_internal(action: &str) -> Option<Failure> {
    let name = INTERNAL.into_iter().find(|name| *name == action)?;
    let message =
        format!("{name:?} is what this library asks of its guest itself; list_actions names what may be asked");
    Some(Failure { code: Code::ReservedAction, message })
}

/// The payload of STARTED.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "started", rename_all = "snake_case")]
pub enum Started {
    Program {
        pid: u32,
    },
    /// A file, when it was opened.
    File {
        size: u64,
        /// The permission bits of a regular file that is read; an agent of before does not tell them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u32>,
    },
    /// The guest's server has accepted.
    Connection {
        /// Which one, as `127.0.0.1:80` or `[::1]:80`.
        address: String,
    },
}

/// The payload of CONTROL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "control", rename_all = "snake_case", deny_unknown_fields)]
pub enum Control {
    /// Sends a signal to the program's process group.
    Signal { signal: i32 },
    /// Tells the program's terminal its size.
    Resize { rows: u16, columns: u16 },
}

/// The checksum of a file's bytes: CRC-32 as zlib has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    pub bytes: u64,
    pub crc32: u32,
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

/// A failure as a result.
///
/// # Errors
/// Always: the failure.
pub fn fail<T>(code: Code, message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { code, message: message.into() })
}

/// Reads an action's parameters; null is an object without fields.
///
/// # Errors
/// [`Code::BadParams`], with the name of the field.
pub fn read_params<T: DeserializeOwned>(params: Value) -> Result<T, Failure> {
    let params = if params.is_null() { Value::Object(Map::new()) } else { params };
    serde_path_to_error::deserialize(params).or_else(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        fail(Code::BadParams, format!("{place}{}", error.inner()))
    })
}

/// The stable codes of the agent's failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", content = "reason", rename_all = "snake_case")]
pub enum Code {
    UnknownAction,
    ReservedAction,
    NotAFile,
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
    /// No program of the guest listens at the port.
    ConnectionRefused,
    /// A connection that stood was ended by the other side, and not by its end.
    ConnectionReset,
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

impl Code {
    /// As it stands in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Code::UnknownAction => "unknown_action",
            Code::ReservedAction => "reserved_action",
            Code::NotAFile => "not_a_file",
            Code::BadParams => "bad_params",
            Code::ProgramNotFound => "program_not_found",
            Code::PermissionDenied => "permission_denied",
            Code::Timeout => "timeout",
            Code::Killed => "killed",
            Code::FileNotFound => "file_not_found",
            Code::TooLarge => "too_large",
            Code::NoSpace => "no_space",
            Code::NetworkIsolated => "network_isolated",
            Code::NetworkError(_) => "network_error",
            Code::ConnectionRefused => "connection_refused",
            Code::ConnectionReset => "connection_reset",
            Code::ActionFailed => "action_failed",
            Code::Cancelled => "cancelled",
            Code::Busy => "busy",
            Code::IoError => "io_error",
        }
    }
}

/// Values in a document beyond which it is refused unread: each costs many times its bytes once it is parsed.
pub const MAX_VALUES: usize = 1 << 20;

/// Whether a document of a hostile peer holds no more than about [`MAX_VALUES`] values; it need not be valid.
#[must_use]
pub fn is_modest(json: &[u8]) -> bool {
    if json.len() <= MAX_VALUES {
        return true;
    }
    let (mut values, mut in_string, mut escaped) = (1usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values <= MAX_VALUES
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_request_says_stream_only_when_it_is_one() {
        let request = |stream| Request { action: "ping".into(), params: Value::Null, stream };
        assert_eq!(serde_json::to_value(request(false)).unwrap(), json!({"action": "ping", "params": null}));
        assert_eq!(serde_json::to_value(request(true)).unwrap()["stream"], true);
    }

    #[test]
    fn test_code_as_str_is_its_json() {
        for code in [
            Code::UnknownAction,
            Code::ReservedAction,
            Code::NotAFile,
            Code::ProgramNotFound,
            Code::NoSpace,
            Code::ConnectionRefused,
            Code::ConnectionReset,
            Code::Busy,
            Code::IoError,
        ] {
            assert_eq!(serde_json::to_value(code).unwrap()["code"], code.as_str());
        }
    }

    #[test]
    fn test_refuse_internal_names_the_action_and_lets_others_pass() {
        for name in INTERNAL {
            let failure = refuse_internal(name).unwrap();
            assert!(failure.code == Code::ReservedAction && failure.message.contains(name));
        }
        assert_eq!(refuse_internal("exec"), None);
    }

    #[test]
    fn test_is_modest_counts_values_and_not_what_strings_hold() {
        let text = format!("{{\"data\":\"{}\"}}", "a,[{\\\",".repeat(MAX_VALUES / 2));
        assert!(serde_json::from_str::<Value>(&text).is_ok() && is_modest(text.as_bytes()));
        assert!(!is_modest(format!("[{}0]", "[],".repeat(MAX_VALUES)).as_bytes()));
    }

    #[test]
    fn test_read_params_null_has_no_fields_and_an_error_names_its_field() {
        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Params {
            size: Option<u8>,
        }
        assert_eq!(read_params(Value::Null), Ok(Params { size: None }));
        let failure = read_params::<Params>(json!({"size": "x"})).unwrap_err();
        assert!(failure.code == Code::BadParams && failure.message.starts_with("size: "), "{failure:?}");
    }

    #[test]
    fn test_control_unknown_is_refused() {
        assert!(serde_json::from_value::<Control>(json!({"control": "explode"})).is_err());
        assert!(serde_json::from_value::<Control>(json!({"control": "signal", "signal": 2, "x": 1})).is_err());
    }

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
