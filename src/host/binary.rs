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

/// The first executable called `name` in `search_path` (the form of `$PATH`); a name with a slash is taken as it is. Folders whose
/// names are no UTF-8 are passed over: no report could name what is there.
#[must_use]
pub fn find(name: &str, search_path: Option<&OsStr>) -> Option<PathBuf> {
    if name.contains('/') {
        let path = std::path::absolute(name).ok()?;
        return is_executable(&path).then_some(path);
    }
    std::env::split_paths(search_path?)
        .map(|dir| dir.join(name))
        .find(|path| path.is_absolute() && path.to_str().is_some() && is_executable(path))
}

/// The first line that `path --version` prints, or why there is none.
///
/// # Errors
/// Text for people.
pub fn version_line(path: &Path) -> Result<String, String> {
    let said = output(path, &["--version"])?;
    let line = said.lines().find(|line| !line.trim().is_empty());
    line.map(|line| line.trim().to_owned()).ok_or_else(|| format!("{} --version printed no version", path.display()))
}

/// What `path` prints when it is run with `args` and ends well, or why there is nothing.
///
/// # Errors
/// Text for people.
pub fn output(path: &Path, args: &[&str]) -> Result<String, String> {
    let named = || format!("{} {}", path.display(), args.join(" "));
    let output = Command::new(path).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{}: {error}", named()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{} ended with {}", named(), output.status)),
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
    fn test_output_is_of_programs_that_end_well() {
        assert_eq!(output(Path::new("/bin/echo"), &["a", "b"]).unwrap(), "a b\n");
        let why = output(Path::new("/bin/sh"), &["-c", "echo no; exit 3"]).unwrap_err();
        assert!(why.starts_with("/bin/sh -c") && why.contains('3'), "{why}");
    }

    #[test]
    fn test_find_missing_or_not_executable_is_none() {
        assert_eq!(find("no-such-program-here", Some(OsStr::new("/bin"))), None);
        assert_eq!(find("/etc/passwd", None), None);
    }
}
