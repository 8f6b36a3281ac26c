//! What the launcher tells: its events, the stage a failure happened in, and what confines the VMM.
//!
//! Architecture invariant: plain data; no system call is made here.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest event the launcher sends; messages are cut to fit.
pub const MAX_EVENT_BYTES: usize = 4096;

/// Exit code of a process of the jail that failed before the VMM ran.
pub const SETUP_FAILED: i32 = 125;

/// The launcher's stages, in the order in which they run; a failure names the one it happened in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// L: the control socket itself.
    Control,
    /// L: reading and checking the spec.
    Spec,
    /// L and V: the VMM's descriptors.
    Fds,
    /// L and V: session, signal mask and dispositions.
    Session,
    /// L opens, C joins.
    Cgroup,
    /// L for an ordinary user; C, with L's help, for root.
    UserNamespace,
    /// L.
    PidNamespace,
    /// L and C.
    Fork,
    /// C.
    MountNamespace,
    /// C.
    NetNamespace,
    /// C.
    IpcNamespace,
    /// C.
    UtsNamespace,
    /// C: the new root.
    Root,
    /// C: uid, gid and groups.
    Identity,
    /// C: capabilities, secure bits, no_new_privs.
    Privileges,
    /// C: watching the VMM and the manager.
    Supervise,
    /// V.
    Cwd,
    /// V.
    Rlimits,
    /// V: dying with the supervisor.
    ParentDeath,
    /// V.
    Landlock,
    /// V installs, C answers in an audit.
    Seccomp,
    /// V.
    Exec,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Spec => "spec",
            Self::Fds => "fds",
            Self::Session => "session",
            Self::Cgroup => "cgroup",
            Self::UserNamespace => "user_namespace",
            Self::PidNamespace => "pid_namespace",
            Self::Fork => "fork",
            Self::MountNamespace => "mount_namespace",
            Self::NetNamespace => "net_namespace",
            Self::IpcNamespace => "ipc_namespace",
            Self::UtsNamespace => "uts_namespace",
            Self::Root => "root",
            Self::Identity => "identity",
            Self::Privileges => "privileges",
            Self::Supervise => "supervise",
            Self::Cwd => "cwd",
            Self::Rlimits => "rlimits",
            Self::ParentDeath => "parent_death",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::Exec => "exec",
        })
    }
}

/// One layer that depends on the kernel: how it was given, or why it was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    Given(String),
    Missing(String),
}

/// The layers that only the jail itself can tell about; everything else in the spec is done or the launch fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confined {
    pub landlock: Layer,
    pub seccomp: Layer,
    /// A session keyring of the VMM's own.
    pub keyring: Layer,
    /// No further namespaces: `user.max_*_namespaces` are 0 in its user namespace.
    pub namespace_limits: Layer,
}

/// What the launcher tells the manager; the crate's documentation has the order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum JailEvent {
    /// Sent by C: from now on the jail follows the control socket.
    Supervising,
    /// Sent by V right before `exec`.
    Started { confined: Confined },
    /// Sent by C in an audit: the first time that a layer would have denied this.
    WouldDeny { layer: String, what: String },
    /// The jail could not be set up or not be kept up; everything exits.
    Failed {
        stage: Stage,
        /// 0 when no system call failed.
        errno: i32,
        message: String,
    },
    /// Sent by C: V has ended. One of the two is set.
    Exited { code: Option<i32>, signal: Option<i32> },
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn test_events_have_the_agreed_json() {
        let json = |event: &JailEvent| serde_json::to_string(event).unwrap();
        assert_eq!(json(&JailEvent::Supervising), r#"{"event":"supervising"}"#);
        let confined = Confined {
            landlock: Layer::Given("ABI 6".into()),
            seccomp: Layer::Given("allow-list".into()),
            keyring: Layer::Missing("no keys".into()),
            namespace_limits: Layer::Given("0".into()),
        };
        assert_eq!(
            json(&JailEvent::Started { confined }),
            r#"{"event":"started","confined":{"landlock":{"given":"ABI 6"},"seccomp":{"given":"allow-list"},"#
                .to_owned()
                + r#""keyring":{"missing":"no keys"},"namespace_limits":{"given":"0"}}}"#
        );
        assert_eq!(
            json(&JailEvent::Failed { stage: Stage::Privileges, errno: 1, message: "m".into() }),
            r#"{"event":"failed","stage":"privileges","errno":1,"message":"m"}"#
        );
        assert_eq!(
            json(&JailEvent::Exited { code: None, signal: Some(9) }),
            r#"{"event":"exited","code":null,"signal":9}"#
        );
    }
}
