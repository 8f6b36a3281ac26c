//! A stage that failed, ready to be reported.

use std::fmt;

use crate::{JailEvent, Stage};
use nix::errno::Errno;

/// What failed, where, and what can be done about it.
#[derive(Debug)]
pub struct Failure {
    stage: Stage,
    /// 0 when no system call failed.
    errno: i32,
    message: String,
}

/// Longest message in bytes: JSON turns one byte into at most six, and an event has to stay below `MAX_EVENT_BYTES`.
const MAX_MESSAGE_BYTES: usize = 640;

impl Failure {
    pub fn new(stage: Stage, message: impl fmt::Display) -> Self {
        Self { stage, errno: 0, message: message.to_string() }
    }

    /// A system call that failed: `what` names the call and its object.
    pub fn errno(stage: Stage, errno: Errno, what: impl fmt::Display) -> Self {
        Self { stage, errno: errno as i32, message: format!("{what}: {}", errno.desc()) }
    }

    /// A fork that failed.
    pub fn fork(errno: Errno, what: &str) -> Self {
        let way_out = match errno {
            Errno::EAGAIN => " (this user's RLIMIT_NPROC, or a control group's pids.max, is used up)",
            _ => "",
        };
        Self::errno(Stage::Fork, errno, format_args!("{what}{way_out}"))
    }

    pub fn io(stage: Stage, error: &std::io::Error, what: impl fmt::Display) -> Self {
        Self { stage, errno: error.raw_os_error().unwrap_or(0), message: format!("{what}: {error}") }
    }

    pub fn to_event(&self) -> JailEvent {
        let mut message = self.message.clone();
        if message.len() > MAX_MESSAGE_BYTES {
            let cut = (0..=MAX_MESSAGE_BYTES).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(cut);
        }
        JailEvent::Failed { stage: self.stage, errno: self.errno, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stage {}: {}", self.stage, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_EVENT_BYTES;

    #[test]
    fn test_event_of_endless_message_fits() {
        for text in ["\u{1}", "é", "x"] {
            let event = Failure::new(Stage::Spec, text.repeat(100_000)).to_event();
            let json = serde_json::to_vec(&event).expect("an event is plain data");
            assert!(json.len() <= MAX_EVENT_BYTES, "{} bytes", json.len());
        }
    }
}
