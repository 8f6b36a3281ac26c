//! The snapshots that users keep: templates of running VMs, under names of their own, and suspended VMs, under the VMs'
//! names.
//!
//! ```text
//! <cache directory>/snapshots/        0700, owned by the effective user; `suspended/` looks the same
//!   <name>/                           appears whole, by a rename, and goes whole, by another one
//!     manifest                        the BLAKE3 digest of the rest in hexadecimal, a line feed, JSON
//!     ram, disk, state                as a template's
//!   .new-<name>/                      a pending snapshot; its maker holds the lock
//!   .lock-<name>                      held while the snapshot is made, resumed or removed
//!   .gone-<random>/                   trash; any process of the user may remove it
//! ```
//! No snapshot is pruned or made again: a damaged one is refused, and stays until its owner deletes it. Names never
//! begin with a dot.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use tokio::sync::RwLock;

use super::files::{self, Template, DISK, MANIFEST, RAM, STATE};
use super::folder::{self, Folder};
use super::{digest, Digest, Fit, Manifest};
use crate::error::{Cause, Error, Result};
use crate::host::clock;
use crate::image::copy_disk;
use crate::model::{VmId, VmSpec};
use crate::mutex::Mutex;
use crate::store::{Dir, Entry, Lock};

const SNAPSHOTS: &str = "snapshots";
const SUSPENDED: &str = "suspended";
const LOCK: &str = ".lock-";
const NEW: &str = ".new-";
const GONE: &str = ".gone-";
/// How often a lock is tried whose file its last holder removes at the same moment.
const TRIES: usize = 8;

/// The VM whose state a snapshot holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotMetadata {
    pub vm_id: VmId,
    /// With the backend that it ran on.
    pub spec: VmSpec,
    /// machine-id(5) and the boot id that a VM has again when it is resumed.
    pub machine_id: [u8; 16],
    pub boot_id: [u8; 16],
    pub created_unix_s: u64,
    /// What its VMM said of its version; `None` in snapshots of releases that did not note it.
    #[serde(default)]
    pub vmm_version: Option<String>,
}

/// The contents of a snapshot's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotManifest {
    pub metadata: SnapshotMetadata,
    pub manifest: Manifest,
}

/// A snapshot, checked and in memory.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub metadata: SnapshotMetadata,
    pub template: Arc<Template>,
}

type LoadedSnapshot = Arc<tokio::sync::Mutex<Option<Snapshot>>>;

/// A folder of snapshots by name.
#[derive(Debug)]
pub struct SnapshotStore {
    folder: Folder,
    /// What its snapshots are, for messages.
    what: &'static str,
    remedy: &'static str,
    /// One task at a time reads a snapshot, once for all clones of this process.
    slots: Mutex<HashMap<String, LoadedSnapshot>>,
    /// Held for reading by the tasks that remove trash.
    removing: Arc<RwLock<()>>,
}

/// The lock on one name. Dropping it unlocks the name.
#[derive(Debug)]
pub struct NameLock {
    dir: Dir,
    name: String,
    _lock: Lock,
}

impl Drop for NameLock {
    fn drop(&mut self) {
        // While it is still locked, so that no other process takes a lock file that is about to go.
        let file = lock_of(&self.name);
        if let Err(error) = self.dir.remove_file(&file) {
            log::warn!("{}: {error}", self.dir.at(&file).display());
        }
    }
}

/// A snapshot that was removed from its store. Dropping it removes the files, which may take a file system a second.
#[derive(Debug)]
pub struct Trash {
    dir: Dir,
    name: String,
}

impl Drop for Trash {
    fn drop(&mut self) {
        // Another process may be cleaning up the same trash.
        if let Err(error) = self.dir.remove_all(&self.name) {
            log::debug!("{}: {error}", self.dir.at(&self.name).display());
        }
    }
}

fn lock_of(name: &str) -> String {
    format!("{LOCK}{name}")
}

impl SnapshotStore {
    /// Names the folder for templates of running VMs; it is made when it is needed.
    #[must_use]
    pub fn snapshots(cache_dir: &Path) -> Self {
        let remedy = "delete_template() it and take another snapshot()";
        Self::new(Folder::new(cache_dir, SNAPSHOTS), "template", remedy)
    }

