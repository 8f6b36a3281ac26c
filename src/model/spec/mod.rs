//! What one VM is to be.
//!
//! Architecture invariant: text becomes types at the edge, once: a [`VmSpec`] is checked when it is made, so no layer
//! checks it again. A caller's wishes are a [`SpecPatch`]; templates and the configuration fill in what it leaves out.

mod egress;
mod labels;
mod limits;
mod mac;
mod network;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Backend, IsolationType, TemplateName};

pub use egress::{EgressRule, EgressTarget, NamePattern};
pub use labels::Labels;
pub use limits::ResourceLimits;
pub use mac::MacAddress;
pub use network::{GuestAddress, NetworkConfig, NetworkMode, NetworkText, DEFAULT_PREFIX};

/// What one VM is to be. It does not change while the VM lives, and comes back with a suspended one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    pub isolation_type: IsolationType,
    /// `None`: the best one that this host can run.
    pub backend: Option<Backend>,
    pub limits: ResourceLimits,
    pub network: NetworkConfig,
    pub image: BootImage,
    /// One of the user's own that the VM is a clone of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateName>,
    /// By which its owner finds it again; no part of its machine.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// The parts of a [`VmSpec`] that a caller may leave out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecPatch {
    pub backend: Option<Backend>,
    pub limits: Option<ResourceLimits>,
    pub network: Option<NetworkConfig>,
    pub image: BootImage,
    pub template: Option<TemplateName>,
    pub labels: Option<Labels>,
}

/// The caller's own files that a VM boots from; `None`: those that come with the package.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootImage {
    pub kernel_path: Option<PathBuf>,
    pub rootfs_path: Option<PathBuf>,
}

impl VmSpec {
    /// A VM as `patch` has it; what that leaves out is as the defaults of each part are.
    #[must_use]
    pub fn new(isolation_type: IsolationType, patch: SpecPatch) -> Self {
        let SpecPatch { backend, limits, network, image, template, labels } = patch;
        let (limits, network, labels) =
            (limits.unwrap_or_default(), network.unwrap_or_default(), labels.unwrap_or_default());
        Self { isolation_type, backend, limits, network, image, template, labels }
    }

    /// What a clone of a template that was taken of this VM has unless its maker says otherwise. Addresses and labels
    /// are each VM's own; where it may go is not.
    #[must_use]
    pub fn as_template(&self) -> SpecPatch {
        let network = Some(self.network.without_addresses());
        SpecPatch { network, template: None, labels: None, ..SpecPatch::from(self.clone()) }
    }

    /// The VM whose state is the template of all VMs like this one, on `backend`: without what is each VM's own.
    #[must_use]
    pub fn to_record(&self, backend: Backend) -> Self {
        let limits = Some(self.limits.without_disk_rates());
        let patch = SpecPatch { backend: Some(backend), limits, image: self.image.clone(), ..SpecPatch::default() };
        Self::new(self.isolation_type, patch)
    }

    /// Whether a VM that was started ahead as `made` can become this one. A network is a VM's own from its first packet
    /// on, so nothing of it can be made ahead; nor are clones of users' templates.
    #[must_use]
    pub fn can_take(&self, made: &Self) -> bool {
        let is_plain = self.network.isolated_network && self.template.is_none();
        is_plain && self.backend == made.backend && self.limits == made.limits && self.image == made.image
    }

    /// In what this VM is to be other than the one that its template was taken of, where a clone has no choice.
    #[must_use]
    pub fn mismatches(&self, template: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |field: &str, taken: String, wanted: String| {
            if taken != wanted {
                found.push(format!("{field}: the template has {taken}, not {wanted}"));
            }
        };
        let (taken, wanted) = (&template.limits, &self.limits);
        compare("vcpu_count", taken.vcpu_count.to_string(), wanted.vcpu_count.to_string());
        compare("memory_mb", taken.memory_mb.to_string(), wanted.memory_mb.to_string());
        compare("disk_size_mb", taken.disk_size_mb.to_string(), wanted.disk_size_mb.to_string());
        let isolated = |network: &NetworkConfig| if network.isolated_network { "True" } else { "False" }.to_owned();
        compare("isolated_network", isolated(&template.network), isolated(&self.network));
        if let (Some(taken), Some(wanted)) = (template.backend, self.backend) {
            compare("backend", taken.to_string(), wanted.to_string());
        }
        for ((field, taken), (_, wanted)) in template.image.parts().into_iter().zip(self.image.parts()) {
            if wanted.is_some() {
                compare(field, format!("{taken:?}"), format!("{wanted:?}"));
            }
        }
        found
    }
}

impl SpecPatch {
    /// What is left out here, as `defaults` has it.
    #[must_use]
    pub fn or(self, defaults: Self) -> Self {
        Self {
            backend: self.backend.or(defaults.backend),
            limits: self.limits.or(defaults.limits),
            network: self.network.or(defaults.network),
            image: self.image.or(defaults.image),
            template: self.template.or(defaults.template),
            labels: self.labels.or(defaults.labels),
        }
    }
}

/// Leaves nothing out.
impl From<VmSpec> for SpecPatch {
    fn from(spec: VmSpec) -> Self {
        let VmSpec { isolation_type: _, backend, limits, network, image, template, labels } = spec;
        Self { backend, limits: Some(limits), network: Some(network), image, template, labels: Some(labels) }
    }
}

