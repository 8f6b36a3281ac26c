//! Whether KVM on this host runs an ordinary guest.
//!
//! Opening `/dev/kvm` proves nothing: a container may have a plain file or a dead node there, another hypervisor may hold
//! the CPU's virtualization, and some hosts offer a paravirtual KVM on which ordinary kernels hang. So the node must be KVM's,
//! the CPU must show `vmx` or `svm`, and a guest of some instructions must run.

mod trial;

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};

use super::fork::PerProcess;
use super::remedy::{self, Node, Place};
use crate::mutex::Mutex;

/// Where the kernel puts it (include/linux/miscdevice.h: major 10 of all "misc" devices, minor 232).
const DEVICE: &str = "/dev/kvm";
const NUMBERS: (u64, u64) = (10, 232);

/// What was found out, with a remedy when something is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kvm {
    pub device: bool,
    pub usable: bool,
    pub reason: String,
    pub remedy: Option<String>,
}

/// The CPU's model name and virtualization flag (`vmx` or `svm`).
#[must_use]
pub fn cpu() -> (String, Option<&'static str>) {
    parse_cpuinfo(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn parse_cpuinfo(cpuinfo: &str) -> (String, Option<&'static str>) {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let flags = field("flags").unwrap_or_default();
    let flag = ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|f| f == *flag));
    (field("model name").unwrap_or_else(|| "unknown".into()), flag)
}

/// Looks at the node and the CPU and, once in a process for each node that opens, runs a guest. Blocking, for seconds where
/// KVM hangs.
#[must_use]
pub fn probe() -> Kvm {
    assess(Path::new(DEVICE), cpu().1, tried)
}

type Tried = Result<(), String>;

/// The outcome of [`trial::run`], remembered for the node.
fn tried(kvm: &File, meta: &Metadata) -> Tried {
    type Node = (u64, u64, i64);
    static KNOWN: PerProcess<Mutex<Option<(Node, Tried)>>> = PerProcess::new();
    let node = (meta.dev(), meta.ino(), meta.ctime());
    // Held throughout: a second caller would only do the same.
    let mut known = KNOWN.get().lock();
    match &*known {
        Some((of, tried)) if *of == node => tried.clone(),
        _ => known.insert((node, trial::run(kvm))).1.clone(),
    }
}

fn assess(path: &Path, flag: Option<&str>, tried: impl FnOnce(&File, &Metadata) -> Tried) -> Kvm {
    let shown = path.display();
    let no = |device, reason: String, remedy: String| Kvm { device, usable: false, reason, remedy: Some(remedy) };
    let meta = match path.metadata() {
        Ok(meta) => meta,
        Err(error) if error.kind() == ErrorKind::NotFound => return absent(path, flag),
        Err(error) => return no(false, format!("{shown} cannot be looked at: {error}"), format!("ls -l {shown}")),
    };
    if let Some(what) = another(&meta) {
        let remedy =
            "remove it and load the module (modprobe kvm_intel or kvm_amd); in a container pass --device /dev/kvm";
        return no(false, format!("{shown} is {what}, not KVM's device"), remedy.into());
    }
    let Some(flag) = flag else {
        let reason = format!(
            "{shown} is there, but the CPU shows neither vmx nor svm, so ordinary guests make no progress on it"
        );
        let remedy = "enable nested virtualization for this machine, or use a host with hardware virtualization";
        return no(true, reason, remedy.into());
    };
    let kvm = match File::options().read(true).write(true).open(path) {
        Ok(kvm) => kvm,
        Err(error) => {
            let (reason, remedy) = refused(path, &meta, &error);
            return no(true, reason, remedy);
        }
    };
    match tried(&kvm, &meta) {
        Ok(()) => Kvm {
            device: true,
            usable: true,
            reason: format!("{shown} runs a guest, and the CPU has {flag}"),
            remedy: None,
        },
        Err(reason) => {
            let remedy =
                "see the kernel's log (dmesg); end other hypervisors (VirtualBox, VMware); on a virtual machine \
                          ask its host for working nested virtualization";
            no(true, format!("{shown} opens and the CPU has {flag}, but a guest does not run: {reason}"), remedy.into())
        }
    }
}

