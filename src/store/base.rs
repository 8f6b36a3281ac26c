//! The folders that hold all that this program keeps: checked, marked, and opened once.
//!
//! ```text
//! <folder>/          0700, of the effective user, on a way that no other user can change
//!   .tw-microvm      the mark: what the folder is for, and its id
//! ```
//! A folder without the mark is taken when it is empty (then it is marked), or when it has a default's name and nothing in
//! it but what an earlier version made. Any other is refused: what is in it is not ours.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AtFlags, FlockArg, AT_FDCWD};
use nix::sys::stat::{fstat, lstat, FileStat, SFlag};
use nix::sys::statfs::{statfs, TMPFS_MAGIC};
use nix::sys::statvfs::{statvfs, FsFlags};
use nix::unistd::{faccessat, geteuid, AccessFlags, Uid, User};

use super::dir::{is_kind, Dir, Entry, Id};
use super::mark::{self, Mark};
use super::walk::{self, Found, Refusal};
use crate::error::{Cause, Error, Result};
use crate::model::VmId;
use crate::mutex::Mutex;

pub use super::mark::Kind;

/// Names in a refusal; more say nothing more.
const NAMES: usize = 5;
const SHARED_MEMORY: &str = "/dev/shm";
/// The folders in a cache that has no mark yet.
const CACHED: [&str; 4] = ["templates", "snapshots", "suspended", "disks"];

/// A folder that was checked and is held.
#[derive(Debug)]
pub struct Root {
    dir: Dir,
    mark: Mark,
    id: Id,
    /// The folders that it lies in.
    above: Vec<Id>,
}

impl Deref for Root {
    type Target = Dir;

    fn deref(&self) -> &Dir {
        &self.dir
    }
}

impl Root {
    /// 32 hexadecimal digits that name this folder and no other.
    #[must_use]
    pub fn mark_id(&self) -> &str {
        &self.mark.id
    }

    /// A folder in this one, which is made when there is none.
    ///
    /// # Errors
    /// [`Error::FolderRefused`] when it is not this user's alone or cannot be made.
    pub fn make_folder(&self, name: &str) -> Result<Dir> {
        self.make_or_open_dir(name).map_err(|error| self.refuse(name, error))
    }

    /// A folder in this one, if it is there.
    ///
    /// # Errors
    /// [`Error::FolderRefused`] when it is not this user's alone.
    pub fn existing_folder(&self, name: &str) -> Result<Option<Dir>> {
        match self.dir(name) {
            Ok(dir) => Ok(Some(dir)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.refuse(name, error)),
        }
    }

    fn refuse(&self, name: &str, error: io::Error) -> Error {
        let refusal = Refusal::new(error, "make it this user's alone, or name another folder");
        refuse(self.mark.kind, &self.at(name), refusal)
    }

    /// Takes over a descriptor that another process of this user's checked; the checks that need no path are made again.
    ///
    /// # Errors
    /// [`Error::FolderRefused`].
    pub fn received(kind: Kind, fd: &OwnedFd, path: &Path) -> Result<Self> {
        let refused = |cause: Cause| refuse(kind, path, Refusal::new(cause, "name another folder"));
        let stat = fstat(fd).map_err(|errno| refused(errno.into()))?;
        if !is_kind(&stat, SFlag::S_IFDIR) || stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
            return Err(refused("it is not a folder of this user's alone".into()));
        }
        let dir = Dir::from_fd(fd, path.to_owned()).map_err(|error| refused(error.into()))?;
        let mark = mark::read(&dir).map_err(|error| refused(error.into()))?;
        let mark = mark.filter(|mark| mark.kind == kind).ok_or_else(|| refused("it has no mark".into()))?;
        Ok(Self { dir, mark, id: Id::of(&stat), above: Vec::new() })
    }

    /// A descriptor for another process.
    ///
    /// # Errors
    /// What dup(2) failed with.
    pub fn to_send(&self) -> io::Result<OwnedFd> {
        self.dir.as_fd().try_clone_to_owned()
    }
}

