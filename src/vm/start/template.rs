//! Templates of VMs: which one fits, and how it is made.

use std::fs::File;
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_jail::Access;
use microvm_protocol::handshake::{has_failed, Ask};
use microvm_protocol::identity::{CONFIG_SERIAL, DISK_SERIAL, DRIVE_BYTES, ROOTFS_SERIAL};
use tokio::io::AsyncWriteExt;

use super::attempt::{Attempt, Progress, GUEST_BOOT, TEMPLATE};
use super::identity_delivery::IdentityDelivery;
use super::prepare::{self, file_size, Prepared, Sources};
use crate::channel::Agent;
use crate::error::{Error, Result};
use crate::host::kvm;
use crate::image::template::{Digests, Fit, FitDrive, Template, DISK, RAM, STATE};
use crate::image::{self, GuestImage};
use crate::model::{Backend, EventKind, VmId, VmSpec};
use crate::vm::events::Events;
use crate::vm::ids::new_id;
use crate::vm::settings::Settings;
use crate::vmm::{self, BackendRequest, Drive, JailPlan, LaunchPlan, Launched, Nic, Origin, Vmm, RAM_PLACE};

/// HELLOs requested before the guest is frozen: it warms up before each.
const WARM_UPS: usize = 3;
/// Time for the kernel to do what it has put off.
const BETWEEN: Duration = Duration::from_millis(20);

/// A template has this many times as long as a start: it is booted, warmed up, written and read.
const TEMPLATE_STARTS: u32 = 4;
/// Of the time of a start, the part for which it waits for a template; in the rest it boots.
const WAITS: u32 = 2;

/// The template for a prepared VM, made if need be; `None`: the VM has to boot. Waits for it until `deadline`, which
/// does not end its making: a later start finds it.
pub async fn find_or_make(
    prepared: &Prepared,
    settings: &Settings,
    deadline: Option<Instant>,
) -> Option<Arc<Template>> {
    let store = settings.templates.as_ref()?;
    let vm_id = &prepared.plan.vm_id;
    if !prepared.vmm.capabilities().clones {
        return None;
    }
    if let Err(reason) = prepared.vmm.can_clone(&prepared.plan) {
        // What its backend cannot do is no news at each start.
        let is_of_host = prepared.plan.jail.has_fixed_places().is_err();
        let level = if is_of_host { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "{vm_id}: the VM boots: {reason}");
        return None;
    }
    let found = async {
        let fit = fit(settings, prepared).await?;
        if let Some(template) = store.known(&fit.key()) {
            return Ok(template);
        }
        let maker = Maker::of(prepared, settings)?;
        store.find_or_make(fit, |dir| async move { maker.make(&dir).await }).await
    };
    let found = match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline.into(), found).await,
        None => Ok(found.await),
    };
    match found {
        Ok(Ok(template)) => return Some(template),
        Ok(Err(error)) => log::warn!("{vm_id}: there is no template, the VM boots: {error}"),
        Err(_) => log::warn!("{vm_id}: its template is not ready yet, the VM boots beside it"),
    }
    None
}

/// Until when a start that began at `begun` waits for a template.
pub fn patience(begun: Instant, settings: &Settings) -> Instant {
    begun + settings.start_timeout / WAITS
}

/// Makes the template of VMs like `spec`, unless it is there; its events name `vm_id`.
///
/// # Errors
/// As a start's; [`Error::Host`] when templates are switched off or cannot be kept.
pub async fn prepare(vm_id: &VmId, spec: VmSpec, settings: &Settings) -> Result<()> {
    let prepared = prepare::prepare(vm_id, &Arc::new(spec), settings).await?;
    let template = find_or_make(&prepared, settings, None).await;
    let missing = || Error::host("prepare", "a template", "there can be none; see the log for the reason");
    template.map(drop).ok_or_else(missing)
}

