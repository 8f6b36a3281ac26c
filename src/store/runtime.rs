//! Where the files of running VMs live: private to one user, gone with the VM.
//!
//! ```text
//! <runtime folder>/        see [`super::Base`]
//!   <vm_id>/               0700
//!     lock                 flock'ed by the owning process for as long as the VM exists
//!     sock                 the broker
//!     config               what tells the guest who it is, for a VMM without ports
//!     cgroups              the folders of the VM's control groups
//!     run/                 where the VMM makes its sockets
//!   .new-<hex>/            becomes <vm_id> when its lock is held
//!   .gone-<hex>/           was a VM's, and is being removed
//! ```
//! A folder whose lock no process holds belonged to one that died: it is swept. A folder that has no lock is not ours, and
//! stays. The VMs' disks are elsewhere, under locks of their own ([`super::disk`]).

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{renameat2, FlockArg, RenameFlags};

use super::base::{check_apart, default_cache, default_runtime, default_runtimes, Base, Kind, Root};
use super::dir::Dir;
use super::lock::{is_held_by_us, Lock};
use crate::error::{Error, Result};
use crate::host::{cgroup, clock};
use crate::model::VmId;

/// sockaddr_un holds 107 bytes and a NUL.
const MAX_SOCKET_PATH: usize = 107;
const SOCKET: &str = "sock";
const LOCK: &str = "lock";
/// Names the VM's control groups, one folder a line.
const GROUPS: &str = "cgroups";
const GROUPS_LIMIT: u64 = 1 << 20;
const NEW: &str = ".new-";
const GONE: &str = ".gone-";
/// How often a name is tried that other processes take and leave at the same time.
const TRIES: u32 = 100;
/// How long the lock of a name is waited for: a VM that leaves, or a sweep that looks at its folder, is done sooner.
const LEAVING: Duration = Duration::from_millis(500);

/// The broker's socket of a VM.
#[must_use]
pub fn socket_path(base: &Path, vm_id: &VmId) -> PathBuf {
    base.join(vm_id.as_str()).join(SOCKET)
}

/// The folders of all VMs of a manager.
#[derive(Debug, Clone)]
pub struct Folders {
    pub runtime: Arc<Base>,
    pub cache: Arc<Base>,
}

impl Folders {
    /// Names the folders by absolute paths; `None`: the defaults.
    #[must_use]
    pub fn new(runtime: Option<PathBuf>, cache: Option<PathBuf>) -> Self {
        let runtime = Base::new(Kind::Runtime, runtime.unwrap_or_else(default_runtime));
        let cache = Base::new(Kind::Cache, cache.unwrap_or_else(default_cache));
        Self { runtime: Arc::new(runtime), cache: Arc::new(cache) }
    }

    /// Both, made where they are missing. Blocking.
    ///
    /// # Errors
    /// [`Error::FolderRefused`].
    pub fn roots(&self) -> Result<(Arc<Root>, Arc<Root>)> {
        let (runtime, cache) = (self.runtime.root()?, self.cache.root()?);
        check_apart(&runtime, &cache)?;
        Ok((runtime, cache))
    }

    /// Those that are there and may hold anything, for a sweep, which makes nothing. Blocking.
    ///
    /// # Errors
    /// [`Error::FolderRefused`].
    pub fn existing(&self) -> Result<Existing> {
        let (runtime, cache) = (self.runtime.existing()?, self.cache.existing()?);
        if let (Some(runtime), Some(cache)) = (&runtime, &cache) {
            check_apart(runtime, cache)?;
        }
        Ok(Existing { runtime, cache })
    }
}

/// The folders of a manager that are there.
#[derive(Debug, Clone)]
pub struct Existing {
    pub runtime: Option<Arc<Root>>,
    pub cache: Option<Arc<Root>>,
}

/// One VM's folder; removed with all it holds when dropped.
#[derive(Debug)]
pub struct VmDir {
    runtime: Arc<Root>,
    dir: Dir,
    vm_id: VmId,
    _lock: Lock,
}

