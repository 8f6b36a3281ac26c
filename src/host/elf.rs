//! What a program needs to run besides itself: its interpreter and its libraries.
//!
//! The dynamic loader is asked, not imitated: search paths, caches and hardware variants are its own business. With
//! `--list` it loads and prints, and runs no code of the program's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};

/// elf(5): e_ident of a 64-bit little-endian file, the program header of an interpreter, the size of one.
const ELF64: &[u8] = b"\x7fELF\x02\x01";
const PT_INTERP: u32 = 3;
const PROGRAM_HEADER: usize = 56;
/// The kernel's own limit on a path.
const PATH_MAX: u64 = 4096;

/// A program's files on this host, symbolic links resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// The path by which the kernel looks for it, and where it is; `None` for a static program.
    pub interpreter: Option<(PathBuf, PathBuf)>,
    /// By the name that the loader looks for.
    pub libraries: BTreeMap<String, PathBuf>,
    /// Those that only its modules need.
    pub for_modules: BTreeMap<String, PathBuf>,
}

/// Asks the loader of `program` what it and `modules`, which it will load later, need.
///
/// # Errors
/// [`Error::Host`] when a file cannot be read, or a library is missing.
pub fn needs(program: &Path, modules: &[PathBuf]) -> Result<Needs> {
    let failed = |reason: &dyn std::fmt::Display| Error::host("find the libraries of", program.display(), reason);
    let Some(named) = interpreter(program).map_err(|e| failed(&e))? else { return Ok(Needs::default()) };
    let real = named.canonicalize().map_err(|e| failed(&format!("{}: {e}", named.display())))?;
    let libraries_of = |file: &Path| -> Result<BTreeMap<String, PathBuf>> {
        let output = Command::new(&named)
            .arg("--list")
            .arg(file)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .map_err(|e| failed(&format!("{}: {e}", named.display())))?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            return Err(failed(&String::from_utf8_lossy(&output.stderr).trim()));
        }
        let mut found = BTreeMap::new();
        for (name, path) in parse_list(&said).map_err(|e| failed(&e))? {
            let path = path.canonicalize().map_err(|e| failed(&format!("{}: {e}", path.display())))?;
            // The interpreter has a place of its own.
            if path != real {
                found.insert(name, path);
            }
        }
        Ok(found)
    };
    let libraries = libraries_of(program)?;
    let mut for_modules = BTreeMap::new();
    for module in modules {
        for_modules.extend(libraries_of(module)?);
    }
    for_modules.retain(|name, _| !libraries.contains_key(name));
    Ok(Needs { interpreter: Some((named, real)), libraries, for_modules })
}

/// The path by which the kernel looks for the loader of `program`; `None`: it is static.
///
/// # Errors
/// What reading says, and for what is no program of this machine's.
pub fn interpreter(program: &Path) -> std::io::Result<Option<PathBuf>> {
    let file = File::open(program)?;
    let mut header = [0; 64];
    (&file).read_exact(&mut header)?;
    if !header.starts_with(ELF64) {
        return Err(std::io::Error::other("it is not a 64-bit ELF program"));
    }
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header.get(at + i).copied().unwrap_or(0)));
    let half =
        |at: usize| u64::from(u16::from_le_bytes(std::array::from_fn(|i| header.get(at + i).copied().unwrap_or(0))));
    let (table, size, count) = (word(32), half(54), half(56));
    for index in 0..count {
        let mut entry = [0; PROGRAM_HEADER];
        file.read_exact_at(&mut entry, table.saturating_add(index * size))?;
        let field = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| entry.get(at + i).copied().unwrap_or(0)));
        if field(0) as u32 != PT_INTERP {
            continue;
        }
        let mut path = vec![0; usize::try_from(field(32).min(PATH_MAX)).unwrap_or(0)];
        file.read_exact_at(&mut path, field(8))?;
        let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
        return Ok(Some(PathBuf::from(String::from_utf8_lossy(path).into_owned())));
    }
    Ok(None)
}

/// `name => path (address)` a line; what has no path is the kernel's own (vdso) or the loader.
fn parse_list(said: &str) -> std::result::Result<Vec<(String, PathBuf)>, String> {
    let mut found = Vec::new();
    for line in said.lines() {
        let Some((name, target)) = line.trim().split_once(" => ") else { continue };
        let path = target.rsplit_once(" (").map_or(target, |(path, _)| path).trim();
        if !path.starts_with('/') {
            return Err(format!("{name}: {path}"));
        }
        let name = name.rsplit('/').next().unwrap_or(name);
        found.push((name.to_owned(), PathBuf::from(path)));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_needs_of_this_program_are_files_and_hold_the_c_library() {
        let needs = needs(&std::env::current_exe().unwrap(), &[]).unwrap();
        assert!(needs.interpreter.unwrap().1.is_file());
        assert!(needs.libraries.keys().any(|name| name.starts_with("libc.so")));
        assert!(needs.libraries.values().all(|path| path.is_file()));
    }

    #[test]
    fn test_parse_list_says_what_is_missing() {
        let said = "\tlinux-vdso.so.1 (0x1)\n\tliba.so.1 => /lib/liba.so.1 (0x2)\n\t/lib64/ld.so (0x3)\n";
        assert_eq!(parse_list(said).unwrap(), [("liba.so.1".to_owned(), PathBuf::from("/lib/liba.so.1"))]);
        assert_eq!(parse_list("\tlibb.so.2 => not found\n").unwrap_err(), "libb.so.2: not found");
    }

    #[test]
    fn test_needs_of_a_script_is_an_error() {
        let script = std::env::temp_dir().join(format!("elf-{}", std::process::id()));
        std::fs::write(&script, "#!/bin/sh\n".repeat(20)).unwrap();
        assert!(needs(&script, &[]).unwrap_err().to_string().contains("not a 64-bit ELF"));
        std::fs::remove_file(script).unwrap();
    }
}
