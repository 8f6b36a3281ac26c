//! The store of templates: finds, makes once, checks and removes them.

use std::collections::HashMap;
use std::future::Future;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::files::{self, Template, DISK, MANIFEST};
use super::folder::{self, Folder};
use super::{Fit, Manifest};
use crate::error::{Error, Result};
use crate::mutex::Mutex;
use crate::store::{Dir, Lock};

/// Its time of change is that of the last use.
const USED: &str = "used";
const LOCK: &str = ".lock";
const NEW: &str = ".new";
const FOLDER: &str = "templates";
/// Hexadecimal digits of a key ([`Fit::key`]).
const KEY_DIGITS: usize = 32;
/// How often a process looks whether another has made the template that both want.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How much the store may hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StoreLimits {
    pub max_bytes: u64,
    /// Since its last use.
    pub max_age: Duration,
}

/// A template as this process knows it.
#[derive(Debug, Default)]
struct TemplateSlot {
    known: Option<Arc<Template>>,
    work: Option<Work>,
}

type Outcome = Result<Arc<Template>>;

/// A task that reads or makes a template. It outlives those that wait for it.
#[derive(Debug)]
struct Work {
    done: watch::Receiver<Option<Outcome>>,
    stop: watch::Sender<bool>,
}

/// The templates of this user.
#[derive(Debug)]
pub struct Store {
    folder: Arc<Folder>,
    limits: StoreLimits,
    slots: Mutex<HashMap<String, TemplateSlot>>,
}

impl Store {
    /// Names the folder; it is made when the first template is.
    #[must_use]
    pub fn new(cache_dir: &Path, limits: StoreLimits) -> Self {
        Self { folder: Arc::new(Folder::new(cache_dir, FOLDER)), limits, slots: Mutex::default() }
    }

    /// Where the templates are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The template of this [`Fit::key`], if this process holds it and its files are what they were.
    #[must_use]
    pub fn known(&self, key: &str) -> Option<Arc<Template>> {
        let known = self.slots.lock().get(key).and_then(|slot| slot.known.clone())?;
        if known.is_unchanged() {
            return Some(known);
        }
        log::warn!("template {key}: its files have changed; it is not used any more");
        if let Some(slot) = self.slots.lock().get_mut(key) {
            slot.known.take_if(|other| Arc::ptr_eq(other, &known));
        }
        None
    }

    /// The template for `fit`; `make` writes [`RAM`], [`STATE`] and [`DISK`] into the folder it is given and returns the agent's
    /// HELLO. Of all that want the same template, in this process and others, one makes it and the others wait. It goes on
    /// when the caller waits no more, until it is done or [`Store::cancel`].
    ///
    /// # Errors
    /// [`Error::FolderRefused`] when the folder is not this user's alone, [`Error::Host`], and `make`'s.
    pub async fn find_or_make<F>(
        self: &Arc<Self>,
        fit: Fit,
        make: impl FnOnce(PathBuf) -> F + Send + 'static,
    ) -> Outcome
    where
        F: Future<Output = Result<Vec<u8>>> + Send + 'static,
    {
        let key = fit.key();
        if let Some(template) = self.known(&key) {
            return Ok(template);
        }
        let mut done = self.work(key, fit, make);
        let outcome = done.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or_else(|| Err(cancelled()))
    }

