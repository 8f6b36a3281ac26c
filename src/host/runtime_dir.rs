//! Where the files of running VMs live: private to one user, gone with the VM.
//!
//! ```text
//! <base>/                0700, owned by the effective user
//!   <vm_id>/             0700
//!     lock               flock'ed by the owning process for as long as the VM exists
//!     sock               the broker
//!     config, disk       the VM's drives
//!     cgroups            the folders of the VM's control groups
//! ```
//! A directory whose lock nobody holds belonged to a process that died; whoever finds it removes it.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::cgroup;
use super::fork::{self, Concealed};
use super::{lock, private_dir};
use crate::error::{Error, Result};
use crate::model::VmId;

/// sockaddr_un holds 107 bytes and a NUL.
const MAX_SOCKET_PATH: usize = 107;
const SOCKET: &str = "sock";
const LOCK: &str = "lock";
/// Names the VM's control groups, one folder a line.
pub const GROUPS: &str = "cgroups";

/// The base directory that every process of this user works out alike: no environment variable has a say.
#[must_use]
pub fn default_base() -> PathBuf {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return PathBuf::from("/run/tw-microvm");
    }
    let run_user = PathBuf::from(format!("/run/user/{uid}"));
    match run_user.metadata() {
        Ok(meta) if meta.is_dir() && meta.uid() == uid.as_raw() => run_user.join("tw-microvm"),
        _ => std::env::temp_dir().join(format!("tw-microvm-{uid}")),
    }
}

/// The broker's socket of a VM.
#[must_use]
pub fn socket_path(base: &Path, vm_id: &VmId) -> PathBuf {
    base.join(vm_id.as_str()).join(SOCKET)
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
    pub fn create(base: &Path, vm_id: &VmId) -> Result<Self> {
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
            return Err(Error::VmIdTaken { vm_id: vm_id.clone(), owner: "another process of this user".into() });
        };
        // Remains of a dead owner, if any: everything but the lock that we now hold.
        cgroup::sweep(&path.join(GROUPS));
        clear(&path).map_err(|error| Error::host("clear", path.display(), error))?;
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
    pub fn rename(&mut self, base: &Path, vm_id: &VmId) -> Result<()> {
        let new = Self::create(base, vm_id)?;
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
pub fn sweep(base: &Path) -> Vec<String> {
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
            Ok(Some(_held)) => {
                cgroup::sweep(&path.join(GROUPS));
                match fs::remove_dir_all(&path) {
                    Ok(()) => swept.push(entry.file_name().to_string_lossy().into_owned()),
                    Err(error) => log::warn!("{}: stale, but could not be removed: {error}", path.display()),
                }
            }
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

    fn base(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("rtdir-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        path
    }

    #[test]
    fn test_create_twice_says_taken_and_drop_removes() {
        let base = base("taken");
        let id = VmId::parse("a").unwrap();
        let first = VmDir::create(&base, &id).unwrap();
        assert_eq!(VmDir::create(&base, &id).unwrap_err().code(), "vm_id_taken");
        drop(first);
        assert!(!base.join("a").exists());
        fs::remove_dir(&base).unwrap();
    }

    #[test]
    fn test_rename_takes_the_files_along() {
        let base = base("rename");
        let mut dir = VmDir::create(&base, &VmId::parse("old").unwrap()).unwrap();
        fs::write(dir.path().join("disk"), b"x").unwrap();
        dir.rename(&base, &VmId::parse("new").unwrap()).unwrap();
        assert_eq!((base.join("old").exists(), fs::read(base.join("new/disk")).unwrap()), (false, b"x".to_vec()));
        assert_eq!(VmDir::create(&base, &VmId::parse("new").unwrap()).unwrap_err().code(), "vm_id_taken");
        drop(dir);
        fs::remove_dir(&base).unwrap();
    }

    #[test]
    fn test_sweep_removes_only_what_nobody_holds() {
        let base = base("sweep");
        let held = VmDir::create(&base, &VmId::parse("held").unwrap()).unwrap();
        fs::create_dir(base.join("stale")).unwrap();
        fs::write(base.join("stale/disk"), b"x").unwrap();
        assert_eq!(sweep(&base), ["stale"]);
        assert!(held.path().exists());
        drop(held);
        fs::remove_dir(&base).unwrap();
    }

    #[test]
    fn test_directories_are_made_in_the_midst_of_sweeps() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let base = base("midst");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                let mut swept = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    swept.extend(sweep(&base));
                }
                swept
            });
            let makers: Vec<_> = (0..2)
                .map(|maker| {
                    let base = &base;
                    scope.spawn(move || {
                        for _ in 0..500 {
                            let dir = VmDir::create(base, &VmId::parse(&format!("vm{maker}")).unwrap()).unwrap();
                            fs::write(dir.path().join("disk"), b"x").unwrap();
                        }
                    })
                })
                .collect();
            let made: Vec<_> = makers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            over.store(true, Ordering::Relaxed);
            assert!(made.iter().all(|maker| maker.is_ok()));
            assert_eq!(sweeper.join().unwrap(), Vec::<String>::new());
        });
        fs::remove_dir(&base).unwrap();
    }

    #[test]
    fn test_create_in_an_open_base_is_refused() {
        let base = base("open");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(VmDir::create(&base, &VmId::parse("a").unwrap()).unwrap_err().code(), "host_error");
        fs::remove_dir(&base).unwrap();
    }
}
