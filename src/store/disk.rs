//! The disks of running VMs.
//!
//! ```text
//! <cache directory>/disks/          0700, on a real file system: the runtime folder is memory on most hosts
//!   <16 hex digits>-<vm_id>         flock'ed through the open file of the manager whose VM it is
//! ```
//! Architecture invariant: the lock is on the disk itself, because managers that share this folder need not share a runtime
//! folder (two containers with one cache volume). The digits are random, so VMs of one name never share a disk. The VMM opens
//! the disk anew, so it does not hold the lock; QEMU's own locks on images (F_OFD_SETLK) do not meet flock(2)'s.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{fchown, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{openat, OFlag};
use nix::sys::stat::Mode;

use super::base::Root;
use super::dir::Dir;
use super::lock::Lock;
use crate::error::{Error, Result};
use crate::host::clock;
use crate::model::VmId;

/// The folder of the VMs' disks in the cache.
const DISKS: &str = "disks";
/// Random digits before each name.
const DIGITS: usize = 16;
const MIB: u64 = 1 << 20;
/// New names that are tried while a sweep holds those made before.
const TRIES: usize = 8;

/// One VM's disk; its name goes when this is dropped, its content when the VMM has closed it, too.
#[derive(Debug)]
pub struct Disk {
    folder: Dir,
    name: String,
    path: PathBuf,
    lock: Lock,
}

impl Disk {
    /// Makes an empty disk for this user alone.
    ///
    /// # Errors
    /// [`Error::FolderRefused`] when the disks' folder is not this user's alone; [`Error::Host`].
    pub fn create(cache: &Root, vm_id: &VmId) -> Result<Self> {
        let folder = cache.make_folder(DISKS)?;
        let failed = |error: io::Error| Error::host("create a disk in", folder.path().display(), error);
        for _ in 0..TRIES {
            let name = format!("{}-{vm_id}", clock::hex(&clock::random::<{ DIGITS / 2 }>()?));
            let file = folder.create(&name).map_err(failed)?;
            // A sweep may have taken it for a dead process's in between: then it has no name any more.
            if let Some(lock) = locked(&folder, &name, file).map_err(failed)? {
                let path = folder.at(&name);
                return Ok(Self { folder, name, path, lock });
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
        self.lock.file()
    }

    /// The disk opened anew: reading it neither moves this one's offset nor keeps its lock.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn reader(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.file().as_raw_fd()))
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
        self.folder
            .rename(&self.name, &self.folder, &name)
            .map_err(|error| Error::host("rename", self.path.display(), error))?;
        self.path.set_file_name(&name);
        self.name = name;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = self.folder.remove_file(&self.name) {
            log::warn!("{}: could not be removed: {error}", self.path.display());
        }
    }
}

/// Locks an open disk; `None` when another holds it, or when `name` stands for something else.
fn locked(folder: &Dir, name: &str, file: File) -> io::Result<Option<Lock>> {
    match folder.held(name.as_ref(), file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        held => held,
    }
}

/// Whether a file may be called so by [`Disk::create`].
fn is_disk(name: &str) -> bool {
    let Some((digits, vm_id)) = name.split_once('-') else { return false };
    let is_digit = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    digits.len() == DIGITS && digits.bytes().all(is_digit) && VmId::parse(vm_id).is_ok()
}

/// Removes the disks in a cache that no process holds. What else is in their folder stays. Blocking.
pub fn sweep(cache: &Root) {
    let dir = match cache.dir(DISKS) {
        Ok(dir) => dir,
        Err(error) => {
            log::debug!("{}: no disk is swept: {error}", cache.at(DISKS).display());
            return;
        }
    };
    let entries = dir.entries().unwrap_or_else(|error| {
        log::warn!("{}: not swept: {error}", dir.path().display());
        Vec::new()
    });
    for entry in entries {
        let Some(name) = entry.name.to_str().filter(|name| is_disk(name)) else { continue };
        match stale(&dir, name) {
            Ok(Some(_held)) => match dir.remove_file(name) {
                Ok(()) => log::debug!("{}: removed, no process holds it", dir.at(name).display()),
                Err(error) => log::warn!("{}: stale, but could not be removed: {error}", dir.at(name).display()),
            },
            Ok(None) => {}
            Err(error) => log::debug!("{}: not looked at: {error}", dir.at(name).display()),
        }
    }
}

/// A disk of this user's that no process holds, locked; root's VMs have theirs under uids of their own.
fn stale(dir: &Dir, name: &str) -> io::Result<Option<Lock>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(openat(dir, name, flags, Mode::empty())?);
    let (meta, uid) = (file.metadata()?, nix::unistd::geteuid());
    // Disks are for one user alone and have whole mebibytes: what else has such a name is no disk.
    let is_disk = meta.is_file() && meta.nlink() == 1 && meta.mode() & 0o7777 == 0o600 && meta.len() % MIB == 0;
    if !is_disk || !(uid.is_root() || meta.uid() == uid.as_raw()) {
        return Ok(None);
    }
    locked(dir, name, file)
}

#[cfg(test)]
mod tests {
    use super::super::base::{Base, Kind};
    use super::super::dir::tests::Scratch;
    use super::*;
    use std::fs;
    use std::os::unix::fs::{symlink, FileExt, OpenOptionsExt, PermissionsExt};
    use std::sync::Arc;

    /// A cache, and the disks' folder in it.
    fn cache() -> (Scratch, Arc<Root>, PathBuf) {
        let scratch = Scratch::new();
        let root = Base::new(Kind::Cache, scratch.path().join("cache")).root().unwrap();
        let folder = root.at(DISKS);
        (scratch, root, folder)
    }

    fn made(cache: &Root, vm_id: &str) -> Disk {
        Disk::create(cache, &VmId::parse(vm_id).unwrap()).unwrap()
    }