impl VmDir {
    /// Makes the folder, over the remains of a process that died.
    ///
    /// # Errors
    /// [`Error::VmIdTaken`] when a living process holds it, [`Error::FolderRefused`], [`Error::Host`],
    /// [`Error::InvalidValue`] when a socket's path would not fit in it.
    pub fn create(folders: &Folders, vm_id: &VmId) -> Result<Self> {
        let (runtime, _) = folders.roots()?;
        let socket = socket_path(runtime.path(), vm_id);
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Error::InvalidValue {
                field: "runtime_dir".into(),
                value: format!("{:?}", runtime.path()),
                allowed: format!("a path so short that {socket:?} has at most {MAX_SOCKET_PATH} bytes"),
            });
        }
        let (dir, lock) = made(&runtime, vm_id)?;
        Ok(Self { runtime, dir, vm_id: vm_id.clone(), _lock: lock })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The folder itself.
    #[must_use]
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.at(SOCKET)
    }

    /// Notes the VM's control groups, for the process that finds the folder when this one has died.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn note_groups(&self, groups: &[PathBuf]) -> Result<()> {
        let noted = self.dir.write(GROUPS, cgroup::record(groups).as_bytes());
        noted.map_err(|error| Error::host("write", self.dir.at(GROUPS).display(), error))
    }

    /// The groups that were noted.
    #[must_use]
    pub fn groups(&self) -> Vec<PathBuf> {
        recorded(&self.dir).unwrap_or_default()
    }

    /// Becomes the folder of another VM; what is in it comes along, open files included.
    ///
    /// # Errors
    /// As [`VmDir::create`]'s; nothing has changed then.
    pub fn rename(&mut self, vm_id: &VmId) -> Result<()> {
        settle(&self.runtime, self.vm_id.as_str().as_ref(), vm_id)?;
        self.dir.renamed(self.runtime.at(vm_id.as_str()));
        self.vm_id = vm_id.clone();
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        groups_gone(&self.dir)?;
        bury(&self.runtime, self.vm_id.as_str().as_ref())
    }
}

impl Drop for VmDir {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::warn!("{}: could not be removed: {error}", self.path().display());
        }
    }
}

/// A folder for a VM, with its lock held before it has the VM's name.
fn made(runtime: &Root, vm_id: &VmId) -> Result<(Dir, Lock)> {
    let new = format!("{NEW}{}", clock::hex(&clock::random::<8>()?));
    let failed = |error: io::Error| Error::host("make", runtime.at(&new).display(), error);
    // Without its lock it looks like what a process left that died: nothing is swept in between.
    let turn = runtime.turn(FlockArg::LockShared).map_err(failed)?;
    let mut dir = runtime.make_dir(&new).map_err(failed)?;
    let lock = dir.make_lock(LOCK).and_then(|lock| lock.ok_or_else(|| ErrorKind::WouldBlock.into())).map_err(failed)?;
    drop(turn);
    if let Err(error) = settle(runtime, new.as_ref(), vm_id) {
        if let Err(left) = runtime.remove_all(&new) {
            log::warn!("{}: could not be removed: {left}", runtime.at(&new).display());
        }
        return Err(error);
    }
    dir.renamed(runtime.at(vm_id.as_str()));
    Ok((dir, lock))
}

/// Gives the folder `from` a VM's name, which the remains of a process that died may have.
fn settle(runtime: &Root, from: &OsStr, vm_id: &VmId) -> Result<()> {
    let path = runtime.at(vm_id.as_str());
    let end = Instant::now() + LEAVING;
    for _ in 0..TRIES {
        match free(runtime, vm_id) {
            // Its lock may be that of a VM that is just leaving, or of a sweep that only looks.
            Err(Error::VmIdTaken { .. }) if Instant::now() < end => {
                std::thread::sleep(LEAVING / 20);
                continue;
            }
            freed => freed?,
        }
        match rename_to_free(runtime, from, vm_id.as_str().as_ref()) {
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty) => {}
            renamed => return renamed.map_err(|error| Error::host("rename to", path.display(), error)),
        }
    }
    Err(taken(runtime, vm_id))
}

