//! What users keep: templates of running VMs, under names of their own, and suspended VMs, under the VMs' names.
//!
//! ```text
//! <cache directory>/snapshots/        0700, owned by the effective user; `suspended/` looks the same
//!   <name>/                           appears whole, by a rename, and goes whole, by another one
//!     manifest                        the BLAKE3 digest of the rest in hexadecimal, a line feed, JSON
//!     ram, disk, state                as a template's
//!   .new-<name>/                      being made by whoever holds the lock
//!   .lock-<name>                      held by whoever makes, resumes or removes it
//!   .gone-<random>/                   thrown away; anyone may remove it
//! ```
//! Nothing here is pruned or made again: what is damaged is refused, and stays until its owner deletes it. Names never
//! begin with a dot.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use tokio::sync::RwLock;

use super::files::{self, remove, Template, DISK, MANIFEST, RAM, STATE};
use super::{digest, Digest, Fit, Manifest};
use crate::error::{Error, Result};
use crate::host::fork::{self, Concealed};
use crate::host::{clock, lock, private_dir};
use crate::image::copy_disk;
use crate::model::{NetworkConfig, ResourceLimits};

const LOCK: &str = ".lock-";
const NEW: &str = ".new-";
const GONE: &str = ".gone-";
/// How often a lock is tried whose file its last holder removes at the same moment.
const TRIES: usize = 8;

/// The VM that was kept, as its owner described it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outline {
    pub vm_id: String,
    pub backend: String,
    pub isolation_type: String,
    pub limits: ResourceLimits,
    pub network: NetworkConfig,
    pub kernel_path: Option<PathBuf>,
    pub rootfs_path: Option<PathBuf>,
    /// machine-id(5) and the boot id that a VM has again when it is resumed.
    pub machine_id: [u8; 16],
    pub boot_id: [u8; 16],
    pub created_unix_s: u64,
    /// What its VMM said of its version; `None` in what was kept before that was noted.
    #[serde(default)]
    pub vmm_version: Option<String>,
}

/// What the manifest of something kept says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    pub outline: Outline,
    pub manifest: Manifest,
}

/// Something kept, checked and in memory.
#[derive(Debug, Clone)]
pub struct Kept {
    pub outline: Outline,
    pub template: Arc<Template>,
}

type Slot = Arc<tokio::sync::Mutex<Option<Kept>>>;

/// One folder of things kept by name.
#[derive(Debug)]
pub struct Shelf {
    dir: PathBuf,
    /// What stands on it, for messages.
    what: &'static str,
    remedy: &'static str,
    /// One is read by one task at a time, and once for all clones of this process.
    slots: Mutex<HashMap<String, Slot>>,
    /// Held for reading by whoever removes files that nobody waits for.
    removing: Arc<RwLock<()>>,
}

/// The lock on one name. Dropping it lets go.
#[derive(Debug)]
pub struct Held {
    path: PathBuf,
    _concealed: Concealed,
    _lock: Flock<File>,
}

impl Drop for Held {
    fn drop(&mut self) {
        // While it is still locked, so that nobody takes a name that is about to go.
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: {error}", self.path.display());
        }
    }
}

/// What was taken off a shelf. Dropping it removes the files, which may take a file system a second.
#[derive(Debug)]
pub struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        // Another process that cleans up may do the same.
        if let Err(error) = remove(&self.0) {
            log::debug!("{}: {error}", self.0.display());
        }
    }
}

impl Shelf {
    /// Names the folder for templates of running VMs; it is made when it is needed.
    #[must_use]
    pub fn snapshots(cache_dir: &Path) -> Self {
        let remedy = "delete_template() it and take another snapshot()";
        Self::new(cache_dir.join("snapshots"), "template", remedy)
    }

    /// Names the folder for suspended VMs.
    #[must_use]
    pub fn suspended(cache_dir: &Path) -> Self {
        let remedy = "destroy_vm() it: its state is lost";
        Self::new(cache_dir.join("suspended"), "suspended VM", remedy)
    }

