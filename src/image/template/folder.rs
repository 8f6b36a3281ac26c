//! The folders below the cache in which templates and VMs' states are kept.
//!
//! Architecture invariant: nothing in the cache is believed, locked or removed but through a [`Dir`] that this module opened:
//! the cache and its parents were checked then (owner, mode, mark), and the folder is this user's alone. The digests lie beside
//! what they are of, so these checks are what keeps another user's files from being restored.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files::MANIFEST;
use crate::error::Result;
use crate::store::{Base, Dir, Entry, Kind};

/// Bytes of a manifest at most: its own are a few thousand.
pub const MANIFEST_LIMIT: u64 = 1 << 20;

/// A folder of the cache, by its name.
#[derive(Debug)]
pub struct Folder {
    cache: Base,
    name: &'static str,
    path: PathBuf,
}

impl Folder {
    #[must_use]
    pub fn new(cache_dir: &Path, name: &'static str) -> Self {
        // A relative one is refused when it is opened.
        let cache_dir = std::path::absolute(cache_dir).unwrap_or_else(|_| cache_dir.to_owned());
        Self { path: cache_dir.join(name), cache: Base::new(Kind::Cache, cache_dir), name }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder, which is made when there is none. Blocking.
    ///
    /// # Errors
    /// [`crate::error::Error::FolderRefused`].
    pub fn make(&self) -> Result<Dir> {
        self.cache.root()?.make_folder(self.name)
    }

    /// The folder, if it is there. Blocking.
    ///
    /// # Errors
    /// [`crate::error::Error::FolderRefused`].
    pub fn existing(&self) -> Result<Option<Dir>> {
        self.cache.existing()?.map_or(Ok(None), |cache| cache.existing_folder(self.name))
    }

    /// As [`Folder::existing`], for looking around and for cleaning up: what is refused has nothing in it, and is told.
    pub fn trusted(&self) -> Option<Dir> {
        self.existing().unwrap_or_else(|error| {
            log::warn!("{error}");
            None
        })
    }
}

/// An entry of this user's that is a folder, and its name.
pub fn own_folder(entry: &Entry) -> Option<&str> {
    let own = entry.is_dir && entry.owner == nix::unistd::geteuid().as_raw();
    entry.name.to_str().filter(|_| own)
}

/// Bytes on disk of the files in a folder.
pub fn disk_bytes(dir: &Dir) -> io::Result<u64> {
    let sizes = dir.entries()?.into_iter().filter_map(|entry| dir.open(&entry.name).ok()?.metadata().ok());
    Ok(sizes.map(|meta| meta.blocks() * 512).sum())
}

/// The bytes of its manifest.
pub fn read_manifest(dir: &Dir) -> io::Result<Vec<u8>> {
    dir.read(MANIFEST, MANIFEST_LIMIT)
}