/// How much of the time has gone by where each stage begins: the means of three, QEMU 7.2 under TCG, 2 s each.
const SHARES: [(&str, f64); 7] = [
    (TEMPLATE, 0.0),
    ("drives", 0.002),
    ("launch", 0.003),
    (GUEST_BOOT, 0.006),
    ("warm-up", 0.64),
    ("save", 0.987),
    ("end", 0.988),
];

/// A template that is being made, and who is told.
struct Recorder {
    progress: Progress,
    events: Arc<Events>,
    /// The VM that it is first needed for.
    wanted_by: (VmId, Arc<VmSpec>),
}

impl Recorder {
    fn at(&self, stage: &'static str) {
        self.progress.at(stage);
        self.publish(stage, SHARES.iter().find(|(known, _)| *known == stage).map_or(0.0, |(_, share)| *share), "");
    }

    fn publish(&self, stage: &'static str, fraction: f64, detail: &str) {
        let (vm_id, spec) = &self.wanted_by;
        self.events.publish(vm_id, spec, EventKind::Template { stage, fraction }, detail);
    }
}

/// Makes a template by a VM of its own, whatever becomes of the one that it is first needed for.
struct Maker {
    vm_id: VmId,
    wanted_by: (VmId, Arc<VmSpec>),
    spec: Arc<VmSpec>,
    is_connected: bool,
    settings: Settings,
}

impl Maker {
    fn of(prepared: &Prepared, settings: &Settings) -> Result<Self> {
        let vm_id = new_id("template")?;
        let spec = Arc::new(prepared.spec.to_record(prepared.vmm.backend()));
        let wanted_by = (prepared.plan.vm_id.clone(), prepared.spec.clone());
        Ok(Self { vm_id, wanted_by, spec, is_connected: prepared.plan.nic.is_some(), settings: settings.clone() })
    }

    async fn make(self, dir: &Path) -> Result<Vec<u8>> {
        let progress = Progress::begin(TEMPLATE);
        let recorder = Recorder { progress, events: self.settings.events.clone(), wanted_by: self.wanted_by.clone() };
        const WHY: &str = "the template of such VMs is made, once and for some seconds; later ones are its clones";
        log::info!("{}: {WHY}", self.wanted_by.0);
        recorder.publish(TEMPLATE, 0.0, WHY);
        let made = self.record_as(&recorder, dir).await;
        match &made {
            Ok(_) => recorder.publish("done", 1.0, ""),
            Err(error) => recorder.publish("failed", 1.0, &error.to_string()),
        }
        made
    }

    async fn record_as(&self, recorder: &Recorder, dir: &Path) -> Result<Vec<u8>> {
        let progress = &recorder.progress;
        let mut prepared = prepare::prepare(&self.vm_id, &self.spec, &self.settings).await?;
        prepared.plan.nic = self.is_connected.then(Nic::unplugged);
        let hello = record(&prepared, &self.settings, recorder, dir).await?;
        let lengths = progress.lengths();
        let stages: Vec<String> = lengths.iter().map(|(stage, length)| format!("{stage} {length:.1?}")).collect();
        log::debug!("{}: recorded: {}", self.vm_id, stages.join(", "));
        Ok(hello)
    }
}

pub async fn discard(settings: &Settings, template: &Template) {
    if let Some(store) = &settings.templates {
        store.discard(&template.manifest.fit).await;
    }
}

/// What a template of this VM depends on.
pub async fn fit(settings: &Settings, prepared: &Prepared) -> Result<Fit> {
    let Prepared { vmm, plan, sources, .. } = prepared;
    let (digests, sources, drives) = (settings.digests.clone(), sources.clone(), plan.drives.clone());
    let (vmm, machine) = (VmmFacts::of(vmm.as_ref()), vmm.machine(plan));
    let looking = tokio::task::spawn_blocking(move || fit_of(&digests, vmm, machine, &drives, &sources));
    looking.await.map_err(|error| Error::host("look at", "what a template depends on", error))?
}

struct VmmFacts {
    backend: Backend,
    accelerator: &'static str,
    binary: PathBuf,
}

