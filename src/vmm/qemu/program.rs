//! QEMU's files on this host: what it needs to run, and how its calls are to be filtered.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use microvm_jail::{Access, Layer, Seccomp};

use crate::error::{Error, Result};
use crate::host::{binary, elf};
use crate::vmm::JailPlan;

/// The releases whose system calls were measured for the allow-list.
const MEASURED: [(u32, u32); 1] = [(7, 2)];
/// What the `microvm` machine boots from: with acpi=off the first, else the second.
const FIRMWARE: [&str; 2] = ["qboot.rom", "bios-microvm.bin"];
/// Where distributions keep firmware and modules, seen from the folder of the binary.
const FIRMWARE_FOLDERS: [&str; 4] = ["../share/qemu", "../share/seabios", "/usr/share/qemu", "/usr/share/seabios"];
const MODULE_FOLDERS: [&str; 3] = ["../lib/x86_64-linux-gnu/qemu", "../lib64/qemu", "../lib/qemu"];
/// QEMU loads its emulator from a module where it was built with modules; KVM is always built in.
const TCG_MODULE: &str = "accel-tcg-x86_64.so";

/// One QEMU binary. Found out once for each binary and change of it.
#[derive(Debug, Clone)]
pub struct Program {
    binary: PathBuf,
    needs: elf::Needs,
    modules: Vec<PathBuf>,
    firmware: Vec<(&'static str, PathBuf)>,
    version: Option<(u32, u32)>,
}

/// Where the jailed QEMU finds itself and its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub program: PathBuf,
    pub env: Vec<(String, String)>,
    /// For `-L`; `None`: QEMU's own.
    pub firmware: Option<&'static str>,
}

type Identity = (PathBuf, u64, u64, i64, i64, u64);

fn identity(path: &Path, meta: &Metadata) -> Identity {
    (path.to_owned(), meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size())
}

impl Program {
    /// Looks at a binary, or remembers what it found out about the same file. Blocking.
    ///
    /// # Errors
    /// [`Error::Host`] when it is no program of this machine's, or misses a library.
    pub fn inspect(path: &Path) -> Result<Arc<Self>> {
        static KNOWN: Mutex<Option<HashMap<Identity, Arc<Program>>>> = Mutex::new(None);
        let failed = |error: std::io::Error| Error::host("inspect", path.display(), error);
        let binary = path.canonicalize().map_err(failed)?;
        let identity = identity(&binary, &binary.metadata().map_err(failed)?);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        if let Some(program) = known.get(&identity) {
            return Ok(program.clone());
        }
        let program = Arc::new(Self::find_out(binary)?);
        known.insert(identity, program.clone());
        Ok(program)
    }

    fn find_out(binary: PathBuf) -> Result<Self> {
        let folder = binary.parent().unwrap_or(Path::new("/")).to_owned();
        let first = |folders: &[&str], name: &str| {
            folders.iter().map(|place| folder.join(place).join(name)).find_map(|path| path.canonicalize().ok())
        };
        let modules: Vec<PathBuf> = first(&MODULE_FOLDERS, TCG_MODULE).into_iter().collect();
        let firmware = FIRMWARE.iter().filter_map(|name| Some((*name, first(&FIRMWARE_FOLDERS, name)?))).collect();
        let (needs, version) = std::thread::scope(|scope| {
            let version = scope.spawn(|| binary::version_line(&binary).ok().as_deref().and_then(parse_version));
            (elf::needs(&binary, &modules), version.join().unwrap_or(None))
        });
        Ok(Self { needs: needs?, modules, firmware, version, binary })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.binary
    }

    /// Adds QEMU's own files to a plan.
    ///
    /// # Errors
    /// [`Error::ImageUnreadable`].
    pub fn show(&self, plan: &mut JailPlan) -> Result<Shown> {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let inside = format!("/vmm/{}", name(&self.binary));
        let program = plan.show("QEMU", &self.binary, &inside, Access::Execute)?;
        if let Some((named, real)) = &self.needs.interpreter {
            plan.show("QEMU's loader", real, &named.display().to_string(), Access::Execute)?;
        }
        for (soname, path) in &self.needs.libraries {
            plan.show("QEMU's library", path, &format!("/lib/{soname}"), Access::Execute)?;
        }
        for module in &self.modules {
            plan.show("QEMU's module", module, &format!("/vmm/modules/{}", name(module)), Access::Execute)?;
        }
        for (file, path) in &self.firmware {
            plan.show("QEMU's firmware", path, &format!("/vmm/firmware/{file}"), Access::Read)?;
        }
        if !plan.own_root {
            return Ok(Shown { program, env: Vec::new(), firmware: None });
        }
        let env = [("LD_LIBRARY_PATH", "/lib"), ("QEMU_MODULE_DIR", "/vmm/modules")];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Ok(Shown { program, env, firmware: Some("/vmm/firmware") })
    }

    /// Whether QEMU was built to filter its own system calls.
    #[must_use]
    pub fn has_sandbox(&self) -> bool {
        self.needs.libraries.keys().any(|name| name.starts_with("libseccomp.so"))
    }

    #[must_use]
    pub fn seccomp(&self) -> Seccomp {
        match self.version {
            Some(version) if MEASURED.contains(&version) => Seccomp::AllowList,
            _ => Seccomp::DenyList,
        }
    }

    /// What can be said about QEMU's part in the filter, before it runs.
    #[must_use]
    pub fn layers(&self) -> Vec<(&'static str, Layer)> {
        let sandbox = match self.has_sandbox() {
            true => Layer::Given(format!("-sandbox {}", super::args::SANDBOX)),
            false => Layer::Missing("this QEMU was built without libseccomp".into()),
        };
        let shown = self.version.map_or_else(|| "of unknown version".to_owned(), |(a, b)| format!("{a}.{b}"));
        let allow_list = match self.seccomp() {
            Seccomp::AllowList => Layer::Given(format!("measured with QEMU {shown}")),
            _ => Layer::Missing(format!(
                "QEMU {shown} is not among the releases whose system calls were measured ({}): it gets the deny-list; \
                 config[\"jail\"]=\"audit\" shows what the allow-list would deny it",
                MEASURED.map(|(a, b)| format!("{a}.{b}")).join(", ")
            )),
        };
        vec![("vmm_sandbox", sandbox), ("seccomp_allow_list", allow_list)]
    }
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(line: &str) -> Option<(u32, u32)> {
    let numbers = line.strip_prefix("QEMU emulator version ")?;
    let mut parts = numbers.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_version_takes_the_first_two_numbers() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)"), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.0"), Some((10, 0)));
        assert_eq!(parse_version("something else 7.2"), None);
    }
}
