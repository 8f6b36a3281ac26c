//! From a spec to a running VM. Whatever is made on the way is undone when a step fails or the future is dropped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use microvm_jail::Access;
use microvm_protocol::identity::{Identity, Key, CONFIG_SERIAL, DISK_SERIAL, ROOTFS_SERIAL};

use super::confine::{confine, Confinement, Held};
use super::running::Running;
use super::{Settings, Spec};
use crate::channel::{Agent, Broker};
use crate::error::{Error, Result, Tails};
use crate::host::clock;
use crate::host::procfs::Usage;
use crate::host::runtime_dir::VmDir;
use crate::image;
use crate::vmm::{self, Drive, LaunchPlan, Launched, Vmm};

/// The stage a start is at, for the error that it may end with.
type Stage = Mutex<&'static str>;

fn at(stage: &Stage, name: &'static str) {
    *stage.lock().unwrap_or_else(PoisonError::into_inner) = name;
}

fn name(stage: &Stage) -> &'static str {
    *stage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is on disk before the VMM starts.
struct Prepared {
    dir: VmDir,
    vmm: Box<dyn Vmm>,
    plan: LaunchPlan,
    key: Key,
    held: Held,
    confinement: Confinement,
}

/// Boots and waits for the agent, at most `start_timeout`.
pub async fn boot(spec: &Spec, settings: &Settings) -> Result<Running> {
    let begun = Instant::now();
    let (owned_spec, owned_settings) = (spec.clone(), settings.clone());
    let prepared = tokio::task::spawn_blocking(move || prepare(&owned_spec, &owned_settings)).await;
    let Prepared { dir, vmm, plan, key, held, confinement } =
        prepared.map_err(|error| Error::host("prepare", &spec.vm_id, error)).and_then(|prepared| prepared)?;
    let stage = Stage::new("launch");
    let Launched { jailed, agent: transport, control, tails } = vmm.launch(&plan, Box::new(held))?;
    let vm_id = &spec.vm_id;
    let in_guest = async {
        at(&stage, "guest boot");
        let agent = Agent::connect(vm_id.clone(), transport, key, || at(&stage, "handshake")).await?;
        at(&stage, "guest setup");
        agent.ready().await.map_err(|(guest_stage, message)| Error::StartFailed {
            vm_id: vm_id.clone(),
            stage: "guest setup",
            reason: format!("{guest_stage}: {message}"),
            tails: Box::default(),
        })?;
        Ok(agent)
    };
    let left = settings.start_timeout.saturating_sub(begun.elapsed());
    let outcome = tokio::select! {
        biased;
        agent = in_guest => agent,
        exit = jailed.exited() => Err(Error::StartFailed {
            vm_id: vm_id.clone(),
            stage: name(&stage),
            reason: format!("the VMM ended ({exit})"),
            tails: Box::default(),
        }),
        () = tokio::time::sleep(left) => Err(Error::StartTimeout {
            vm_id: vm_id.clone(),
            stage: name(&stage),
            limit_s: settings.start_timeout.as_secs_f64(),
            tails: Box::default(),
        }),
    };
    let agent = match outcome {
        Ok(agent) => Arc::new(agent),
        Err(error) => {
            let error = explain(error, &stage, &jailed).await;
            // The pipes are drained once no process holds their other ends.
            jailed.kill();
            jailed.reaped().await;
            tails.console.drained().await;
            tails.vmm_stderr.drained().await;
            return Err(with_tails(error, tails.read()));
        }
    };
    at(&stage, "broker");
    image::wipe_config_drive(&dir.path().join("config"))?;
    let broker = Broker::serve(vm_id.clone(), &dir.socket(), agent.clone(), settings.command_timeout)?;
    Ok(Running {
        vm_id: vm_id.clone(),
        backend: vmm.backend(),
        grade: vmm.grade(),
        accelerator: vmm.accelerator(),
        confinement,
        since: Instant::now(),
        cpu_sample: Mutex::new((begun, Usage::default())),
        broker: Mutex::new(Some(broker)),
        agent,
        control,
        jailed,
        tails,
        dir: Mutex::new(Some(dir)),
    })
}

