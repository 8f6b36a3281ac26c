//! What travels over the control socket: the launch spec, the events and the requests.
//!
//! Architecture invariant: plain data and checks on it; no system call is made here.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longest spec or request the launcher reads. Below `net.core.wmem_default` (212,992), which bounds what fits into
/// one packet of the socket anyway.
pub const MAX_PACKET_BYTES: usize = 192 * 1024;

/// Longest event the launcher sends; messages are cut to fit.
pub const MAX_EVENT_BYTES: usize = 4096;

/// Most descriptors in one spec: the kernel's `SCM_MAX_FD`.
pub const MAX_FDS: usize = 253;

/// Highest descriptor number the VMM can be given. The descriptors wait above the highest target until they are put
/// in place, and all of that has to fit below the usual soft limit of 1024 open files.
pub const MAX_TARGET_FD: i32 = 511;

/// Exit code of a process of the jail that failed before the VMM ran.
pub const SETUP_FAILED: i32 = 125;

/// Everything the launcher has to know to start one VMM.
///
/// What is left out of the JSON confines more, never less: all namespaces, `no_new_privs`, an empty environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// `argv[0]` is the VMM's absolute path.
    pub argv: Vec<String>,
    /// The complete environment; nothing is inherited.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory, absolute.
    #[serde(default = "root_directory")]
    pub cwd: PathBuf,
    /// The VMM's descriptor number for each passed descriptor, in the order of `SCM_RIGHTS`. Of 0, 1 and 2, those not
    /// named here become `/dev/null`.
    #[serde(default)]
    pub fds: Vec<i32>,
    #[serde(default)]
    pub namespaces: Namespaces,
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// `cgroup.procs` files (absolute) of the groups to join before anything else is set up, one per hierarchy.
    #[serde(default)]
    pub cgroup_procs: Vec<PathBuf>,
    #[serde(default = "yes")]
    pub no_new_privs: bool,
}

fn root_directory() -> PathBuf {
    PathBuf::from("/")
}

fn yes() -> bool {
    true
}

/// Which new namespaces the VMM gets. The default is all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Namespaces {
    pub pid: bool,
    /// Private: no mount propagates in or out.
    pub mount: bool,
    /// Empty: loopback only, and that is down.
    pub net: bool,
    pub ipc: bool,
    pub uts: bool,
    /// The effective uid and gid map to themselves, `setgroups` is denied. An ordinary user needs this for the others.
    pub user: bool,
}

impl Namespaces {
    pub const ALL: Self = Self { pid: true, mount: true, net: true, ipc: true, uts: true, user: true };
    pub const NONE: Self = Self { pid: false, mount: false, net: false, ipc: false, uts: false, user: false };
}

impl Default for Namespaces {
    fn default() -> Self {
        Self::ALL
    }
}

/// One resource limit; `u64::MAX` is "unlimited".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    pub resource: Resource,
    pub soft: u64,
    pub hard: u64,
}

/// A limit of setrlimit(2), by its name there: `nofile` is `RLIMIT_NOFILE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    As,
    Core,
    Cpu,
    Data,
    Fsize,
    Memlock,
    Nofile,
    Nproc,
    Stack,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::As => "as",
            Self::Core => "core",
            Self::Cpu => "cpu",
            Self::Data => "data",
            Self::Fsize => "fsize",
            Self::Memlock => "memlock",
            Self::Nofile => "nofile",
            Self::Nproc => "nproc",
            Self::Stack => "stack",
        })
    }
}

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
    /// L.
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
    /// C: watching the VMM and the manager.
    Supervise,
    /// V.
    Cwd,
    /// V.
    Rlimits,
    /// V.
    NoNewPrivs,
    /// V: dying with the supervisor.
    ParentDeath,
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
            Self::Supervise => "supervise",
            Self::Cwd => "cwd",
            Self::Rlimits => "rlimits",
            Self::NoNewPrivs => "no_new_privs",
            Self::ParentDeath => "parent_death",
            Self::Exec => "exec",
        })
    }
}

/// What the launcher tells the manager; the crate's documentation has the order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum JailEvent {
    /// Sent by C: from now on the jail follows the control socket.
    Supervising,
    /// Sent by V right before `exec`.
    Started,
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