/// A folder that the configuration names, opened when it is first needed.
#[derive(Debug)]
pub struct Base {
    kind: Kind,
    path: PathBuf,
    is_default: bool,
    opened: Mutex<Option<Arc<Root>>>,
}

fn refuse(kind: Kind, path: &Path, Refusal { cause: source, remedy }: Refusal) -> Error {
    Error::FolderRefused { field: kind.field(), path: path.to_owned(), source, remedy }
}

impl Base {
    /// Names a folder by its absolute path; nothing is made yet.
    #[must_use]
    pub fn new(kind: Kind, path: PathBuf) -> Self {
        let is_default = match kind {
            Kind::Runtime => default_runtime_folders(geteuid()).contains(&path),
            Kind::Cache => path == default_cache(),
            Kind::Leases => true,
        };
        Self { kind, path, is_default, opened: Mutex::default() }
    }

    /// As the configuration has it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The folder, which is made when there is none. Blocking.
    ///
    /// # Errors
    /// [`Error::FolderRefused`].
    pub fn root(&self) -> Result<Arc<Root>> {
        let opened = self.open(true)?;
        // Made just now, and removed in between.
        opened.ok_or_else(|| self.refuse(Refusal::new("it vanished while it was opened", "try again")))
    }

    /// The folder, if it is there and anything may be in it: a sweep makes nothing. Blocking.
    ///
    /// # Errors
    /// [`Error::FolderRefused`].
    pub fn existing(&self) -> Result<Option<Arc<Root>>> {
        self.open(false)
    }

    fn refuse(&self, refusal: Refusal) -> Error {
        refuse(self.kind, &self.path, refusal)
    }

    fn open(&self, make: bool) -> Result<Option<Arc<Root>>> {
        let mut opened = self.opened.lock();
        // Another folder may have its name by now, or none, or others were let into it: then all is checked anew.
        if let Some(root) = opened.as_ref().filter(|root| is_still_at(root.id, &self.path)) {
            return Ok(Some(root.clone()));
        }
        *opened = None;
        if !self.path.is_absolute() {
            return Err(self.refuse(Refusal::new("the path is relative", "give it in full")));
        }
        let Some(Found { dir, id, above }) = walk::to(&self.path, make).map_err(|why| self.refuse(why))? else {
            return Ok(None);
        };
        let Some(mark) = self.mark(&dir, make)? else { return Ok(None) };
        let root = Arc::new(Root { dir, mark, id, above });
        *opened = Some(root.clone());
        Ok(Some(root))
    }

    /// The folder's mark, which an empty folder gets when something is to be made in it.
    fn mark(&self, dir: &Dir, make: bool) -> Result<Option<Mark>> {
        let marked = || {
            let failed = |error: io::Error| {
                let text = format!("its mark {} cannot be read: {error}", dir.at(mark::FILE).display());
                self.refuse(Refusal::new(Cause::explained(error, text), "name another folder"))
            };
            let found = mark::read(dir).map_err(failed)?;
            match found.as_ref().filter(|mark| mark.kind != self.kind) {
                None => Ok(found),
                Some(other) => {
                    let reason = format!("it is a {} folder (by its mark {})", other.kind.as_str(), mark::FILE);
                    Err(self.refuse(Refusal::new(reason, "name another folder")))
                }
            }
        };
        if let Some(mark) = marked()? {
            return Ok(Some(mark));
        }
        let failed = |error: io::Error| {
            let text = format!("it cannot be written: {error}");
            self.refuse(Refusal::new(Cause::explained(error, text), "name a folder that can"))
        };
        let _turn = dir.turn(FlockArg::LockExclusive).map_err(failed)?;
        // Another process may have marked it meanwhile.
        if let Some(mark) = marked()? {
            return Ok(Some(mark));
        }
        let entries = dir.entries().map_err(failed)?;
        let others: Vec<&Entry> = entries.iter().filter(|entry| !is_nothing(entry)).collect();
        if others.is_empty() && !make {
            return Ok(None);
        }
        let strangers: Vec<String> = others
            .iter()
            .filter(|entry| !self.is_default || !was_ours(self.kind, dir, entry))
            .map(|entry| format!("{:?}", entry.name))
            .collect();
        if !strangers.is_empty() {
            let more = if strangers.len() > NAMES { ", ..." } else { "" };
            let reason = format!(
                "it has other files in it ({}{more}) and no mark of ours ({}), and what VMs leave in it is removed",
                strangers[..strangers.len().min(NAMES)].join(", "),
                mark::FILE
            );
            return Err(self.refuse(Refusal::new(reason, "name an empty folder, or one that is not there yet")));
        }
        mark::write(dir, self.kind).map(Some).map_err(failed)
    }
}

