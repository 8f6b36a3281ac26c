//! One error type for the whole core; each variant has a stable code that the Python side turns into a class.
//!
//! An error's text is whole: it says its cause, too, because logs and Python show nothing else. `source()` is for code: the
//! [`Cause`], as it was, of whose type and number it may ask.

mod cause;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{json, Value};

pub use cause::{errno, Cause};

use crate::model::{said, Backend, VmId, VmState};

pub type Result<T> = std::result::Result<T, Error>;

/// The last lines of what a VM's processes said, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tails {
    pub console: String,
    pub vmm_stderr: String,
}

/// Isolation that was demanded and cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} was asked for, but {limited_by} can give no more than {offered}: {reason}; {remedy}")]
pub struct Shortfall {
    pub wanted: String,
    pub offered: String,
    /// This host, the backend, or both.
    pub limited_by: String,
    pub reason: String,
    pub remedy: String,
    /// Layers of the jail, with the reason of each.
    pub missing: Vec<(&'static str, String)>,
}

/// What can go wrong. `Display` says what failed, on what, and what the user can do; of what guests and VMMs said it keeps
/// some, without control characters ([`said`]).
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("{field} must be {allowed}, not {value}")]
    InvalidType { field: String, value: String, allowed: String },
    #[error("{field}={value} is not allowed: {allowed}")]
    InvalidValue { field: String, value: String, allowed: String },
    #[error("not enough {what}: {vm_id} needs {needed}, {available} of {limit} are free; destroy VMs that are done or {remedy}")]
    QuotaExceeded { vm_id: VmId, what: &'static str, needed: u64, available: u64, limit: u64, remedy: &'static str },
    #[error("vm_id {vm_id:?} is taken by {owner}; destroy that VM or choose another id")]
    VmIdTaken { vm_id: VmId, owner: String },
    #[error("there is no VM {vm_id:?}; list_vms() names those there are")]
    VmNotFound { vm_id: String },
    #[error("there is no VM {vm_id:?} that runs at {socket:?}: {source}; `microvm ps` names those of this user", socket = socket.display())]
    NothingToAttach { vm_id: VmId, socket: PathBuf, source: Cause },
    /// What the process that has the VM answered: an error with the code, message and details that it has there.
    #[error("{message}")]
    Owner { code: &'static str, message: String, details: Value },
    #[error("there is no template {name:?}; list_templates() names those there are")]
    TemplateNotFound { name: String },
    #[error("template {name:?} {reason}; choose another name or delete_template() it")]
    TemplateTaken { name: String, reason: &'static str },
    #[error("{what} does not fit: {}", differences.join("; "))]
    StateMismatch { what: String, differences: Vec<String> },
    #[error("{what} is damaged and is not used: {source}; {remedy}")]
    StateDamaged { what: String, source: Cause, remedy: &'static str },
    #[error("{vm_id}: cannot {operation} a VM that is {state}; allowed from: {allowed}")]
    InvalidState { vm_id: VmId, operation: &'static str, state: VmState, allowed: String },
    #[error("backend {backend} cannot be used: {reason}; {remedy}")]
    BackendUnavailable { backend: Backend, reason: String, remedy: String },
    #[error("{vm_id}: {operation} is not supported by backend {backend}: {reason}; {remedy}")]
    NotSupported { vm_id: VmId, operation: &'static str, backend: Backend, reason: String, remedy: &'static str },
    #[error("{vm_id}: {shortfall}")]
    IsolationUnavailable { vm_id: VmId, shortfall: Box<Shortfall> },
    #[error(
        "{vm_id}: RLIMIT_{} of this process is {value} (hard limit), and a VMM for this VM needs {needed}: start the process \
         with more (prlimit --{limit}={needed} COMMAND as root; docker run --ulimit {limit}={needed}; systemd \
         Limit{}={needed}), or make the VM smaller",
        limit.to_uppercase(),
        limit.to_uppercase()
    )]
    LimitTooLow { vm_id: VmId, limit: String, value: u64, needed: u64 },
    #[error("{vm_id}: a connected network cannot be set up: {source}; {remedy}")]
    NetworkUnavailable { vm_id: VmId, source: Cause, remedy: String },
    #[error("{address} of this host cannot be listened at: {source}; {remedy}")]
    PortUnavailable { address: SocketAddr, source: Cause, remedy: &'static str },
    #[error("{field} {path:?} cannot be read: {source}", path = path.display())]
    ImageUnreadable { field: &'static str, path: PathBuf, source: Cause },
    #[error("{field} {path:?} is not usable: {reason}", path = path.display())]
    ImageInvalid { field: &'static str, path: PathBuf, reason: String },
    #[error("{vm_id}: start failed at stage {stage}: {}", said(&source.to_string()))]
    StartFailed { vm_id: VmId, stage: &'static str, source: Cause, tails: Box<Tails> },
    #[error(
        "{vm_id}: start did not finish within {limit_s} s; it was at stage {stage}{} (start_timeout_s can be raised)",
        busy.as_ref().map_or_else(String::new, |busy| format!(": {busy}"))
    )]
    StartTimeout { vm_id: VmId, stage: &'static str, limit_s: f64, busy: Option<String>, tails: Box<Tails> },
    #[error("{vm_id}: the VMM's process ended unexpectedly ({how})")]
    VmDied { vm_id: VmId, how: String, tails: Box<Tails> },
    #[error("{vm_id}: the channel to the agent is closed: {}{}", said(&source.to_string()), outcome(*sent))]
    ChannelClosed { vm_id: String, source: Cause, sent: bool },
    #[error(
        "{vm_id}: {socket:?} belongs to uid {uid}, neither to this process's user nor to root: nothing was sent",
        socket = socket.display()
    )]
    ForeignSocket { vm_id: String, socket: PathBuf, uid: u32 },
    #[error("{vm_id}: {socket:?} is not trusted: {source}; {remedy}: nothing was sent", socket = socket.display())]
    UntrustedSocket { vm_id: String, socket: PathBuf, source: Cause, remedy: String },
    #[error("{vm_id}: {what} was not done within {limit_s} s{}", outcome(*sent))]
    ChannelTimeout { vm_id: String, what: String, limit_s: f64, sent: bool },
    #[error("{vm_id}: {what}: {}", said(message))]
    Guest { vm_id: String, what: String, code: &'static str, message: String },
    #[error("{vm_id}: {path:?} did not arrive as it was sent: CRC-32 {here:08x} here, {there:08x} in the guest")]
    ChecksumMismatch { vm_id: String, path: String, here: u32, there: u32 },
    #[error("{vm_id}: the guest and this host could not agree on a session: {}", said(&source.to_string()))]
    HandshakeFailed { vm_id: VmId, source: Cause },
    #[error("{vm_id}: {what} of {size} bytes is over the limit of {limit} bytes; send it in pieces")]
    MessageTooLarge { vm_id: String, what: String, size: usize, limit: usize },
    #[error("{vm_id}: {operation} failed: {}", said(&source.to_string()))]
    Vmm { vm_id: VmId, operation: &'static str, source: Cause },
    #[error("{operation} failed on {object}: {source}{}", remedy.as_ref().map_or_else(String::new, |remedy| format!("; {remedy}")))]
    Host { operation: &'static str, object: String, source: Cause, remedy: Option<String> },
    #[error("{field}={path:?} is not used: {source}; {remedy}")]
    FolderRefused { field: &'static str, path: PathBuf, source: Cause, remedy: String },
    #[error("this {what} was made in process {made_in}; it cannot be used in the forked process {used_in}: make a new one there")]
    ForkedProcess { what: &'static str, made_in: u32, used_in: u32 },
    #[error("{vm_id}: {operation} was cancelled")]
    Cancelled { vm_id: VmId, operation: &'static str },
}

/// What a caller may make of a command that got no answer.
fn outcome(sent: bool) -> &'static str {
    match sent {
        true => "; it was sent, and the outcome in the guest is unknown",
        false => "; nothing of it reached the guest, so it can be tried again",
    }
}

impl Error {
    /// The stable code; callers may branch on it.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Error::InvalidType { .. } => "invalid_type",
            Error::InvalidValue { .. } => "invalid_value",
            Error::QuotaExceeded { .. } => "quota_exceeded",
            Error::VmIdTaken { .. } => "vm_id_taken",
            Error::VmNotFound { .. } | Error::NothingToAttach { .. } => "vm_not_found",
            Error::Owner { code, .. } => code,
            Error::TemplateNotFound { .. } => "template_not_found",
            Error::TemplateTaken { .. } => "template_taken",
            Error::StateMismatch { .. } => "state_mismatch",
            Error::StateDamaged { .. } => "state_damaged",
            Error::InvalidState { .. } => "invalid_state",
            Error::BackendUnavailable { .. } => "backend_unavailable",
            Error::NotSupported { .. } => "not_supported",
            Error::IsolationUnavailable { .. } => "isolation_unavailable",
            Error::LimitTooLow { .. } => "limit_too_low",
            Error::NetworkUnavailable { .. } => "network_unavailable",
            Error::PortUnavailable { .. } => "port_unavailable",
            Error::ImageUnreadable { .. } => "image_unreadable",
            Error::ImageInvalid { .. } => "image_invalid",
            Error::StartFailed { .. } => "start_failed",
            Error::StartTimeout { .. } => "start_timeout",
            Error::VmDied { .. } => "vm_died",
            Error::ChannelClosed { .. } => "channel_closed",
            Error::ChannelTimeout { .. } => "channel_timeout",
            Error::ForeignSocket { .. } | Error::UntrustedSocket { .. } => "foreign_socket",
            Error::Guest { code, .. } => code,
            Error::ChecksumMismatch { .. } => "checksum_mismatch",
            Error::HandshakeFailed { .. } => "handshake_failed",
            Error::MessageTooLarge { .. } => "message_too_large",
            Error::Vmm { .. } => "vmm_error",
            Error::Host { .. } => "host_error",
            Error::FolderRefused { .. } => "folder_refused",
            Error::ForkedProcess { .. } => "forked_process",
            Error::Cancelled { .. } => "cancelled",
        }
    }

    /// What a program may want to read besides the message.
    #[must_use]
    pub fn details(&self) -> Value {
        match self {
            Error::StartFailed { stage, tails, .. } | Error::StartTimeout { stage, tails, .. } => {
                json!({"stage": stage, "console_tail": tails.console, "vmm_stderr_tail": tails.vmm_stderr})
            }
            Error::VmDied { how, tails, .. } => {
                json!({"how": how, "console_tail": tails.console, "vmm_stderr_tail": tails.vmm_stderr})
            }
            Error::BackendUnavailable { backend, reason, remedy } => {
                json!({"backend": backend.as_str(), "reason": reason, "remedy": remedy})
            }
            Error::NotSupported { operation, backend, reason, remedy, .. } => {
                json!({"operation": operation, "backend": backend.as_str(), "reason": reason, "remedy": remedy})
            }
            Error::QuotaExceeded { what, needed, available, limit, .. } => {
                json!({"what": what, "needed": needed, "available": available, "limit": limit})
            }
            Error::IsolationUnavailable { shortfall, .. } => {
                let Shortfall { wanted, offered, limited_by, reason, remedy, missing } = shortfall.as_ref();
                let missing: serde_json::Map<String, Value> =
                    missing.iter().map(|(layer, why)| ((*layer).to_owned(), json!(why))).collect();
                json!({
                    "wanted": wanted, "offered": offered, "limited_by": limited_by, "reason": reason, "remedy": remedy,
                    "missing": missing,
                })
            }
            Error::LimitTooLow { limit, value, needed, .. } => {
                json!({"limit": limit, "value": value, "needed": needed})
            }
            Error::StateMismatch { differences, .. } => json!({"differences": differences}),
            Error::NetworkUnavailable { source, remedy, .. } => json!({"reason": source.to_string(), "remedy": remedy}),
            Error::PortUnavailable { address, source, remedy } => {
                let (host, reason) = (address.ip().to_string(), source.to_string());
                json!({"address": host, "host_port": address.port(), "reason": reason, "remedy": remedy})
            }
            Error::FolderRefused { field, path, source, remedy } => {
                let (path, reason) = (path.display().to_string(), source.to_string());
                json!({"field": field, "path": path, "reason": reason, "remedy": remedy})
            }
            Error::ChannelClosed { sent, .. } | Error::ChannelTimeout { sent, .. } => json!({"sent": sent}),
            Error::MessageTooLarge { .. } | Error::UntrustedSocket { .. } => json!({"sent": false}),
            Error::ForeignSocket { uid, .. } => json!({"uid": uid, "sent": false}),
            Error::InvalidState { operation, state, .. } => json!({"operation": operation, "state": state.as_str()}),
            Error::Owner { details, .. } => details.clone(),
            _ => json!({}),
        }
    }

    /// An error as another process of this user has it; a code that this version does not know is a `host_error`.
    pub(crate) fn of_owner(code: &str, message: String, details: Value) -> Self {
        const CODES: [&str; 29] = [
            "invalid_type",
            "invalid_value",
            "quota_exceeded",
            "vm_id_taken",
            "vm_not_found",
            "template_not_found",
            "template_taken",
            "state_mismatch",
            "state_damaged",
            "invalid_state",
            "backend_unavailable",
            "not_supported",
            "isolation_unavailable",
            "limit_too_low",
            "network_unavailable",
            "image_unreadable",
            "image_invalid",
            "start_failed",
            "start_timeout",
            "vm_died",
            "channel_closed",
            "channel_timeout",
            "handshake_failed",
            "message_too_large",
            "vmm_error",
            "folder_refused",
            "cancelled",
            "busy",
            "reserved_action",
        ];
        let code = CODES.into_iter().find(|known| *known == code).unwrap_or("host_error");
        Error::Owner { code, message, details }
    }

    /// The same, of another VM: one of the pool is known by its first name to what was made for it.
    #[must_use]
    pub fn of(mut self, name: &VmId) -> Self {
        match &mut self {
            Error::StartFailed { vm_id, .. }
            | Error::StartTimeout { vm_id, .. }
            | Error::VmDied { vm_id, .. }
            | Error::NotSupported { vm_id, .. }
            | Error::HandshakeFailed { vm_id, .. }
            | Error::Vmm { vm_id, .. } => vm_id.clone_from(name),
            Error::ChannelClosed { vm_id, .. }
            | Error::ChannelTimeout { vm_id, .. }
            | Error::MessageTooLarge { vm_id, .. } => *vm_id = name.to_string(),
            _ => {}
        }
        self
    }

    pub(crate) fn host(operation: &'static str, object: impl std::fmt::Display, cause: impl Into<Cause>) -> Self {
        Error::Host { operation, object: object.to_string(), source: cause.into(), remedy: None }
    }

    pub(crate) fn channel_closed(vm_id: impl std::fmt::Display, cause: impl Into<Cause>, sent: bool) -> Self {
        Error::ChannelClosed { vm_id: vm_id.to_string(), source: cause.into(), sent }
    }
}
