//! Where the files of running VMs live: private to one user, gone with the VM.
//!
//! ```text
//! <base>/                0700, owned by the effective user
//!   <vm_id>/             0700
//!     lock               flock'ed by the owning process for as long as the VM exists
//!     sock               the broker
//!     config             what tells the guest who it is, for a VMM without ports
//!     cgroups            the folders of the VM's control groups
//! ```
//! A directory whose lock nobody holds belonged to a process that died; whoever finds it removes it. The VMs' disks are
//! elsewhere, under locks of their own ([`super::disk`]).

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{statfs, TMPFS_MAGIC};
use nix::unistd::{access, AccessFlags, Uid};
use serde::{Deserialize, Serialize};

use super::cgroup;
use super::fork::{self, Concealed};
use super::{lock, private_dir};
use crate::error::{Error, Result};
use crate::model::VmId;

/// sockaddr_un holds 107 bytes and a NUL.
const MAX_SOCKET_PATH: usize = 107;
const SHARED_MEMORY: &str = "/dev/shm";
const SOCKET: &str = "sock";
const LOCK: &str = "lock";
/// Names the VM's control groups, one folder a line.
pub const GROUPS: &str = "cgroups";

/// The base directory that every process of this user works out alike: no environment variable has a say.
///
/// In memory if there is any: containers and small hosts have `/run` on their disk, where ext4 looks at every file that was
/// removed in the last minute before it makes another.
#[must_use]
pub fn default_base() -> PathBuf {
    let uid = nix::unistd::geteuid();
    let usual = usual_base(uid);
    let shared = Path::new(SHARED_MEMORY).join(format!("tw-microvm-{uid}"));
    if !usual.parent().is_some_and(is_in_memory) && may_be_base(&shared, uid) {
        return shared;
    }
    usual
}

fn usual_base(uid: Uid) -> PathBuf {
    if uid.is_root() {
        return PathBuf::from("/run/tw-microvm");
    }
    let run_user = PathBuf::from(format!("/run/user/{uid}"));
    match run_user.metadata() {
        Ok(meta) if meta.is_dir() && meta.uid() == uid.as_raw() => run_user.join("tw-microvm"),
        _ => std::env::temp_dir().join(format!("tw-microvm-{uid}")),
    }
}

fn is_in_memory(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC)
}

/// Whether it is there, or can be made, in memory. All may make files beside it: somebody else's of that name is left alone.
fn may_be_base(folder: &Path, uid: Uid) -> bool {
    let Some(parent) = folder.parent().filter(|parent| is_in_memory(parent)) else { return false };
    match folder.symlink_metadata() {
        Ok(meta) => meta.is_dir() && meta.uid() == uid.as_raw(),
        Err(_) => access(parent, AccessFlags::W_OK | AccessFlags::X_OK).is_ok(),
    }
}

/// The broker's socket of a VM.
#[must_use]
pub fn socket_path(base: &Path, vm_id: &VmId) -> PathBuf {
    base.join(vm_id.as_str()).join(SOCKET)
}

/// The folders of all VMs of a manager.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Folders {
    pub base: PathBuf,
    pub disks: PathBuf,
}

/// One VM's directory; removed with all it holds when dropped.
#[derive(Debug)]
pub struct VmDir {
    path: PathBuf,
    _concealed: Concealed,
    lock: Option<Flock<File>>,
}

