//! ELF files: what a program needs to run besides itself, its interpreter and its libraries, and what a kernel tells in notes.
//!
//! The dynamic loader is asked, not imitated: search paths, caches and hardware variants are its own business. With
//! `--list` it loads and prints, and runs no code of the program's.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use object::elf::{FileHeader64, NoteType, ProgramType, EM_X86_64, PT_INTERP, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, ReadCache};

use crate::error::{Cause, Error, Result};

/// The kernel's own limit on a path (`PATH_MAX`).
const MAX_INTERPRETER: u64 = 4096;
/// Notes are a few hundred bytes; a longer segment is not read.
const MAX_NOTES: u64 = 1 << 20;

/// A 64-bit little-endian ELF file, read piece by piece.
pub struct Elf {
    data: ReadCache<File>,
    size: u64,
}

type Header = FileHeader64<LittleEndian>;
type Phdr = <Header as FileHeader>::ProgramHeader;

impl Elf {
    /// # Errors
    /// What reading says, and for a file that is not of this kind.
    pub fn read(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let elf = Self { data: ReadCache::new(file), size };
        elf.header()?;
        Ok(elf)
    }

    fn header(&self) -> io::Result<&Header> {
        let header = Header::parse(&self.data).ok().filter(|header| header.is_class_64() && header.is_little_endian());
        header.ok_or_else(|| io::Error::other("it is not a 64-bit ELF program"))
    }

    #[must_use]
    pub fn is_of_this_machine(&self) -> bool {
        self.header().is_ok_and(|header| header.e_machine(LittleEndian) == EM_X86_64)
    }

    /// The segments, each of which lies within the file.
    fn segments(&self) -> io::Result<&[Phdr]> {
        let segments = self.header()?.program_headers(LittleEndian, &self.data);
        let segments = segments.map_err(|_| io::Error::other("it is cut off: its program headers are missing"))?;
        let is_within = |segment: &Phdr| {
            let (offset, length) = segment.file_range(LittleEndian);
            offset.checked_add(length).is_some_and(|end| end <= self.size)
        };
        match segments.iter().all(is_within) {
            true => Ok(segments),
            false => Err(io::Error::other("it is cut off: a segment ends behind the end of the file")),
        }
    }

    /// The segments of a kind that are no longer than `limit`.
    fn short_segments(&self, kind: ProgramType, limit: u64) -> io::Result<impl Iterator<Item = &Phdr>> {
        let is_wanted =
            move |segment: &&Phdr| segment.p_type(LittleEndian) == kind && segment.file_range(LittleEndian).1 <= limit;
        Ok(self.segments()?.iter().filter(is_wanted))
    }

    /// The path by which the kernel looks for the program's loader; `None`: the program is static.
    ///
    /// # Errors
    /// For a file that is cut off or malformed.
    pub fn interpreter(&self) -> io::Result<Option<PathBuf>> {
        let Some(segment) = self.short_segments(PT_INTERP, MAX_INTERPRETER)?.next() else { return Ok(None) };
        let path = segment.interpreter(LittleEndian, &self.data).map_err(io::Error::other)?;
        Ok(path.map(|path| PathBuf::from(OsStr::from_bytes(path))))
    }

    /// Whether it has a note of an owner and a type (elf(5)).
    ///
    /// # Errors
    /// For a file that is cut off.
    pub fn has_note(&self, owner: &[u8], kind: u32) -> io::Result<bool> {
        for segment in self.short_segments(PT_NOTE, MAX_NOTES)? {
            let Ok(Some(mut notes)) = segment.notes(LittleEndian, &self.data) else { continue };
            // What is malformed ends the list.
            while let Ok(Some(note)) = notes.next() {
                if note.name() == owner && note.n_type(LittleEndian) == NoteType(kind) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

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
    let failed = |cause: Cause| Error::host("find the libraries of", program.display(), cause);
    let failed_on = |path: &Path, error: io::Error| {
        let text = format!("{}: {error}", path.display());
        failed(Cause::explained(error, text))
    };
    let Some(named) = interpreter(program).map_err(|e| failed(e.into()))? else { return Ok(Needs::default()) };
    let real = named.canonicalize().map_err(|e| failed_on(&named, e))?;
    // What runs without input reads it, and a failure to would seem to be the program's.
    if let Err(error) = std::fs::File::open("/dev/null") {
        let reason = format!("{error}; make it (mknod -m 666 /dev/null c 1 3), or mount a /dev that has it");
        return Err(Error::host("open", "/dev/null", reason));
    }
    let libraries_of = |file: &Path| -> Result<BTreeMap<String, PathBuf>> {
        let output = Command::new(&named)
            .arg("--list")
            .arg(file)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .map_err(|e| failed_on(&named, e))?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().into()));
        }
        let mut found = BTreeMap::new();
        for (name, path) in parse_list(&said).map_err(|e| failed(e.into()))? {
            let path = path.canonicalize().map_err(|e| failed_on(&path, e))?;
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
/// What reading says, and for a file that is no 64-bit ELF program.
pub fn interpreter(program: &Path) -> io::Result<Option<PathBuf>> {
    Elf::read(File::open(program)?)?.interpreter()
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
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&script, "#!/bin/sh\n".repeat(20)).unwrap();
        assert!(needs(script.path(), &[]).unwrap_err().to_string().contains("not a 64-bit ELF"));
    }
}