fn rename_to_free(runtime: &Root, from: &OsStr, to: &OsStr) -> io::Result<()> {
    match renameat2(&**runtime, from, &**runtime, to, RenameFlags::RENAME_NOREPLACE) {
        // Not every file system knows the flag; another folder with a lock in it is not empty, and not replaced.
        Err(Errno::EINVAL | Errno::ENOSYS) => runtime.rename(from, runtime, to),
        renamed => Ok(renamed?),
    }
}

/// Whose a VM's folder is.
fn taken(runtime: &Root, vm_id: &VmId) -> Error {
    let owner = match is_held_by_us(&runtime.at(vm_id.as_str()).join(LOCK)) {
        true => "another manager of this process",
        false => "another process of this user",
    };
    Error::VmIdTaken { vm_id: vm_id.clone(), owner: owner.into() }
}

/// A VM's folder, and where its broker is once it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub vm_id: VmId,
    pub socket: PathBuf,
}

/// The VMs' folders, of whichever process of this user's; it may have died. Blocking.
///
/// # Errors
/// [`Error::FolderRefused`] when the runtime folder is not this user's alone; [`Error::Host`].
pub fn found(base: &Base) -> Result<Vec<Found>> {
    let Some(runtime) = base.existing()? else { return Ok(Vec::new()) };
    let entries = runtime.entries().map_err(|error| Error::host("list", runtime.path().display(), error))?;
    let named =
        entries.into_iter().filter(|entry| entry.is_dir).filter_map(|entry| VmId::parse(entry.name.to_str()?).ok());
    // One without a lock was made by no VM. The lock is not tried: a start at this moment would find it taken.
    let ours = named.filter(|vm_id| runtime.dir(vm_id.as_str()).and_then(|dir| dir.has(LOCK)).unwrap_or(false));
    Ok(ours.map(|vm_id| Found { socket: socket_path(runtime.path(), &vm_id), vm_id }).collect())
}

/// As [`found`], in a folder that was named, or in every one that is the default of some process of this user's. Blocking.
///
/// # Errors
/// [`found`]'s, of a folder that was named. A default one that another user took has none of this user's VMs.
pub fn found_in(folder: Option<PathBuf>) -> Result<Vec<Found>> {
    if let Some(folder) = folder {
        return found(&Base::new(Kind::Runtime, folder));
    }
    let mut all = Vec::new();
    for folder in default_runtimes() {
        match found(&Base::new(Kind::Runtime, folder)) {
            Ok(found) => all.extend(found),
            Err(error) => log::debug!("{error}"),
        }
    }
    Ok(all)
}

/// Removes what a dead process left under a VM's name.
fn free(runtime: &Root, vm_id: &VmId) -> Result<()> {
    let name = vm_id.as_str();
    let failed = |error: io::Error| Error::host("open", runtime.at(name).display(), error);
    match runtime.has(name) {
        Ok(true) => {}
        other => return other.map(drop).map_err(failed),
    }
    let look = || -> io::Result<bool> {
        let dir = runtime.dir(name)?;
        let Some(_held) = dir.lock(LOCK)? else { return Ok(false) };
        if runtime.dir(name)?.id()? == dir.id()? {
            groups_gone(&dir)?;
            bury(runtime, name.as_ref())?;
        }
        Ok(true)
    };
    match look() {
        Ok(true) => Ok(()),
        Ok(false) => Err(taken(runtime, vm_id)),
        Err(error) if error.kind() == ErrorKind::NotFound => match runtime.dir(name).and_then(|dir| dir.has(LOCK)) {
            Ok(false) => {
                let reason = "it has no lock, so no VM made it; remove it or choose another vm_id";
                Err(Error::host("take", runtime.at(name).display(), reason))
            }
            // It left meanwhile, or another process is about to have it.
            Ok(true) | Err(_) => Ok(()),
        },
        Err(error) => Err(failed(error)),
    }
}