    /// The task that is under way for `key`, or a new one.
    fn work<F>(
        self: &Arc<Self>,
        key: String,
        fit: Fit,
        make: impl FnOnce(PathBuf) -> F + Send + 'static,
    ) -> watch::Receiver<Option<Outcome>>
    where
        F: Future<Output = Result<Vec<u8>>> + Send + 'static,
    {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key.clone()).or_default();
        // A sender that is gone is that of a task that panicked.
        if let Some(work) = slot.work.as_ref().filter(|work| work.done.has_changed().is_ok()) {
            return work.done.clone();
        }
        let (sender, done) = watch::channel(None);
        let (stop, stopped) = watch::channel(false);
        slot.work = Some(Work { done: done.clone(), stop });
        let store = self.clone();
        tokio::spawn(async move {
            let outcome = store.find(&key, fit, make, stopped).await.map(Arc::new);
            {
                let mut slots = store.slots.lock();
                let slot = slots.entry(key).or_default();
                slot.work = None;
                slot.known = outcome.as_ref().ok().cloned();
            }
            sender.send_replace(Some(outcome));
        });
        done
    }

    async fn find<F>(
        &self,
        key: &str,
        fit: Fit,
        make: impl FnOnce(PathBuf) -> F,
        stopped: watch::Receiver<bool>,
    ) -> Result<Template>
    where
        F: Future<Output = Result<Vec<u8>>>,
    {
        if let Some(template) = self.read(key, &fit).await? {
            return Ok(template);
        }
        let lock = unless(&stopped, self.lock(key)).await?;
        // Another process may have made it while this one waited.
        match self.read(key, &fit).await? {
            Some(template) => Ok(template),
            None => self.make(lock, key, fit, make, stopped).await,
        }
    }

    /// Cancels the making of templates: no process and no file of one is left.
    pub async fn cancel(&self) {
        let stop = |work: &Work| {
            work.stop.send_replace(true);
            work.done.clone()
        };
        let under_way: Vec<_> = self.slots.lock().values().filter_map(|slot| slot.work.as_ref()).map(stop).collect();
        for mut done in under_way {
            // An error is the end of the task, too.
            drop(done.wait_for(Option::is_some).await);
        }
    }

    /// Removes a template that did not work.
    pub async fn discard(&self, fit: &Fit) {
        let key = fit.key();
        if let Some(slot) = self.slots.lock().get_mut(&key) {
            slot.known = None;
        }
        let removed = match self.folder.existing() {
            Ok(dir) => dir.map_or(Ok(()), |dir| remove(&dir, &key)),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            log::warn!("template {key}: {error}");
        }
    }

    async fn lock(&self, key: &str) -> Result<Lock> {
        let dir = self.folder.make()?;
        let name = format!("{key}{LOCK}");
        loop {
            match dir.make_lock(&name) {
                Ok(Some(held)) => return Ok(held),
                Ok(None) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::host("lock", dir.at(&name).display(), error)),
            }
        }
    }

    /// Reads and checks a template; a damaged one is logged and removed.
    async fn read(&self, key: &str, fit: &Fit) -> Result<Option<Template>> {
        let (folder, key, fit) = (self.folder.clone(), key.to_owned(), fit.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let Some(dir) = folder.existing()? else { return Ok(None) };
            let place = match dir.dir(&key) {
                Ok(place) => place,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                // Not a folder that this user's processes make: it is neither used nor removed.
                Err(error) => return Err(Error::host("use a template in", dir.at(&key).display(), error)),
            };
            match read(&place, &fit) {
                Ok(template) => Ok(Some(template)),
                Err(error) => {
                    log::warn!("template {}: it is damaged ({error}); it is removed", place.path().display());
                    remove(&dir, &key)?;
                    Ok(None)
                }
            }
        });
        reading.await.map_err(|error| Error::host("read", "a template", error))?
    }

    /// Makes a template beside its place and moves it there when it is whole.
    async fn make<F>(
        &self,
        lock: Lock,
        key: &str,
        fit: Fit,
        make: impl FnOnce(PathBuf) -> F,
        stopped: watch::Receiver<bool>,
    ) -> Result<Template>
    where
        F: Future<Output = Result<Vec<u8>>>,
    {
        let dir = self.folder.make()?;
        let path = dir.at(key);
        let failed = |error: io::Error| Error::host("make a template", path.display(), error);
        let pending = PendingTemplate { name: format!("{key}{NEW}"), dir };
        pending.dir.remove_all(&pending.name).map_err(failed)?;
        let new = pending.dir.make_dir(&pending.name).map_err(failed)?;
        let hello = unless(&stopped, make(new.path().to_owned())).await?;
        let (key, limits) = (key.to_owned(), self.limits);
        // The folder and the lock go along: a thread cannot be cancelled, only asked to end.
        let finishing = tokio::task::spawn_blocking(move || -> io::Result<Template> {
            let (_lock, pending, begun) = (lock, pending, Instant::now());
            write_manifest(&new, &fit, hello, || *stopped.borrow())?;
            let described = begun.elapsed();
            let dir = &pending.dir;
            dir.rename(&pending.name, dir, &key)?;
            let template = read(&dir.dir(&key)?, &fit)?;
            let read = begun.elapsed() - described;
            log::debug!("template {key}: described in {described:.1?}, read into memory in {read:.1?}");
            prune(dir, limits, Some(&key));
            Ok(template)
        });
        finishing.await.map_err(|error| Error::host("make", "a template", error))?.map_err(failed)
    }

    /// Removes what dead processes left, and templates that are too old or too many. Blocking.
    pub fn clean_up(&self) {
        if let Some(dir) = self.folder.trusted() {
            remove_unfinished_in(&dir);
            prune(&dir, self.limits, None);
        }
    }

    /// How many templates there are, and their bytes on disk. Blocking.
    #[must_use]
    pub fn usage(&self) -> (usize, u64) {
        let stored = self.folder.trusted().map_or_else(Vec::new, |dir| stored(&dir));
        (stored.len(), stored.iter().map(|template| template.bytes).sum())
    }
}

