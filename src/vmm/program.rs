//! A VMM's files on this host: what it needs to run, and where its jail shows them.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm_jail::Access;

use crate::error::{Error, Result};
use crate::host::fork::PerProcess;
use crate::host::{binary, elf};
use crate::mutex::Mutex;
use crate::vmm::JailPlan;

/// One binary, with its libraries and those of the modules that it will load.
#[derive(Debug, Clone)]
pub struct VmmBinary {
    pub binary: PathBuf,
    pub needs: elf::Needs,
    /// What it answers to `--version`.
    pub version_line: Option<String>,
    /// What it prints for the first of the backend's own questions that it accepts.
    pub answer: Option<Answer>,
}

/// What a binary says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which question it is the answer to.
    pub question: usize,
    pub text: String,
}

/// Asks in turns: a binary that does not know an option ends badly.
fn ask(binary: &Path, questions: &[&[&str]]) -> Option<Answer> {
    let mut asked = questions.iter().enumerate();
    asked.find_map(|(question, args)| Some(Answer { question, text: binary::output(binary, args).ok()? }))
}

type Identity = (PathBuf, u64, u64, i64, i64, u64);

fn identity(path: &Path, meta: &Metadata) -> Identity {
    (path.to_owned(), meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl VmmBinary {
    /// Looks at a binary, or remembers what it found out about the same file; `modules` names what it loads besides,
    /// `questions` are command lines that it is run with, until it accepts one. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`] when it is no program of this machine's, or misses a library.
    pub fn inspect(
        path: &Path,
        modules: impl FnOnce(&Path) -> Vec<PathBuf>,
        questions: &[&[&str]],
    ) -> Result<Arc<Self>> {
        static KNOWN: PerProcess<Mutex<HashMap<Identity, Arc<VmmBinary>>>> = PerProcess::new();
        let failed = |error: std::io::Error| Error::host("inspect", path.display(), error);
        let binary = path.canonicalize().map_err(failed)?;
        let identity = identity(&binary, &binary.metadata().map_err(failed)?);
        let mut known = KNOWN.get().lock();
        if let Some(program) = known.get(&identity) {
            return Ok(program.clone());
        }
        let modules = modules(&binary);
        let (needs, version_line, answer) = std::thread::scope(|scope| {
            let version = scope.spawn(|| binary::version_line(&binary).ok());
            let answer = scope.spawn(|| ask(&binary, questions));
            (elf::needs(&binary, &modules), version.join().unwrap_or(None), answer.join().unwrap_or(None))
        });
        let program = Arc::new(Self { needs: needs?, version_line, answer, binary });
        known.insert(identity, program.clone());
        Ok(program)
    }

    /// The version and the path, and the releases that the packaged guest was `tried` with; for people.
    #[must_use]
    pub fn pairing(&self, tried: &str) -> String {
        let version = self.version_line.as_deref().unwrap_or("unknown version");
        format!("{version} ({}); the packaged kernel was tried with {tried}", self.binary.display())
    }

    /// Shows the binary and its libraries, or, of a VMM that is loaded already, what only its modules need; answers with
    /// the path by which the jailed VMM finds itself.
    ///
    /// # Errors
    /// [`Error::ImageUnreadable`].
    pub fn show(&self, plan: &mut JailPlan, is_loaded: bool) -> Result<PathBuf> {
        for (soname, path) in &self.needs.for_modules {
            plan.show("VMM's library", path, &format!("/lib/{soname}"), Access::Execute)?;
        }
        let inside = format!("/vmm/{}", file_name(&self.binary));
        if is_loaded {
            return Ok(if plan.own_root { inside.into() } else { self.binary.clone() });
        }
        let program = plan.show("VMM", &self.binary, &inside, Access::Execute)?;
        if let Some((named, real)) = &self.needs.interpreter {
            plan.show("VMM's loader", real, &named.display().to_string(), Access::Execute)?;
        }
        for (soname, path) in &self.needs.libraries {
            plan.show("VMM's library", path, &format!("/lib/{soname}"), Access::Execute)?;
        }
        Ok(program)
    }
}

/// Where the libraries are, for a VMM with a root of its own.
#[must_use]
pub fn library_path() -> (String, String) {
    ("LD_LIBRARY_PATH".into(), "/lib".into())
}

/// The numbers of a version, `MAJOR.MINOR` with whatever follows, behind `prefix`.
#[must_use]
pub fn parse_version(line: &str, prefix: &str) -> Option<(u32, u32)> {
    let mut parts = line.strip_prefix(prefix)?.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_ask_tells_which_question_was_accepted() {
        let answer = ask(Path::new("/bin/sh"), &[&["-c", "exit 1"], &["-c", "echo yes"], &["-c", "echo no"]]).unwrap();
        assert_eq!((answer.question, answer.text.as_str()), (1, "yes\n"));
        assert_eq!(ask(Path::new("/bin/false"), &[&["a"], &["b"]]), None);
    }

    #[test]
    fn test_parse_version_takes_the_first_two_numbers() {
        let qemu = "QEMU emulator version ";
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)", qemu), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.0", qemu), Some((10, 0)));
        assert_eq!(parse_version("Firecracker v1.16.1", "Firecracker v"), Some((1, 16)));
        assert_eq!(parse_version("cloud-hypervisor v53.0-dirty", "cloud-hypervisor v"), Some((53, 0)));
        assert_eq!(parse_version("something else 7.2", qemu), None);
    }
}
