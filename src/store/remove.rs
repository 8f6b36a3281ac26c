//! Removal of whole folders, by descriptors.
//!
//! Architecture invariant: nothing is removed but what is reached by descriptors from the folder that was named: links are
//! removed themselves, and a mount point ends the work with an error. Folders nested deep are brought up first, so that
//! neither the stack nor the number of descriptors grows with what a VMM has made.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{openat, renameat, AtFlags, OFlag, AT_FDCWD};
use nix::sys::stat::{fchmodat, fstat, fstatat, FchmodatFlags, Mode, SFlag};
use nix::unistd::{geteuid, unlinkat, UnlinkatFlags};

use super::dir::is_kind;

/// How many folders are open at a time.
const DEPTH: u32 = 24;

/// The names in an open folder.
pub fn names(folder: &OwnedFd) -> io::Result<Vec<OsString>> {
    // A magic link: it leads to the open folder, wherever that is by now.
    let listed = fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))?;
    listed.map(|entry| Ok(entry?.file_name())).collect()
}

/// Which mount a descriptor was opened on; bind mounts of one file system differ.
fn mount_of(fd: &impl AsRawFd) -> io::Result<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("the kernel does not tell on which mount it is"))
}

/// Removes the entry `name` of `parent` with all it holds; nothing when there is none.
pub fn all(parent: &impl AsFd, name: &OsStr) -> io::Result<()> {
    let found = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(()),
        found => found?,
    };
    if !is_kind(&found, SFlag::S_IFDIR) {
        return unlink(parent, name, UnlinkatFlags::NoRemoveDir);
    }
    let here = openat(parent, ".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mount = mount_of(&here)?;
    let Some(top) = open(parent, name, mount)? else { return Ok(()) };
    loop {
        let mut lifted = 0;
        empty(&top, &top, mount, DEPTH, &mut lifted)?;
        if lifted == 0 {
            break;
        }
    }
    unlink(parent, name, UnlinkatFlags::RemoveDir)
}

/// Opens a folder for emptying; `None` when it is gone.
fn open(parent: &impl AsFd, name: &OsStr, mount: u64) -> io::Result<Option<OwnedFd>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let found = match openat(parent, name, flags | OFlag::O_PATH, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(None),
        found => found?,
    };
    if mount_of(&found)? != mount {
        return Err(io::Error::from(Errno::EBUSY));
    }
    let stat = fstat(&found)?;
    if stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o700 != 0o700 {
        let by_fd = format!("/proc/self/fd/{}", found.as_raw_fd());
        fchmodat(AT_FDCWD, by_fd.as_str(), Mode::S_IRWXU, FchmodatFlags::FollowSymlink)?;
    }
    Ok(Some(openat(&found, ".", OFlag::O_RDONLY | flags, Mode::empty())?))
}

/// Empties a folder. What is deeper than `depth` is lifted into `top`, which then has to be emptied again.
fn empty(folder: &OwnedFd, top: &OwnedFd, mount: u64, depth: u32, lifted: &mut u64) -> io::Result<()> {
    for name in names(folder)? {
        let found = match fstatat(folder, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => continue,
            found => found?,
        };
        if !is_kind(&found, SFlag::S_IFDIR) {
            unlink(folder, &name, UnlinkatFlags::NoRemoveDir)?;
            continue;
        }
        let Some(within) = open(folder, &name, mount)? else { continue };
        if depth == 0 {
            lift(folder, &name, top, lifted)?;
        } else {
            empty(&within, top, mount, depth - 1, lifted)?;
            unlink(folder, &name, UnlinkatFlags::RemoveDir)?;
        }
    }
    Ok(())
}

/// Moves a folder to the top, under a name that is free there.
fn lift(folder: &OwnedFd, name: &OsStr, top: &OwnedFd, lifted: &mut u64) -> io::Result<()> {
    loop {
        *lifted += 1;
        let new = format!(".lifted-{lifted}");
        match fstatat(top, new.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(renameat(folder, name, top, new.as_str())?),
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
    }
}

fn unlink(parent: &impl AsFd, name: &OsStr, flags: UnlinkatFlags) -> io::Result<()> {
    match unlinkat(parent, name, flags) {
        // Another process removes the same.
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;
    use std::os::unix::fs::{symlink, PermissionsExt};

    #[test]
    fn test_all_removes_what_is_closed_and_what_is_deep() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        fs::create_dir_all(scratch.path().join("x").join(["d"; 300].join("/"))).unwrap();
        fs::create_dir_all(scratch.path().join("x/closed/within")).unwrap();
        fs::write(scratch.path().join("x/closed/within/file"), b"").unwrap();
        fs::set_permissions(scratch.path().join("x/closed/within"), fs::Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(scratch.path().join("x/closed"), fs::Permissions::from_mode(0o000)).unwrap();
        dir.remove_all("x").unwrap();
        dir.remove_all("x").unwrap();
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[test]
    fn test_all_keeps_what_links_lead_to() {
        let (scratch, outside) = (Scratch::new(), Scratch::new());
        fs::write(outside.path().join("file"), b"").unwrap();
        fs::create_dir(scratch.path().join("x")).unwrap();
        symlink(outside.path(), scratch.path().join("x/folder")).unwrap();
        symlink(outside.path().join("file"), scratch.path().join("x/file")).unwrap();
        scratch.dir().remove_all("x").unwrap();
        assert!(outside.path().join("file").exists() && !scratch.path().join("x").exists());
    }

    #[test]
    fn test_all_stops_at_a_mount_point() {
        let parent = fs::File::open("/sys").unwrap();
        let on = |path: &str| fs::File::open(path).ok().and_then(|file| mount_of(&file).ok());
        let Some(point) = ["fs/cgroup", "kernel/debug", "kernel/tracing"].into_iter().find(|point| {
            let other = on(&format!("/sys/{point}"));
            other.is_some() && other != mount_of(&parent).ok()
        }) else {
            eprintln!("skipped: nothing is mounted below /sys");
            return;
        };
        let (above, name) = point.rsplit_once('/').unwrap();
        let above = fs::File::open(format!("/sys/{above}")).unwrap();
        let error = all(&above, OsStr::new(name)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EBUSY as i32), "{error}");
    }
}