fn absent(path: &Path, flag: Option<&str>) -> Kvm {
    let shown = path.display().to_string();
    let reason = match flag {
        Some(_) => format!("the CPU can virtualize, but there is no {shown}"),
        None => format!("there is no {shown}, and the CPU shows neither vmx nor svm"),
    };
    let remedy = remedy::kvm_absent(&shown, flag, &Place::look());
    Kvm { device: false, usable: false, reason, remedy: Some(remedy) }
}

/// What it is, if it is not the node of KVM.
fn another(meta: &Metadata) -> Option<String> {
    let kind = meta.file_type();
    if !kind.is_char_device() {
        let what = if kind.is_file() {
            "a regular file"
        } else if kind.is_dir() {
            "a folder"
        } else {
            "no character device"
        };
        return Some(what.into());
    }
    let numbers = (major(meta.rdev()), minor(meta.rdev()));
    (numbers != NUMBERS).then(|| format!("the character device {}:{}", numbers.0, numbers.1))
}

/// Why the node does not open, and what would help on this host.
fn refused(path: &Path, meta: &Metadata, error: &io::Error) -> (String, String) {
    let shown = path.display();
    if !matches!(error.kind(), ErrorKind::PermissionDenied) {
        let remedy = "load the module (modprobe kvm_intel or kvm_amd): the node has no working driver behind it";
        return (format!("{shown} does not open: {error}"), remedy.into());
    }
    let (node, place) = (Node::of(path, meta), Place::look());
    let group = node.group.clone().unwrap_or_else(|| node.gid.to_string());
    let reason = format!(
        "{shown} is there, but {} may not open it: mode {:03o}, owner {}, group {group}",
        place.user, node.mode, node.owner
    );
    (reason, remedy::kvm_denied(&node, &place))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn works(_: &File, _: &Metadata) -> Tried {
        Ok(())
    }

    fn never(_: &File, _: &Metadata) -> Tried {
        panic!("it is not to be tried")
    }

    #[test]
    fn test_assess_what_is_not_the_node_is_named_and_not_opened() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cases =
            [(file.path(), "a regular file"), (Path::new("/dev/null"), "device 1:3"), (Path::new("/"), "a folder")];
        for (path, expected) in cases {
            let kvm = assess(path, Some("vmx"), never);
            assert!(!kvm.device && !kvm.usable && kvm.remedy.is_some());
            assert!(kvm.reason.contains(expected), "{}", kvm.reason);
        }
    }

    #[test]
    fn test_assess_no_node_says_whether_the_cpu_could() {
        let reason = |flag| assess(Path::new("/no/kvm"), flag, never).reason;
        assert!(reason(Some("svm")).contains("can virtualize") && reason(None).contains("neither vmx nor svm"));
    }

    #[test]
    fn test_assess_node_that_opens_is_tried_where_the_cpu_has_a_flag() {
        let node = Path::new(DEVICE);
        if File::options().read(true).write(true).open(node).is_err() {
            eprintln!("skipped: needs a /dev/kvm that opens");
            return;
        }
        let (without, with) = (assess(node, None, never), assess(node, Some("svm"), works));
        assert!(without.device && !without.usable && with.usable, "{without:?} {with:?}");
        let broken = assess(node, Some("svm"), |_, _| Err("KVM_CREATE_VM: Device or resource busy".into()));
        assert!(!broken.usable && broken.reason.ends_with("KVM_CREATE_VM: Device or resource busy"), "{broken:?}");
    }

    #[test]
    fn test_refused_names_the_nodes_mode_or_a_missing_driver() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let meta = file.as_file().metadata().unwrap();
        let told = refused(file.path(), &meta, &io::Error::from(ErrorKind::PermissionDenied));
        assert!(told.0.contains("mode 600, owner"), "{}", told.0);
        let dead = refused(file.path(), &meta, &io::Error::from_raw_os_error(libc::ENXIO));
        assert!(dead.1.contains("no working driver"));
    }

    #[test]
    fn test_parse_cpuinfo_finds_model_and_whole_flag() {
        let text = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu svm_lock vmx\n";
        assert_eq!(parse_cpuinfo(text), ("Some CPU".into(), Some("vmx")));
        assert_eq!(parse_cpuinfo("flags : fpu svm_lock\n").1, None);
    }
}
