//! Where templates are kept, found, made once, checked and thrown away.

use std::collections::HashMap;
use std::fs::{self, File};
use std::future::Future;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::fcntl::Flock;
use tokio::sync::watch;

use super::files::{self, remove, Template, DISK, MANIFEST};
use super::{Fit, Manifest};
use crate::error::{Error, Result};
use crate::host::{lock, private_dir};

/// Its time of change is that of the last use.
const USED: &str = "used";
/// How often a process looks whether another has made the template that both want.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How much may be kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StoreLimits {
    pub max_bytes: u64,
    /// Since its last use.
    pub max_age: Duration,
}

/// A template as this process knows it.
#[derive(Debug, Default)]
struct Slot {
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
    dir: PathBuf,
    limits: StoreLimits,
    slots: Mutex<HashMap<String, Slot>>,
}

impl Store {
    /// Names the folder; it is made when the first template is.
    #[must_use]
    pub fn new(cache_dir: &Path, limits: StoreLimits) -> Self {
        let dir = cache_dir.join("templates");
        Self { dir, limits, slots: Mutex::default() }
    }

    /// Where the templates are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template of this [`Fit::key`], if this process holds it and its files are what they were.
    #[must_use]
    pub fn known(&self, key: &str) -> Option<Arc<Template>> {
        let known = self.slots().get(key).and_then(|slot| slot.known.clone())?;
        if known.is_unchanged() {
            return Some(known);
        }
        log::warn!("template {key}: its files have changed; it is not used any more");
        if let Some(slot) = self.slots().get_mut(key) {
            slot.known.take_if(|other| Arc::ptr_eq(other, &known));
        }
        None
    }

    /// The template for `fit`; `make` writes [`RAM`], [`STATE`] and [`DISK`] into the folder it is given and returns the agent's
    /// HELLO. Of all that want the same template, in this process and others, one makes it and the others wait. It goes on
    /// when the caller waits no more, until it is done or [`Store::give_up`].
    ///
    /// # Errors
    /// [`Error::Host`] when the folder cannot be used, and `make`'s.
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
        outcome.unwrap_or_else(|| Err(given_up()))
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
        let mut slots = self.slots();
        let slot = slots.entry(key.clone()).or_default();
        // A sender that is gone is that of a task that panicked.
        if let Some(work) = slot.work.as_ref().filter(|work| work.done.has_changed().is_ok()) {
            return work.done.clone();
        }
        let (telling, done) = watch::channel(None);
        let (stop, stopped) = watch::channel(false);
        slot.work = Some(Work { done: done.clone(), stop });
        let store = self.clone();
        tokio::spawn(async move {
            let outcome = store.find(&key, fit, make, stopped).await.map(Arc::new);
            {
                let mut slots = store.slots();
                let slot = slots.entry(key).or_default();
                slot.work = None;
                slot.known = outcome.as_ref().ok().cloned();
            }
            telling.send_replace(Some(outcome));
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
        let place = self.dir.join(key);
        if let Some(template) = self.read(&place, &fit).await? {
            return Ok(template);
        }
        let lock = unless(&stopped, self.lock(key)).await?;
        // Another process may have made it while this one waited.
        match self.read(&place, &fit).await? {
            Some(template) => Ok(template),
            None => self.make(lock, place, fit, make, stopped).await,
        }
    }

    /// Ends the making of templates: no process and no file of one is left.
    pub async fn give_up(&self) {
        let tell = |work: &Work| {
            work.stop.send_replace(true);
            work.done.clone()
        };
        let under_way: Vec<_> = self.slots().values().filter_map(|slot| slot.work.as_ref()).map(tell).collect();
        for mut done in under_way {
            // An error is the end of the task, too.
            drop(done.wait_for(Option::is_some).await);
        }
    }

    /// Throws a template away that did not work out.
    pub async fn discard(&self, fit: &Fit) {
        let key = fit.key();
        if let Some(slot) = self.slots().get_mut(&key) {
            slot.known = None;
        }
        let place = self.dir.join(&key);
        if let Err(error) = remove(&place) {
            log::warn!("{}: {error}", place.display());
        }
    }

    async fn lock(&self, key: &str) -> Result<Flock<File>> {
        private_dir::ensure(&self.dir, "cache_dir")?;
        let path = self.dir.join(format!("{key}.lock"));
        loop {
            match lock::try_exclusive(&path) {
                Ok(Some(held)) => return Ok(held),
                Ok(None) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::host("lock", path.display(), error)),
            }
        }
    }

