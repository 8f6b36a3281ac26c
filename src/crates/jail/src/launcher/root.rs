//! The root directory: a tmpfs that holds the files that the spec names, and nothing else.
//!
//! Architecture invariant: every mount of the VMM's namespace is made here. Files are bound one by one: for the fifty
//! libraries of QEMU that takes 0.8 ms, while a folder of the host's, bound whole, would show a hundred times as many.

use std::fs::{create_dir, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::{Access, Stage, Visible};
use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::statvfs::{statvfs, FsFlags};
use nix::unistd::{chdir, pivot_root};

use super::failure::Failure;

/// Where the tmpfs is put before it becomes the root; whatever is there reappears below [`OLD`].
const STAGING: &str = "/tmp";
/// The host's root, for as long as files are bound from it.
const OLD: &str = "/.host";
const PROC: &str = "/proc";
/// Mount points are empty files; the kernel counts their inodes and pages.
const SIZE: &str = "size=256k,nr_inodes=1k,mode=755";

const NOTHING: Option<&str> = None;

fn failed(errno: Errno, what: impl std::fmt::Display) -> Failure {
    Failure::errno(Stage::Root, errno, what)
}

/// Builds the root in the caller's own mount namespace and moves there; the host's root is gone afterwards.
pub fn enter(files: &[Visible], proc: bool) -> Result<(), Failure> {
    // The staging folder may be missing on a bare host, but / never is.
    let staging = if Path::new(STAGING).is_dir() { STAGING } else { "/" };
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("jail"), staging, Some("tmpfs"), safe, Some(SIZE))
        .map_err(|errno| failed(errno, format_args!("mounting a tmpfs on {staging}{}", remedy(errno))))?;
    chdir(staging).map_err(|errno| failed(errno, "entering the new root"))?;
    let old = OLD.trim_start_matches('/');
    create_dir(old).map_err(|error| Failure::io(Stage::Root, &error, format_args!("creating {OLD}")))?;
    pivot_root(".", old).map_err(|errno| failed(errno, format_args!("pivot_root{}", remedy(errno))))?;
    chdir("/").map_err(|errno| failed(errno, "chdir to the new root"))?;
    for file in files {
        show(file)?;
    }
    // In a user namespace the kernel allows it only beside a /proc that shows as much: the host's, until it is let go of.
    if proc {
        mount_proc(safe)?;
    }
    umount2(OLD, MntFlags::MNT_DETACH).map_err(|errno| failed(errno, "letting go of the host's root"))?;
    std::fs::remove_dir(OLD).map_err(|error| Failure::io(Stage::Root, &error, format_args!("removing {OLD}")))?;
    mount(NOTHING, "/", NOTHING, safe | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, NOTHING)
        .map_err(|errno| failed(errno, "making the root read-only"))
}

/// The processes of this PID namespace, each for itself alone, and nothing of the kernel's.
fn mount_proc(flags: MsFlags) -> Result<(), Failure> {
    create_dir(PROC).map_err(|error| Failure::io(Stage::Root, &error, format_args!("creating {PROC}")))?;
    mount(Some("proc"), PROC, Some("proc"), flags | MsFlags::MS_RDONLY, Some("subset=pid,hidepid=invisible"))
        .map_err(|errno| failed(errno, format_args!("mounting {PROC}{}", remedy(errno))))
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => {
            " (this host denies mounts in user namespaces: see kernel.apparmor_restrict_unprivileged_userns, or a \
             container's profile)"
        }
        Errno::EINVAL => " (the process's root is the initial ramfs, which cannot be left)",
        _ => "",
    }
}

/// Binds one file to its place, with no more rights than its access needs.
fn show(Visible { host, inside, access }: &Visible) -> Result<(), Failure> {
    let source = PathBuf::from(format!("{OLD}{}", host.display()));
    let about = |action: &str| format!("{action} {} as {}", host.display(), inside.display());
    let io = |error: std::io::Error, action| Failure::io(Stage::Root, &error, about(action));
    let meta = source.metadata().map_err(|error| io(error, "looking at"))?;
    let parent = inside.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(|error| io(error, "making room for"))?;
    if meta.is_dir() {
        match create_dir(inside) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(io(error, "making room for")),
            Ok(()) | Err(_) => {}
        }
    } else {
        File::create(inside).map_err(|error| io(error, "making room for"))?;
    }
    mount(Some(&source), inside, NOTHING, MsFlags::MS_BIND, NOTHING)
        .map_err(|errno| failed(errno, about("binding")))?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | restrictions(*access) | inherited(inside)?;
    mount(NOTHING, inside, NOTHING, flags, NOTHING).map_err(|errno| failed(errno, about("restricting")))
}

fn restrictions(access: Access) -> MsFlags {
    let always = MsFlags::MS_NOSUID;
    match access {
        Access::Read => always | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY,
        Access::Execute => always | MsFlags::MS_NODEV | MsFlags::MS_RDONLY,
        Access::Write | Access::Sockets | Access::Folder => always | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        // Read-only mounts do not keep device nodes from being written to, only from being changed.
        Access::Device => always | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY,
    }
}

/// The flags of the mount that the file came from: a user namespace may add to them, but take none away
/// (mount_namespaces(7), "locked").
fn inherited(path: &Path) -> Result<MsFlags, Failure> {
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let flags = statvfs(path).map_err(|errno| failed(errno, format_args!("statvfs of {}", path.display())))?.flags();
    Ok(pairs.into_iter().filter(|(have, _)| flags.contains(*have)).fold(MsFlags::empty(), |sum, (_, add)| sum | add))
}