/// A transport that closed means a VMM that ended: say how.
async fn explain(error: Error, stage: &Stage, jailed: &crate::host::process::Jailed) -> Error {
    let Error::HandshakeFailed { vm_id, reason } = error else { return error };
    let soon = std::time::Duration::from_millis(500);
    let reason = match tokio::time::timeout(soon, jailed.exited()).await {
        Ok(exit) => format!("the VMM ended ({exit})"),
        Err(_) => reason,
    };
    Error::StartFailed { vm_id, stage: name(stage), reason, tails: Box::default() }
}

fn with_tails(error: Error, said: Tails) -> Error {
    let tails = Box::new(said);
    match error {
        Error::StartFailed { vm_id, stage, reason, .. } => {
            let last = |text: &str| text.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned);
            // One line of what was said is worth a place in the message; the rest is in the details.
            let hint = last(&tails.vmm_stderr).map(|line| format!("; the VMM said: {line}"));
            let hint = hint.or_else(|| last(&tails.console).map(|line| format!("; the guest's console ends: {line}")));
            Error::StartFailed { vm_id, stage, reason: reason + &hint.unwrap_or_default(), tails }
        }
        Error::StartTimeout { vm_id, stage, limit_s, .. } => Error::StartTimeout { vm_id, stage, limit_s, tails },
        other => other,
    }
}

/// Everything that can be refused or made before a process runs. Blocking.
fn prepare(spec: &Spec, settings: &Settings) -> Result<Prepared> {
    let vm_id = &spec.vm_id;
    if let Some(path) = &spec.kernel_path {
        image::check_kernel(path)?;
    }
    if let Some(path) = &spec.rootfs_path {
        image::check_rootfs(path)?;
    }
    settings.image.check()?;
    if !spec.network.isolated_network {
        return Err(Error::NetworkUnavailable {
            vm_id: vm_id.clone(),
            reason: "this release runs isolated VMs only".into(),
            remedy: "use isolated_network=True".into(),
        });
    }
    let vmm = vmm::select(vm_id, spec.backend, settings.min_isolation, &settings.binaries)?;
    let dir = VmDir::create(&settings.base, vm_id)?;
    let path = |name: &str| dir.path().join(name);
    let key = Key(clock::random()?);
    let identity = Identity {
        key: key.clone(),
        seed: Key(clock::random()?),
        vm_id: vm_id.to_string(),
        hostname: vm_id.hostname(),
        machine_id: clock::hex(&clock::random::<16>()?),
        unix_time_ns: clock::unix_time_ns(),
        disk: true,
        rootfs: spec.rootfs_path.is_some(),
        max_file_handles: spec.limits.max_file_handles,
        max_processes: spec.limits.max_processes,
        network: None,
    };
    image::write_config_drive(&identity, &path("config"))?;
    image::write_disk(&settings.image.disk_template, &path("disk"), spec.limits.disk_size_mb)?;
    let (mut jail, held, confinement) = confine(spec, settings, &dir, vmm.as_ref())?;
    if let Some(uid) = held.uid() {
        for name in ["config", "disk"] {
            std::os::unix::fs::chown(path(name), Some(uid), None)
                .map_err(|error| Error::host("chown", path(name).display(), error))?;
        }
    }
    let mut drives = vec![
        Drive {
            serial: CONFIG_SERIAL,
            path: jail.show("config drive", &path("config"), "/vm/config", Access::Read)?,
            read_only: true,
        },
        Drive {
            serial: DISK_SERIAL,
            path: jail.show("disk", &path("disk"), "/vm/disk", Access::Write)?,
            read_only: false,
        },
    ];
    if let Some(rootfs) = &spec.rootfs_path {
        let path = jail.show("rootfs_path", rootfs, "/image/rootfs", Access::Read)?;
        drives.push(Drive { serial: ROOTFS_SERIAL, path, read_only: true });
    }
    let (kernel_field, kernel) = match &spec.kernel_path {
        Some(path) => ("kernel_path", path),
        None => ("package data", &settings.image.kernel),
    };
    let plan = LaunchPlan {
        vm_id: vm_id.clone(),
        vcpu_count: spec.limits.vcpu_count,
        memory_mib: spec.limits.memory_mb,
        kernel: jail.show(kernel_field, kernel, "/image/kernel", Access::Read)?,
        initramfs: jail.show("package data", &settings.image.initramfs, "/image/initramfs", Access::Read)?,
        drives,
        disk_bytes_per_s: spec.limits.disk_bytes_per_s,
        disk_ops_per_s: spec.limits.disk_ops_per_s,
        jail,
    };
    Ok(Prepared { dir, vmm, plan, key, held, confinement })
}
