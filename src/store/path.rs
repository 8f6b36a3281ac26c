//! Paths as a user gives them, made absolute once: later the working directory may be another one, in the janitor it is.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::unistd::{geteuid, User};

use crate::error::{Error, Result};

/// Makes `given` absolute; a leading `~` or `~name` is that user's home. `field` is what the user calls it.
///
/// # Errors
/// [`Error::InvalidValue`] for what is empty, holds a NUL, has a home that is not known, or is no UTF-8 in full.
pub fn absolute(field: &str, given: &Path) -> Result<PathBuf> {
    let invalid = |allowed: String| {
        let value = format!("{:?}", given.display().to_string());
        Error::InvalidValue { field: field.into(), value, allowed }
    };
    let bytes = given.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(invalid("a path is not empty and holds no NUL; leave it out, or None, for the default".into()));
    }
    let expanded = expand(given).map_err(invalid)?;
    let expanded = expanded.as_deref().unwrap_or(given);
    let absolute = std::path::absolute(expanded).map_err(|error| {
        invalid(format!("a relative path needs a working directory, which cannot be told ({error}); give it in full"))
    })?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(invalid(format!("in full it is {}, which is no UTF-8; name another", absolute.display()))),
    }
}

/// The path below a home; `None` when it does not begin with `~`.
fn expand(given: &Path) -> std::result::Result<Option<PathBuf>, String> {
    let mut components = given.components();
    let first = components.next().map(|component| component.as_os_str().as_bytes());
    let Some(name) = first.and_then(|first| first.strip_prefix(b"~")) else { return Ok(None) };
    // As the shell has it: a home that the environment names goes before that of the user database.
    let named = std::env::var_os("HOME").map(PathBuf::from).filter(|home| name.is_empty() && home.is_absolute());
    let found = || match name.is_empty() {
        true => User::from_uid(geteuid()),
        false => User::from_name(&String::from_utf8_lossy(name)),
    };
    match named.or_else(|| found().ok().flatten().map(|user| user.dir)) {
        Some(home) => Ok(Some(home.join(components.as_path()))),
        None => Err("~ stands for a user's home, and this one's is not known; give the path in full".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_absolute_paths_stay_and_relative_ones_are_below_the_working_directory() {
        let here = std::env::current_dir().unwrap();
        for (given, expected) in
            [("/a/b", Path::new("/a/b").to_owned()), ("a/b", here.join("a/b")), ("./a", here.join("a"))]
        {
            assert_eq!(absolute("field", Path::new(given)).unwrap(), expected);
        }
    }

    #[test]
    fn test_absolute_path_that_is_no_utf8_is_refused() {
        let given = Path::new(std::ffi::OsStr::from_bytes(b"/tmp/\xff"));
        assert!(absolute("field", given).unwrap_err().to_string().contains("no UTF-8"));
    }

    #[test]
    fn test_a_tilde_is_a_home() {
        let root = User::from_name("root").unwrap().unwrap().dir;
        assert_eq!(absolute("field", Path::new("~root/x")).unwrap(), root.join("x"));
        assert!(absolute("field", Path::new("~/x")).unwrap().is_absolute());
        assert!(absolute("field", Path::new("a/~")).unwrap().ends_with("a/~"));
        let message = absolute("field", Path::new("~no-such-user/x")).unwrap_err().to_string();
        assert!(message.contains("field=\"~no-such-user/x\""), "{message}");
    }

    #[test]
    fn test_empty_and_nul_are_refused_by_name() {
        for given in ["", "a\0b", "\0"] {
            let error = absolute("config[\"x\"]", Path::new(given)).unwrap_err();
            assert!(error.code() == "invalid_value" && error.to_string().contains("config[\"x\"]"), "{error}");
        }
    }
}
