//! Landlock: the root's rules a second time, kept by the kernel even where a mount would not hold.
//!
//! Architecture invariant: best effort, and told: an old kernel enforces what it knows, and the level is reported.

use std::path::Path;

use crate::{Access, LaunchSpec, Layer, Seccomp, Stage, Visible};
use landlock::{
    Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, ABI,
};

use super::failure::Failure;

/// The newest rights that are asked for: files, TCP, ioctl on devices, abstract sockets and signals.
const NEWEST: ABI = ABI::V6;

/// Restricts the caller, and whatever it executes, to the spec's files; no TCP, no signals and no abstract sockets
/// beyond itself.
pub fn restrict(spec: &LaunchSpec) -> Result<Layer, Failure> {
    if !spec.landlock {
        return Ok(Layer::Missing("switched off by the launch spec".into()));
    }
    if spec.audit {
        return Ok(Layer::Given("audited: nothing is refused".into()));
    }
    let failed = |error: landlock::RulesetError| Failure::new(Stage::Landlock, error);
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        // A gateway's own rules say where it connects.
        .and_then(|rules| match spec.seccomp {
            Seccomp::Gateway => rules.handle_access(AccessNet::BindTcp),
            _ => rules.handle_access(AccessNet::from_all(NEWEST)),
        })
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for Visible { inside, access, .. } in &spec.files {
        let file = PathFd::new(inside)
            .map_err(|error| Failure::new(Stage::Landlock, format!("opening {}: {error}", inside.display())))?;
        rules = rules.add_rule(PathBeneath::new(file, rights(*access, inside.is_dir()))).map_err(failed)?;
    }
    let status = rules.restrict_self().map_err(failed)?;
    let level = match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            format!("ABI {}", kernel_abi.unwrap_or(effective_abi as i32))
        }
        LandlockStatus::NotEnabled => return Ok(Layer::Missing("Landlock is off in this kernel (lsm=)".into())),
        LandlockStatus::NotImplemented => return Ok(Layer::Missing("this kernel has no Landlock (5.13)".into())),
    };
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Layer::Given(format!("{level}, every rule enforced")),
        RulesetStatus::PartiallyEnforced => Layer::Given(format!("{level}, what it knows of the rules")),
        RulesetStatus::NotEnforced => Layer::Missing(format!("{level}, but it enforces nothing")),
    })
}

fn rights(access: Access, is_dir: bool) -> BitFlags<AccessFs> {
    let read = if is_dir { AccessFs::ReadFile | AccessFs::ReadDir } else { AccessFs::ReadFile.into() };
    match access {
        Access::Read => read,
        Access::Execute => read | AccessFs::Execute,
        Access::Write => read | AccessFs::WriteFile | AccessFs::Truncate,
        Access::Device => read | AccessFs::WriteFile | AccessFs::IoctlDev,
        Access::Sockets => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeSock | AccessFs::RemoveFile,
        Access::Folder => rights(Access::Sockets, is_dir) | AccessFs::MakeReg,
    }
}

/// Whether an open of `path` with these flags would be denied, were the rules enforced. What is not there is no matter of
/// Landlock's; symbolic links are not followed: the root has none.
pub fn would_deny(files: &[Visible], path: &Path, flags: i32) -> bool {
    // Its entries stand for what the VMM holds already; Landlock has no say over pipes, sockets and memfds.
    let held = path.starts_with("/proc/self/fd");
    if held || flags & libc::O_PATH != 0 || !(path.exists() || flags & libc::O_CREAT != 0) {
        return false;
    }
    let allows = |access: Access| match access {
        Access::Read | Access::Execute => !is_write(flags),
        Access::Write | Access::Device | Access::Sockets => path.exists(),
        Access::Folder => true,
    };
    !files.iter().any(|file| path.starts_with(&file.inside) && allows(file.access))
}

pub fn is_write(flags: i32) -> bool {
    flags & (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_would_deny_follows_the_rules() {
        let file = |path: &str, access| Visible::new(path, path, access);
        let files = [file("/etc", Access::Read), file("/dev/null", Access::Device)];
        for (path, flags, denied) in [
            ("/etc/passwd", libc::O_RDONLY, false),
            ("/etc/passwd", libc::O_RDWR, true),
            ("/dev/null", libc::O_RDWR, false),
            ("/proc/self/status", libc::O_RDONLY, true),
            ("/proc/self/status", libc::O_PATH, false),
            ("/proc/self/fd/5", libc::O_RDWR, false),
            ("/not/there", libc::O_RDONLY, false),
            ("/etc/new", libc::O_WRONLY | libc::O_CREAT, true),
        ] {
            assert_eq!(would_deny(&files, Path::new(path), flags), denied, "{path} {flags:#x}");
        }
    }
}
