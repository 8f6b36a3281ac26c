//! The disks of running VMs.
//!
//! ```text
//! <cache directory>/disks/          0700, on a real file system: the runtime folder is memory on most hosts
//!   <16 hex digits>-<vm_id>         flock'ed through the open file of the manager whose VM it is
//! ```
//! Architecture invariant: the lock is on the disk itself, because managers that share this folder need not share a runtime
//! folder (two containers with one cache volume). The digits are random, so VMs of one name never share a disk. The VMM opens
//! the disk anew, so it does not hold the lock; QEMU's own locks on images (F_OFD_SETLK) do not meet flock(2)'s.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{fchown, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{openat, renameat, AtFlags, Flock, FlockArg, OFlag};
use nix::sys::stat::{fstat, fstatat, Mode};
use nix::unistd::{unlinkat, UnlinkatFlags};

use super::fork::{self, Concealed};
use super::{clock, private_dir};
use crate::error::{Error, Result};
use crate::model::VmId;

/// Random digits before each name.
const DIGITS: usize = 16;
/// New names that are tried while a sweep holds those made before.
const TRIES: usize = 8;

/// One VM's disk; its name goes when this is dropped, its content when the VMM has closed it, too.
#[derive(Debug)]
pub struct Disk {
    folder: OwnedFd,
    name: String,
    path: PathBuf,
    _concealed: Concealed,
    file: Flock<File>,
}

impl Disk {
    /// Makes an empty disk for this user alone.
    ///
    /// # Errors
    /// [`Error::Host`] when the folder is not this user's alone, or not writable.
    pub fn create(folder: &Path, vm_id: &VmId) -> Result<Self> {
        private_dir::ensure(folder, "cache_dir")?;
        let failed = |error: io::Error| Error::host("create a disk in", folder.display(), error);
        let dir = open_folder(folder).map_err(failed)?;
        for _ in 0..TRIES {
            let name = format!("{}-{vm_id}", clock::hex(&clock::random::<{ DIGITS / 2 }>()?));
            let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let fd = openat(&dir, name.as_str(), flags, Mode::from_bits_truncate(0o600));
            let file = File::from(fd.map_err(|errno| failed(errno.into()))?);
            // A umask of the user's must not keep the owner out.
            file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
            // A sweep may have taken it for a dead process's in between: then it has no name any more.
            if let Some(file) = locked(file, &dir, &name).map_err(failed)? {
                let path = folder.join(&name);
                return Ok(Self { _concealed: fork::conceal(&*file), folder: dir, name, path, file });
            }
        }
        Err(failed(io::Error::other("each one that was made was removed at once")))
    }

    /// Where the VMM finds it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk itself, whatever its name stands for by now.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The disk opened anew: reading it neither moves this one's offset nor keeps its lock.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn reader(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// Gives it to the user that its VMM runs as.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn give_to(&self, owner: u32) -> Result<()> {
        fchown(self.file(), Some(owner), None).map_err(|error| Error::host("chown", self.path.display(), error))
    }

    /// Becomes the disk of another VM.
    ///
    /// # Errors
    /// [`Error::Host`]; nothing has changed then.
    pub fn rename(&mut self, vm_id: &VmId) -> Result<()> {
        let name = format!("{}-{vm_id}", &self.name[..DIGITS]);
        renameat(&self.folder, self.name.as_str(), &self.folder, name.as_str())
            .map_err(|error| Error::host("rename", self.path.display(), error))?;
        self.path.set_file_name(&name);
        self.name = name;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.folder, &self.name) {
            log::warn!("{}: could not be removed: {error}", self.path.display());
        }
    }
}

/// The folder, if it is this user's alone.
fn open_folder(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(folder, flags, Mode::empty())?;
    let stat = fstat(&dir)?;
    match stat.st_uid == nix::unistd::geteuid().as_raw() && stat.st_mode & 0o077 == 0 {
        true => Ok(dir),
        false => Err(io::Error::other("it is not this user's alone")),
    }
}

