//! Templates of VMs: which one fits, and how it is made.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use microvm_jail::Access;
use microvm_protocol::handshake::{has_failed, Ask};
use microvm_protocol::identity::{CONFIG_SERIAL, DISK_SERIAL, ROOTFS_SERIAL};
use tokio::io::AsyncWriteExt;

use super::boot::{Attempt, Progress};
use super::introduction::Introduction;
use super::prepare::{self, Prepared};
use super::{Settings, Spec};
use crate::channel::Agent;
use crate::error::{Error, Result};
use crate::host::kvm;
use crate::image::template::{Fit, FitDrive, Template, DISK, RAM, STATE};
use crate::image::{self, GuestImage};
use crate::vmm::{Drive, LaunchPlan, Launched, Nic, Origin, RAM_PLACE};

/// HELLOs asked for before the guest is frozen: it rehearses before each.
const REHEARSALS: usize = 3;
/// Time for the kernel to do what it has put off.
const BETWEEN: Duration = Duration::from_millis(20);

/// The template for a prepared VM, made now if need be; `None`: it has to boot.
///
/// # Errors
/// [`Error::StartTimeout`]: a kernel that does not come up as a template would not do so as a VM.
pub async fn find_or_make(
    prepared: &Prepared,
    settings: &Settings,
    progress: &Progress,
) -> Result<Option<Arc<Template>>> {
    let Some(store) = &settings.templates else { return Ok(None) };
    if !prepared.vmm.capabilities().clones {
        return Ok(None);
    }
    if let Err(reason) = prepared.vmm.can_clone(&prepared.plan) {
        // What its backend cannot do is no news at each start.
        let is_of_host = prepared.plan.jail.has_fixed_places().is_err();
        let level = if is_of_host { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "{}: the VM boots: {reason}", prepared.plan.vm_id);
        return Ok(None);
    }
    let found = async {
        let fit = fit(settings, prepared).await?;
        store.find_or_make(&fit, |dir| async move { record(prepared, settings, progress, &dir).await }).await
    };
    match tokio::time::timeout(settings.start_timeout, found).await {
        Ok(Ok(template)) => Ok(Some(template)),
        Ok(Err(error @ Error::StartTimeout { .. })) => Err(error),
        Ok(Err(error)) => {
            log::warn!("{}: there is no template, the VM boots: {error}", prepared.plan.vm_id);
            Ok(None)
        }
        Err(_) => {
            log::warn!("{}: the template was not ready in time, the VM boots", prepared.plan.vm_id);
            Ok(None)
        }
    }
}

/// Makes the template of VMs like `spec`, unless it is there.
///
/// # Errors
/// As a start's; [`Error::Host`] when templates are switched off or cannot be kept.
pub async fn prepare(spec: &Spec, settings: &Settings) -> Result<()> {
    let progress = Progress::begin("prepare");
    let prepared = prepare::prepare(spec, settings).await?;
    let template = find_or_make(&prepared, settings, &progress).await?;
    let missing = || Error::host("prepare", "a template", "there can be none; see the log for the reason");
    template.map(drop).ok_or_else(missing)
}

pub async fn discard(settings: &Settings, template: &Template) {
    if let Some(store) = &settings.templates {
        store.discard(&template.manifest.fit).await;
    }
}

/// What a template of this VM depends on.
pub async fn fit(settings: &Settings, prepared: &Prepared) -> Result<Fit> {
    let (digests, plan, sources) = (settings.digests.clone(), prepared.plan.clone(), prepared.sources.clone());
    let vmm = &prepared.vmm;
    let binary = vmm.binary().to_owned();
    let (backend, accelerator, machine) = (vmm.backend(), vmm.accelerator(), vmm.machine(&plan));
    let looking = tokio::task::spawn_blocking(move || {
        let digest = |path: &Path| digests.of_file(path).map_err(|error| Error::host("read", path.display(), error));
        // A guest has the image mounted when it is frozen; its other drives are made for each clone.
        let drive = |drive: &Drive| {
            let image = sources.rootfs.as_deref().filter(|_| drive.serial == ROOTFS_SERIAL);
            let image = image.map(digest).transpose()?;
            Ok(FitDrive { serial: drive.serial.to_owned(), size: drive.size, image })
        };
        Ok(Fit {
            backend: backend.as_str().into(),
            vmm: digest(&binary)?,
            accelerator: accelerator.into(),
            cpu: kvm::cpu().0,
            machine,
            kernel: digest(&sources.kernel)?,
            initramfs: digest(&sources.initramfs)?,
            drives: plan.drives.iter().map(drive).collect::<Result<_>>()?,
        })
    });
    looking.await.map_err(|error| Error::host("look at", "what a template depends on", error))?
}

