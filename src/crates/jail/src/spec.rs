//! What the launcher is told: the launch spec and the requests that may follow it.
//!
//! Architecture invariant: plain data and checks on it; no system call is made here.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use nix::sys::resource::Resource as Kernel;
use serde::{Deserialize, Serialize};

/// Longest spec or request the launcher reads. Below `net.core.wmem_default` (212,992), which bounds what fits into
/// one packet of the socket anyway.
pub const MAX_PACKET_BYTES: usize = 192 * 1024;

/// Most descriptors in one spec: the kernel's `SCM_MAX_FD`.
pub const MAX_FDS: usize = 253;

/// Highest descriptor number the VMM can be given. The descriptors wait above the highest target until they are put
/// in place, and all of that has to fit below the usual soft limit of 1024 open files.
pub const MAX_TARGET_FD: i32 = 511;

/// Everything the launcher has to know to start one VMM.
///
/// What is left out of the JSON confines more, never less: all namespaces, a root with nothing in it, an empty
/// environment, the allow-list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// `argv[0]` is the VMM's absolute path, as the VMM sees it.
    pub argv: Vec<String>,
    /// The complete environment; nothing is inherited.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory, absolute, as the VMM sees it.
    #[serde(default = "root_directory")]
    pub cwd: PathBuf,
    /// The VMM's descriptor number for each passed descriptor, in the order of `SCM_RIGHTS`. Of 0, 1 and 2, those not
    /// named here become `/dev/null`.
    #[serde(default)]
    pub fds: Vec<i32>,
    #[serde(default)]
    pub namespaces: Namespaces,
    /// A root directory that holds `files` and nothing else; needs the mount namespace.
    #[serde(default = "yes")]
    pub new_root: bool,
    /// A `/proc` of the jail's own processes in the new root: descriptors have names there. Landlock allows to open
    /// nothing in it but what the descriptors stand for.
    #[serde(default)]
    pub proc: bool,
    /// What the VMM may see, and Landlock's rules. Without `new_root`, `inside` must be `host`.
    #[serde(default)]
    pub files: Vec<Visible>,
    /// Whom the VMM runs as; only root may say so. `None`: as the launcher's own user.
    #[serde(default)]
    pub identity: Option<Identity>,
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// Transparent huge pages where the VMM asks for them; without it, nowhere.
    #[serde(default = "yes")]
    pub huge_pages: bool,
    /// `cgroup.procs` or (v1) `tasks` files, absolute, of the groups to join before anything else is set up, one per
    /// hierarchy.
    #[serde(default)]
    pub cgroup_procs: Vec<PathBuf>,
    /// Restricts the VMM to `files` a second time, by Landlock, as far as the kernel has it.
    #[serde(default = "yes")]
    pub landlock: bool,
    #[serde(default)]
    pub seccomp: Seccomp,
    /// Answers the VMM's opening of `/dev/net/tun`, for reading and writing and once, with a descriptor that was opened in
    /// the launcher's network namespace: there a VMM finds its tap that knows only the tap's name. Linux 5.9.
    #[serde(default)]
    pub tap: bool,
    /// Denies nothing by seccomp and Landlock, but reports what they would have denied.
    #[serde(default)]
    pub audit: bool,
}

fn root_directory() -> PathBuf {
    PathBuf::from("/")
}

fn yes() -> bool {
    true
}

/// A file or device of the host, and where the VMM finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Visible {
    /// Absolute and without symbolic links: it is looked up below another root than the one it was written for.
    pub host: PathBuf,
    pub inside: PathBuf,
    pub access: Access,
}

/// What the VMM may do with a file; the mount, Landlock and the audit all follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    Read,
    /// Read, execute, map as code.
    Execute,
    /// Read and write what is there; nothing can be created.
    Write,
    /// A device node: read, write, ioctl.
    Device,
    /// A folder for sockets: they can be made and removed in it, and what else is in it read and written; no file can be made.
    Sockets,
    /// As `Sockets`, and files can be made in it.
    Folder,
}

impl Visible {
    pub fn new(host: impl Into<PathBuf>, inside: impl Into<PathBuf>, access: Access) -> Self {
        Self { host: host.into(), inside: inside.into(), access }
    }
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
    /// With a host name that says nothing of the host.
    pub uts: bool,
    /// One user and one group, mapped to themselves; `setgroups` is denied, and no further namespaces can be made. An
    /// ordinary user needs this for the others. Root enters it last: then it has no power over the others.
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

/// A user that owns nothing but one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
}

/// Which filter of system calls the VMM gets; `policy.rs` has the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// For the launcher's own tests.
    None,
    /// Everything but what no VMM needs: for VMMs whose calls have not been measured.
    DenyList,
    /// The same, but for what Firecracker and Cloud Hypervisor do: they make sockets of the Unix domain, for their API and
    /// their vsock, and anonymous files, for rings that are mapped twice.
    DenyListForRustVmms,
    /// Nothing but what the measured VMMs need.
    #[default]
    AllowList,
    /// Nothing but what the QEMU of our own package needs, which is static and has few devices: a shorter list.
    AllowListForOwnQemu,
    /// Nothing but what the gateway of a user-mode network needs: sockets towards IP networks and questions to rtnetlink, no
    /// file. Landlock lets it have TCP, too.
    Gateway,
}

/// One resource limit; `u64::MAX` is "unlimited".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    pub resource: Resource,
    pub soft: u64,
    pub hard: u64,
}

