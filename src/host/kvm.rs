//! Whether KVM on this host runs an ordinary guest.
//!
//! Opening `/dev/kvm` proves nothing: some hosts offer a paravirtual KVM on which ordinary kernels hang. Without `vmx`
//! or `svm` among the CPU's flags it is not usable.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;

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

/// Looks at the device and the CPU; does not run anything.
#[must_use]
pub fn probe() -> Kvm {
    let (_, flag) = cpu();
    judge(OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop).map_err(|e| e.kind()), flag)
}

fn judge(opened: Result<(), ErrorKind>, flag: Option<&str>) -> Kvm {
    let no = |device, reason: &str, remedy: &str| Kvm {
        device,
        usable: false,
        reason: reason.into(),
        remedy: Some(remedy.into()),
    };
    match (opened, flag) {
        (Ok(()), Some(flag)) => {
            Kvm { device: true, usable: true, reason: format!("/dev/kvm opens and the CPU has {flag}"), remedy: None }
        }
        (Ok(()), None) => no(
            true,
            "/dev/kvm opens, but the CPU shows neither vmx nor svm, so ordinary guests make no progress on it",
            "enable nested virtualization for this machine, or use a host with hardware virtualization",
        ),
        (Err(ErrorKind::PermissionDenied), _) => no(
            true,
            "/dev/kvm is there, but this user may not open it",
            "add the user to the group that owns /dev/kvm (usermod -aG kvm USER) and log in again",
        ),
        (Err(ErrorKind::NotFound), Some(_)) => no(
            false,
            "the CPU can virtualize, but there is no /dev/kvm",
            "load the module (modprobe kvm_intel or kvm_amd); in a container pass --device /dev/kvm",
        ),
        (Err(ErrorKind::NotFound), None) => no(
            false,
            "there is no /dev/kvm, and the CPU shows neither vmx nor svm",
            "enable virtualization in the firmware, or nested virtualization on the cloud instance",
        ),
        (Err(kind), _) => {
            no(true, &format!("/dev/kvm does not open: {kind}"), "look at its owner, mode and the device cgroup")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_judge_device_without_cpu_flag_is_not_usable() {
        let kvm = judge(Ok(()), None);
        assert!(kvm.device && !kvm.usable && kvm.remedy.is_some());
    }

    #[test]
    fn test_judge_device_and_flag_is_usable() {
        assert!(judge(Ok(()), Some("svm")).usable);
    }

    #[test]
    fn test_parse_cpuinfo_finds_model_and_whole_flag() {
        let text = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu svm_lock vmx\n";
        assert_eq!(parse_cpuinfo(text), ("Some CPU".into(), Some("vmx")));
        assert_eq!(parse_cpuinfo("flags : fpu svm_lock\n").1, None);
    }
}