/// Locks an open disk; `None` when another holds it, or when `name` stands for something else.
fn locked(file: File, folder: &OwnedFd, name: &str) -> io::Result<Option<Flock<File>>> {
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => file,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, errno)) => return Err(errno.into()),
    };
    let ours = file.metadata()?;
    match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(named) if (named.st_dev, named.st_ino) == (ours.dev(), ours.ino()) => Ok(Some(file)),
        Ok(_) | Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn remove(folder: &OwnedFd, name: &str) -> io::Result<()> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a file may be called so by [`Disk::create`].
fn is_disk(name: &str) -> bool {
    let Some((digits, vm_id)) = name.split_once('-') else { return false };
    let is_digit = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    digits.len() == DIGITS && digits.bytes().all(is_digit) && VmId::parse(vm_id).is_ok()
}

/// Removes the disks that no process holds. What else is in the folder stays. Blocking.
pub fn sweep(folder: &Path) {
    match open_folder(folder) {
        Ok(dir) => sweep_in(&dir, folder),
        Err(error) => log::debug!("{}: no disk is swept: {error}", folder.display()),
    }
}

fn sweep_in(dir: &OwnedFd, folder: &Path) {
    // The descriptor's folder, whatever the path stands for by now.
    let entries = std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    for entry in entries.into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let Some(name) = file_name.to_str().filter(|name| is_disk(name)) else { continue };
        match stale(dir, name) {
            Ok(Some(_held)) => match remove(dir, name) {
                Ok(()) => log::debug!("{}: removed, no process holds it", folder.join(name).display()),
                Err(error) => log::warn!("{}: stale, but could not be removed: {error}", folder.join(name).display()),
            },
            Ok(None) => {}
            Err(error) => log::debug!("{}: not looked at: {error}", folder.join(name).display()),
        }
    }
}

