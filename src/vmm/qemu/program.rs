//! QEMU's files on this host: what it needs to run, and how its calls are to be filtered.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm_jail::{Access, Layer, Seccomp};

use super::api::Restore;
use crate::error::Result;
use crate::host::elf;
use crate::vmm::{program, JailPlan};

/// The distributions' releases whose system calls were measured for the allow-list.
const MEASURED: [(u32, u32); 1] = [(7, 2)];
/// Ours, which has an allow-list of its own; `qemu/build.sh` gives it that name.
const OWN_MEASURED: (u32, u32) = (10, 0);
const OWN_NAME: &str = "(microvm)";
/// From 9.1 on `fd:` of a file is deprecated, and `file:` takes a set of descriptors; 11 refuses the first. It cannot be tried:
/// a restore that was refused leaves QEMU unable to begin another. `query-qmp-schema` does not tell.
const RESTORES_FILES: (u32, u32) = (9, 1);
/// Where tests/distributions.py ran, and make test.
const TRIED: &str = "QEMU 7.2, 10.0 and 11.1";
/// What the `microvm` machine boots from: with acpi=off the first, else the second.
const FIRMWARE: [&str; 2] = ["qboot.rom", "bios-microvm.bin"];
/// Where distributions keep firmware and modules, seen from the folder of the binary.
const FIRMWARE_FOLDERS: [&str; 4] = ["../share/qemu", "../share/seabios", "/usr/share/qemu", "/usr/share/seabios"];
const MODULE_FOLDERS: [&str; 3] = ["../lib/x86_64-linux-gnu/qemu", "../lib64/qemu", "../lib/qemu"];
/// Where a copy of the distribution's finds its own; QEMU itself refuses the modules of another build.
const SYSTEM_MODULE_FOLDERS: [&str; 3] = ["/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib64/qemu", "/usr/lib/qemu"];
/// The loader of the distributions that have such folders (System V ABI, AMD64): another libc's cannot load their modules.
const SYSTEM_LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// QEMU loads its emulator from a module where it was built with modules; KVM is always built in.
const TCG_MODULE: &str = "accel-tcg-x86_64.so";

/// The first is refused by a QEMU that was built without libseccomp. `off` because nothing is to be filtered here.
const QUESTIONS: [&[&str]; 2] = [&["-sandbox", "off", "-cpu", "help"], &["-cpu", "help"]];
const WITH_SANDBOX: usize = 0;

/// One QEMU binary.
#[derive(Debug, Clone)]
pub struct QemuBinary {
    files: Arc<program::VmmBinary>,
    modules: Vec<PathBuf>,
    firmware: Vec<(&'static str, PathBuf)>,
}

/// Where the jailed QEMU finds itself and its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub program: PathBuf,
    pub env: Vec<(String, String)>,
    /// For `-L`; `None`: QEMU's own.
    pub firmware: Option<&'static str>,
}

/// A file in the first of `folders`, seen from the folder of the binary, that has it.
fn beside(binary: &Path, folders: &[&str], name: &str) -> Option<PathBuf> {
    let folder = binary.parent().unwrap_or(Path::new("/"));
    folders.iter().map(|place| folder.join(place).join(name)).find_map(|path| path.canonicalize().ok())
}

fn modules(binary: &Path) -> Vec<PathBuf> {
    let is_distributions = || elf::interpreter(binary).is_ok_and(|loader| loader == Some(SYSTEM_LOADER.into()));
    let of_a_copy = || beside(binary, &SYSTEM_MODULE_FOLDERS, TCG_MODULE).filter(|_| is_distributions());
    beside(binary, &MODULE_FOLDERS, TCG_MODULE).or_else(of_a_copy).into_iter().collect()
}

/// Whether the answer to `-cpu help` names a flag: after the models, a heading and then names between blanks.
fn lists_cpu_flag(answer: &str, name: &str) -> bool {
    answer.split_once("CPUID flags:").is_some_and(|(_, flags)| flags.split_whitespace().any(|flag| flag == name))
}

fn version(line: &str) -> Option<(u32, u32)> {
    program::parse_version(line, "QEMU emulator version ")
}

/// The filter of system calls for a QEMU that says this of its version. Whoever lies gets one that fits him less.
fn filter(version_line: &str) -> Seccomp {
    match version(version_line) {
        Some(OWN_MEASURED) if version_line.ends_with(OWN_NAME) => Seccomp::AllowListForOwnQemu,
        Some(version) if MEASURED.contains(&version) => Seccomp::AllowList,
        _ => Seccomp::DenyList,
    }
}

impl QemuBinary {
    /// Looks at a binary, or remembers what it found out about the same file. Blocking.
    ///
    /// # Errors
    /// [`crate::error::Error::Host`] when it is no program of this machine's, or misses a library.
    pub fn inspect(path: &Path) -> Result<Self> {
        let files = program::VmmBinary::inspect(path, modules, &QUESTIONS)?;
        let firmware = |name: &'static str| Some((name, beside(&files.binary, &FIRMWARE_FOLDERS, name)?));
        let firmware = FIRMWARE.into_iter().filter_map(firmware).collect();
        Ok(Self { modules: modules(&files.binary), firmware, files })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.files.binary
    }