    /// Names the folder for suspended VMs.
    #[must_use]
    pub fn suspended(cache_dir: &Path) -> Self {
        let remedy = "destroy_vm() it: its state is lost";
        Self::new(Folder::new(cache_dir, SUSPENDED), "suspended VM", remedy)
    }

    fn new(folder: Folder, what: &'static str, remedy: &'static str) -> Self {
        Self { folder, what, remedy, slots: Mutex::default(), removing: Arc::default() }
    }

    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of a snapshot; `None` when there is none of that name.
    fn place(&self, name: &str) -> Result<Option<Dir>> {
        let Some(dir) = self.folder.existing()? else { return Ok(None) };
        match dir.dir(name) {
            Ok(place) => Ok(Some(place)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.damaged(name, error)),
        }
    }

    fn damaged(&self, name: &str, cause: impl Into<Cause>) -> Error {
        let what = format!("{} {name:?}", self.what);
        Error::StateDamaged { what, source: cause.into(), remedy: self.remedy }
    }

    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.folder.trusted().is_some_and(|dir| dir.has(name).unwrap_or(false))
    }

    /// Takes the lock on a name; `None` when another task or process has it. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`] when the folder cannot be used.
    pub fn lock(&self, name: &str) -> Result<Option<NameLock>> {
        let dir = self.folder.make()?;
        let file = lock_of(name);
        for _ in 0..TRIES {
            match dir.make_lock(&file) {
                Ok(Some(lock)) => return Ok(Some(NameLock { dir, name: name.to_owned(), _lock: lock })),
                Ok(None) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::host("lock", dir.at(&file).display(), error)),
            }
        }
        Ok(None)
    }

    /// Begins a snapshot of the locked name, in a folder of its own. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn make(&self, lock: NameLock, name: &str) -> Result<PendingSnapshot> {
        debug_assert_eq!(lock.name, name);
        let file = format!("{NEW}{name}");
        let failed = |error: io::Error| Error::host("make", lock.dir.at(&file).display(), error);
        if lock.dir.has(&file).map_err(failed)? {
            check(&lock.dir, &file, is_half_made)?;
            lock.dir.remove_all(&file).map_err(failed)?;
        }
        let new = lock.dir.make_dir(&file).map_err(failed)?;
        Ok(PendingSnapshot { new, lock })
    }

    /// The manifest of a snapshot; `None` when there is none of that name. Blocking.
    ///
    /// # Errors
    /// [`Error::StateDamaged`].
    pub fn manifest(&self, name: &str) -> Result<Option<SnapshotManifest>> {
        let Some(place) = self.place(name)? else { return Ok(None) };
        match folder::read_manifest(&place).and_then(|bytes| parse(&bytes)) {
            Ok(written) => Ok(Some(written)),
            Err(_) if self.is_gone(name) => Ok(None),
            Err(error) => Err(self.damaged(name, error)),
        }
    }

    /// Reads and checks a snapshot, or finds that it has not changed since it was read; `None` when there is none of that
    /// name.
    ///
    /// # Errors
    /// [`Error::StateDamaged`].
    pub async fn load(self: &Arc<Self>, name: &str) -> Result<Option<Snapshot>> {
        let slot = self.slots.lock().entry(name.to_owned()).or_default().clone();
        let mut known = slot.lock().await;
        if let Some(snapshot) = known.take().filter(|snapshot| snapshot.template.is_unchanged()) {
            *known = Some(snapshot.clone());
            return Ok(Some(snapshot));
        }
        let (store, name) = (self.clone(), name.to_owned());
        let reading = tokio::task::spawn_blocking(move || store.read(&name));
        let snapshot = reading.await.map_err(|error| Error::host("read", "a snapshot", error))??;
        known.clone_from(&snapshot);
        Ok(snapshot)
    }

    /// As [`SnapshotStore::load`], but caches nothing: for a snapshot that is used once. Blocking.
    ///
    /// # Errors
    /// [`Error::StateDamaged`].
    pub fn read(&self, name: &str) -> Result<Option<Snapshot>> {
        let Some(place) = self.place(name)? else { return Ok(None) };
        let mut metadata = None;
        let check = |bytes: &[u8]| {
            let SnapshotManifest { metadata: found, manifest } = parse(bytes)?;
            metadata = Some(found);
            Ok(manifest)
        };
        let read = Template::read(&place, check, files::checked);
        match (read, metadata) {
            (Ok(template), Some(metadata)) => Ok(Some(Snapshot { metadata, template: Arc::new(template) })),
            (Err(_), _) if self.is_gone(name) => Ok(None),
            (Err(error), _) => Err(self.damaged(name, error)),
            (Ok(_), None) => Err(self.damaged(name, "it has no manifest")),
        }
    }

    /// Whether a snapshot was removed while it was read.
    fn is_gone(&self, name: &str) -> bool {
        matches!(self.place(name), Ok(None))
    }

    /// Copies the disk of a snapshot into an empty file; returns whether the copy has the noted digest. A snapshot that cannot
    /// be started any more, or is damaged otherwise, still has its disk. Blocking.
    ///
    /// # Errors
    /// [`Error::StateDamaged`] when there is no disk, [`Error::Host`].
    pub fn export_disk(&self, lock: &NameLock, name: &str, to: &File) -> Result<bool> {
        debug_assert_eq!(lock.name, name);
        let place = self.place(name)?.ok_or_else(|| self.damaged(name, "its folder is gone"))?;
        let disk = place.open(DISK).map_err(|error| self.damaged(name, error))?;
        let copy = || {
            to.set_len(disk.metadata()?.len())?;
            copy_disk(&disk, to)?;
            to.sync_all()?;
            digest::pages(to, |_, _| Ok(()))
        };
        let found = copy().map_err(|error: io::Error| Error::host("export", format!("the disk of {name}"), error))?;
        Ok(self.manifest(name).ok().flatten().is_some_and(|written| written.manifest.disk == found))
    }

    /// Removes a snapshot from the store; `None` when there is none of that name. Running clones keep what they have mapped.
    /// Blocking.
    ///
    /// # Errors
    /// [`Error::Host`], also when what has the name is no snapshot: it stays.
    pub fn remove(&self, lock: &NameLock, name: &str) -> Result<Option<Trash>> {
        debug_assert_eq!(lock.name, name);
        let Some(dir) = self.folder.existing()? else { return Ok(None) };
        if dir.has(name).unwrap_or(false) {
            check(&dir, name, is_snapshot)?;
        }
        let gone = format!("{GONE}{}", clock::hex(&clock::random::<8>()?));
        self.slots.lock().remove(name);
        match dir.rename(name, &dir, &gone) {
            Ok(()) => Ok(Some(Trash { dir, name: gone })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::host("remove", dir.at(name).display(), error)),
        }
    }

    /// Removes trash in the background.
    pub async fn remove_later(&self, trash: Trash) {
        let removing = self.removing.clone().read_owned().await;
        let work = move || {
            drop(trash);
            drop(removing);
        };
        drop(tokio::task::spawn_blocking(work));
    }

    /// Waits until no trash is being removed.
    pub async fn removed(&self) {
        drop(self.removing.write().await);
    }

    /// The names of the snapshots, and their bytes on disk. Blocking.
    #[must_use]
    pub fn list(&self) -> Vec<(String, u64)> {
        let Some(dir) = self.folder.trusted() else { return Vec::new() };
        let look = |entry| {
            let name = folder::own_folder(&entry).filter(|name| !name.starts_with('.') && is_snapshot(&dir, name))?;
            Some((name.to_owned(), folder::disk_bytes(&dir.dir(name).ok()?).ok()?))
        };
        dir.entries().unwrap_or_default().into_iter().filter_map(look).collect()
    }

    /// Removes the pending snapshots, trash and locks of dead processes. Blocking.
    pub fn clean_up(&self) {
        let Some(dir) = self.folder.trusted() else { return };
        for entry in dir.entries().unwrap_or_default() {
            let Some(name) = entry.name.to_str() else { continue };
            let is_folder = folder::own_folder(&entry).is_some() && is_half_made(&dir, name);
            let removed = if is_folder && name.strip_prefix(GONE).is_some_and(is_random) {
                dir.remove_all(name)
            } else if let Some(of) = name.strip_prefix(NEW).filter(|_| is_folder) {
                match self.lock(of) {
                    Ok(Some(_held)) => dir.remove_all(name),
                    _ => Ok(()),
                }
            } else if name.starts_with(LOCK) {
                match dir.lock(name) {
                    Ok(Some(_held)) => dir.remove_file(name),
                    _ => Ok(()),
                }
            } else {
                Ok(())
            };
            if let Err(error) = removed {
                log::warn!("{}: {error}", dir.at(name).display());
            }
        }
    }
}

