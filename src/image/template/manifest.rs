//! What a template is good for.

use microvm_protocol::GENERATION_MAX;
use serde::{Deserialize, Serialize};

use super::Digest;

/// The layout of a template's folder; another one is another template.
const FORMAT: u32 = 1;

/// Everything that a template depends on. Two VMs with equal fits can be clones of the same template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fit {
    pub backend: String,
    /// The VMM's binary: a package upgrade changes it, and device state need not fit another version.
    pub vmm: Digest,
    pub accelerator: String,
    /// The host CPU's model, which the guest saw when it booted.
    pub cpu: String,
    /// The machine as the VMM is told it, without the names of this VM's files.
    pub machine: Vec<String>,
    pub kernel: Digest,
    pub initramfs: Digest,
    pub drives: Vec<FitDrive>,
}

/// A drive as the frozen guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FitDrive {
    pub serial: String,
    /// In bytes.
    pub size: u64,
    /// Of an image of the caller's.
    pub image: Option<Digest>,
}

impl Fit {
    /// The name of its template. The formats of the folder and of the wire are part of it.
    #[must_use]
    pub fn key(&self) -> String {
        let json = serde_json::to_vec(&(FORMAT, GENERATION_MAX, self)).expect("a fit is plain data");
        Digest::of(&json).as_str().chars().take(32).collect()
    }
}

/// What stands beside a template's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub fit: Fit,
    /// What the agent said before it was frozen; each clone's handshake goes on from there.
    pub hello: Vec<u8>,
    pub ram: Digest,
    pub state: Digest,
    pub disk: Digest,
    pub created_unix_s: u64,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn fit() -> Fit {
        let digest = |text: &str| Digest::of(text.as_bytes());
        Fit {
            backend: "qemu".into(),
            vmm: digest("qemu"),
            accelerator: "tcg".into(),
            cpu: "a CPU".into(),
            machine: vec!["-m".into(), "128M".into()],
            kernel: digest("kernel"),
            initramfs: digest("initramfs"),
            drives: vec![FitDrive { serial: "disk".into(), size: 1 << 20, image: None }],
        }
    }

    #[test]
    fn test_key_changes_with_every_part() {
        type Change = fn(&mut Fit);
        let changes: [Change; 9] = [
            |fit| fit.backend.push('x'),
            |fit| fit.vmm = Digest::of(b"other"),
            |fit| fit.accelerator = "kvm".into(),
            |fit| fit.cpu.push('x'),
            |fit| fit.machine[1] = "256M".into(),
            |fit| fit.kernel = Digest::of(b"other"),
            |fit| fit.initramfs = Digest::of(b"other"),
            |fit| fit.drives[0].size += 1,
            |fit| fit.drives[0].image = Some(Digest::of(b"image")),
        ];
        let mut keys: Vec<String> = vec![fit().key()];
        for change in changes {
            let mut changed = fit();
            change(&mut changed);
            keys.push(changed.key());
        }
        let distinct: std::collections::HashSet<&String> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }
}