    fn new(dir: PathBuf, what: &'static str, remedy: &'static str) -> Self {
        Self { dir, what, remedy, slots: Mutex::default(), removing: Arc::default() }
    }

    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn damaged(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        let what = format!("{} {name:?}", self.what);
        Error::StateDamaged { what, reason: reason.to_string(), remedy: self.remedy }
    }

    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.place(name).is_dir()
    }

    /// Takes the lock on a name; `None` when another task or process has it. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`] when the folder cannot be used.
    pub fn hold(&self, name: &str) -> Result<Option<Held>> {
        private_dir::ensure(&self.dir, "cache_dir")?;
        let path = self.dir.join(format!("{LOCK}{name}"));
        for _ in 0..TRIES {
            match lock::try_exclusive(&path) {
                Ok(Some(lock)) => return Ok(Some(Held { path, _concealed: fork::conceal(&*lock), _lock: lock })),
                Ok(None) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::host("lock", path.display(), error)),
            }
        }
        Ok(None)
    }

    /// Begins to make what `held` names, in a folder of its own. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn make(&self, held: Held, name: &str) -> Result<Making> {
        let new = self.dir.join(format!("{NEW}{name}"));
        remove(&new).map_err(|error| Error::host("remove", new.display(), error))?;
        private_dir::ensure(&new, "cache_dir")?;
        Ok(Making { new, place: self.place(name), _held: held })
    }

    /// What is kept under a name, without its files; `None` when nothing is. Blocking.
    ///
    /// # Errors
    /// [`Error::StateDamaged`].
    pub fn manifest(&self, name: &str) -> Result<Option<Written>> {
        let place = self.place(name);
        match fs::read(place.join(MANIFEST)).and_then(|bytes| parse(&bytes)) {
            Ok(written) => Ok(Some(written)),
            Err(error) if error.kind() == ErrorKind::NotFound && !place.exists() => Ok(None),
            Err(error) => Err(self.damaged(name, error)),
        }
    }

    /// Reads and checks what is kept, or finds that it has not changed since it was read; `None` when nothing is.
    ///
    /// # Errors
    /// [`Error::StateDamaged`].
    pub async fn load(self: &Arc<Self>, name: &str) -> Result<Option<Kept>> {
        let slot =
            self.slots.lock().unwrap_or_else(PoisonError::into_inner).entry(name.to_owned()).or_default().clone();
        let mut known = slot.lock().await;
        if let Some(kept) = known.take().filter(|kept| kept.template.is_unchanged()) {
            *known = Some(kept.clone());
            return Ok(Some(kept));
        }
        let (shelf, name) = (self.clone(), name.to_owned());
        let reading = tokio::task::spawn_blocking(move || shelf.read(&name));
        let kept = reading.await.map_err(|error| Error::host("read", "what was kept", error))??;
        known.clone_from(&kept);
        Ok(kept)
    }

    /// As [`Shelf::load`], but remembers nothing: for what is used once. Blocking.
    ///
    /// # Errors
    /// [`Error::StateDamaged`].
    pub fn read(&self, name: &str) -> Result<Option<Kept>> {
        let place = self.place(name);
        let mut outline = None;
        let check = |bytes: &[u8]| {
            let Written { outline: found, manifest } = parse(bytes)?;
            outline = Some(found);
            Ok(manifest)
        };
        let read = Template::read(&place, check, files::checked);
        match (read, outline) {
            (Ok(template), Some(outline)) => Ok(Some(Kept { outline, template: Arc::new(template) })),
            (Err(error), _) if error.kind() == ErrorKind::NotFound && !place.exists() => Ok(None),
            (Err(error), _) => Err(self.damaged(name, error)),
            (Ok(_), None) => Err(self.damaged(name, "it has no manifest")),
        }
    }

    /// Copies the disk of what `held` names into an empty file; whether the copy has the digest that was noted. What cannot be
    /// started any more, or is damaged otherwise, still has its disk. Blocking.
    ///
    /// # Errors
    /// [`Error::StateDamaged`] when there is no disk, [`Error::Host`].
    pub fn export_disk(&self, held: &Held, name: &str, to: &File) -> Result<bool> {
        debug_assert_eq!(held.path, self.dir.join(format!("{LOCK}{name}")));
        let disk = File::open(self.place(name).join(DISK)).map_err(|error| self.damaged(name, error))?;
        let copy = || {
            to.set_len(disk.metadata()?.len())?;
            copy_disk(&disk, to)?;
            to.sync_all()?;
            digest::pages(to, |_, _| Ok(()))
        };
        let found = copy().map_err(|error: io::Error| Error::host("export", format!("the disk of {name}"), error))?;
        Ok(self.manifest(name).ok().flatten().is_some_and(|written| written.manifest.disk == found))
    }

    /// Forgets what is kept and takes it off the shelf; `None` when nothing was there. VMs that run keep what they have.
    /// Blocking.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn remove(&self, held: &Held, name: &str) -> Result<Option<Gone>> {
        let (place, gone) = (self.place(name), self.dir.join(format!("{GONE}{}", clock::hex(&clock::random::<8>()?))));
        debug_assert_eq!(held.path, self.dir.join(format!("{LOCK}{name}")));
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        match fs::rename(&place, &gone) {
            Ok(()) => Ok(Some(Gone(gone))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::host("remove", place.display(), error)),
        }
    }

    /// Removes the files of what is gone while the caller goes on.
    pub async fn remove_later(&self, gone: Gone) {
        let removing = self.removing.clone().read_owned().await;
        let work = move || {
            drop(gone);
            drop(removing);
        };
        drop(tokio::task::spawn_blocking(work));
    }

    /// Waits until nothing is being removed any more.
    pub async fn removed(&self) {
        drop(self.removing.write().await);
    }

    /// The names of what is kept, and their bytes on disk. Blocking.
    #[must_use]
    pub fn list(&self) -> Vec<(String, u64)> {
        let look = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok().filter(|name| !name.starts_with('.'))?;
            let files = fs::read_dir(entry.path()).ok()?.flatten().filter_map(|file| file.metadata().ok());
            Some((name, files.map(|meta| meta.blocks() * 512).sum()))
        };
        let mut found: Vec<_> = fs::read_dir(&self.dir).into_iter().flatten().flatten().filter_map(look).collect();
        found.sort();
        found
    }

    /// Removes what dead processes left half-way. Blocking.
    pub fn clean_up(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let file_name = entry.file_name();
            let Some(name) = file_name.to_str() else { continue };
            if name.starts_with(GONE) {
                drop(Gone(entry.path()));
                continue;
            }
            let of = name.strip_prefix(NEW).or_else(|| name.strip_prefix(LOCK));
            // Dropping the lock removes its file, too.
            if let Some(Ok(Some(_held))) = of.map(|name| self.hold(name)) {
                if name.starts_with(NEW) {
                    if let Err(error) = remove(&entry.path()) {
                        log::warn!("{}: {error}", entry.path().display());
                    }
                }
            }
        }
    }
}