/// The files of a folder that holds nothing but a snapshot's. Its name alone proves nothing.
fn files_of(dir: &Dir, name: &str) -> Option<Vec<Entry>> {
    let ours = |entry: &Entry| !entry.is_dir && [MANIFEST, RAM, STATE, DISK].iter().any(|file| entry.name == *file);
    let entries = dir.dir(name).and_then(|folder| folder.entries()).ok()?;
    entries.iter().all(ours).then_some(entries)
}

/// Whether a folder holds what is written into one that is being made, nothing at first.
fn is_half_made(dir: &Dir, name: &str) -> bool {
    files_of(dir, name).is_some()
}

/// Whether a folder holds a snapshot, or what damage has left of one.
fn is_snapshot(dir: &Dir, name: &str) -> bool {
    is_half_made(dir, name)
        && dir.dir(name).and_then(|folder| folder.entries()).is_ok_and(|entries| !entries.is_empty())
}

/// Whatever is to be removed is ours.
fn check(dir: &Dir, name: &str, is_ours: impl Fn(&Dir, &str) -> bool) -> Result<()> {
    match is_ours(dir, name) {
        true => Ok(()),
        false => {
            let reason = "it is not what this library puts there, so it stays; move it away or choose another name";
            Err(Error::host("remove", dir.at(name).display(), reason))
        }
    }
}