/// Removes a folder whose lock is held. It loses its name at once: one that is half removed is never taken for a VM's.
fn bury(runtime: &Root, name: &OsStr) -> io::Result<()> {
    let gone = format!("{GONE}{}", clock::hex(&clock::random::<8>().map_err(io::Error::other)?));
    runtime.rename(name, runtime, &gone)?;
    runtime.remove_all(&gone)
}

fn recorded(dir: &Dir) -> io::Result<Vec<PathBuf>> {
    match dir.read(GROUPS, GROUPS_LIMIT) {
        Ok(bytes) => Ok(cgroup::recorded(&bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The folder names the VM's groups: while one of them is there, the folder stays, for the next sweep.
fn groups_gone(dir: &Dir) -> io::Result<()> {
    match cgroup::sweep(&recorded(dir)?) {
        true => Ok(()),
        false => Err(io::Error::other("one of its control groups is still there")),
    }
}

/// Removes the folders whose owners are dead; returns their names. What cannot be looked at, and what no
/// VM made, is left alone. Blocking.
#[must_use]
pub fn sweep(runtime: &Root) -> Vec<String> {
    let mut swept = Vec::new();
    let entries = runtime.entries().unwrap_or_else(|error| {
        log::warn!("{}: not swept: {error}", runtime.path().display());
        Vec::new()
    });
    for entry in entries.into_iter().filter(|entry| entry.is_dir) {
        let Some(name) = entry.name.to_str() else { continue };
        let done = match (is_ours(name, NEW), is_ours(name, GONE), VmId::parse(name)) {
            (true, ..) => sweep_new(runtime, name).map(|()| false),
            (_, true, _) => runtime.remove_all(name).map(|()| false),
            (_, _, Ok(_)) => sweep_vm(runtime, name),
            (_, _, Err(_)) => Ok(false),
        };
        match done {
            Ok(true) => swept.push(name.to_owned()),
            Ok(false) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::InvalidData
                ) =>
            {
                log::debug!("{}: not looked at: {error}", runtime.at(name).display());
            }
            Err(error) => log::warn!("{}: stale, but could not be removed: {error}", runtime.at(name).display()),
        }
    }
    swept
}

/// Whether a name is a prefix of ours and 16 hexadecimal digits.
fn is_ours(name: &str, prefix: &str) -> bool {
    let digits = name.strip_prefix(prefix);
    digits.is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// A folder that never got its VM's name: without a lock, or with one that is free, its maker is dead.
fn sweep_new(runtime: &Root, name: &str) -> io::Result<()> {
    let _turn = runtime.turn(FlockArg::LockExclusive)?;
    let dir = runtime.dir(name)?;
    match dir.lock(LOCK) {
        Ok(None) => Ok(()),
        Ok(Some(_held)) => runtime.remove_all(name),
        // Its maker died before the lock was one.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) && is_begun(&dir)? => {
            runtime.remove_all(name)
        }
        Err(error) => Err(error),
    }
}

/// Whether a folder has nothing but a lock file with nothing in it.
fn is_begun(dir: &Dir) -> io::Result<bool> {
    let mut entries = dir.entries()?.into_iter();
    Ok(entries.all(|entry| entry.name == LOCK && dir.read(LOCK, 1).is_ok_and(|content| content.is_empty())))
}

fn sweep_vm(runtime: &Root, name: &str) -> io::Result<bool> {
    let dir = runtime.dir(name)?;
    let Some(_held) = dir.lock(LOCK)? else { return Ok(false) };
    // Its owner may have left, and another come, between the two.
    if runtime.dir(name)?.id()? != dir.id()? {
        return Ok(false);
    }
    groups_gone(&dir)?;
    bury(runtime, name.as_ref()).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;
    use std::fs::{self, DirBuilder};
    use std::os::unix::fs::{symlink, DirBuilderExt, PermissionsExt};

    fn folders(scratch: &Scratch) -> Folders {
        Folders::new(Some(scratch.path().join("run")), Some(scratch.path().join("cache")))
    }

    fn id(name: &str) -> VmId {
        VmId::parse(name).unwrap()
    }

    fn made(folders: &Folders, name: &str) -> VmDir {
        VmDir::create(folders, &id(name)).unwrap()
    }

    /// As a process leaves it that dies: all is there, and no lock is held.
    fn abandon(dir: VmDir) {
        let (stale, kept) = (dir.path().to_owned(), dir.runtime.path().with_extension("kept"));
        fs::rename(&stale, &kept).unwrap();
        drop(dir);
        fs::rename(kept, stale).unwrap();
    }

    fn swept(folders: &Folders) -> Vec<String> {
        sweep(&folders.existing().unwrap().runtime.unwrap())
    }

    fn names(path: &Path) -> Vec<String> {
        let entries = fs::read_dir(path).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.filter(|name| name != ".tw-microvm").collect();
        names.sort();
        names
    }

    #[test]
    fn test_create_twice_says_taken_and_drop_removes() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        let first = made(&folders, "a");
        assert_eq!(VmDir::create(&folders, &id("a")).unwrap_err().code(), "vm_id_taken");
        assert_eq!(names(folders.runtime.path()), ["a"]);
        drop(first);
        assert!(names(folders.runtime.path()).is_empty());
    }

    #[test]
    fn test_name_of_a_vm_that_is_just_leaving_is_waited_for() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        let first = made(&folders, "a");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(LEAVING / 10);
                drop(first);
            });
            assert!(VmDir::create(&folders, &id("a")).is_ok());
        });
    }

    #[test]
    fn test_found_are_the_folders_that_have_a_lock_and_no_links() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        assert_eq!(found(&folders.runtime).unwrap(), []);
        let (one, _other) = (made(&folders, "one"), made(&folders, "other"));
        fs::create_dir(folders.runtime.path().join("empty")).unwrap();
        symlink(one.path(), folders.runtime.path().join("link")).unwrap();
        let mut ids: Vec<String> =
            found(&folders.runtime).unwrap().iter().map(|found| found.vm_id.to_string()).collect();
        ids.sort();
        assert_eq!(ids, ["one", "other"]);
    }

    #[test]
    fn test_rename_takes_the_files_along() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        let mut dir = made(&folders, "old");
        fs::write(dir.path().join("config"), b"y").unwrap();
        abandon(made(&folders, "new"));
        dir.rename(&id("new")).unwrap();
        assert_eq!(names(folders.runtime.path()), ["new"]);
        assert_eq!(dir.path(), folders.runtime.path().join("new"));
        assert_eq!(fs::read(dir.path().join("config")).unwrap(), b"y");
        assert_eq!(VmDir::create(&folders, &id("new")).unwrap_err().code(), "vm_id_taken");
        let other = made(&folders, "other");
        assert_eq!(dir.rename(&id("other")).unwrap_err().code(), "vm_id_taken");
        assert!(dir.path().ends_with("new") && dir.socket().parent().unwrap().exists() && other.path().exists());
    }

    #[test]
    fn test_sweep_removes_only_what_nobody_holds() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        let held = made(&folders, "held");
        abandon(made(&folders, "stale"));
        assert_eq!(swept(&folders), ["stale"]);
        assert!(held.path().exists());
    }

    #[test]
    fn test_sweep_leaves_what_no_vm_made() {
        let (scratch, outside) = (Scratch::new(), Scratch::new());
        let folders = folders(&scratch);
        drop(made(&folders, "vm"));
        let base = folders.runtime.path();
        fs::write(outside.path().join("lock"), b"").unwrap();
        for folder in ["empty", "full", ".new-x", ".gone-x", "disks"] {
            fs::create_dir(base.join(folder)).unwrap();
            fs::set_permissions(base.join(folder), fs::Permissions::from_mode(0o700)).unwrap();
        }
        for file in ["full/thesis", "lock", ".gone-0123456789abcdef", "git/lock", "git/HEAD", "empty-lock/lock"] {
            let folder = base.join(file).parent().unwrap().to_owned();
            DirBuilder::new().recursive(true).mode(0o700).create(folder).unwrap();
            fs::write(base.join(file), if file == "git/lock" { "1234\n" } else { "" }).unwrap();
        }
        symlink(outside.path(), base.join("linked")).unwrap();
        fs::create_dir(base.join("lock-is-a-link")).unwrap();
        fs::set_permissions(base.join("lock-is-a-link"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink(outside.path().join("lock"), base.join("lock-is-a-link/lock")).unwrap();
        let before = names(base);
        assert!(swept(&folders).is_empty());
        assert_eq!((names(base), names(outside.path())), (before, vec!["lock".to_owned()]));
        for taken in ["empty", "full", "linked", "lock-is-a-link", "git", "empty-lock"] {
            let message = VmDir::create(&folders, &id(taken)).unwrap_err().to_string();
            assert!(message.contains(taken), "{message}");
        }
        assert!(base.join("full/thesis").exists());
    }

    #[test]
    fn test_sweep_removes_what_was_half_made_or_half_removed() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        drop(made(&folders, "vm"));
        let runtime = folders.runtime.root().unwrap();
        runtime.make_dir(".new-0123456789abcdef").unwrap();
        drop(runtime.make_dir(".new-0123456789abcdee").unwrap().make_lock(LOCK).unwrap());
        let held = runtime.make_dir(".new-0123456789abcded").unwrap().make_lock(LOCK).unwrap();
        runtime.make_dir(".gone-0123456789abcdef").unwrap().create("sock").unwrap();
        assert!(swept(&folders).is_empty());
        assert_eq!(names(runtime.path()), [".new-0123456789abcded"]);
        drop(held);
    }

    #[test]
    fn test_folder_stays_until_the_groups_that_it_names_are_gone() {
        let scratch = Scratch::new();
        let folders = folders(&scratch);
        let dir = made(&folders, "vm");
        let groups = cgroup::Groups::create(&format!("stays-{}", std::process::id()), None, &cgroup::PROBED).unwrap();
        dir.note_groups(groups.folders()).unwrap();
        let Some(group) = dir.groups().pop() else {
            eprintln!("skipped: no control groups here");
            return;
        };
        // Its owner dies without a word, and something keeps one group from going.
        std::mem::forget(groups);
        fs::create_dir(group.join("child")).unwrap();
        drop(dir);
        assert!(swept(&folders).is_empty() && names(folders.runtime.path()) == ["vm"]);
        fs::remove_dir(group.join("child")).unwrap();
        assert_eq!(swept(&folders), ["vm"]);
        assert!(!group.exists());
    }

    #[test]
    fn test_folders_are_made_in_the_midst_of_sweeps() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let scratch = Scratch::new();
        let folders = folders(&scratch);
        let (runtime, _) = folders.roots().unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                let mut swept = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    swept.extend(sweep(&runtime));
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
    }

    #[test]
    fn test_create_in_an_open_base_is_refused() {
        for open in ["run", "cache"] {
            let scratch = Scratch::new();
            let folders = folders(&scratch);
            fs::create_dir(scratch.path().join(open)).unwrap();
            fs::set_permissions(scratch.path().join(open), fs::Permissions::from_mode(0o755)).unwrap();
            let error = VmDir::create(&folders, &id("a")).unwrap_err();
            assert!(error.code() == "folder_refused" && error.to_string().contains("chmod 700"), "{error}");
        }
    }
}