/// Whether the folder that was checked has the path, the owner and the mode that it had then.
fn is_still_at(id: Id, path: &Path) -> bool {
    let is_ours = |stat: &FileStat| stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o077 == 0;
    lstat(path).is_ok_and(|stat| Id::of(&stat) == id && is_ours(&stat))
}

/// What an empty folder may hold: a mark half made, and what mkfs makes.
fn is_nothing(entry: &Entry) -> bool {
    entry.name == mark::DRAFT || (entry.name == "lost+found" && entry.is_dir && entry.owner == 0)
}

/// Whether an earlier version, which had no marks, made an entry.
fn was_ours(kind: Kind, dir: &Dir, entry: &Entry) -> bool {
    let name = entry.name.to_str().unwrap_or_default();
    let (own, private) = (entry.owner == geteuid().as_raw(), entry.mode & 0o077 == 0);
    let closed_folder = own && private && entry.is_dir;
    match kind {
        Kind::Runtime => {
            let of_vm = || {
                let Ok(vm) = dir.dir(&entry.name) else { return false };
                let empty = || vm.entries().is_ok_and(|entries| entries.is_empty());
                vm.open("lock").is_ok() || empty()
            };
            closed_folder && VmId::parse(name).is_ok() && of_vm()
        }
        Kind::Cache => closed_folder && CACHED.contains(&name),
        Kind::Leases => own && !entry.is_dir && name.parse::<u32>().is_ok(),
    }
}

/// Refuses two folders of which one is the other, or lies in it.
///
/// # Errors
/// [`Error::FolderRefused`].
pub fn check_apart(runtime: &Root, cache: &Root) -> Result<()> {
    let how = if runtime.id == cache.id {
        "is"
    } else if runtime.above.contains(&cache.id) {
        "lies in"
    } else if cache.above.contains(&runtime.id) {
        "holds"
    } else {
        return Ok(());
    };
    let reason = format!("it {how} {}, which is {}", cache.path().display(), Kind::Cache.field());
    Err(refuse(Kind::Runtime, runtime.path(), Refusal::new(reason, "name folders that lie apart")))
}

/// The runtime folder that every process of this user works out alike. `XDG_RUNTIME_DIR` has a say where it names a folder of an
/// ordinary user's alone, as its specification demands; root's is one for services and for logins, which set it.
///
/// In memory if there is any: containers and small hosts have `/run` on their disk, where ext4 looks at every file that was
/// removed in the last minute before it makes another. In `/tmp` where neither can be made. A refusal names the usual one.
#[must_use]
pub fn default_runtime() -> PathBuf {
    let uid = geteuid();
    let own = env::var_os("XDG_RUNTIME_DIR").filter(|_| !uid.is_root());
    if let Some(own) = xdg_runtime(own, uid) {
        return own.join("tw-microvm");
    }
    let [usual, shared, last] = default_runtime_folders(uid);
    let is_first = usual.parent().is_some_and(is_in_memory) && can_be_written(&usual);
    if !is_first && is_in_memory(Path::new(SHARED_MEMORY)) && may_be_base(&shared, uid) {
        return shared;
    }
    let is_there = usual.symlink_metadata().is_ok();
    if !is_there && !can_be_written(&usual) && may_be_base(&last, uid) {
        return last;
    }
    usual
}