/// Whether digits are those of a name that [`SnapshotStore::remove`] gives.
fn is_random(digits: &str) -> bool {
    digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// As [`SnapshotStore::clean_up`], for the folder of one. Blocking.
pub fn clean_up_folder(folder: &Path) {
    let known = [SNAPSHOTS, SUSPENDED].into_iter().find(|name| folder.ends_with(name));
    if let Some((cache, name)) = folder.parent().zip(known) {
        SnapshotStore::new(Folder::new(cache, name), "snapshot", "").clean_up();
    }
}

fn parse(bytes: &[u8]) -> io::Result<SnapshotManifest> {
    let invalid = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    let at = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| invalid("its manifest has no digest"))?;
    let (digest, json) = (&bytes[..at], &bytes[at + 1..]);
    if digest != Digest::of(json).as_str().as_bytes() {
        return Err(invalid("its manifest does not have the digest it should have"));
    }
    let written = serde_json::from_slice(json).map(with_spec).and_then(serde_json::from_value);
    written.map_err(|error| invalid(&format!("its manifest: {error}")))
}

/// A manifest in today's form. In the former one the parts of the spec stood beside the rest of the metadata, which was
/// called the outline.
fn with_spec(mut written: Value) -> Value {
    let former = written.as_object_mut().and_then(|written| written.remove("outline"));
    let Some(Value::Object(mut metadata)) = former else { return written };
    let mut take = |key: &str| metadata.remove(key).unwrap_or(Value::Null);
    let spec = json!({
        "isolation_type": take("isolation_type"),
        "backend": take("backend"),
        "limits": take("limits"),
        "network": take("network"),
        "image": {"kernel_path": take("kernel_path"), "rootfs_path": take("rootfs_path")},
    });
    metadata.insert("spec".into(), spec);
    written["metadata"] = metadata.into();
    written
}

/// The folder of a snapshot that is being made; removed when that fails or is cancelled.
#[derive(Debug)]
pub struct PendingSnapshot {
    new: Dir,
    lock: NameLock,
}

