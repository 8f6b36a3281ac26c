//! What confines one VM's processes on this host, worked out before they start, and how that is told.
//!
//! Architecture invariant: nothing is dropped in silence. A layer or limit that this host cannot give is in the report;
//! with `jail="strict"` it is an error.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use microvm_jail::{Confined, Identity, Layer, Resource, Rlimit};
use serde_json::{json, Map, Value};

use crate::error::{Error, Result, Shortfall};
use crate::host::cgroup::{self, Controller, Device, Groups, Outcome};
use crate::host::clock;
use crate::host::process::Jailed;
use crate::host::rlimit;
use crate::model::{Backend, Budget, JailMode, NetworkConfig, ResourceLimits, VmId, VmSpec, CPU_PERIOD_US};
use crate::store::disk::Disk;
use crate::store::lease::Lease;
use crate::store::VmDir;
use crate::vm::settings::Settings;
use crate::vmm::{self, HostJail, JailPlan, Vmm, OVERHEAD_MIB};

const TAP_DEVICE: &str = "/dev/net/tun";

/// Nobody can change it from one VM to the next.
fn warn_once(backend: Backend, why: &str) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        log::warn!(
            "connected VMs of {backend} are in the host's network namespace, where a VMM that was broken out of sees all \
             interfaces and, before Linux 6.12, reaches abstract Unix sockets: {why}"
        );
    }
}

/// What the processes of one VM hold on the host until the last of them is gone.
pub struct HostResources {
    groups: Groups,
    lease: Option<Lease>,
    memory_bytes: u64,
}

/// How one VM's processes are confined.
#[derive(Debug, Clone)]
pub struct Confinement {
    mode: JailMode,
    layers: Vec<(&'static str, Layer)>,
    limits: Vec<(&'static str, Vec<String>)>,
}

/// The plan of the jail, what it holds on the host, and the report.
///
/// # Errors
/// [`Error::IsolationUnavailable`] in strict mode, [`Error::Host`].
pub fn confine(
    vm_id: &VmId,
    spec: &VmSpec,
    settings: &Settings,
    dir: &VmDir,
    disk: &Disk,
    vmm: &dyn Vmm,
) -> Result<(JailPlan, HostResources, Confinement)> {
    let launcher = &settings.image.launcher;
    let (first_uid, last_uid) = settings.uid_range;
    let mut needs = vmm.needs(!spec.network.isolated_network);
    let host = vmm::host_jail(launcher, first_uid, needs.seccomp)?;
    // Those that the host gives or not are the host's.
    let of_backend: Vec<&str> = needs.layers.iter().map(|(name, _)| *name).collect();
    let hands_tap = needs.opens_tap.then(|| host.hands_taps());
    if let Some(handed) = &hands_tap {
        let layer = match handed {
            Ok(how) => Layer::Given((*how).to_owned()),
            Err(why) => {
                needs.devices.push(TAP_DEVICE.into());
                warn_once(vmm.backend(), why);
                Layer::Missing(why.clone())
            }
        };
        needs.layers.push(("network_namespace", layer));
    }
    let budget = Budget::of(&spec.limits, OVERHEAD_MIB);
    let lease = match host.own_uid() {
        true => Some(Lease::take(first_uid, last_uid)?),
        false => None,
    };
    let devices: Vec<(Device, u32)> = needs.devices.iter().filter_map(|path| device(path)).collect();
    // A device that only a group may open: that becomes the VM's group.
    let identity = lease.as_ref().map(Lease::uid).map(|uid| {
        let gid = devices.iter().map(|(_, gid)| *gid).find(|gid| *gid != 0).unwrap_or(uid);
        Identity { uid, gid }
    });
    let mut plan = JailPlan::new(launcher, &host, identity, &needs.devices)?;
    let common = ["/dev/null", "/dev/urandom"].iter().filter_map(|path| device(Path::new(path)));
    let name = format!("{vm_id}-{}", clock::hex(&clock::random::<4>()?));
    // In the journal before it exists: this process may be killed in between.
    dir.note_groups(&cgroup::candidates(&name, settings.cgroup_parent.as_deref()))?;
    let groups = Groups::create(
        &name,
        settings.cgroup_parent.as_deref(),
        &cgroup::Limits {
            cpu_quota_us: budget.cpu_quota_us,
            cpu_period_us: CPU_PERIOD_US,
            memory_bytes: budget.memory_bytes,
            tasks: budget.tasks,
            devices: common.chain(devices).map(|(device, _)| device).collect(),
            io: io_limit(&spec.limits, disk),
        },
    )?;
    dir.note_groups(groups.folders())?;
    plan.cgroup_procs = groups.procs();
    plan.rlimits = rlimits(vm_id, &budget, needs.open_files, identity.is_some(), rlimit::hard)?;
    plan.audit = settings.jail == JailMode::Audit;
    plan.hands_tap = matches!(hands_tap, Some(Ok(_)));
    let mut layers = layers(&host, identity);
    layers.extend(needs.layers);
    layers.extend(groups.outcomes().iter().filter(|(c, _)| *c != Controller::Io).map(cgroup_layer));
    let confinement =
        Confinement { mode: settings.jail, layers, limits: limits(spec, &budget, &plan, groups.outcomes()) };
    if settings.jail == JailMode::Strict {
        confinement.refuse_what_is_missing(vm_id, &host, vmm.backend(), &of_backend)?;
    } else if !host.own_root() {
        log::warn!("{vm_id}: its VMM runs without namespaces and a root of its own (see doctor)");
    }
    Ok((plan, HostResources { groups, lease, memory_bytes: budget.memory_bytes }, confinement))
}

/// Refuses a VM whose VMM could not run with the limits of this process, before anything is made for it. Blocking.
///
/// # Errors
/// [`Error::LimitTooLow`], [`Error::Host`].
pub fn check_limits(vm_id: &VmId, spec: &VmSpec, settings: &Settings, vmm: &dyn Vmm) -> Result<()> {
    let needs = vmm.needs(!spec.network.isolated_network);
    let host = vmm::host_jail(&settings.image.launcher, settings.uid_range.0, needs.seccomp)?;
    let more_files = needs.open_files;
    let budget = Budget::of(&spec.limits, OVERHEAD_MIB);
    rlimits(vm_id, &budget, more_files, host.own_uid(), rlimit::hard).map(drop)
}

impl HostResources {
    /// Lets the VMM be the first to touch `bytes` of its template's memory: the kernel makes a page of zeros in the
    /// template for each that is not there, before it copies it, and counts both against whoever touched it.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn allow_first_touch(&self, bytes: u64) -> Result<()> {
        self.groups.raise_memory(self.memory_bytes + bytes)
    }

    /// The owner of the VM's files.
    pub fn uid(&self) -> Option<u32> {
        self.lease.as_ref().map(Lease::uid)
    }
}

impl std::fmt::Debug for HostResources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostResources").field("groups", &self.groups).field("uid", &self.uid()).finish()
    }
}