    /// Reads and checks what is kept; what is damaged is said and removed.
    async fn read(&self, place: &Path, fit: &Fit) -> Result<Option<Template>> {
        let (place, fit) = (place.to_owned(), fit.clone());
        let reading = tokio::task::spawn_blocking(move || match read(&place, &fit) {
            Ok(template) => Ok(Some(template)),
            Err(error) if error.kind() == ErrorKind::NotFound && !place.exists() => Ok(None),
            Err(error) => {
                log::warn!("template {}: it is damaged ({error}); it is removed", place.display());
                remove(&place).map_err(|error| Error::host("remove", place.display(), error))?;
                Ok(None)
            }
        });
        reading.await.map_err(|error| Error::host("read", "a template", error))?
    }

    /// Makes a template beside its place and moves it there when it is whole.
    async fn make<F>(
        &self,
        lock: Flock<File>,
        place: PathBuf,
        fit: Fit,
        make: impl FnOnce(PathBuf) -> F,
        stopped: watch::Receiver<bool>,
    ) -> Result<Template>
    where
        F: Future<Output = Result<Vec<u8>>>,
    {
        let making = Making(place.with_extension("new"));
        let shown = place.display().to_string();
        let failed = |error: io::Error| Error::host("make a template", &shown, error);
        remove(&making.0).map_err(failed)?;
        private_dir::ensure(&making.0, "cache_dir")?;
        let hello = unless(&stopped, make(making.0.clone())).await?;
        let (dir, limits) = (self.dir.clone(), self.limits);
        // The folder and the lock go along: a thread cannot be cancelled, only asked to end.
        let finishing = tokio::task::spawn_blocking(move || -> io::Result<Template> {
            let (_lock, making) = (lock, making);
            write_manifest(&making.0, &fit, hello, || *stopped.borrow())?;
            fs::rename(&making.0, &place)?;
            let template = read(&place, &fit)?;
            prune(&dir, limits, Some(&place));
            Ok(template)
        });
        finishing.await.map_err(|error| Error::host("make", "a template", error))?.map_err(failed)
    }

    /// Removes what dead makers left, and what is too old or too much. Blocking.
    pub fn clean_up(&self) {
        remove_unfinished(&self.dir);
        prune(&self.dir, self.limits, None);
    }

    /// How many templates are kept, and their bytes on disk. Blocking.
    #[must_use]
    pub fn usage(&self) -> (usize, u64) {
        let kept = kept(&self.dir);
        (kept.len(), kept.iter().map(|kept| kept.bytes).sum())
    }
}

/// Removes from the folder of a store what dead makers left. Blocking.
pub fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "new") {
            if let Ok(Some(_held)) = lock::try_exclusive(&path.with_extension("lock")) {
                if let Err(error) = remove(&path) {
                    log::warn!("{}: {error}", path.display());
                }
            }
        }
    }
}

/// The folder in which a template is being made; gone when that fails or is given up.
struct Making(PathBuf);

impl Drop for Making {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            log::warn!("{}: {error}", self.0.display());
        }
    }
}

fn given_up() -> Error {
    Error::host("make", "a template", "it was given up: its manager stops")
}

/// What `work` comes to, unless it is stopped before; it is dropped then.
async fn unless<T>(stopped: &watch::Receiver<bool>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut stopped = stopped.clone();
    tokio::select! {
        biased;
        _ = stopped.wait_for(|stopped| *stopped) => Err(given_up()),
        done = work => done,
    }
}

