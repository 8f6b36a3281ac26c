//! Finding a program the way a shell would.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Whether `path` is a file that someone may execute.
#[must_use]
pub fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The first executable called `name` in `search_path` (the form of `$PATH`); a name with a slash is taken as it is.
#[must_use]
pub fn find(name: &str, search_path: Option<&OsStr>) -> Option<PathBuf> {
    if name.contains('/') {
        let path = std::path::absolute(name).ok()?;
        return is_executable(&path).then_some(path);
    }
    std::env::split_paths(search_path?).map(|dir| dir.join(name)).find(|path| path.is_absolute() && is_executable(path))
}

/// The first line that `path --version` prints, or why there is none.
///
/// # Errors
/// Text for people.
pub fn version_line(path: &Path) -> Result<String, String> {
    let output = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} --version: {error}", path.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().find(|line| !line.trim().is_empty()) {
        Some(line) if output.status.success() => Ok(line.trim().to_owned()),
        _ => Err(format!("{} --version ended with {} and no version", path.display(), output.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_find_sh_on_the_path_is_found() {
        assert!(find("sh", Some(OsStr::new("/nowhere:/bin"))).is_some());
    }

    #[test]
    fn test_find_missing_or_not_executable_is_none() {
        assert_eq!(find("no-such-program-here", Some(OsStr::new("/bin"))), None);
        assert_eq!(find("/etc/passwd", None), None);
    }
}