/// A device node's numbers and group.
fn device(path: &Path) -> Option<(Device, u32)> {
    let meta = path.metadata().ok()?;
    let (major, minor) = (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
    Some((Device { major, minor }, meta.gid()))
}

/// On the block device that the disk is on; file systems without one (tmpfs, overlays) have major number 0.
fn io_limit(limits: &ResourceLimits, disk: &Disk) -> Option<(Device, Option<u64>, Option<u64>)> {
    let (bytes, operations) = (limits.disk_bytes_per_s, limits.disk_ops_per_s);
    let number = disk.file().metadata().ok()?.dev();
    let device = Device { major: nix::sys::stat::major(number), minor: nix::sys::stat::minor(number) };
    (device.major != 0 && (bytes.is_some() || operations.is_some())).then_some((device, bytes, operations))
}

/// The VMM's limits: what it may have, or what this process was started with, where that is less.
///
/// # Errors
/// [`Error::LimitTooLow`] where that is less than a VMM needs, its guest's worst included: one that gets no memory for a
/// thread, no thread or no room in its disk's file aborts.
fn rlimits(
    vm_id: &VmId,
    budget: &Budget,
    more_files: u64,
    own_uid: bool,
    inherited: impl Fn(Resource) -> u64,
) -> Result<Vec<Rlimit>> {
    const LEAST_STACK: u64 = 1 << 20;
    let mut wanted = vec![
        (Resource::Core, 0, 0),
        (Resource::Memlock, 0, 0),
        (Resource::Nofile, budget.open_files + more_files, budget.least_open_files + more_files),
        (Resource::Fsize, budget.file_bytes, budget.file_bytes),
        (Resource::Data, budget.data_bytes, budget.data_bytes),
        (Resource::As, u64::MAX, budget.address_bytes),
        (Resource::Stack, budget.stack_bytes, LEAST_STACK),
    ];
    // The kernel counts a user's processes, not a VM's: another user's would be counted in.
    wanted.extend(own_uid.then_some((Resource::Nproc, budget.tasks, budget.tasks)));
    let limit = |(resource, wanted, least): (Resource, u64, u64)| match wanted.min(inherited(resource)) {
        value if value < least => {
            Err(Error::LimitTooLow { vm_id: vm_id.clone(), limit: resource.to_string(), value, needed: least })
        }
        value => Ok(Rlimit::both(resource, value)),
    };
    wanted.into_iter().map(limit).collect()
}

/// What every jail on this host has.
#[must_use]
pub fn layers(host: &HostJail, identity: Option<Identity>) -> Vec<(&'static str, Layer)> {
    let given = |how: &str| Layer::Given(how.to_owned());
    let root = match &host.namespaces {
        Layer::Given(_) => given("a read-only tmpfs with the VMM, its libraries and this VM's files"),
        Layer::Missing(_) => Layer::Missing("it needs the namespaces: the VMM sees the host's root".into()),
    };
    let uid = match (&host.identity, identity) {
        (Layer::Given(_), Some(Identity { uid, .. })) => Layer::Given(format!("{uid}, no other VM's")),
        (other, _) => other.clone(),
    };
    let mut layers = vec![
        ("namespaces", host.namespaces.clone()),
        ("root", root),
        ("uid", uid),
        // Only in a user namespace of its own may an ordinary user empty the bounding set.
        ("capabilities", given(if host.own_root() { "none, in any set; no_new_privs" } else { "none; no_new_privs" })),
        ("rlimits", given("see limits")),
        ("parent_watch", given("the supervisor kills the VMM when the manager's end of its socket closes")),
    ];
    if let Some(confined) = &host.confined {
        layers.extend(kernel_layers(confined));
    }
    layers
}

fn kernel_layers(confined: &Confined) -> [(&'static str, Layer); 4] {
    let Confined { landlock, seccomp, keyring, namespace_limits } = confined.clone();
    [("landlock", landlock), ("seccomp", seccomp), ("keyring", keyring), ("namespace_limits", namespace_limits)]
}

/// Where the VMM's code and data are in its memory.
fn layout(jailed: &Jailed) -> Layer {
    match jailed.is_forked() {
        true => Layer::Missing("its manager's other VMs have the same: jail=\"strict\" gives each VM its own".into()),
        false => Layer::Given("the VMM was executed for this VM".into()),
    }
}

/// A controller as a layer.
#[must_use]
pub fn cgroup_layer((controller, outcome): &Outcome) -> (&'static str, Layer) {
    let name = match controller {
        Controller::Cpu => "cgroup_cpu",
        Controller::Memory => "cgroup_memory",
        Controller::Pids => "cgroup_pids",
        Controller::Devices => "cgroup_devices",
        Controller::Io => "cgroup_io",
    };
    let layer = match outcome {
        Ok(how) => Layer::Given(how.clone()),
        Err(why) => Layer::Missing(why.to_string()),
    };
    (name, layer)
}

fn bandwidth(network: &NetworkConfig) -> &'static str {
    match network.isolated_network {
        true => "nothing to limit: the VM has no network",
        false => "host: tbf on the tap (to the VM) and on its ifb (from the VM); in user mode the gateway, each way",
    }
}

/// Where and how each limit is enforced.
fn limits(
    VmSpec { limits: asked, network, .. }: &VmSpec,
    budget: &Budget,
    plan: &JailPlan,
    outcomes: &[Outcome],
) -> Vec<(&'static str, Vec<String>)> {
    let by = |wanted: Controller| {
        let found = outcomes.iter().find(|(controller, _)| *controller == wanted);
        found.map(|(_, outcome)| match outcome {
            Ok(how) => format!("VMM: {how}"),
            Err(why) => format!("VMM: not enforced by cgroup: {why}"),
        })
    };
    let rlimit = |wanted: Resource| {
        let found = plan.rlimits.iter().find(|rlimit| rlimit.resource == wanted);
        found.map(|rlimit| format!("VMM: RLIMIT_{} {}", wanted.to_string().to_uppercase(), rlimit.hard))
    };
    let list = |fixed: &[String], more: Vec<Option<String>>| -> Vec<String> {
        fixed.iter().cloned().chain(more.into_iter().flatten()).collect()
    };
    let rate = |value: Option<u64>, what: &str| match value {
        Some(value) => {
            let group =
                by(Controller::Io).unwrap_or_else(|| "VMM: not enforced by cgroup: its disk is on no device".into());
            vec![format!("VMM: its limiter of the disk, {value} {what}"), group]
        }
        None => vec!["not limited: none was asked for".to_owned()],
    };
    let mib = budget.memory_bytes >> 20;
    vec![
        ("vcpu_count", list(&[format!("guest: it has {} vCPUs", asked.vcpu_count)], vec![by(Controller::Cpu)])),
        (
            "memory_mb",
            list(
                &[format!("guest: it has {} MiB, and its own OOM killer", asked.memory_mb)],
                vec![by(Controller::Memory).map(|how| format!("{how} ({mib} MiB)")), rlimit(Resource::Data)],
            ),
        ),
        (
            "disk_size_mb",
            list(&[format!("guest: its disk has {} MiB", asked.disk_size_mb)], vec![rlimit(Resource::Fsize)]),
        ),
        ("network_bandwidth_mbps", vec![bandwidth(network).to_owned()]),
        (
            "max_file_handles",
            list(
                &[format!("guest: RLIMIT_NOFILE {} of every program", asked.max_file_handles)],
                vec![rlimit(Resource::Nofile)],
            ),
        ),
        (
            "max_processes",
            list(
                &[format!("guest: RLIMIT_NPROC and pids.max {} of all programs", asked.max_processes)],
                vec![by(Controller::Pids), rlimit(Resource::Nproc)],
            ),
        ),
        ("disk_bytes_per_s", rate(asked.disk_bytes_per_s, "bytes/s, reads and writes together")),
        ("disk_ops_per_s", rate(asked.disk_ops_per_s, "operations/s, reads and writes together")),
    ]
}

impl Confinement {
    fn refuse_what_is_missing(
        &self,
        vm_id: &VmId,
        host: &HostJail,
        backend: Backend,
        of_backend: &[&str],
    ) -> Result<()> {
        let missing: Vec<(&'static str, String)> = self
            .layers
            .iter()
            .filter_map(|(name, layer)| match layer {
                // Where cgroups cannot (v2), the root does: it has no other device nodes.
                Layer::Missing(_) if *name == "cgroup_devices" && host.own_root() => None,
                Layer::Missing(why) => Some((*name, why.clone())),
                Layer::Given(_) => None,
            })
            .collect();
        if missing.is_empty() && host.confined.is_some() {
            return Ok(());
        }
        let by_backend = missing.iter().any(|(name, _)| of_backend.contains(name));
        let by_host = host.confined.is_none() || missing.iter().any(|(name, _)| !of_backend.contains(name));
        let limited_by = match (by_backend, by_host) {
            (true, true) => format!("backend {backend} on this host"),
            (true, false) => format!("backend {backend}"),
            (false, _) => "this host".to_owned(),
        };
        let other = match backend {
            Backend::Qemu => "use a release of QEMU that was measured, or jail=\"default\"",
            Backend::Firecracker | Backend::CloudHypervisor => "use backend=\"qemu\", or jail=\"default\"",
        };
        let remedies =
            [by_backend.then_some(other), by_host.then_some("doctor tells what each layer of the host needs")];
        let reasons: Vec<String> = missing.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        let shortfall = Box::new(Shortfall {
            wanted: "jail=strict".into(),
            offered: "jail=default".into(),
            limited_by,
            reason: reasons.join("; "),
            remedy: remedies.into_iter().flatten().collect::<Vec<_>>().join("; "),
            missing,
        });
        Err(Error::IsolationUnavailable { vm_id: vm_id.clone(), shortfall })
    }

    /// Each layer, as far as it is known before the VMM runs.
    pub fn layers(&self) -> &[(&'static str, Layer)] {
        &self.layers
    }

    /// Every layer: whether it is given, and how, or why not, as far as `jailed` tells by now.
    pub fn jail_json(&self, jailed: &Jailed) -> Value {
        let mut report = Map::new();
        report.insert("mode".into(), json!(self.mode.as_str()));
        let told = jailed.confined().as_ref().map(kernel_layers);
        let layout = ("address_layout", layout(jailed));
        let (expected, told) = (self.layers.iter(), told.iter().flatten());
        for (name, layer) in expected.chain(told).chain([&layout]) {
            let (given, how) = match layer {
                Layer::Given(how) => (true, how),
                Layer::Missing(why) => (false, why),
            };
            report.insert((*name).to_owned(), json!({"given": given, "how": how}));
        }
        if self.mode == JailMode::Audit {
            let found: Vec<Value> =
                jailed.findings().iter().map(|f| json!({"layer": f.layer, "what": f.what})).collect();
            report.insert("would_deny".into(), json!(found));
        }
        Value::Object(report)
    }

    /// Notes what [`HostResources::allow_first_touch`] gave.
    pub fn note_first_touch(&mut self, bytes: u64) {
        if let Some((_, how)) = self.limits.iter_mut().find(|(field, _)| *field == "memory_mb") {
            how.push(format!(
                "VMM: up to {} MiB more for pages of its template that it is the first to touch",
                bytes >> 20
            ));
        }
    }

    /// For each limit, where and how it is enforced.
    pub fn limits_json(&self) -> Value {
        self.limits.iter().map(|(field, how)| ((*field).to_owned(), json!(how))).collect::<Map<_, _>>().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(inherited: impl Fn(Resource) -> u64) -> Result<Vec<Rlimit>> {
        let budget = Budget::of(&ResourceLimits::default(), OVERHEAD_MIB);
        rlimits(&VmId::parse("tab").unwrap(), &budget, 0, true, inherited)
    }

    #[test]
    fn test_rlimits_the_stricter_one_is_kept() {
        let own = |of: Resource, value: u64| limited(move |resource| if resource == of { value } else { u64::MAX });
        let value = |limits: Result<Vec<Rlimit>>, of| limits.unwrap().iter().find(|l| l.resource == of).unwrap().hard;
        assert_eq!(value(limited(|_| u64::MAX), Resource::Nofile), 200);
        assert_eq!(value(own(Resource::Nofile, 100), Resource::Nofile), 100);
        assert_eq!(value(own(Resource::Nofile, 4096), Resource::Nofile), 200);
        assert_eq!(value(own(Resource::Core, 7), Resource::Core), 0);
        assert_eq!(value(own(Resource::Stack, 2 << 20), Resource::Stack), 2 << 20);
    }

    #[test]
    fn test_rlimits_too_little_is_named_with_what_is_needed() {
        for (of, value) in [
            (Resource::Nofile, 71),
            (Resource::Nproc, 80),
            (Resource::Fsize, 1 << 30),
            (Resource::Data, 1 << 30),
            (Resource::As, 1 << 30),
            (Resource::Stack, 65_536),
        ] {
            let error = limited(|resource| if resource == of { value } else { u64::MAX }).unwrap_err();
            let text = error.to_string();
            assert_eq!(error.code(), "limit_too_low");
            assert!(text.contains(&of.to_string().to_uppercase()) && text.contains(&value.to_string()), "{text}");
        }
    }

    #[test]
    fn test_strict_blames_the_backend_for_its_layers_and_the_host_for_others() {
        let given = || Layer::Given("yes".into());
        let confined = Confined { landlock: given(), seccomp: given(), keyring: given(), namespace_limits: given() };
        let host = HostJail { namespaces: given(), no_proc: None, identity: given(), confined: Some(confined) };
        let vm_id = VmId::parse("tab").unwrap();
        let refused = |missing: &[&'static str], backend| {
            let layers = missing.iter().map(|name| (*name, Layer::Missing("not measured".into()))).collect();
            let confinement = Confinement { mode: JailMode::Strict, layers, limits: Vec::new() };
            confinement.refuse_what_is_missing(&vm_id, &host, backend, &["seccomp_allow_list"]).unwrap_err()
        };
        let by_backend = refused(&["seccomp_allow_list"], Backend::Firecracker);
        let text = by_backend.to_string();
        assert!(text.contains("but backend firecracker can give") && text.contains("use backend=\"qemu\""), "{text}");
        assert!(!text.contains("doctor"), "{text}");
        assert_eq!(by_backend.details()["missing"]["seccomp_allow_list"], "not measured");
        let by_host = refused(&["landlock"], Backend::Qemu).to_string();
        assert!(by_host.contains("but this host can give") && by_host.contains("doctor"), "{by_host}");
        let by_both = refused(&["landlock", "seccomp_allow_list"], Backend::Qemu).details();
        assert_eq!(by_both["limited_by"], "backend qemu on this host");
        assert!(by_both["remedy"].as_str().unwrap().contains("measured"), "{by_both}");
    }
}