    /// As a dead manager leaves it.
    fn left(path: &Path) {
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
        file.set_len(MIB).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn test_disks_of_one_name_are_two_and_each_goes_with_its_owner() {
        let (_scratch, cache, folder) = cache();
        let (one, other) = (made(&cache, "twin"), made(&cache, "twin"));
        one.file().write_all_at(b"A", 0).unwrap();
        other.file().write_all_at(b"B", 0).unwrap();
        sweep(&cache);
        assert_eq!((fs::read(one.path()).unwrap(), fs::read(other.path()).unwrap()), (b"A".to_vec(), b"B".to_vec()));
        drop(one);
        assert_eq!(fs::read(other.path()).unwrap(), b"B");
        drop(other);
        assert_eq!(names(&folder), Vec::<String>::new());
    }

    #[test]
    fn test_reader_has_the_disk_that_was_made_whatever_its_name_stands_for() {
        let (_scratch, cache, _) = cache();
        let disk = made(&cache, "vm");
        disk.file().write_all_at(b"own", 0).unwrap();
        fs::remove_file(disk.path()).unwrap();
        fs::write(disk.path(), b"another's").unwrap();
        let mut content = [0; 3];
        disk.reader().unwrap().read_exact_at(&mut content, 0).unwrap();
        assert_eq!((&content, disk.reader().unwrap().metadata().unwrap().len()), (b"own", 3));
        drop(disk);
    }

    #[test]
    fn test_rename_keeps_the_disk_and_its_lock() {
        let (_scratch, cache, folder) = cache();
        let mut disk = made(&cache, "old");
        disk.rename(&VmId::parse("new").unwrap()).unwrap();
        sweep(&cache);
        let name = disk.path().file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.ends_with("-new"));
        assert_eq!(names(&folder), [name]);
        drop(disk);
    }

    #[test]
    fn test_sweep_removes_what_a_dead_manager_left_and_nothing_else() {
        let (_scratch, cache, folder) = cache();
        let (held, dead) = (made(&cache, "held"), made(&cache, "dead"));
        let stale = dead.path().to_owned();
        drop(dead);
        left(&stale);
        let digits = "0123456789abcdef";
        fs::create_dir(folder.join(format!("{digits}-folder"))).unwrap();
        fs::write(folder.join("elsewhere"), b"x").unwrap();
        symlink(folder.join("elsewhere"), folder.join(format!("{digits}-link"))).unwrap();
        fs::hard_link(folder.join("elsewhere"), folder.join(format!("{digits}-hardlink"))).unwrap();
        nix::unistd::mkfifo(&folder.join(format!("{digits}-fifo")), Mode::S_IRWXU).unwrap();
        // What has a disk's name, but another size or mode.
        left(&folder.join(format!("{digits}-open")));
        fs::set_permissions(folder.join(format!("{digits}-open")), fs::Permissions::from_mode(0o644)).unwrap();
        left(&folder.join(format!("{digits}-notes")));
        fs::write(folder.join(format!("{digits}-notes")), b"x").unwrap();
        for name in ["notes", "5f369f35-vm", "0123456789ABCDEF-vm", "0123456789abcdef-", "0123456789abcdef-a/b"] {
            drop(fs::write(folder.join(name), b"x"));
        }
        let mut before = names(&folder);
        before.retain(|name| !stale.ends_with(name));
        sweep(&cache);
        assert!(!stale.exists() && held.path().exists());
        assert_eq!(names(&folder), before);
        drop(held);
    }

    #[test]
    fn test_sweep_in_a_folder_that_others_may_write_to_removes_nothing() {
        let (_scratch, cache, folder) = cache();
        let stale = folder.join("0123456789abcdef-vm");
        fs::create_dir(&folder).unwrap();
        left(&stale);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o770)).unwrap();
        sweep(&cache);
        assert!(stale.exists());
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        sweep(&cache);
        assert!(!stale.exists());
    }

    /// In a process of its own: the umask is a process's.
    #[test]
    fn test_disk_and_its_folder_are_the_owners_whatever_the_umask() {
        const CHILD: &str = "TEST_DISK_WITH_UMASK";
        if std::env::var_os(CHILD).is_some() {
            let (_scratch, cache, folder) = cache();
            let disk = made(&cache, "vm");
            let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
            assert_eq!((mode(&folder), mode(disk.path())), (0o700, 0o600));
            return;
        }
        let own = "store::disk::tests::test_disk_and_its_folder_are_the_owners_whatever_the_umask";
        let mut child = std::process::Command::new("sh");
        child.args(["-c", "umask 777 && exec \"$0\" --exact \"$1\""]).arg(std::env::current_exe().unwrap()).arg(own);
        let output = child.env(CHILD, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    /// What opens the disk by its name, as a VMM does, neither holds its lock nor is kept out by it, QEMU's locks included.
    #[test]
    fn test_lock_is_the_managers_and_not_the_vmms() {
        let (_scratch, cache, folder) = cache();
        let disk = made(&cache, "vm");
        disk.file().set_len(MIB).unwrap();
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
        sweep(&cache);
        assert!(!path.exists());
        vmm.write_all_at(b"x", 0).unwrap();
        drop(vmm);
    }

    #[test]
    fn test_making_and_sweeping_at_once_loses_no_disk() {
        let (_scratch, cache, folder) = cache();
        drop(made(&cache, "first"));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn({
                let (cache, done) = (&cache, &done);
                move || {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        sweep(cache);
                    }
                }
            });
            let makers: Vec<_> = (0..2)
                .map(|maker| {
                    let cache = &cache;
                    scope.spawn(move || {
                        for _ in 0..300 {
                            assert!(made(cache, &format!("vm{maker}")).path().exists());
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
    }
}
