//! Where templates are kept, found, made once, checked and thrown away.

use std::collections::HashMap;
use std::fs::{self, File};
use std::future::Future;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::fcntl::Flock;

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

type Slot = Arc<tokio::sync::Mutex<Option<Arc<Template>>>>;

/// The templates of this user.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    limits: StoreLimits,
    /// One template is made, or read, by one task at a time.
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

    fn slot(&self, key: &str) -> Slot {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_owned()).or_default().clone()
    }

    /// The template for `fit`; `make` writes [`RAM`], [`STATE`] and [`DISK`] into the folder it is given and returns the agent's
    /// HELLO. Of all processes that want the same template one makes it and the others wait.
    ///
    /// # Errors
    /// [`Error::Host`] when the folder cannot be used, and `make`'s.
    pub async fn find_or_make<F>(&self, fit: &Fit, make: impl FnOnce(PathBuf) -> F) -> Result<Arc<Template>>
    where
        F: Future<Output = Result<Vec<u8>>>,
    {
        let key = fit.key();
        let slot = self.slot(&key);
        let mut known = slot.lock().await;
        if let Some(template) = known.take() {
            if template.is_unchanged() {
                *known = Some(template.clone());
                return Ok(template);
            }
            log::warn!("template {key}: its files have changed; it is not used any more");
        }
        let place = self.dir.join(&key);
        let template = match self.read(&place, fit).await? {
            Some(template) => template,
            None => {
                let _lock = self.lock(&key).await?;
                // Another process may have made it while this one waited.
                match self.read(&place, fit).await? {
                    Some(template) => template,
                    None => self.make(&place, fit, make).await?,
                }
            }
        };
        let template = Arc::new(template);
        *known = Some(template.clone());
        Ok(template)
    }

    /// Throws a template away that did not work out.
    pub async fn discard(&self, fit: &Fit) {
        let key = fit.key();
        *self.slot(&key).lock().await = None;
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

    /// Makes a template beside its place and moves it there when it is whole. The lock is held.
    async fn make<F>(&self, place: &Path, fit: &Fit, make: impl FnOnce(PathBuf) -> F) -> Result<Template>
    where
        F: Future<Output = Result<Vec<u8>>>,
    {
        let making = Making(place.with_extension("new"));
        let failed = |error: io::Error| Error::host("make a template", place.display(), error);
        remove(&making.0).map_err(failed)?;
        private_dir::ensure(&making.0, "cache_dir")?;
        let hello = make(making.0.clone()).await?;
        let (new, place, fit, dir, limits) =
            (making.0.clone(), place.to_owned(), fit.clone(), self.dir.clone(), self.limits);
        let finishing = tokio::task::spawn_blocking(move || -> io::Result<Template> {
            write_manifest(&new, &fit, hello)?;
            fs::rename(&new, &place)?;
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

fn write_manifest(new: &Path, fit: &Fit, hello: Vec<u8>) -> io::Result<()> {
    let manifest = files::describe(new, fit.clone(), hello)?;
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