impl VmmFacts {
    fn of(vmm: &dyn Vmm) -> Self {
        Self { backend: vmm.backend(), accelerator: vmm.accelerator(), binary: vmm.binary().to_owned() }
    }
}

fn fit_of(digests: &Digests, vmm: VmmFacts, machine: Vec<String>, drives: &[Drive], sources: &Sources) -> Result<Fit> {
    let digest = |path: &Path| digests.of_file(path).map_err(|error| Error::host("read", path.display(), error));
    // A guest has the image mounted when it is frozen; its other drives are made for each clone.
    let drive = |drive: &Drive| {
        let image = sources.rootfs.as_deref().filter(|_| drive.serial == ROOTFS_SERIAL);
        let image = image.map(digest).transpose()?;
        Ok(FitDrive { serial: drive.serial.to_owned(), size: drive.size, image })
    };
    Ok(Fit {
        backend: vmm.backend.as_str().into(),
        vmm: digest(&vmm.binary)?,
        accelerator: vmm.accelerator.into(),
        cpu: kvm::cpu().0,
        machine,
        kernel: digest(&sources.kernel)?,
        initramfs: digest(&sources.initramfs)?,
        drives: drives.iter().map(drive).collect::<Result<_>>()?,
    })
}

/// What the state of a machine would depend on here and now.
#[derive(Debug)]
pub struct Here {
    pub fit: Fit,
    pub vmm_version: Option<String>,
}

/// What the state of a VM of `spec` would depend on here and now: looks at what [`prepare::prepare`] would use, and makes
/// nothing. Blocking; reads an image that has changed.
///
/// # Errors
/// As a start's, where such a VM cannot be started on this host; [`Error::NotSupported`] for `operation` where its jail lacks
/// what a clone needs.
pub fn look(vm_id: &VmId, spec: &VmSpec, settings: &Settings, operation: &'static str) -> Result<Here> {
    let sources = Sources::checked(&spec.image, settings)?;
    let request = BackendRequest::of(spec, settings.min_isolation);
    let vmm = vmm::select(vm_id, &request, &settings.binaries)?.vmm;
    let connected = !spec.network.isolated_network;
    let host = vmm::host_jail(&settings.image.launcher, settings.uid_range.0, vmm.needs(connected).seccomp)?;
    let drive = |serial: &'static str, size: u64, read_only: bool| Drive {
        serial,
        path: format!("/vm/{serial}").into(),
        read_only,
        size,
    };
    // In the order in which `prepare` has them.
    let config = vmm.capabilities().config_drive.then(|| drive(CONFIG_SERIAL, DRIVE_BYTES as u64, true));
    let mut drives: Vec<Drive> = config.into_iter().collect();
    drives.push(drive(DISK_SERIAL, spec.limits.disk_size_mb << 20, false));
    if let Some(rootfs) = &sources.rootfs {
        drives.push(Drive { path: "/image/rootfs".into(), ..drive(ROOTFS_SERIAL, file_size(rootfs)?, true) });
    }
    let plan = LaunchPlan {
        vm_id: vm_id.clone(),
        limits: spec.limits.clone(),
        kernel: "/image/kernel".into(),
        initramfs: "/image/initramfs".into(),
        drives,
        nic: connected.then(Nic::unplugged),
        sockets: None,
        jail: JailPlan::new(&settings.image.launcher, &host, None, &[])?,
        zygotes: None,
    };
    vmm.can_clone(&plan).map_err(|reason| Error::NotSupported {
        vm_id: vm_id.clone(),
        operation,
        backend: vmm.backend(),
        reason,
        remedy: "doctor tells what this host's jail lacks",
    })?;
    let machine = vmm.machine(&plan);
    let fit = fit_of(&settings.digests, VmmFacts::of(vmm.as_ref()), machine, &plan.drives, &sources)?;
    Ok(Here { fit, vmm_version: vmm.version().map(str::to_owned) })
}