/// As [`Shelf::clean_up`], for the folder of one. Blocking.
pub fn clean_up_folder(folder: &Path) {
    Shelf::new(folder.to_owned(), "kept", "").clean_up();
}

fn parse(bytes: &[u8]) -> io::Result<Written> {
    let invalid = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    let at = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| invalid("its manifest has no digest"))?;
    let (digest, json) = (&bytes[..at], &bytes[at + 1..]);
    if digest != Digest::of(json).as_str().as_bytes() {
        return Err(invalid("its manifest does not have the digest it should have"));
    }
    serde_json::from_slice(json).map_err(|error| invalid(&format!("its manifest: {error}")))
}

/// A folder in which something is made that is to be kept; gone when that fails or is given up.
#[derive(Debug)]
pub struct Making {
    new: PathBuf,
    place: PathBuf,
    _held: Held,
}

impl Making {
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.new
    }

    /// Puts it in its place, now that its three files are written: safe against a crash of the machine. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn finish(self, fit: Fit, hello: Vec<u8>, outline: Outline) -> Result<()> {
        let work = || -> io::Result<()> {
            let manifest = files::describe(&self.new, fit, hello)?;
            let json = serde_json::to_vec(&Written { outline, manifest })?;
            let mut file = File::options().write(true).create_new(true).open(self.new.join(MANIFEST))?;
            file.write_all(Digest::of(&json).as_str().as_bytes())?;
            file.write_all(b"\n")?;
            file.write_all(&json)?;
            file.sync_all()?;
            for name in [RAM, STATE, DISK] {
                File::open(self.new.join(name))?.sync_all()?;
            }
            fs::rename(&self.new, &self.place)?;
            self.place.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
        };
        work().map_err(|error| Error::host("keep", self.place.display(), error))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.new) {
            log::warn!("{}: {error}", self.new.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::fit;
    use super::*;

    fn shelf(name: &str) -> (PathBuf, Arc<Shelf>) {
        let cache = std::env::temp_dir().join(format!("kept-{}-{name}", std::process::id()));
        (cache.clone(), Arc::new(Shelf::snapshots(&cache)))
    }

    fn outline() -> Outline {
        Outline {
            vm_id: "tab-1".into(),
            backend: "qemu".into(),
            isolation_type: "browser_tab".into(),
            limits: ResourceLimits::default(),
            network: NetworkConfig::default(),
            kernel_path: None,
            rootfs_path: None,
            machine_id: [1; 16],
            boot_id: [2; 16],
            created_unix_s: 3,
            vmm_version: Some("QEMU emulator version 7.2.22".into()),
        }
    }

    fn keep(shelf: &Shelf, name: &str) {
        let making = shelf.make(shelf.hold(name).unwrap().unwrap(), name).unwrap();
        for file in [RAM, STATE, DISK] {
            fs::write(making.path().join(file), file).unwrap();
        }
        making.finish(fit(), b"hello".to_vec(), outline()).unwrap();
    }

    #[test]
    fn test_holes_of_a_template_count_for_as_long_as_a_clone_holds_its_memory() {
        let (cache, shelf) = shelf("holes");
        let making = shelf.make(shelf.hold("a").unwrap().unwrap(), "a").unwrap();
        for file in [RAM, STATE, DISK] {
            fs::write(making.path().join(file), file).unwrap();
        }
        // So large that the other tests' templates are nothing beside it.
        let bytes = 1 << 40;
        File::options().write(true).open(making.path().join(RAM)).unwrap().set_len(bytes).unwrap();
        making.finish(fit(), b"hello".to_vec(), outline()).unwrap();
        let ram = shelf.read("a").unwrap().unwrap().template.ram.clone();
        assert!(files::untouched_bytes() >= bytes - 4096);
        drop(ram);
        assert!(files::untouched_bytes() < bytes / 2);
        fs::remove_dir_all(cache).unwrap();
    }

    #[tokio::test]
    async fn test_kept_is_found_again_and_removed_whole() {
        let (cache, shelf) = shelf("found");
        keep(&shelf, "a");
        assert_eq!(shelf.manifest("a").unwrap().unwrap().outline, outline());
        let kept = shelf.load("a").await.unwrap().unwrap();
        assert!(Arc::ptr_eq(&kept.template, &shelf.load("a").await.unwrap().unwrap().template));
        assert_eq!((kept.outline, kept.template.manifest.hello.as_slice()), (outline(), &b"hello"[..]));
        let held = shelf.hold("a").unwrap().unwrap();
        assert!(shelf.remove(&held, "a").unwrap().is_some() && shelf.remove(&held, "a").unwrap().is_none());
        drop(held);
        assert!(shelf.load("a").await.unwrap().is_none() && shelf.manifest("a").unwrap().is_none());
        assert_eq!(fs::read_dir(cache.join("snapshots")).unwrap().count(), 0);
        fs::remove_dir_all(cache).unwrap();
    }

    #[tokio::test]
    async fn test_any_changed_byte_is_refused() {
        let (cache, shelf) = shelf("damage");
        for file in [RAM, STATE, DISK, MANIFEST] {
            keep(&shelf, "a");
            shelf.load("a").await.unwrap().unwrap();
            let path = cache.join("snapshots/a").join(file);
            let mut bytes = fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&path, bytes).unwrap();
            let error = shelf.load("a").await.unwrap_err();
            assert!(error.code() == "state_damaged" && error.to_string().contains("\"a\""), "{file}: {error}");
            assert!(shelf.read("a").is_err());
            drop(shelf.remove(&shelf.hold("a").unwrap().unwrap(), "a").unwrap());
        }
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn test_hold_is_one_holders_at_a_time_and_leaves_nothing() {
        let (cache, shelf) = shelf("hold");
        let held = shelf.hold("a").unwrap().unwrap();
        assert!(shelf.hold("a").unwrap().is_none());
        assert!(shelf.hold("b").unwrap().is_some());
        drop(held);
        assert!(shelf.hold("a").unwrap().is_some());
        assert_eq!(fs::read_dir(cache.join("snapshots")).unwrap().count(), 0);
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn test_making_given_up_or_of_a_dead_maker_leaves_nothing() {
        let (cache, shelf) = shelf("given-up");
        drop(shelf.make(shelf.hold("a").unwrap().unwrap(), "a").unwrap());
        fs::create_dir(cache.join("snapshots/.new-b")).unwrap();
        fs::create_dir(cache.join("snapshots/.gone-0123")).unwrap();
        fs::write(cache.join("snapshots/.lock-b"), b"").unwrap();
        let (held, mine) = (shelf.hold("c").unwrap(), cache.join("snapshots/.new-c"));
        fs::create_dir(&mine).unwrap();
        shelf.clean_up();
        assert!(mine.exists());
        drop(held);
        fs::remove_dir(mine).unwrap();
        assert_eq!(fs::read_dir(cache.join("snapshots")).unwrap().count(), 0);
        assert_eq!(shelf.list(), []);
        fs::remove_dir_all(cache).unwrap();
    }
}