/// Boots a VM without an identity and freezes it in `dir`; returns the agent's HELLO.
async fn record(prepared: &Prepared, settings: &Settings, progress: &Progress, dir: &Path) -> Result<Vec<u8>> {
    let (plan, origin) = blank(prepared, &settings.image, dir)?;
    let vm_id = &plan.vm_id;
    let launched = prepared.vmm.launch(&plan, &origin, Box::new(prepared.held.clone()))?;
    let Launched { jailed, agent, control, tails, identity } = launched;
    let introduction = Introduction::by(identity);
    let attempt = Attempt { vm_id, progress, jailed: &jailed, tails: &tails, limit: settings.start_timeout };
    let state = File::options().write(true).create_new(true).open(dir.join(STATE));
    let state = state.map_err(|error| Error::host("create", dir.display(), error))?;
    let freeze = Ask::Freeze.encode().map_err(|error| Error::host("encode", "a record", error))?;
    let frozen = async {
        control.boot().await?;
        let mut transport = agent.open().await?;
        let mut hello = Agent::hello(vm_id, &mut transport).await?;
        if has_failed(&hello) {
            // A boot of the VM itself will say what.
            return Err(Error::host("freeze", vm_id, "the guest could not be set up"));
        }
        for _ in 0..REHEARSALS {
            tokio::time::sleep(BETWEEN).await;
            introduction.rehearse()?;
            transport.write_all(&freeze).await.map_err(|error| Error::host("write", "the agent's port", error))?;
            hello = Agent::hello(vm_id, &mut transport).await?;
        }
        tokio::time::sleep(BETWEEN).await;
        control.save(state.into()).await?;
        Ok(hello)
    };
    let hello = attempt.race(frozen).await?;
    jailed.kill();
    jailed.reaped().await;
    if prepared.held.uid().is_some() {
        let owner = nix::unistd::geteuid().as_raw();
        [RAM, DISK].iter().try_for_each(|name| image::give_to(owner, &dir.join(name)))?;
    }
    if plan.drives.iter().any(|drive| drive.serial == CONFIG_SERIAL) {
        let config = dir.join(CONFIG_SERIAL);
        std::fs::remove_file(&config).map_err(|error| Error::host("remove", config.display(), error))?;
    }
    Ok(hello)
}

/// The plan with files in `dir`: memory, a disk as every VM's begins, and a config drive that says nothing.
fn blank(prepared: &Prepared, image: &GuestImage, dir: &Path) -> Result<(LaunchPlan, Origin)> {
    let mut plan = LaunchPlan { disk_bytes_per_s: None, disk_ops_per_s: None, ..prepared.plan.clone() };
    let owner = prepared.held.uid();
    let ram = dir.join(RAM);
    image::create_drive(&ram, plan.memory_mib << 20, owner)?;
    let ram = plan.jail.show(RAM, &ram, RAM_PLACE, Access::Write)?;
    for drive in plan.drives.iter_mut().filter(|drive| drive.serial != ROOTFS_SERIAL) {
        let own = dir.join(if drive.serial == DISK_SERIAL { DISK } else { drive.serial });
        image::create_drive(&own, drive.size, owner)?;
        drive.path = plan.jail.show_instead(drive.serial, &drive.path, &own)?;
    }
    image::write_disk(&image.disk_template, &dir.join(DISK))?;
    plan.nic = plan.nic.map(|_| Nic::unplugged());
    Ok((plan, Origin::Record { ram }))
}
