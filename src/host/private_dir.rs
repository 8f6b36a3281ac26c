//! Folders that are one user's alone.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where what may be made again is kept: no environment variable has a say, as with the runtime directory.
#[must_use]
pub fn default_cache() -> PathBuf {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return PathBuf::from("/var/cache/tw-microvm");
    }
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) if user.dir.is_dir() => user.dir.join(".cache/tw-microvm"),
        _ => std::env::temp_dir().join(format!("tw-microvm-cache-{uid}")),
    }
}

/// Makes sure that `path` exists, is a directory of this user's, and is closed to all others. `key` is the
/// configuration's name for it.
///
/// # Errors
/// [`Error::Host`] saying what is wrong with it.
pub fn ensure(path: &Path, key: &str) -> Result<()> {
    let failed = |operation, reason: String| Error::host(operation, path.display(), reason);
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) => return Err(failed("mkdir", error.to_string())),
    }
    let meta = fs::symlink_metadata(path).map_err(|error| failed("stat", error.to_string()))?;
    let uid = nix::unistd::geteuid().as_raw();
    if !meta.is_dir() || meta.uid() != uid {
        let reason = format!("it must be a directory owned by uid {uid}; remove it or set config[{key:?}]");
        return Err(failed("directory check", reason));
    }
    if meta.mode() & 0o077 != 0 {
        let reason = format!("its mode is {:o}, it must be closed to others: chmod 700", meta.mode() & 0o777);
        return Err(failed("directory check", reason));
    }
    Ok(())
}