impl Rlimit {
    /// The same value for both.
    #[must_use]
    pub fn both(resource: Resource, value: u64) -> Self {
        Self { resource, soft: value, hard: value }
    }
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

impl From<Resource> for Kernel {
    fn from(resource: Resource) -> Self {
        match resource {
            Resource::As => Self::RLIMIT_AS,
            Resource::Core => Self::RLIMIT_CORE,
            Resource::Cpu => Self::RLIMIT_CPU,
            Resource::Data => Self::RLIMIT_DATA,
            Resource::Fsize => Self::RLIMIT_FSIZE,
            Resource::Memlock => Self::RLIMIT_MEMLOCK,
            Resource::Nofile => Self::RLIMIT_NOFILE,
            Resource::Nproc => Self::RLIMIT_NPROC,
            Resource::Stack => Self::RLIMIT_STACK,
        }
    }
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
    #[error("files: inside {path:?} must be a plain path below /, with no '.' and no '..' in it")]
    Inside { path: PathBuf },
    #[error("files: {path:?} is named twice; every file needs a place of its own")]
    InsideTwice { path: PathBuf },
    #[error("new_root needs namespaces.mount; switch both on or both off")]
    RootWithoutMounts,
    #[error("proc needs new_root and namespaces.pid, else it would show the host's processes; switch it off")]
    ProcOfTheHost,
    #[error("files: without new_root {path:?} cannot appear under another name; inside must be host")]
    MovedWithoutRoot { path: PathBuf },
    #[error("tap needs namespaces.net, without which the VMM opens its tap itself, and seccomp; switch it off")]
    TapOfTheHost,
    #[error("identity: uid and gid must not be 0; the VMM must not be root")]
    RootIdentity,
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
            new_root: true,
            proc: false,
            files: Vec::new(),
            identity: None,
            rlimits: Vec::new(),
            huge_pages: true,
            cgroup_procs: Vec::new(),
            landlock: true,
            seccomp: Seccomp::default(),
            tap: false,
            audit: false,
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
        self.validate_env()?;
        self.validate_files()?;
        if self.identity.is_some_and(|identity| identity.uid == 0 || identity.gid == 0) {
            return Err(SpecError::RootIdentity);
        }
        if self.tap && !(self.namespaces.net && self.seccomp != Seccomp::None) {
            return Err(SpecError::TapOfTheHost);
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

    fn validate_env(&self) -> Result<(), SpecError> {
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
        Ok(())
    }

    fn validate_files(&self) -> Result<(), SpecError> {
        if self.new_root && !self.namespaces.mount {
            return Err(SpecError::RootWithoutMounts);
        }
        if self.proc && !(self.new_root && self.namespaces.pid) {
            return Err(SpecError::ProcOfTheHost);
        }
        let mut places = BTreeSet::new();
        for Visible { host, inside, .. } in &self.files {
            absolute("files: host", host)?;
            absolute("files: inside", inside)?;
            if !self.new_root && host != inside {
                return Err(SpecError::MovedWithoutRoot { path: host.clone() });
            }
            let plain = inside.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
            if !plain || inside.parent().is_none() {
                return Err(SpecError::Inside { path: inside.clone() });
            }
            if !places.insert(inside) {
                return Err(SpecError::InsideTwice { path: inside.clone() });
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
        assert_eq!((spec.namespaces, spec.seccomp), (Namespaces::ALL, Seccomp::AllowList));
        assert!(spec.new_root && spec.landlock && !spec.audit && spec.files.is_empty());
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
        let file = |host: &str, inside: &str| Visible::new(host, inside, Access::Read);
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
            (
                LaunchSpec { files: vec![file("/a", "/../etc")], ..base.clone() },
                SpecError::Inside { path: "/../etc".into() },
            ),
            (LaunchSpec { files: vec![file("/a", "/")], ..base.clone() }, SpecError::Inside { path: "/".into() }),
            (
                LaunchSpec { files: vec![file("/a", "/c"), file("/b", "/c")], ..base.clone() },
                SpecError::InsideTwice { path: "/c".into() },
            ),
            (
                LaunchSpec { files: vec![file("/a", "/c")], new_root: false, ..base.clone() },
                SpecError::MovedWithoutRoot { path: "/a".into() },
            ),
            (LaunchSpec { namespaces: Namespaces::NONE, ..base.clone() }, SpecError::RootWithoutMounts),
            (
                LaunchSpec { proc: true, namespaces: Namespaces { pid: false, ..Namespaces::ALL }, ..base.clone() },
                SpecError::ProcOfTheHost,
            ),
            (LaunchSpec { identity: Some(Identity { uid: 7, gid: 0 }), ..base.clone() }, SpecError::RootIdentity),
            (
                LaunchSpec { tap: true, namespaces: Namespaces { net: false, ..Namespaces::ALL }, ..base.clone() },
                SpecError::TapOfTheHost,
            ),
            (LaunchSpec { tap: true, seccomp: Seccomp::None, ..base.clone() }, SpecError::TapOfTheHost),
        ];
        for (spec, expected) in cases {
            assert_eq!(spec.validate(), Err(expected));
        }
        assert_eq!(base.validate(), Ok(()));
        assert_eq!(base.validate_passed(1), Err(SpecError::FdCount { named: 0, passed: 1 }));
    }

    #[test]
    fn test_request_with_impossible_signal_is_refused() {
        assert_eq!(JailRequest { signal: 0 }.validate(), Err(SpecError::Signal { signal: 0 }));
        assert_eq!(JailRequest { signal: 65 }.validate(), Err(SpecError::Signal { signal: 65 }));
        assert_eq!(JailRequest { signal: 15 }.validate(), Ok(()));
    }
}