/// What the manager asks of the supervisor. A request that makes no sense is a broken manager: the jail fails
/// (`supervise`) and takes the VMM with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailRequest {
    /// 1 to 64, sent to the VMM's process only.
    pub signal: i32,
}

/// Why a spec or a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    #[error("argv is empty; argv[0] must be the VMM's absolute path")]
    NoProgram,
    #[error("{field} is {path:?}, which is not absolute; give the full path")]
    NotAbsolute { field: &'static str, path: PathBuf },
    #[error("{field} {value:?} holds a NUL byte, which no program can be given; remove it")]
    NulByte { field: &'static str, value: String },
    #[error("environment variable name {name:?} is empty or holds '='; rename it")]
    EnvName { name: String },
    #[error("environment variable {name:?} is given twice; give it once")]
    EnvTwice { name: String },
    #[error("{named} target descriptors in fds, but {passed} descriptors came with the spec; the two must be equal")]
    FdCount { named: usize, passed: usize },
    #[error("target descriptor {fd} is not in 0..={MAX_TARGET_FD}; choose a number in that range")]
    FdRange { fd: i32 },
    #[error("target descriptor {fd} is named twice; every descriptor needs a number of its own")]
    FdTwice { fd: i32 },
    #[error("rlimit {resource}: soft limit {soft} is above hard limit {hard}; lower it")]
    RlimitOrder { resource: Resource, soft: u64, hard: u64 },
    #[error("rlimit {resource} is given twice; give it once")]
    RlimitTwice { resource: Resource },
    #[error("signal {signal} is not in 1..=64; send one that exists")]
    Signal { signal: i32 },
}

impl LaunchSpec {
    /// A spec for `argv`, with everything else at its strictest.
    #[must_use]
    pub fn new(argv: Vec<String>) -> Self {
        Self {
            argv,
            env: Vec::new(),
            cwd: root_directory(),
            fds: Vec::new(),
            namespaces: Namespaces::default(),
            rlimits: Vec::new(),
            cgroup_procs: Vec::new(),
            no_new_privs: true,
        }
    }

    /// Checks what can be checked without a system call.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), SpecError> {
        let program = self.argv.first().ok_or(SpecError::NoProgram)?;
        absolute("argv[0]", Path::new(program))?;
        absolute("cwd", &self.cwd)?;
        for path in &self.cgroup_procs {
            absolute("cgroup_procs", path)?;
        }
        for argument in &self.argv {
            no_nul("argument", argument)?;
        }
        let mut names = BTreeSet::new();
        for (name, value) in &self.env {
            no_nul("environment variable name", name)?;
            no_nul("environment variable value", value)?;
            if name.is_empty() || name.contains('=') {
                return Err(SpecError::EnvName { name: name.clone() });
            }
            if !names.insert(name) {
                return Err(SpecError::EnvTwice { name: name.clone() });
            }
        }
        let mut targets = BTreeSet::new();
        for &fd in &self.fds {
            if !(0..=MAX_TARGET_FD).contains(&fd) {
                return Err(SpecError::FdRange { fd });
            }
            if !targets.insert(fd) {
                return Err(SpecError::FdTwice { fd });
            }
        }
        let mut limited = BTreeSet::new();
        for &Rlimit { resource, soft, hard } in &self.rlimits {
            if soft > hard {
                return Err(SpecError::RlimitOrder { resource, soft, hard });
            }
            if !limited.insert(resource) {
                return Err(SpecError::RlimitTwice { resource });
            }
        }
        Ok(())
    }

    /// Checks that as many descriptors were passed as are named.
    ///
    /// # Errors
    /// [`SpecError::FdCount`].
    pub fn validate_passed(&self, passed: usize) -> Result<(), SpecError> {
        let named = self.fds.len();
        if named == passed {
            Ok(())
        } else {
            Err(SpecError::FdCount { named, passed })
        }
    }
}

impl JailRequest {
    /// Checks that the signal exists.
    ///
    /// # Errors
    /// [`SpecError::Signal`].
    pub fn validate(&self) -> Result<(), SpecError> {
        if (1..=64).contains(&self.signal) {
            Ok(())
        } else {
            Err(SpecError::Signal { signal: self.signal })
        }
    }
}

fn absolute(field: &'static str, path: &Path) -> Result<(), SpecError> {
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(SpecError::NulByte { field, value: path.display().to_string() });
    }
    if path.is_absolute() {
        Ok(())
    } else {
        Err(SpecError::NotAbsolute { field, path: path.to_owned() })
    }
}