impl VmDir {
    /// Makes the directory, over the remains of a process that died.
    ///
    /// # Errors
    /// [`Error::VmIdTaken`] when a living process holds it, [`Error::Host`] when the base is not ours or not writable,
    /// [`Error::InvalidValue`] when a socket's path would not fit in it.
    pub fn create(folders: &Folders, vm_id: &VmId) -> Result<Self> {
        let base = &folders.base;
        private_dir::ensure(base, "runtime_dir")?;
        let path = base.join(vm_id.as_str());
        let socket = socket_path(base, vm_id);
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Error::InvalidValue {
                field: "runtime_dir".into(),
                value: format!("{base:?}"),
                allowed: format!("a path so short that {socket:?} has at most {MAX_SOCKET_PATH} bytes"),
            });
        }
        let lock = Self::made_and_locked(base, &path)?;
        let Some(lock) = lock else {
            return Err(Error::VmIdTaken { vm_id: vm_id.clone(), owner: owner(&path.join(LOCK)).into() });
        };
        // Remains of a dead owner, if any: everything but the lock that we now hold.
        groups_gone(&path).and_then(|()| clear(&path)).map_err(|error| Error::host("clear", path.display(), error))?;
        Ok(Self { path, _concealed: fork::conceal(&*lock), lock: Some(lock) })
    }

    /// The directory's lock; `None` when a living process holds it.
    fn made_and_locked(base: &Path, path: &Path) -> Result<Option<Flock<File>>> {
        // Without its lock, it looks as if nobody lived there: nobody sweeps, and no owner leaves, in between.
        let _turn =
            lock::turn(base, FlockArg::LockShared).map_err(|error| Error::host("lock", base.display(), error))?;
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::host("mkdir", path.display(), error)),
        }
        lock::try_exclusive(&path.join(LOCK)).map_err(|error| Error::host("lock", path.join(LOCK).display(), error))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Becomes the directory of another VM; what is in it comes along, open files included.
    ///
    /// # Errors
    /// As [`VmDir::create`]'s; nothing has changed then.
    pub fn rename(&mut self, folders: &Folders, vm_id: &VmId) -> Result<()> {
        let new = Self::create(folders, vm_id)?;
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten().filter(|entry| entry.file_name() != LOCK)
        {
            let (from, to) = (entry.path(), new.path.join(entry.file_name()));
            fs::rename(&from, &to).map_err(|error| Error::host("rename", from.display(), error))?;
        }
        // The old directory goes, with what is left of it: its lock.
        *self = new;
        Ok(())
    }

    fn remove(&mut self) -> std::io::Result<()> {
        groups_gone(&self.path)?;
        clear(&self.path)?;
        let _turn = self.path.parent().map(|base| lock::turn(base, FlockArg::LockExclusive)).transpose()?;
        fs::remove_dir_all(&self.path)?;
        self.lock = None;
        Ok(())
    }
}

impl Drop for VmDir {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::warn!("{}: could not be removed: {error}", self.path.display());
        }
    }
}

/// Who holds the lock of a VM's directory.
fn owner(path: &Path) -> &'static str {
    match lock::is_held_by_us(path) {
        true => "another manager of this process",
        false => "another process of this user",
    }
}

/// The folder names the VM's groups: while one of them is there, the folder stays, for the next sweep.
fn groups_gone(folder: &Path) -> std::io::Result<()> {
    match cgroup::sweep(&folder.join(GROUPS)) {
        true => Ok(()),
        false => Err(std::io::Error::other("one of its control groups is still there")),
    }
}

/// Removes all but the lock.
fn clear(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?.flatten().filter(|entry| entry.file_name() != LOCK) {
        let within = entry.path();
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(&within)?
        } else {
            fs::remove_file(&within)?
        }
    }
    Ok(())
}