/// Every folder that is [`default_runtime`] for a process of this user: which one depends on what it sees of the host.
#[must_use]
pub fn default_runtimes() -> Vec<PathBuf> {
    let mut folders = vec![default_runtime()];
    for folder in default_runtime_folders(geteuid()) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// Where root's uid leases are: the same for every manager that sees these file systems, whatever its runtime folder.
#[must_use]
pub fn leases_folder() -> PathBuf {
    let uid = geteuid();
    let [usual, shared, last] = ["/run", SHARED_MEMORY, "/tmp"].map(|folder| Path::new(folder).join("tw-microvm-uids"));
    let has_shared = is_in_memory(Path::new(SHARED_MEMORY)) && may_be_base(&shared, uid);
    match can_be_written(&usual) {
        false if has_shared => shared,
        false if may_be_base(&last, uid) => last,
        _ => usual,
    }
}

/// Where it may be. The names can be guessed: [`Base`] refuses a folder that another user made there.
fn default_runtime_folders(uid: Uid) -> [PathBuf; 3] {
    let shared = Path::new(SHARED_MEMORY).join(format!("tw-microvm-{uid}"));
    let last = PathBuf::from(format!("/tmp/tw-microvm-{uid}"));
    let run_user = PathBuf::from(format!("/run/user/{uid}"));
    let usual = match run_user.symlink_metadata() {
        _ if uid.is_root() => PathBuf::from("/run/tw-microvm"),
        Ok(meta) if meta.is_dir() && meta.uid() == uid.as_raw() => run_user.join("tw-microvm"),
        _ => last.clone(),
    };
    [usual, shared, last]
}

/// The XDG base directory specification: absolute, this user's, and closed to others.
fn xdg_runtime(value: Option<OsString>, uid: Uid) -> Option<PathBuf> {
    let path = PathBuf::from(value?.into_string().ok()?);
    let meta = path.symlink_metadata().ok().filter(|_| path.is_absolute())?;
    (meta.is_dir() && meta.uid() == uid.as_raw() && meta.mode() & 0o077 == 0).then_some(path)
}

/// It may be missing, and is made in a folder of this user's: another user's is what `sudo -E` leaves.
fn xdg_cache(value: Option<OsString>, uid: Uid) -> Option<PathBuf> {
    let path = PathBuf::from(value?.into_string().ok()?);
    let there = path.ancestors().find_map(|above| above.metadata().ok()).filter(|_| path.is_absolute())?;
    (there.is_dir() && there.uid() == uid.as_raw()).then_some(path)
}

fn is_in_memory(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC)
}

/// Whether it is there, or can be made. All may make files beside it: another user's of that name is left alone.
fn may_be_base(folder: &Path, uid: Uid) -> bool {
    let is_ours = match folder.symlink_metadata() {
        Ok(meta) => meta.is_dir() && meta.uid() == uid.as_raw(),
        Err(_) => true,
    };
    is_ours && can_be_written(folder)
}

/// Whether it is there on a file system that can be written, or can be made. One that is there may be closed to its owner
/// (umask), and that is mended: its mode says nothing.
fn can_be_written(folder: &Path) -> bool {
    let flags = AccessFlags::W_OK | AccessFlags::X_OK;
    match folder.ancestors().find(|above| above.symlink_metadata().is_ok()) {
        Some(there) if there == folder => statvfs(there).is_ok_and(|fs| !fs.flags().contains(FsFlags::ST_RDONLY)),
        Some(above) => faccessat(AT_FDCWD, above, flags, AtFlags::AT_EACCESS).is_ok(),
        None => false,
    }
}