fn no_nul(field: &'static str, value: &str) -> Result<(), SpecError> {
    if value.contains('\0') {
        Err(SpecError::NulByte { field, value: value.to_owned() })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn test_spec_with_only_argv_confines_all() {
        let spec: LaunchSpec = serde_json::from_str(r#"{"argv":["/bin/true"]}"#).unwrap();
        assert_eq!(spec, LaunchSpec::new(vec!["/bin/true".into()]));
        assert_eq!(spec.namespaces, Namespaces::ALL);
        assert!(spec.no_new_privs);
    }

    #[test]
    fn test_spec_with_partial_namespaces_keeps_the_rest_on() {
        let spec: LaunchSpec = serde_json::from_str(r#"{"argv":["/a"],"namespaces":{"user":false}}"#).unwrap();
        assert_eq!(spec.namespaces, Namespaces { user: false, ..Namespaces::ALL });
    }

    #[test]
    fn test_spec_with_unknown_field_is_refused() {
        let error = serde_json::from_str::<LaunchSpec>(r#"{"argv":["/a"],"uid":7}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `uid`"), "{error}");
    }

    #[test]
    fn test_validate_names_the_broken_rule() {
        let base = LaunchSpec::new(vec!["/vmm".into()]);
        let rlimit = |soft, hard| Rlimit { resource: Resource::Nofile, soft, hard };
        let cases = [
            (LaunchSpec { argv: vec![], ..base.clone() }, SpecError::NoProgram),
            (LaunchSpec { fds: vec![3, 3], ..base.clone() }, SpecError::FdTwice { fd: 3 }),
            (LaunchSpec { fds: vec![-1], ..base.clone() }, SpecError::FdRange { fd: -1 }),
            (LaunchSpec { fds: vec![512], ..base.clone() }, SpecError::FdRange { fd: 512 }),
            (
                LaunchSpec { cwd: "here".into(), ..base.clone() },
                SpecError::NotAbsolute { field: "cwd", path: "here".into() },
            ),
            (
                LaunchSpec { argv: vec!["/vmm".into(), "a\0b".into()], ..base.clone() },
                SpecError::NulByte { field: "argument", value: "a\0b".into() },
            ),
            (
                LaunchSpec { env: vec![("A=B".into(), String::new())], ..base.clone() },
                SpecError::EnvName { name: "A=B".into() },
            ),
            (
                LaunchSpec { rlimits: vec![rlimit(2, 1)], ..base.clone() },
                SpecError::RlimitOrder { resource: Resource::Nofile, soft: 2, hard: 1 },
            ),
            (
                LaunchSpec { rlimits: vec![rlimit(1, 1), rlimit(1, 1)], ..base.clone() },
                SpecError::RlimitTwice { resource: Resource::Nofile },
            ),
        ];
        for (spec, expected) in cases {
            assert_eq!(spec.validate(), Err(expected));
        }
        assert_eq!(base.validate(), Ok(()));
        assert_eq!(base.validate_passed(1), Err(SpecError::FdCount { named: 0, passed: 1 }));
    }

    #[test]
    fn test_events_have_the_agreed_json() {
        let json = |event: &JailEvent| serde_json::to_string(event).unwrap();
        assert_eq!(json(&JailEvent::Supervising), r#"{"event":"supervising"}"#);
        assert_eq!(json(&JailEvent::Started), r#"{"event":"started"}"#);
        assert_eq!(
            json(&JailEvent::Failed { stage: Stage::NoNewPrivs, errno: 1, message: "m".into() }),
            r#"{"event":"failed","stage":"no_new_privs","errno":1,"message":"m"}"#
        );
        assert_eq!(
            json(&JailEvent::Exited { code: None, signal: Some(9) }),
            r#"{"event":"exited","code":null,"signal":9}"#
        );
    }

    #[test]
    fn test_request_with_impossible_signal_is_refused() {
        assert_eq!(JailRequest { signal: 0 }.validate(), Err(SpecError::Signal { signal: 0 }));
        assert_eq!(JailRequest { signal: 65 }.validate(), Err(SpecError::Signal { signal: 65 }));
        assert_eq!(JailRequest { signal: 15 }.validate(), Ok(()));
    }
}