impl BootImage {
    /// Each part with its name in the public API.
    fn parts(&self) -> [(&'static str, Option<&Path>); 2] {
        [("kernel_path", self.kernel_path.as_deref()), ("rootfs_path", self.rootfs_path.as_deref())]
    }

    /// The same, to be changed.
    pub fn parts_mut(&mut self) -> [(&'static str, &mut Option<PathBuf>); 2] {
        [("kernel_path", &mut self.kernel_path), ("rootfs_path", &mut self.rootfs_path)]
    }

    /// The files that are the caller's own.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.parts().into_iter().filter_map(|(_, path)| path)
    }

    fn or(self, defaults: Self) -> Self {
        Self {
            kernel_path: self.kernel_path.or(defaults.kernel_path),
            rootfs_path: self.rootfs_path.or(defaults.rootfs_path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec::new(IsolationType::Session, SpecPatch::default())
    }

    fn labelled() -> VmSpec {
        let labels = Labels::parse([("team".to_owned(), "web".to_owned())].into()).unwrap();
        VmSpec { labels, ..spec() }
    }

    fn template() -> VmSpec {
        VmSpec { backend: Some(Backend::Qemu), isolation_type: IsolationType::BrowserTab, ..spec() }
    }

    #[test]
    fn test_or_fills_in_what_was_left_out_and_nothing_else() {
        let limits = |memory_mb| Some(ResourceLimits { memory_mb, ..ResourceLimits::default() });
        let kernel = BootImage { kernel_path: Some("/kernel".into()), rootfs_path: None };
        let rootfs = BootImage { kernel_path: Some("/other".into()), rootfs_path: Some("/rootfs".into()) };
        let asked = SpecPatch { limits: limits(128), image: kernel, ..SpecPatch::default() };
        let defaults =
            SpecPatch { backend: Some(Backend::Qemu), limits: limits(256), image: rootfs, ..SpecPatch::default() };
        let spec = VmSpec::new(IsolationType::Plugin, asked.or(defaults));
        assert_eq!((spec.backend, spec.limits.memory_mb), (Some(Backend::Qemu), 128));
        assert_eq!(spec.image.files().collect::<Vec<_>>(), [Path::new("/kernel"), Path::new("/rootfs")]);
        assert_eq!(VmSpec::new(spec.isolation_type, spec.clone().into()), spec);
    }

    #[test]
    fn test_as_template_keeps_where_a_vm_may_go_and_not_its_addresses() {
        let mut spec = template();
        spec.template = Some(TemplateName::parse("template", "before").unwrap());
        spec.network.tap_device = Some("tap0".into());
        spec.network.gateway = Some([10, 0, 0, 1].into());
        spec.network.egress = Some(vec![EgressRule::parse("example.com").unwrap()]);
        let left = spec.as_template();
        let network = left.network.unwrap();
        assert_eq!((network.tap_device, network.gateway, left.template), (None, None, None));
        assert_eq!(network.egress, spec.network.egress);
    }

    #[test]
    fn test_labels_are_one_vms_own_and_no_part_of_its_machine() {
        assert_eq!(
            (labelled().as_template().labels, labelled().to_record(Backend::Qemu).labels.is_empty()),
            (None, true)
        );
        assert!(labelled().can_take(&spec()));
        assert_eq!(labelled().mismatches(&spec()), Vec::<String>::new());
    }

    #[test]
    fn test_can_take_only_what_is_the_same_machine() {
        type Change = fn(&mut VmSpec);
        let made = spec();
        assert!(VmSpec { isolation_type: IsolationType::Plugin, ..spec() }.can_take(&made));
        let changes: [Change; 5] = [
            |spec| spec.backend = Some(Backend::Firecracker),
            |spec| spec.limits.memory_mb += 1,
            |spec| spec.network.isolated_network = false,
            |spec| spec.image.rootfs_path = Some("/x".into()),
            |spec| spec.template = Some(TemplateName::parse("template", "own").unwrap()),
        ];
        for change in changes {
            let mut wanted = spec();
            change(&mut wanted);
            assert!(!wanted.can_take(&made), "{wanted:?}");
        }
    }

    #[test]
    fn test_mismatches_name_the_field_and_both_values() {
        type Change = fn(&mut VmSpec);
        let changes: [(&str, Change); 6] = [
            ("vcpu_count: the template has 1, not 2", |spec| spec.limits.vcpu_count = 2),
            ("memory_mb: the template has 512, not 256", |spec| spec.limits.memory_mb = 256),
            ("disk_size_mb: the template has 1024, not 64", |spec| spec.limits.disk_size_mb = 64),
            ("isolated_network: the template has True, not False", |spec| spec.network.isolated_network = false),
            ("backend: the template has qemu, not firecracker", |spec| spec.backend = Some(Backend::Firecracker)),
            ("rootfs_path: the template has None", |spec| spec.image.rootfs_path = Some("/x".into())),
        ];
        for (expected, change) in changes {
            let mut spec = spec();
            change(&mut spec);
            let found = spec.mismatches(&template());
            assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
        }
    }

    #[test]
    fn test_mismatches_leave_to_a_clone_what_its_host_enforces() {
        let mut spec = spec();
        spec.limits =
            ResourceLimits { max_processes: 7, max_file_handles: 77, network_bandwidth_mbps: 3, ..spec.limits };
        spec.backend = Some(Backend::Qemu);
        assert_eq!(spec.mismatches(&template()), Vec::<String>::new());
    }
}