/// Where what may be made again is kept, unless the configuration or `XDG_CACHE_HOME` says otherwise.
#[must_use]
pub fn default_cache() -> PathBuf {
    let uid = geteuid();
    if let Some(own) = xdg_cache(env::var_os("XDG_CACHE_HOME"), uid) {
        return own.join("tw-microvm");
    }
    let home = || {
        let home = User::from_uid(uid).ok().flatten().map(|user| user.dir);
        let own =
            |home: &PathBuf| File::open(home).and_then(|file| file.metadata()).is_ok_and(|m| m.uid() == uid.as_raw());
        home.filter(|home| home.to_str().is_some() && own(home)).map(|home| home.join(".cache/tw-microvm"))
    };
    let usual = if uid.is_root() { Some(PathBuf::from("/var/cache/tw-microvm")) } else { home() };
    let last = PathBuf::from(format!("/tmp/tw-microvm-cache-{uid}"));
    // What a folder that is there keeps must not seem lost because its file system became read-only.
    let is_usable =
        |usual: &PathBuf| usual.symlink_metadata().is_ok() || can_be_written(usual) || !may_be_base(&last, uid);
    usual.filter(is_usable).unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;
    use std::fs;
    use std::os::unix::fs::{symlink, PermissionsExt};

    fn base(kind: Kind, path: PathBuf) -> Base {
        Base::new(kind, path)
    }

    fn refusal(base: &Base) -> String {
        let (made, looked) = (base.root().unwrap_err(), base.existing().unwrap_err());
        assert_eq!(made.to_string(), looked.to_string());
        made.to_string()
    }

    #[test]
    fn test_a_new_folder_is_made_marked_and_opened_once() {
        let scratch = Scratch::new();
        let first = base(Kind::Runtime, scratch.path().join("a/run"));
        assert!(first.existing().unwrap().is_none() && !scratch.path().join("a").exists());
        let root = first.root().unwrap();
        assert!(Arc::ptr_eq(&root, &first.root().unwrap()));
        let again = base(Kind::Runtime, scratch.path().join("a/run")).existing().unwrap().unwrap();
        assert_eq!(again.mark_id(), root.mark_id());
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(refusal(&first).contains("755"));
        fs::remove_dir_all(scratch.path().join("a/run")).unwrap();
        assert!(first.existing().unwrap().is_none());
        assert_ne!(first.root().unwrap().mark_id(), root.mark_id());
    }

    #[test]
    fn test_an_empty_folder_is_taken_and_one_with_other_files_is_refused() {
        let scratch = Scratch::new();
        let path = scratch.path().join("run");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let folder = base(Kind::Runtime, path.clone());
        assert!(folder.existing().unwrap().is_none() && fs::read_dir(&path).unwrap().count() == 0);
        fs::write(path.join(".bashrc"), b"").unwrap();
        let message = refusal(&folder);
        for part in ["config[\"runtime_dir\"]", path.to_str().unwrap(), ".bashrc", "empty folder"] {
            assert!(message.contains(part), "{message}");
        }
        fs::remove_file(path.join(".bashrc")).unwrap();
        folder.root().unwrap();
        fs::write(path.join(".bashrc"), b"").unwrap();
        assert!(folder.existing().unwrap().is_some());
    }

    #[test]
    fn test_a_folder_of_another_kind_is_refused() {
        let scratch = Scratch::new();
        base(Kind::Cache, scratch.path().join("x")).root().unwrap();
        assert!(refusal(&base(Kind::Runtime, scratch.path().join("x"))).contains("it is a cache folder"));
    }

    #[test]
    fn test_a_mark_that_is_a_link_is_none() {
        let scratch = Scratch::new();
        let real = base(Kind::Cache, scratch.path().join("real"));
        real.root().unwrap();
        let path = scratch.path().join("false");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        symlink(scratch.path().join("real").join(mark::FILE), path.join(mark::FILE)).unwrap();
        assert!(refusal(&base(Kind::Cache, path)).contains("cannot be read"));
    }

    #[test]
    fn test_folders_that_are_one_or_lie_in_one_another_are_refused() {
        let scratch = Scratch::new();
        let cache = base(Kind::Cache, scratch.path().join("c")).root().unwrap();
        let within = base(Kind::Runtime, scratch.path().join("c/x/run")).root().unwrap();
        let apart = base(Kind::Runtime, scratch.path().join("run")).root().unwrap();
        let below = base(Kind::Cache, scratch.path().join("run/c")).root().unwrap();
        check_apart(&apart, &cache).unwrap();
        assert!(check_apart(&within, &cache).unwrap_err().to_string().contains("it lies in"));
        assert!(check_apart(&apart, &below).unwrap_err().to_string().contains("it holds"));
    }

    /// As [`Base::new`] would make it of a default's path.
    fn default(kind: Kind, path: &Path) -> Base {
        Base { is_default: true, ..Base::new(kind, path.to_owned()) }
    }

    #[test]
    fn test_what_an_earlier_version_made_is_adopted_at_the_defaults_alone() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        let run = dir.make_dir("run").unwrap();
        drop(run.make_dir("tab-1").unwrap().make_lock("lock").unwrap());
        run.make_dir("tab-2").unwrap();
        assert!(refusal(&base(Kind::Runtime, run.path().to_owned())).contains("tab-1"));
        let stranger = run.make_dir("tab-3").unwrap();
        stranger.create("thesis").unwrap();
        assert!(refusal(&default(Kind::Runtime, run.path())).contains("(\"tab-3\")"));
        run.remove_all("tab-3").unwrap();
        assert!(default(Kind::Runtime, run.path()).existing().unwrap().is_some());

        let cache = dir.make_dir("cache").unwrap();
        CACHED.iter().for_each(|name| drop(cache.make_dir(name).unwrap()));
        assert!(refusal(&base(Kind::Cache, cache.path().to_owned())).contains("templates"));
        cache.create("notes").unwrap();
        assert!(refusal(&default(Kind::Cache, cache.path())).contains("(\"notes\")"));
        cache.remove_file("notes").unwrap();
        default(Kind::Cache, cache.path()).root().unwrap();
    }

    #[test]
    fn test_received_checks_the_descriptor_again() {
        let scratch = Scratch::new();
        let root = base(Kind::Runtime, scratch.path().join("run")).root().unwrap();
        let received = Root::received(Kind::Runtime, &root.to_send().unwrap(), root.path()).unwrap();
        assert_eq!(received.mark_id(), root.mark_id());
        assert!(Root::received(Kind::Cache, &root.to_send().unwrap(), root.path()).is_err());
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Root::received(Kind::Runtime, &root.to_send().unwrap(), root.path()).is_err());
    }

    #[test]
    fn test_the_default_is_in_memory_and_never_another_users() {
        let uid = geteuid();
        let folders = default_runtime_folders(uid);
        let chosen = default_runtime();
        assert!(chosen == folders[0] || is_in_memory(chosen.parent().unwrap()) || chosen == folders[2]);
        assert!(!can_be_written(Path::new("relative")));
        assert!(can_be_written(&std::env::temp_dir().join("tw/deep")) && can_be_written(Path::new("/dev/shm")));
        assert!(!is_in_memory(Path::new("/proc")));
        let free = Path::new(SHARED_MEMORY).join(format!("tw-microvm-test-{}", std::process::id()));
        assert!(may_be_base(&free, uid), "this host has no /dev/shm");
        fs::create_dir(&free).unwrap();
        assert!(may_be_base(&free, uid) && !may_be_base(&free, Uid::from_raw(uid.as_raw() + 1)));
        fs::remove_dir(&free).unwrap();
        symlink("/", &free).unwrap();
        assert!(!may_be_base(&free, uid));
        fs::remove_file(&free).unwrap();
    }

    #[test]
    fn test_folders_of_the_environment_are_this_users_or_ignored() {
        let (scratch, uid) = (Scratch::new(), geteuid());
        let other = Uid::from_raw(uid.as_raw() + 1);
        let (own, open) = (scratch.path().join("own"), scratch.path().join("open"));
        for (path, mode) in [(&own, 0o700), (&open, 0o755)] {
            fs::create_dir(path).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let value = |path: &Path| Some(path.as_os_str().to_owned());
        assert_eq!(xdg_runtime(value(&own), uid), Some(own.clone()));
        assert_eq!(xdg_cache(value(&open.join("new/x")), uid), Some(open.join("new/x")));
        for refused in [None, value(&open), value(&own.join("new")), value(Path::new("")), value(Path::new("own"))] {
            assert_eq!(xdg_runtime(refused, uid), None);
        }
        for refused in [None, value(Path::new("")), value(Path::new("own"))] {
            assert_eq!(xdg_cache(refused, uid), None);
        }
        assert_eq!((xdg_runtime(value(&own), other), xdg_cache(value(&own), other)), (None, None));
    }
}