/// Boots a VM without an identity and freezes it in `dir`; returns the agent's HELLO.
async fn record(prepared: &Prepared, settings: &Settings, recorder: &Recorder, dir: &Path) -> Result<Vec<u8>> {
    recorder.at("drives");
    let Recording { plan, origin, files } = recording(prepared, &settings.image, dir)?;
    let vm_id = &plan.vm_id;
    recorder.at("launch");
    let launched = prepared.vmm.launch(&plan, &origin, Box::new(prepared.held.clone()))?;
    let Launched { jailed, agent, control, tails, identity } = launched;
    let identity_delivery = IdentityDelivery::by(identity);
    let (limit, vmm) = (settings.start_timeout * TEMPLATE_STARTS, prepared.vmm.as_ref());
    let attempt = Attempt { vm_id, progress: &recorder.progress, jailed: &jailed, tails: &tails, limit, vmm };
    let state = image::create_state(&dir.join(STATE))?;
    let freeze = Ask::Freeze.encode().map_err(|error| Error::host("encode", "a record", error))?;
    let frozen = async {
        control.boot().await?;
        recorder.at(GUEST_BOOT);
        let mut transport = agent.open().await?;
        let mut hello = Agent::hello(vm_id, &mut transport).await?;
        if has_failed(&hello) {
            // A boot of the VM itself will say what.
            return Err(Error::host("freeze", vm_id, "the guest could not be set up"));
        }
        recorder.at("warm-up");
        for _ in 0..WARM_UPS {
            tokio::time::sleep(BETWEEN).await;
            identity_delivery.warm_up()?;
            transport.write_all(&freeze).await.map_err(|error| Error::host("write", "the agent's port", error))?;
            hello = Agent::hello(vm_id, &mut transport).await?;
        }
        tokio::time::sleep(BETWEEN).await;
        recorder.at("save");
        control.save(state.into()).await?;
        Ok(hello)
    };
    let hello = attempt.race(frozen).await?;
    recorder.at("end");
    jailed.kill();
    jailed.reaped().await;
    if prepared.held.uid().is_some() {
        let owner = nix::unistd::geteuid().as_raw();
        let give = |file: &File| fchown(file, Some(owner), None);
        files.iter().try_for_each(give).map_err(|error| Error::host("chown", dir.display(), error))?;
    }
    if plan.drives.iter().any(|drive| drive.serial == CONFIG_SERIAL) {
        let config = dir.join(CONFIG_SERIAL);
        std::fs::remove_file(&config).map_err(|error| Error::host("remove", config.display(), error))?;
    }
    Ok(hello)
}

/// What a template is recorded by.
struct Recording {
    plan: LaunchPlan,
    origin: Origin,
    /// Those that are the VMM's while it runs.
    files: Vec<File>,
}

/// The plan with files in `dir`: memory, a disk as every VM's begins, and a config drive that says nothing.
fn recording(prepared: &Prepared, image: &GuestImage, dir: &Path) -> Result<Recording> {
    let mut plan = prepared.plan.without_disk_rates();
    let owner = prepared.held.uid();
    let ram = dir.join(RAM);
    let mut files = vec![image::create_drive(&ram, plan.limits.memory_mb << 20, owner)?];
    let ram = plan.jail.show(RAM, &ram, RAM_PLACE, Access::Write)?;
    for drive in plan.drives.iter_mut().filter(|drive| drive.serial != ROOTFS_SERIAL) {
        let own = dir.join(if drive.serial == DISK_SERIAL { DISK } else { drive.serial });
        let file = image::create_drive(&own, drive.size, owner)?;
        if drive.serial == DISK_SERIAL {
            image::write_disk(&image.disk_template, &file)?;
        }
        files.push(file);
        drive.path = plan.jail.show_instead(drive.serial, &drive.path, &own)?;
    }
    plan.nic = plan.nic.map(|_| Nic::unplugged());
    Ok(Recording { plan, origin: Origin::Record { ram }, files })
}
