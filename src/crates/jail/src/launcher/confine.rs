//! The stages that confine: cgroups, namespaces, limits.
//!
//! Architecture invariant: each function is one stage, names itself in its failures, and is called from exactly one of
//! `main` (L), `supervisor` (C) and `vmm` (V), in the order of `Stage`. Nothing is skipped silently: what the spec asks
//! for is done or the launch fails.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Namespaces, Rlimit, Stage};
use nix::errno::Errno;
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::sys::statfs::{statfs, CGROUP2_SUPER_MAGIC};
use nix::sys::{prctl, resource, signal::Signal};
use nix::unistd::{chdir, getppid, sethostname, Pid};

use super::failure::Failure;

/// The groups to join, open for writing: opened with the launcher's rights and in the launcher's mount namespace.
pub type Cgroups = Vec<(PathBuf, File)>;

pub fn open_cgroups(paths: &[PathBuf]) -> Result<Cgroups, Failure> {
    let open = |path: &PathBuf| match OpenOptions::new().write(true).open(path) {
        Ok(file) => Ok((path.clone(), file)),
        Err(error) => Err(Failure::io(Stage::Cgroup, &error, format_args!("opening {} for writing", path.display()))),
    };
    paths.iter().map(open).collect()
}

/// The group's folder, when exactly one is to be joined and it is of the unified hierarchy: only there can a process be
/// born.
pub fn birthplace(paths: &[PathBuf]) -> Option<File> {
    let [procs] = paths else { return None };
    let folder = procs.parent().filter(|_| procs.ends_with("cgroup.procs"))?;
    let is_unified = |folder: &Path| statfs(folder).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    File::open(folder).ok().filter(|_| is_unified(folder))
}

/// Moves the calling process, and with it every later child, into the groups.
pub fn join_cgroups(cgroups: Cgroups) -> Result<(), Failure> {
    for (path, mut file) in cgroups {
        // "0" is the writer itself, whatever its number is in whichever PID namespace (cgroups(7)).
        file.write_all(b"0")
            .map_err(|error| Failure::io(Stage::Cgroup, &error, format_args!("joining {}", path.display())))?;
    }
    Ok(())
}

/// A PID namespace for the next child; the caller itself stays where it is.
pub fn prepare_pid_namespace() -> Result<(), Failure> {
    enter(CloneFlags::CLONE_NEWPID, Stage::PidNamespace, "PID")
}

/// A mount namespace that nothing propagates into or out of.
fn enter_mount_namespace() -> Result<(), Failure> {
    enter(CloneFlags::CLONE_NEWNS, Stage::MountNamespace, "mount")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|errno| Failure::errno(Stage::MountNamespace, errno, "making all mounts private"))
}

/// A network namespace with nothing in it but a loopback that is down.
fn enter_net_namespace() -> Result<(), Failure> {
    enter(CloneFlags::CLONE_NEWNET, Stage::NetNamespace, "network")
}

fn enter_ipc_namespace() -> Result<(), Failure> {
    enter(CloneFlags::CLONE_NEWIPC, Stage::IpcNamespace, "IPC")
}

/// The host's name is no business of a VMM's.
const HOSTNAME: &str = "jail";

fn enter_uts_namespace() -> Result<(), Failure> {
    enter(CloneFlags::CLONE_NEWUTS, Stage::UtsNamespace, "UTS")?;
    sethostname(HOSTNAME).map_err(|errno| Failure::errno(Stage::UtsNamespace, errno, "sethostname"))
}

/// The namespaces that the supervisor enters itself, in which the VMM is then born.
pub fn enter_supervisor_namespaces(namespaces: Namespaces) -> Result<(), Failure> {
    if namespaces.mount {
        enter_mount_namespace()?;
    }
    if namespaces.net {
        enter_net_namespace()?;
    }
    if namespaces.ipc {
        enter_ipc_namespace()?;
    }
    if namespaces.uts {
        enter_uts_namespace()?;
    }
    Ok(())
}

pub fn enter(flag: CloneFlags, stage: Stage, name: &str) -> Result<(), Failure> {
    unshare(flag).map_err(|errno| {
        let way_out = match errno {
            Errno::EPERM if stage == Stage::UserNamespace => {
                " (this host denies user namespaces to this user: see kernel.unprivileged_userns_clone and \
                 kernel.apparmor_restrict_unprivileged_userns, or a container's seccomp profile)"
            }
            Errno::EPERM => " (needs root or a user namespace: microvm doctor says what this host lacks)",
            Errno::ENOSPC | Errno::EUSERS => " (no more of them allowed: see the sysctls user.max_*_namespaces)",
            Errno::EINVAL => " (this kernel was built without them)",
            _ => "",
        };
        Failure::errno(stage, errno, format_args!("entering a new {name} namespace{way_out}"))
    })
}

pub fn enter_cwd(path: &Path) -> Result<(), Failure> {
    chdir(path).map_err(|errno| Failure::errno(Stage::Cwd, errno, format_args!("chdir to {}", path.display())))
}

/// Sets the limits. Where the manager itself was started with a lower hard limit, that one holds: no process of the jail may raise it.
pub fn apply_rlimits(rlimits: &[Rlimit]) -> Result<(), Failure> {
    for &Rlimit { resource, soft, hard } in rlimits {
        let kernel = resource.into();
        let (_, inherited) = resource::getrlimit(kernel)
            .map_err(|errno| Failure::errno(Stage::Rlimits, errno, format_args!("reading rlimit {resource}")))?;
        let hard = hard.min(inherited);
        let soft = soft.min(hard);
        resource::setrlimit(kernel, soft, hard).map_err(|errno| {
            Failure::errno(Stage::Rlimits, errno, format_args!("setting rlimit {resource} to {soft}:{hard}"))
        })?;
    }
    Ok(())
}

/// Has the kernel kill the caller when its parent, `supervisor`, dies. For a jail without a PID namespace, whose end
/// would do the same. The signal follows the parent's *thread*; the supervisor has only one. It is forgotten when a
/// process changes its uid, so this comes after every stage that touches credentials.
pub fn die_with(supervisor: Pid) -> Result<(), Failure> {
    prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| Failure::errno(Stage::ParentDeath, errno, "PR_SET_PDEATHSIG"))?;
    // It may have died before the line above; then no signal will come.
    if getppid() == supervisor {
        Ok(())
    } else {
        Err(Failure::new(Stage::ParentDeath, "the supervisor has died"))
    }
}