fn remove(dir: &Dir, name: &str) -> Result<()> {
    dir.remove_all(name).map_err(|error| Error::host("remove", dir.at(name).display(), error))
}

fn is_key(name: &str) -> bool {
    name.len() == KEY_DIGITS && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Removes the unfinished templates of dead processes from the folder of a store. Blocking.
pub fn remove_unfinished(folder: &Path) {
    let Some(cache) = folder.parent() else { return };
    if let Some(dir) = Folder::new(cache, FOLDER).trusted() {
        remove_unfinished_in(&dir);
    }
}

fn remove_unfinished_in(dir: &Dir) {
    for entry in dir.entries().unwrap_or_default() {
        let name = folder::own_folder(&entry).and_then(|name| name.strip_suffix(NEW)).filter(|name| is_key(name));
        let Some(key) = name else { continue };
        // Its maker had the lock before it made the folder.
        if let Ok(Some(_held)) = dir.lock(format!("{key}{LOCK}")) {
            if let Err(error) = remove(dir, &format!("{key}{NEW}")) {
                log::warn!("{error}");
            }
        }
    }
}

/// The folder in which a template is being made; removed when that fails or is cancelled.
struct PendingTemplate {
    dir: Dir,
    name: String,
}

impl Drop for PendingTemplate {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.dir, &self.name) {
            log::warn!("{error}");
        }
    }
}

fn cancelled() -> Error {
    Error::host("make", "a template", "it was cancelled: its manager stops")
}

/// What `work` comes to, unless it is stopped before; it is dropped then.
async fn unless<T>(stopped: &watch::Receiver<bool>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut stopped = stopped.clone();
    tokio::select! {
        biased;
        _ = stopped.wait_for(|stopped| *stopped) => Err(cancelled()),
        done = work => done,
    }
}

fn write_manifest(new: &Dir, fit: &Fit, hello: Vec<u8>, is_stopped: impl Fn() -> bool) -> io::Result<()> {
    let manifest = files::describe_unless(new, fit.clone(), hello, is_stopped)?;
    let mut file = new.create(MANIFEST)?;
    file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
    file.sync_all()
}

/// Notes that a template is used now; one that cannot be noted is pruned the sooner.
fn note_use(place: &Dir) {
    let noted = place.create_or_open(USED).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = noted {
        log::debug!("{}: {error}", place.at(USED).display());
    }
}