    #[must_use]
    pub fn version_line(&self) -> Option<&str> {
        self.files.version_line.as_deref()
    }

    #[must_use]
    pub fn pairing(&self) -> String {
        self.files.pairing(TRIED)
    }

    fn version(&self) -> Option<(u32, u32)> {
        version(self.version_line()?)
    }

    /// Adds QEMU's own files to a plan; of one that is loaded already, those that it has yet to open.
    ///
    /// # Errors
    /// [`crate::error::Error::ImageUnreadable`].
    pub fn show(&self, plan: &mut JailPlan, is_loaded: bool) -> Result<Shown> {
        let program = self.files.show(plan, is_loaded)?;
        for module in &self.modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            plan.show("QEMU's module", module, &format!("/vmm/modules/{name}"), Access::Execute)?;
        }
        for (file, path) in &self.firmware {
            plan.show("QEMU's firmware", path, &format!("/vmm/firmware/{file}"), Access::Read)?;
        }
        if !plan.own_root {
            return Ok(Shown { program, env: Vec::new(), firmware: None });
        }
        let env = vec![program::library_path(), ("QEMU_MODULE_DIR".into(), "/vmm/modules".into())];
        Ok(Shown { program, env, firmware: Some("/vmm/firmware") })
    }

    /// Whether QEMU was built to filter its own system calls.
    #[must_use]
    pub fn has_sandbox(&self) -> bool {
        self.files.answer.as_ref().is_some_and(|answer| answer.question == WITH_SANDBOX)
    }

    /// How it takes the state that it restores.
    #[must_use]
    pub fn restore(&self) -> Restore {
        match self.version() {
            Some(version) if version >= RESTORES_FILES => Restore::FdSet,
            _ => Restore::Fd,
        }
    }

    /// Whether its CPUs know a feature by this name, be it that they have it or not.
    #[must_use]
    pub fn has_cpu_flag(&self, name: &str) -> bool {
        self.files.answer.as_ref().is_some_and(|answer| lists_cpu_flag(&answer.text, name))
    }

    /// Whether the loader links it, with glibc: only then is there a moment between that and its `main`.
    #[must_use]
    pub fn can_preload(&self) -> bool {
        self.files.needs.interpreter.is_some() && self.files.needs.libraries.contains_key("libc.so.6")
    }

    #[must_use]
    pub fn seccomp(&self) -> Seccomp {
        filter(self.version_line().unwrap_or_default())
    }

    /// What can be said about QEMU's part in the filter, before it runs.
    #[must_use]
    pub fn layers(&self) -> Vec<(&'static str, Layer)> {
        let sandbox = match self.has_sandbox() {
            true => Layer::Given(format!("-sandbox {}", super::args::SANDBOX)),
            false => Layer::Missing("this QEMU was built without libseccomp".into()),
        };
        let shown = self.version().map_or_else(|| "of unknown version".to_owned(), |(a, b)| format!("{a}.{b}"));
        let allow_list = match self.seccomp() {
            Seccomp::AllowListForOwnQemu => Layer::Given(format!("measured with our own QEMU {shown}")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_modules_of_a_copy_are_those_of_the_system() {
        let Some(system) = beside(Path::new("/"), &SYSTEM_MODULE_FOLDERS, TCG_MODULE) else {
            println!("skipped: this system's QEMU has no modules");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("qemu");
        std::fs::copy("/usr/bin/qemu-system-x86_64", &copy).unwrap();
        assert_eq!(modules(&copy), [system]);
        std::fs::write(&copy, "no program").unwrap();
        assert_eq!(modules(&copy), [] as [PathBuf; 0]);
    }

    #[test]
    fn test_filter_is_that_of_the_release_and_build() {
        let of = |rest: &str| filter(&format!("QEMU emulator version {rest}"));
        assert_eq!(of("10.0.13 (microvm)"), Seccomp::AllowListForOwnQemu);
        assert_eq!(of("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"), Seccomp::AllowList);
        for other in ["10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)", "10.1.0 (microvm)", "100.0 (microvm)", ""] {
            assert_eq!(of(other), Seccomp::DenyList, "{other}");
        }
    }

    #[test]
    fn test_cpu_flag_is_a_whole_word_of_the_list_of_flags() {
        let answer = "x86 fsrm  a model\n\nRecognized CPUID flags:\n  3dnow erms est\n  fpu fsgsbase fsrm2 xtpr\n\n";
        assert!(lists_cpu_flag(answer, "erms") && lists_cpu_flag(answer, "xtpr"));
        assert!(!lists_cpu_flag(answer, "fsrm") && !lists_cpu_flag("", "erms"));
        assert!(lists_cpu_flag(&answer.replace("fsrm2", "fsrm"), "fsrm"));
    }
}