/// A disk of this user's that no process holds, locked; root's VMs have theirs under uids of their own.
fn stale(dir: &OwnedFd, name: &str) -> io::Result<Option<Flock<File>>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(openat(dir, name, flags, Mode::empty())?);
    let (meta, uid) = (file.metadata()?, nix::unistd::geteuid());
    if !meta.is_file() || meta.nlink() != 1 || !(uid.is_root() || meta.uid() == uid.as_raw()) {
        return Ok(None);
    }
    locked(file, dir, name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{symlink, FileExt, OpenOptionsExt};

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("disks-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        path
    }

    fn made(folder: &Path, vm_id: &str) -> Disk {
        Disk::create(folder, &VmId::parse(vm_id).unwrap()).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn test_disks_of_one_name_are_two_and_each_goes_with_its_owner() {
        let folder = folder("twins");
        let (one, other) = (made(&folder, "twin"), made(&folder, "twin"));
        one.file().write_all_at(b"A", 0).unwrap();
        other.file().write_all_at(b"B", 0).unwrap();
        sweep(&folder);
        assert_eq!((fs::read(one.path()).unwrap(), fs::read(other.path()).unwrap()), (b"A".to_vec(), b"B".to_vec()));
        drop(one);
        assert_eq!(fs::read(other.path()).unwrap(), b"B");
        drop(other);
        assert_eq!(names(&folder), Vec::<String>::new());
        fs::remove_dir(folder).unwrap();
    }

    #[test]
    fn test_reader_has_the_disk_that_was_made_whatever_its_name_stands_for() {
        let folder = folder("reader");
        let disk = made(&folder, "vm");
        disk.file().write_all_at(b"own", 0).unwrap();
        fs::remove_file(disk.path()).unwrap();
        fs::write(disk.path(), b"another's").unwrap();
        let mut content = [0; 3];
        disk.reader().unwrap().read_exact_at(&mut content, 0).unwrap();
        assert_eq!((&content, disk.reader().unwrap().metadata().unwrap().len()), (b"own", 3));
        drop(disk);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn test_rename_keeps_the_disk_and_its_lock() {
        let folder = folder("rename");
        let mut disk = made(&folder, "old");
        disk.rename(&VmId::parse("new").unwrap()).unwrap();
        sweep(&folder);
        let name = disk.path().file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.ends_with("-new"));
        assert_eq!(names(&folder), [name]);
        drop(disk);
        fs::remove_dir(folder).unwrap();
    }

    #[test]
    fn test_sweep_removes_what_a_dead_manager_left_and_nothing_else() {
        let folder = folder("sweep");
        let (held, dead) = (made(&folder, "held"), made(&folder, "dead"));
        let stale = dead.path().to_owned();
        drop(dead);
        fs::write(&stale, b"x").unwrap();
        let digits = "0123456789abcdef";
        fs::create_dir(folder.join(format!("{digits}-folder"))).unwrap();
        fs::write(folder.join("elsewhere"), b"x").unwrap();
        symlink(folder.join("elsewhere"), folder.join(format!("{digits}-link"))).unwrap();
        fs::hard_link(folder.join("elsewhere"), folder.join(format!("{digits}-hardlink"))).unwrap();
        nix::unistd::mkfifo(&folder.join(format!("{digits}-fifo")), Mode::S_IRWXU).unwrap();
        for name in ["notes", "5f369f35-vm", "0123456789ABCDEF-vm", "0123456789abcdef-", "0123456789abcdef-a/b"] {
            drop(fs::write(folder.join(name), b"x"));
        }
        let mut before = names(&folder);
        before.retain(|name| !stale.ends_with(name));
        sweep(&folder);
        assert!(!stale.exists() && held.path().exists());
        assert_eq!(names(&folder), before);
        drop(held);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn test_sweep_in_a_folder_that_others_may_write_to_removes_nothing() {
        let folder = folder("open");
        let stale = folder.join("0123456789abcdef-vm");
        fs::create_dir(&folder).unwrap();
        fs::write(&stale, b"x").unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o770)).unwrap();
        sweep(&folder);
        assert!(stale.exists());
        fs::set_permissions(&folder, Permissions::from_mode(0o700)).unwrap();
        sweep(&folder);
        assert!(!stale.exists());
        fs::remove_dir(folder).unwrap();
    }

    /// What opens the disk by its name, as a VMM does, neither holds its lock nor is kept out by it, QEMU's locks included.
    #[test]
    fn test_lock_is_the_managers_and_not_the_vmms() {
        let folder = folder("vmm");
        let disk = made(&folder, "vm");
        disk.file().set_len(4096).unwrap();
        let vmm =
            fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(disk.path()).unwrap();
        let whole = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 100, l_len: 1, l_pid: 0 };
        nix::fcntl::fcntl(&vmm, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
        let path = disk.path().to_owned();
        // A manager that was killed leaves the name.
        let held = disk.file().try_clone().unwrap();
        drop(held);
        fs::hard_link(&path, folder.join("kept")).unwrap();
        drop(disk);
        fs::rename(folder.join("kept"), &path).unwrap();
        sweep(&folder);
        assert!(!path.exists());
        vmm.write_all_at(b"x", 0).unwrap();
        drop(vmm);
        fs::remove_dir(folder).unwrap();
    }

    #[test]
    fn test_making_and_sweeping_at_once_loses_no_disk() {
        let folder = folder("race");
        drop(made(&folder, "first"));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn({
                let (folder, done) = (&folder, &done);
                move || {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        sweep(folder);
                    }
                }
            });
            let makers: Vec<_> = (0..2)
                .map(|maker| {
                    let folder = &folder;
                    scope.spawn(move || {
                        for _ in 0..300 {
                            assert!(made(folder, &format!("vm{maker}")).path().exists());
                        }
                    })
                })
                .collect();
            let made: Vec<bool> = makers.into_iter().map(|maker| maker.join().is_ok()).collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(made.iter().all(|made| *made));
            sweeper.join().unwrap();
        });
        assert_eq!(names(&folder), Vec::<String>::new());
        fs::remove_dir(folder).unwrap();
    }
}