fn read(place: &Dir, fit: &Fit) -> io::Result<Template> {
    let check = |bytes: &[u8]| {
        let manifest: Manifest = serde_json::from_slice(bytes)?;
        if manifest.fit == *fit {
            return Ok(manifest);
        }
        Err(io::Error::new(ErrorKind::InvalidData, "it was made for something else"))
    };
    let template = Template::read(place, check, |file, digest| files::seal(&file, digest, DISK))?;
    note_use(place);
    Ok(template)
}

struct StoredTemplate {
    key: String,
    bytes: u64,
    used: SystemTime,
}

/// Whether it is a manifest, of whatever version.
fn is_manifest(bytes: &[u8]) -> bool {
    let parsed: serde_json::Result<serde_json::Value> = serde_json::from_slice(bytes);
    let has =
        |manifest: serde_json::Value| ["fit", "ram", "state", "disk"].iter().all(|key| manifest.get(key).is_some());
    parsed.is_ok_and(has)
}

/// The whole templates in a folder, those not used for longest first.
fn stored(dir: &Dir) -> Vec<StoredTemplate> {
    let look = |entry| {
        let key = folder::own_folder(&entry).filter(|name| is_key(name))?.to_owned();
        let place = dir.dir(&key).ok()?;
        if !folder::read_manifest(&place).is_ok_and(|bytes| is_manifest(&bytes)) {
            return None;
        }
        let used = place.open(USED).or_else(|_| place.open(MANIFEST)).ok()?.metadata().ok()?.modified().ok()?;
        Some(StoredTemplate { key, bytes: folder::disk_bytes(&place).ok()?, used })
    };
    let mut stored: Vec<StoredTemplate> = dir.entries().unwrap_or_default().into_iter().filter_map(look).collect();
    stored.sort_by_key(|template| template.used);
    stored
}