impl PendingSnapshot {
    #[must_use]
    pub fn path(&self) -> &Path {
        self.new.path()
    }

    /// Publishes the snapshot, now that its three files are written: safe against a crash of the machine. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn finish(self, fit: Fit, hello: Vec<u8>, metadata: SnapshotMetadata) -> Result<()> {
        let work = || -> io::Result<()> {
            let manifest = files::describe(&self.new, fit, hello)?;
            let json = serde_json::to_vec(&SnapshotManifest { metadata, manifest })?;
            let mut file = self.new.create(MANIFEST)?;
            file.write_all(Digest::of(&json).as_str().as_bytes())?;
            file.write_all(b"\n")?;
            file.write_all(&json)?;
            file.sync_all()?;
            for name in [RAM, STATE, DISK] {
                self.new.open(name)?.sync_all()?;
            }
            let NameLock { dir, name, .. } = &self.lock;
            dir.rename(format!("{NEW}{name}"), dir, name)?;
            dir.sync()
        };
        work().map_err(|error| Error::host("keep", self.lock.dir.at(&self.lock.name).display(), error))
    }
}

impl Drop for PendingSnapshot {
    fn drop(&mut self) {
        let NameLock { dir, name, .. } = &self.lock;
        if let Err(error) = dir.remove_all(format!("{NEW}{name}")) {
            log::warn!("{}: {error}", self.new.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::fit;
    use super::*;
    use crate::model::{
        Backend, BootImage, IsolationType, Labels, NetworkConfig, NetworkText, ResourceLimits, SpecPatch,
    };
    use crate::store::private_dir;
    use std::fs;
    use std::fs::DirBuilder;
    use std::os::unix::fs::DirBuilderExt;
    use tempfile::TempDir;

    fn store() -> (TempDir, Arc<SnapshotStore>) {
        let cache = private_dir();
        let store = Arc::new(SnapshotStore::snapshots(cache.path()));
        (cache, store)
    }

    fn metadata() -> SnapshotMetadata {
        let patch = SpecPatch { backend: Some(Backend::Qemu), ..SpecPatch::default() };
        SnapshotMetadata {
            vm_id: VmId::parse("tab-1").unwrap(),
            spec: VmSpec::new(IsolationType::BrowserTab, patch),
            machine_id: [1; 16],
            boot_id: [2; 16],
            created_unix_s: 3,
            vmm_version: Some("QEMU emulator version 7.2.22".into()),
        }
    }

    fn keep(store: &SnapshotStore, name: &str) {
        let pending = store.make(store.lock(name).unwrap().unwrap(), name).unwrap();
        for file in [RAM, STATE, DISK] {
            fs::write(pending.path().join(file), file).unwrap();
        }
        pending.finish(fit(), b"hello".to_vec(), metadata()).unwrap();
    }

    /// A manifest in the former form.
    const FORMER: &[u8] = include_bytes!("../../../tests/golden/suspended.manifest");

    /// The bytes of a manifest, with the digest that they must have.
    fn sealed(json: &Value) -> Vec<u8> {
        let json = serde_json::to_vec(json).unwrap();
        [Digest::of(&json).as_str().as_bytes(), b"\n", &json].concat()
    }

    #[test]
    fn test_parse_a_manifest_in_the_former_form_has_every_part_of_its_vm() {
        let written = parse(FORMER).unwrap();
        let network = NetworkText {
            tap_device: Some("tap0".into()),
            ip_address: Some("192.168.100.10".into()),
            mac_address: Some("52:54:00:12:34:AB".into()),
            gateway: Some("192.168.100.1".into()),
            dns_servers: vec!["8.8.8.8".into()],
            egress: Some(vec!["Example.com:443".into(), "10.0.0.0/8".into()]),
            ..NetworkConfig::default().into()
        };
        let limits =
            ResourceLimits { memory_mb: 128, disk_size_mb: 16, disk_ops_per_s: Some(5000), ..Default::default() };
        let spec = VmSpec {
            isolation_type: IsolationType::Session,
            backend: Some(Backend::Qemu),
            limits,
            network: NetworkConfig::parse(network).unwrap(),
            image: BootImage::default(),
            template: None,
            labels: Labels::default(),
        };
        assert_eq!((written.metadata.vm_id.as_str(), &written.metadata.spec), ("old-1", &spec));
        assert!(written.metadata.machine_id != [0; 16] && written.metadata.vmm_version.is_some());
        assert_eq!(parse(&sealed(&serde_json::to_value(&written).unwrap())).unwrap(), written);
    }

    #[test]
    fn test_parse_what_this_release_does_not_know_is_refused() {
        let json: Value = serde_json::from_slice(&FORMER[65..]).unwrap();
        let known = serde_json::to_value(parse(&sealed(&json)).unwrap()).unwrap();
        let parts = ["", "/metadata", "/metadata/spec", "/metadata/spec/image", "/manifest"];
        for (json, part) in parts.iter().map(|part| (&known, *part)).chain([(&json, "/outline")]) {
            let mut json = json.clone();
            json.pointer_mut(part).unwrap()["later"] = json!(1);
            assert!(parse(&sealed(&json)).unwrap_err().to_string().contains("later"), "{part}");
        }
    }

    #[test]
    fn test_holes_of_a_template_count_for_as_long_as_a_clone_holds_its_memory() {
        let (_cache, store) = store();
        let pending = store.make(store.lock("a").unwrap().unwrap(), "a").unwrap();
        for file in [RAM, STATE, DISK] {
            fs::write(pending.path().join(file), file).unwrap();
        }
        // So large that the other tests' templates are nothing beside it.
        let bytes = 1 << 40;
        File::options().write(true).open(pending.path().join(RAM)).unwrap().set_len(bytes).unwrap();
        pending.finish(fit(), b"hello".to_vec(), metadata()).unwrap();
        let ram = store.read("a").unwrap().unwrap().template.ram.clone();
        assert!(files::untouched_bytes() >= bytes - 4096);
        drop(ram);
        assert!(files::untouched_bytes() < bytes / 2);
    }

    #[tokio::test]
    async fn test_snapshot_is_found_again_and_removed_whole() {
        let (cache, store) = store();
        keep(&store, "a");
        assert_eq!(store.manifest("a").unwrap().unwrap().metadata, metadata());
        let kept = store.load("a").await.unwrap().unwrap();
        assert!(Arc::ptr_eq(&kept.template, &store.load("a").await.unwrap().unwrap().template));
        assert_eq!((kept.metadata, kept.template.manifest.hello.as_slice()), (metadata(), &b"hello"[..]));
        let lock = store.lock("a").unwrap().unwrap();
        assert!(store.remove(&lock, "a").unwrap().is_some() && store.remove(&lock, "a").unwrap().is_none());
        drop(lock);
        assert!(store.load("a").await.unwrap().is_none() && store.manifest("a").unwrap().is_none());
        assert_eq!(fs::read_dir(cache.path().join("snapshots")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn test_any_changed_byte_is_refused() {
        let (cache, store) = store();
        for file in [RAM, STATE, DISK, MANIFEST] {
            keep(&store, "a");
            store.load("a").await.unwrap().unwrap();
            let path = cache.path().join("snapshots/a").join(file);
            let mut bytes = fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&path, bytes).unwrap();
            let error = store.load("a").await.unwrap_err();
            assert!(error.code() == "state_damaged" && error.to_string().contains("\"a\""), "{file}: {error}");
            assert!(store.read("a").is_err());
            drop(store.remove(&store.lock("a").unwrap().unwrap(), "a").unwrap());
        }
    }

    /// Another user who may write in a folder on the way could put a state of his own there, with digests that fit.
    #[test]
    fn test_snapshot_in_folders_open_to_others_is_not_used_and_stays() {
        use std::os::unix::fs::{symlink, PermissionsExt};

        let (cache, store) = store();
        keep(&store, "a");
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for path in [cache.path().to_owned(), cache.path().join("snapshots"), cache.path().join("snapshots/a")] {
            set(&path, 0o777);
            assert!(store.read("a").is_err() && store.manifest("a").is_err(), "{}", path.display());
            store.clean_up();
            set(&path, 0o700);
            assert!(store.read("a").unwrap().is_some());
        }
        let outside = cache.path().join("outside");
        for file in [RAM, STATE, DISK, MANIFEST] {
            let path = cache.path().join("snapshots/a").join(file);
            fs::rename(&path, &outside).unwrap();
            symlink(&outside, &path).unwrap();
            assert_eq!(store.read("a").unwrap_err().code(), "state_damaged", "{file}");
            fs::rename(&outside, &path).unwrap();
        }
        symlink(&outside, cache.path().join("snapshots/.lock-b")).unwrap();
        assert!(store.lock("b").is_err() && !outside.exists());
    }

    #[test]
    fn test_clean_up_leaves_foreign_files() {
        let (cache, store) = store();
        keep(&store, "a");
        let folder = cache.path().join("snapshots");
        for name in ["2024-01-01", ".git", ".gone", ".cache"] {
            fs::create_dir(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("file"), b"x").unwrap();
        }
        fs::write(folder.join(".gone-file"), b"x").unwrap();
        std::os::unix::fs::symlink(folder.join("2024-01-01"), folder.join(".new-link")).unwrap();
        let before = fs::read_dir(&folder).unwrap().count();
        store.clean_up();
        clean_up_folder(&folder);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), before);
        assert!(folder.join("2024-01-01/file").exists());
    }

    #[test]
    fn test_what_others_put_there_is_neither_listed_nor_removed_under_its_very_name() {
        let (cache, store) = store();
        keep(&store, "own");
        let folder = cache.path().join("snapshots");
        for name in ["thesis", "empty", ".new-project"] {
            DirBuilder::new().mode(0o700).create(folder.join(name)).unwrap();
        }
        for file in ["thesis/ram", "thesis/chapter", ".new-project/chapter", ".lock-smith"] {
            fs::write(folder.join(file), b"ten years of work").unwrap();
        }
        assert_eq!(store.list().into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["own"]);
        for name in ["thesis", "empty"] {
            let error = store.remove(&store.lock(name).unwrap().unwrap(), name).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("move it away"), "{error}");
        }
        assert!(store.make(store.lock("project").unwrap().unwrap(), "project").is_err());
        assert!(store.lock("smith").is_err());
        store.clean_up();
        for file in ["thesis/chapter", ".new-project/chapter", ".lock-smith"] {
            assert_eq!(fs::read(folder.join(file)).unwrap(), b"ten years of work");
        }
        assert!(folder.join("empty").exists());
    }

    #[test]
    fn test_lock_has_one_holder_at_a_time_and_leaves_nothing() {
        let (cache, store) = store();
        let lock = store.lock("a").unwrap().unwrap();
        assert!(store.lock("a").unwrap().is_none());
        assert!(store.lock("b").unwrap().is_some());
        drop(lock);
        assert!(store.lock("a").unwrap().is_some());
        assert_eq!(fs::read_dir(cache.path().join("snapshots")).unwrap().count(), 0);
    }

    #[test]
    fn test_pending_snapshot_cancelled_or_of_a_dead_process_leaves_nothing() {
        let (cache, store) = store();
        drop(store.make(store.lock("a").unwrap().unwrap(), "a").unwrap());
        for name in [".new-b", ".gone-0123456789abcdef"] {
            DirBuilder::new().mode(0o700).create(cache.path().join("snapshots").join(name)).unwrap();
            fs::write(cache.path().join("snapshots").join(name).join(RAM), b"half").unwrap();
        }
        fs::write(cache.path().join("snapshots/.lock-b"), b"").unwrap();
        let (lock, mine) = (store.lock("c").unwrap(), cache.path().join("snapshots/.new-c"));
        fs::create_dir(&mine).unwrap();
        store.clean_up();
        assert!(mine.exists());
        drop(lock);
        fs::remove_dir(mine).unwrap();
        assert_eq!(fs::read_dir(cache.path().join("snapshots")).unwrap().count(), 0);
        assert_eq!(store.list(), []);
    }
}