fn write_manifest(new: &Path, fit: &Fit, hello: Vec<u8>, is_stopped: impl Fn() -> bool) -> io::Result<()> {
    let manifest = files::describe_unless(new, fit.clone(), hello, is_stopped)?;
    let mut file = File::options().write(true).create_new(true).open(new.join(MANIFEST))?;
    file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
    file.sync_all()
}

fn read(place: &Path, fit: &Fit) -> io::Result<Template> {
    let check = |bytes: &[u8]| {
        let manifest: Manifest = serde_json::from_slice(bytes)?;
        if manifest.fit == *fit {
            return Ok(manifest);
        }
        Err(io::Error::new(ErrorKind::InvalidData, "it was made for something else"))
    };
    let template = Template::read(place, check, |path, digest| files::seal(path, digest, DISK))?;
    fs::write(place.join(USED), b"")?;
    Ok(template)
}

struct Kept {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// The whole templates in a folder, those not used for longest first.
fn kept(dir: &Path) -> Vec<Kept> {
    let look = |entry: fs::DirEntry| {
        let path = entry.path();
        let used = path.join(USED).metadata().or_else(|_| path.metadata()).ok()?.modified().ok()?;
        let files = fs::read_dir(&path).ok()?.flatten().filter_map(|file| file.metadata().ok());
        Some(Kept { bytes: files.map(|meta| meta.blocks() * 512).sum(), path, used })
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut kept: Vec<Kept> = entries.filter(|entry| entry.path().extension().is_none()).filter_map(look).collect();
    kept.sort_by_key(|kept| kept.used);
    kept
}

/// Processes that use a removed template hold it in memory and do not need the files.
fn prune(dir: &Path, limits: StoreLimits, keep: Option<&Path>) {
    let kept = kept(dir);
    let mut total: u64 = kept.iter().map(|kept| kept.bytes).sum();
    for Kept { path, bytes, used } in kept.into_iter().filter(|kept| Some(kept.path.as_path()) != keep) {
        let old = used.elapsed().is_ok_and(|age| age > limits.max_age);
        if !old && total <= limits.max_bytes {
            continue;
        }
        match remove(&path) {
            Ok(()) => {
                total -= bytes;
                log::info!("template {}: removed, it was {}", path.display(), if old { "old" } else { "too much" });
            }
            Err(error) => log::warn!("{}: {error}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::fit;
    use super::super::{RAM, STATE};
    use super::*;
    use tokio::sync::Notify;

    fn store(name: &str) -> (PathBuf, Arc<Store>) {
        let cache = std::env::temp_dir().join(format!("store-{}-{name}", std::process::id()));
        private_dir::ensure(&cache, "cache_dir").unwrap();
        let limits = StoreLimits { max_bytes: u64::MAX, max_age: Duration::MAX };
        (cache.clone(), Arc::new(Store::new(&cache, limits)))
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
        let (cache, store) = store("outlives");
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
        fs::remove_dir_all(cache).unwrap();
    }

    #[tokio::test]
    async fn test_give_up_ends_what_is_made_and_leaves_nothing() {
        let (cache, store) = store("given-up");
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
        while left_or_none(&cache).is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(20));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        store.give_up().await;
        assert!(waiting.await.unwrap().unwrap_err().to_string().contains("given up"));
        assert_eq!(left(&cache), [] as [PathBuf; 0]);
        // A manager can be started again.
        store.find_or_make(fit(), |dir| async move { Ok(write(&dir)) }).await.unwrap();
        fs::remove_dir_all(cache).unwrap();
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
        let (cache, store) = store("fails");
        let fails = |_| async { Err(Error::host("make", "it", "no")) };
        let (one, other) = tokio::join!(store.find_or_make(fit(), fails), store.find_or_make(fit(), fails));
        assert!(one.is_err() && other.is_err());
        assert_eq!(left(&cache), [] as [PathBuf; 0]);
        store.find_or_make(fit(), |dir| async move { Ok(write(&dir)) }).await.unwrap();
        fs::remove_dir_all(cache).unwrap();
    }
}