/// Processes that use a removed template hold it in memory and do not need the files.
fn prune(dir: &Dir, limits: StoreLimits, keep: Option<&str>) {
    let stored = stored(dir);
    let mut total: u64 = stored.iter().map(|template| template.bytes).sum();
    for StoredTemplate { key, bytes, used } in stored.into_iter().filter(|template| Some(template.key.as_str()) != keep)
    {
        let old = used.elapsed().is_ok_and(|age| age > limits.max_age);
        if !old && total <= limits.max_bytes {
            continue;
        }
        match remove(dir, &key) {
            Ok(()) => {
                total -= bytes;
                let path = dir.at(&key);
                log::info!("template {}: removed, it was {}", path.display(), if old { "old" } else { "too much" });
            }
            Err(error) => log::warn!("{error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::fit;
    use super::super::{RAM, STATE};
    use super::*;
    use crate::store::private_dir;
    use std::fs;
    use std::os::unix::fs::{chown, symlink, PermissionsExt};
    use tempfile::TempDir;
    use tokio::sync::Notify;

    const NOTHING: StoreLimits = StoreLimits { max_bytes: 0, max_age: Duration::ZERO };
    const KEY: &str = "0123456789abcdef0123456789abcdef";

    fn store() -> (TempDir, Arc<Store>) {
        let cache = private_dir();
        let limits = StoreLimits { max_bytes: u64::MAX, max_age: Duration::MAX };
        let store = Arc::new(Store::new(cache.path(), limits));
        (cache, store)
    }

    fn write(dir: &Path) -> Vec<u8> {
        for file in [RAM, STATE, DISK] {
            fs::write(dir.join(file), file).unwrap();
        }
        b"hello".to_vec()
    }

    fn left(cache: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(cache.join("templates")).unwrap();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_none_or(|e| e != "lock")).collect()
    }

    #[tokio::test]
    async fn test_making_outlives_those_that_wait_and_is_done_once() {
        let (_cache, store) = store();
        let go_on = Arc::new(Notify::new());
        let wait = go_on.clone();
        let first = store.find_or_make(fit(), |dir| async move {
            wait.notified().await;
            Ok(write(&dir))
        });
        tokio::time::timeout(Duration::from_millis(20), first).await.unwrap_err();
        let second = store.find_or_make(fit(), |_| async { panic!("made twice") });
        tokio::pin!(second);
        tokio::time::timeout(Duration::from_millis(20), &mut second).await.unwrap_err();
        go_on.notify_one();
        let made = second.await.unwrap();
        assert!(Arc::ptr_eq(&store.known(&fit().key()).unwrap(), &made));
    }

    #[tokio::test]
    async fn test_cancel_ends_the_making_and_leaves_nothing() {
        let (cache, store) = store();
        let waiting = tokio::spawn({
            let store = store.clone();
            async move {
                let endless = |dir: PathBuf| async move {
                    write(&dir);
                    std::future::pending().await
                };
                store.find_or_make(fit(), endless).await
            }
        });
        let begun = std::time::Instant::now();
        while left_or_none(cache.path()).is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(20));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        store.cancel().await;
        assert!(waiting.await.unwrap().unwrap_err().to_string().contains("cancelled"));
        assert_eq!(left(cache.path()), [] as [PathBuf; 0]);
        // A manager can be started again.
        store.find_or_make(fit(), |dir| async move { Ok(write(&dir)) }).await.unwrap();
    }

    fn left_or_none(cache: &Path) -> Vec<PathBuf> {
        if cache.join("templates").is_dir() {
            left(cache)
        } else {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn test_failure_is_told_to_all_and_the_next_try_makes_it() {
        let (cache, store) = store();
        let fails = |_| async { Err(Error::host("make", "it", "no")) };
        let (one, other) = tokio::join!(store.find_or_make(fit(), fails), store.find_or_make(fit(), fails));
        assert!(one.is_err() && other.is_err());
        assert_eq!(left(cache.path()), [] as [PathBuf; 0]);
        store.find_or_make(fit(), |dir| async move { Ok(write(&dir)) }).await.unwrap();
    }

    async fn made(cache: &Path) -> Result<Arc<Template>> {
        let limits = StoreLimits { max_bytes: 1 << 30, max_age: Duration::from_secs(3600) };
        Arc::new(Store::new(cache, limits)).find_or_make(fit(), |place| async move { Ok(write(&place)) }).await
    }

    async fn found(cache: &Path) -> Result<Arc<Template>> {
        let none = |_| async { Err(Error::host("find", "a template", "there is none")) };
        Arc::new(Store::new(cache, NOTHING)).find_or_make(fit(), none).await
    }

    #[tokio::test]
    async fn test_cleaning_up_removes_templates_and_what_their_dead_makers_left_and_nothing_else() {
        let scratch = private_dir();
        let cache = scratch.path();
        made(cache).await.unwrap();
        let folder = cache.join("templates");
        // What another program might keep in a folder of this name, put there after the cache was marked.
        for name in ["admin", "mail.new", "0123", "snapshots"] {
            fs::create_dir(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("base.html"), "<html>").unwrap();
        }
        let digits = |last: char| format!("{}{last}", &KEY[..31]);
        let (no_manifest, other_manifest, no_lock) = (digits('a'), digits('b'), format!("{}.new", digits('c')));
        for name in [&no_manifest, &other_manifest, &no_lock] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        fs::write(folder.join(&no_manifest).join("ram"), "x").unwrap();
        fs::write(folder.join(&other_manifest).join("manifest"), "{\"name\": \"an app's\"}").unwrap();
        for name in [KEY, "readme.html", &format!("{}.lock", digits('d'))] {
            fs::write(folder.join(name), "x").unwrap();
        }
        symlink(folder.join("admin"), folder.join(digits('e'))).unwrap();
        symlink(folder.join("admin"), folder.join(format!("{}.new", digits('d')))).unwrap();
        // And what is ours: a maker's that died.
        let dead = folder.join(format!("{}.new", digits('0')));
        fs::create_dir(&dead).unwrap();
        fs::set_permissions(&dead, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(folder.join(format!("{}.lock", digits('0'))), "tw-microvm lock\n").unwrap();
        let template = folder.join(fit().key());
        let list = || {
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect::<std::collections::BTreeSet<_>>()
        };
        let mut expected = list();
        Store::new(cache, NOTHING).clean_up();
        remove_unfinished(&folder);
        assert!(expected.remove(&template) && expected.remove(&dead));
        assert_eq!(list(), expected);
        for name in ["admin", "mail.new", "0123", "snapshots"] {
            assert_eq!(fs::read(folder.join(name).join("base.html")).unwrap(), b"<html>");
        }
    }

    #[tokio::test]
    async fn test_a_cache_that_is_not_this_users_alone_is_neither_read_nor_cleaned() {
        let scratch = private_dir();
        let cache = scratch.path();
        made(cache).await.unwrap();
        found(cache).await.unwrap();
        let (folder, template) = (cache.join("templates"), cache.join("templates").join(fit().key()));
        let (folder, template) = (folder.as_path(), template.as_path());
        for (path, mode) in [(cache, 0o777), (cache, 0o770), (folder, 0o777), (folder, 0o750), (template, 0o777)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let error = found(cache).await.unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:o}")), "{error}");
            if path != template {
                assert!(error.contains("cache_dir"), "{error}");
                Store::new(cache, NOTHING).clean_up();
            }
            assert!(template.join("ram").exists(), "{} {mode:o}", path.display());
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
        }
        for path in [cache, folder, template, &template.join("ram"), &template.join("manifest")] {
            if chown(path, Some(12345), None).is_err() {
                eprintln!("skipped: only root may give files away");
                break;
            }
            let outcome = found(cache).await;
            drop(chown(path, Some(0), None));
            let error = outcome.unwrap_err().to_string();
            if path.starts_with(template) && path != template {
                // Its owner may remove what is damaged; it is not used.
                assert!(error.contains("there is none") && !template.exists(), "{error}");
                made(cache).await.unwrap();
            } else {
                assert!(error.contains("12345") && template.exists(), "{error}");
            }
        }
    }

    #[tokio::test]
    async fn test_links_are_not_followed() {
        let (scratch, others) = (private_dir(), private_dir());
        let (cache, outside) = (scratch.path(), others.path());
        made(cache).await.unwrap();
        fs::write(outside.join("svc.db"), "precious").unwrap();
        let template = cache.join("templates").join(fit().key());
        // `used` is written at each use.
        fs::remove_file(template.join(USED)).unwrap();
        symlink(outside.join("svc.db"), template.join(USED)).unwrap();
        found(cache).await.unwrap();
        let lock = cache.join("templates").join(format!("{}.lock", fit().key()));
        fs::remove_file(&lock).unwrap();
        symlink(outside.join("made"), &lock).unwrap();
        fs::rename(template.join("ram"), outside.join("ram")).unwrap();
        symlink(outside.join("ram"), template.join("ram")).unwrap();
        assert!(made(cache).await.is_err());
        assert_eq!(fs::read(outside.join("svc.db")).unwrap(), b"precious");
        assert!(outside.join("ram").exists() && !outside.join("made").exists());
        // The folder of templates as a link.
        fs::rename(cache.join("templates"), outside.join("templates")).unwrap();
        symlink(outside.join("templates"), cache.join("templates")).unwrap();
        assert!(found(cache).await.unwrap_err().to_string().contains("cache_dir"));
        Store::new(cache, NOTHING).clean_up();
        assert!(outside.join("templates").exists());
    }

    #[tokio::test]
    async fn test_a_cache_with_other_files_is_refused_and_stays_as_it_is() {
        let scratch = private_dir();
        let cache = scratch.path();
        fs::create_dir_all(cache.join("templates/admin")).unwrap();
        fs::write(cache.join("templates/admin/base.html"), "<html>").unwrap();
        let error = made(cache).await.unwrap_err();
        assert!(error.to_string().contains("cache_dir"), "{error}");
        Store::new(cache, NOTHING).clean_up();
        assert_eq!(fs::read(cache.join("templates/admin/base.html")).unwrap(), b"<html>");
        assert_eq!(fs::read_dir(cache).unwrap().count(), 1);
    }
}
