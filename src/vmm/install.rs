//! Which VMMs are installed, and what to do about those that are not.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::{binary, kvm};
use crate::model::{Backend, Grade, ManagerConfig};

/// What pip calls the package with a QEMU of our own.
const QEMU_PACKAGE: &str = "thirstys-waterfall-microvm-qemu";

/// Binaries that the configuration names; instead of an absent one there is the package's, else what `PATH` has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Binaries {
    pub qemu: Option<String>,
    /// QEMU of our own package, where that is installed; without links.
    pub packaged_qemu: Option<PathBuf>,
    pub firecracker: Option<String>,
    pub cloud_hypervisor: Option<String>,
}

impl Binaries {
    #[must_use]
    pub fn new(config: &ManagerConfig, packaged_qemu: Option<PathBuf>) -> Self {
        Self {
            qemu: config.qemu_binary.clone(),
            packaged_qemu,
            firecracker: config.firecracker_binary.clone(),
            cloud_hypervisor: config.cloud_hypervisor_binary.clone(),
        }
    }

    /// # Errors
    /// [`Error::BackendUnavailable`] that says what to install.
    pub fn locate(&self, backend: Backend) -> Result<PathBuf> {
        let packaged = self.packaged_qemu.as_ref().filter(|_| backend == Backend::Qemu && self.qemu.is_none());
        if let Some(packaged) = packaged {
            // The one on PATH may be another release: not taken silently.
            return match binary::is_executable(packaged) {
                true => Ok(packaged.clone()),
                false => Err(Error::BackendUnavailable {
                    backend,
                    reason: format!("{QEMU_PACKAGE}: {} is not an executable file", packaged.display()),
                    remedy: "install that package again, or name another QEMU in config[\"qemu_binary\"]".into(),
                }),
            };
        }
        let (named, default, key) = match backend {
            Backend::Qemu => (&self.qemu, "qemu-system-x86_64", "qemu_binary"),
            Backend::Firecracker => (&self.firecracker, "firecracker", "firecracker_binary"),
            Backend::CloudHypervisor => (&self.cloud_hypervisor, "cloud-hypervisor", "cloud_hypervisor_binary"),
        };
        let name = named.as_deref().unwrap_or(default);
        binary::find(name, std::env::var_os("PATH").as_deref()).ok_or_else(|| Error::BackendUnavailable {
            backend,
            reason: match named {
                Some(name) => format!("config[{key:?}]={name:?} is not an executable file"),
                None => format!("no executable {default:?} was found on PATH"),
            },
            remedy: install_hint(backend, key),
        })
    }

    /// Whether a VMM is the one of our own package, however it was named; `binary` is without links.
    #[must_use]
    pub fn is_packaged(&self, binary: &Path) -> bool {
        self.packaged_qemu.as_deref() == Some(binary)
    }
}

fn install_hint(backend: Backend, key: &str) -> String {
    let how = match backend {
        Backend::Qemu => {
            "install it (the wheel thirstys-waterfall-microvm-qemu has all that is needed; Debian, Ubuntu: apt install \
             qemu-system-x86; Fedora: dnf install qemu-system-x86-core)"
        }
        Backend::Firecracker => "install a release from https://github.com/firecracker-microvm/firecracker/releases",
        Backend::CloudHypervisor => {
            "install a release from https://github.com/cloud-hypervisor/cloud-hypervisor/releases"
        }
    };
    format!("{how}, or name the binary in config[{key:?}]")
}

/// Whether a backend that needs KVM can run here.
///
/// # Errors
/// [`Error::BackendUnavailable`].
pub fn needs_kvm(backend: Backend) -> Result<()> {
    let kvm = kvm::probe();
    if kvm.usable {
        return Ok(());
    }
    let remedy = format!("{}; or use backend=\"qemu\", which runs without KVM", kvm.remedy.unwrap_or_default());
    Err(Error::BackendUnavailable { backend, reason: format!("it needs KVM: {}", kvm.reason), remedy })
}

/// What `doctor` says about one backend.
#[derive(Debug, Clone)]
pub struct Installed {
    pub backend: Backend,
    pub path: Option<PathBuf>,
    pub version: Option<String>,
    /// How VMs of it would run; `None` when they would not.
    pub grade: Option<Grade>,
    pub reason: String,
    pub remedy: Option<String>,
}

/// Looks at every backend; runs each found binary with `--version`.
#[must_use]
pub fn probe(binaries: &Binaries) -> Vec<Installed> {
    let kvm = kvm::probe();
    let look = |backend: Backend| {
        let missing = |path, version, reason, remedy| Installed { backend, path, version, grade: None, reason, remedy };
        let path = match binaries.locate(backend) {
            Ok(path) => path,
            Err(Error::BackendUnavailable { reason, remedy, .. }) => return missing(None, None, reason, Some(remedy)),
            Err(other) => return missing(None, None, other.to_string(), None),
        };
        let version = match binary::version_line(&path) {
            Ok(version) => version,
            Err(reason) => {
                return missing(Some(path), None, reason, Some("install a build for this machine".into()));
            }
        };
        match backend {
            Backend::Qemu => Installed {
                backend,
                path: Some(path),
                version: Some(version),
                grade: Some(if kvm.usable { Grade::Hardware } else { Grade::Emulated }),
                reason: if kvm.usable { "runs on KVM".into() } else { format!("runs on TCG: {}", kvm.reason) },
                remedy: kvm.remedy.clone(),
            },
            Backend::Firecracker | Backend::CloudHypervisor => match kvm.usable {
                true => Installed {
                    backend,
                    path: Some(path),
                    version: Some(version),
                    grade: Some(Grade::Hardware),
                    reason: "runs on KVM".into(),
                    remedy: None,
                },
                false => {
                    missing(Some(path), Some(version), format!("it needs KVM: {}", kvm.reason), kvm.remedy.clone())
                }
            },
        }
    };
    Backend::ALL.iter().copied().map(look).collect()
}
