//! What a file holds, and whether it still does.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::memfd;
use crate::mutex::Mutex;

/// The unit of a sparse digest, and of what is copied: pages that hold only zeros count for nothing.
const PAGE: usize = 4096;
static ZEROS: [u8; PAGE] = [0; PAGE];
/// Pages read at once.
const BATCH: usize = 256 * PAGE;

/// A BLAKE3 digest, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(String);

impl Digest {
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex().to_string())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A state of a file. Writing to it, by whatever way, changes its time of change, which nobody can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl FileId {
    /// # Errors
    /// stat(2)'s.
    pub fn of(path: &Path) -> io::Result<Self> {
        path.metadata().map(|meta| Self::from(&meta))
    }
}

impl From<&Metadata> for FileId {
    fn from(meta: &Metadata) -> Self {
        Self { device: meta.dev(), inode: meta.ino(), size: meta.size(), changed: (meta.ctime(), meta.ctime_nsec()) }
    }
}

/// Digests of files that are asked for again and again: each is read once per state.
#[derive(Debug, Default)]
pub struct Digests(Mutex<HashMap<PathBuf, (FileId, Digest)>>);

impl Digests {
    /// The digest of a file's bytes. Blocking.
    ///
    /// # Errors
    /// What reading says.
    pub fn of_file(&self, path: &Path) -> io::Result<Digest> {
        let known = |id: FileId| {
            let cache = self.0.lock();
            cache.get(path).filter(|(seen, _)| *seen == id).map(|(_, digest)| digest.clone())
        };
        let id = FileId::of(path)?;
        if let Some(digest) = known(id) {
            return Ok(digest);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        let digest = Digest(hasher.finalize().to_hex().to_string());
        if FileId::of(path)? == id {
            let mut cache = self.0.lock();
            cache.insert(path.to_owned(), (id, digest.clone()));
        }
        Ok(digest)
    }
}

/// Reads a sparse file page by page; `visit` gets each one that holds more than zeros, and where it stands. Returns the
/// digest over those pages and their places, which does not depend on where a file system keeps holes.
///
/// # Errors
/// What reading or `visit` says.
pub fn pages(file: &File, mut visit: impl FnMut(u64, Option<&[u8]>) -> io::Result<()>) -> io::Result<Digest> {
    let length = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut batch = vec![0; BATCH];
    let mut done = 0;
    for extent in memfd::data_extents(file, length)? {
        let mut at = (extent.start / PAGE as u64 * PAGE as u64).max(done);
        while at < extent.end {
            let wanted = usize::try_from((length - at).min(BATCH as u64)).unwrap_or(BATCH);
            let bytes = &mut batch[..wanted];
            file.read_exact_at(bytes, at)?;
            for (page, start) in bytes.chunks(PAGE).zip((at..).step_by(PAGE)) {
                if ZEROS.starts_with(page) {
                    visit(start, None)?;
                    continue;
                }
                hasher.update(&start.to_le_bytes());
                hasher.update(page);
                visit(start, Some(page))?;
            }
            at += wanted as u64;
        }
        done = at;
    }
    Ok(Digest(hasher.finalize().to_hex().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tempfile::{tempfile, NamedTempFile};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn test_pages_holes_or_written_zeros_have_the_same_digest(writes in prop::collection::vec((0u64..500, any::<u8>()), 0..20)) {
            let (sparse, full) = (tempfile().unwrap(), tempfile().unwrap());
            sparse.set_len(501 * PAGE as u64).unwrap();
            full.write_all_at(&vec![0; 501 * PAGE], 0).unwrap();
            for (page, byte) in writes {
                for file in [&sparse, &full] {
                    file.write_all_at(&[byte; 100], page * PAGE as u64 + 7).unwrap();
                }
            }
            let skip = |_: u64, _: Option<&[u8]>| Ok(());
            prop_assert_eq!(pages(&sparse, skip).unwrap(), pages(&full, skip).unwrap());
        }
    }

    #[test]
    fn test_pages_any_changed_byte_changes_the_digest() {
        let file = tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let skip = |_: u64, _: Option<&[u8]>| Ok(());
        let before = pages(&file, skip).unwrap();
        file.write_all_at(&[1], 777_777).unwrap();
        assert_ne!(pages(&file, skip).unwrap(), before);
    }

    #[test]
    fn test_digests_notice_a_byte_written_in_place() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(b"one", 0).unwrap();
        let digests = Digests::default();
        let before = digests.of_file(file.path()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.as_file().write_all_at(b"x", 1).unwrap();
        assert_ne!(digests.of_file(file.path()).unwrap(), before);
    }
}