/// Removes the directories whose owners are dead; returns their names.
///
/// # Errors
/// None: what cannot be looked at is left alone and logged.
#[must_use]
pub fn sweep(folders: &Folders) -> Vec<String> {
    let base = &folders.base;
    let mut swept = Vec::new();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let path = entry.path();
        let _turn = match lock::turn(base, FlockArg::LockExclusive) {
            Ok(turn) => turn,
            Err(error) => {
                log::debug!("{}: not looked at: {error}", base.display());
                break;
            }
        };
        match lock::try_exclusive(&path.join(LOCK)) {
            Ok(Some(_held)) => match groups_gone(&path).and_then(|()| fs::remove_dir_all(&path)) {
                Ok(()) => swept.push(entry.file_name().to_string_lossy().into_owned()),
                Err(error) => log::warn!("{}: stale, but could not be removed: {error}", path.display()),
            },
            Ok(None) => {}
            Err(error) => log::debug!("{}: not looked at: {error}", path.display()),
        }
    }
    swept
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Both below one folder, which [`end`] removes when nothing is left in them.
    fn begin(name: &str) -> Folders {
        let path = std::env::temp_dir().join(format!("rtdir-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        Folders { base: path.join("run"), disks: path.join("disks") }
    }

    fn end(folders: &Folders) {
        fs::remove_dir(&folders.base).unwrap();
        fs::remove_dir(folders.base.parent().unwrap()).unwrap();
    }

    fn made(folders: &Folders, name: &str) -> VmDir {
        VmDir::create(folders, &VmId::parse(name).unwrap()).unwrap()
    }

    #[test]
    fn test_create_twice_says_taken_and_drop_removes() {
        let folders = begin("taken");
        let first = made(&folders, "a");
        assert_eq!(VmDir::create(&folders, &VmId::parse("a").unwrap()).unwrap_err().code(), "vm_id_taken");
        drop(first);
        end(&folders);
    }

    #[test]
    fn test_base_is_in_memory_and_never_what_is_somebody_elses() {
        let uid = nix::unistd::geteuid();
        let base = default_base();
        assert!(base == usual_base(uid) || is_in_memory(base.parent().unwrap()));
        assert!(!is_in_memory(Path::new("/proc")) && !may_be_base(Path::new("/proc/tw"), uid));
        let free = Path::new(SHARED_MEMORY).join(format!("tw-microvm-test-{}", std::process::id()));
        assert!(may_be_base(&free, uid), "this host has no /dev/shm");
        private_dir::ensure(&free, "runtime_dir").unwrap();
        assert!(may_be_base(&free, uid) && !may_be_base(&free, Uid::from_raw(uid.as_raw() + 1)));
        fs::remove_dir(&free).unwrap();
        std::os::unix::fs::symlink("/", &free).unwrap();
        assert!(!may_be_base(&free, uid));
        fs::remove_file(&free).unwrap();
    }

    #[test]
    fn test_rename_takes_the_files_along() {
        let folders = begin("rename");
        let mut dir = made(&folders, "old");
        fs::write(dir.path().join("config"), b"y").unwrap();
        dir.rename(&folders, &VmId::parse("new").unwrap()).unwrap();
        assert!(!folders.base.join("old").exists());
        assert_eq!(fs::read(folders.base.join("new/config")).unwrap(), b"y");
        assert_eq!(VmDir::create(&folders, &VmId::parse("new").unwrap()).unwrap_err().code(), "vm_id_taken");
        drop(dir);
        end(&folders);
    }

    #[test]
    fn test_sweep_removes_only_what_nobody_holds() {
        let folders = begin("sweep");
        let held = made(&folders, "held");
        fs::create_dir(folders.base.join("stale")).unwrap();
        assert_eq!(sweep(&folders), ["stale"]);
        assert!(held.path().exists());
        drop(held);
        end(&folders);
    }

    #[test]
    fn test_folder_stays_until_the_groups_that_it_names_are_gone() {
        let folders = begin("groups");
        let dir = made(&folders, "vm");
        let groups = cgroup::Groups::create(&format!("stays-{}", std::process::id()), None, &cgroup::PROBED).unwrap();
        let record = dir.path().join(GROUPS);
        groups.record(&record).unwrap();
        let Some(group) = cgroup::recorded(&record).pop() else {
            eprintln!("skipped: no control groups here");
            return;
        };
        // Its owner dies without a word, and something keeps one group from going.
        std::mem::forget(groups);
        fs::create_dir(group.join("child")).unwrap();
        drop(dir);
        assert!(record.exists() && sweep(&folders).is_empty());
        fs::remove_dir(group.join("child")).unwrap();
        assert_eq!(sweep(&folders), ["vm"]);
        assert!(!group.exists());
        end(&folders);
    }

    #[test]
    fn test_directories_are_made_in_the_midst_of_sweeps() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let folders = begin("midst");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                let mut swept = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    swept.extend(sweep(&folders));
                }
                swept
            });
            let makers: Vec<_> = (0..2)
                .map(|maker| {
                    let folders = &folders;
                    scope.spawn(move || {
                        for _ in 0..500 {
                            assert!(made(folders, &format!("vm{maker}")).path().exists());
                        }
                    })
                })
                .collect();
            let made: Vec<_> = makers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            over.store(true, Ordering::Relaxed);
            assert!(made.iter().all(|maker| maker.is_ok()));
            assert_eq!(sweeper.join().unwrap(), Vec::<String>::new());
        });
        end(&folders);
    }

    #[test]
    fn test_create_in_an_open_base_is_refused() {
        let folders = begin("open");
        fs::create_dir_all(&folders.base).unwrap();
        fs::set_permissions(&folders.base, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(VmDir::create(&folders, &VmId::parse("a").unwrap()).unwrap_err().code(), "host_error");
        fs::remove_dir_all(folders.base.parent().unwrap()).unwrap();
    }
}
