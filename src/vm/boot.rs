//! From a spec to a running VM. Whatever is made on the way is undone when a step fails or the future is dropped.
//!
//! A VM is a clone of its shape's template, which is made first when there is none; where that does not work out it
//! boots, with a warning.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use microvm_protocol::identity::Identity;

use super::confine::Confinement;
use super::identity_delivery::IdentityDelivery;
use super::network::Connection;
use super::prepare::{self, prepare, Ids, Prepared, Seen};
use super::running::{Base, Running};
use super::warm::WarmVm;
use super::{snapshot, template, Settings};
use crate::channel::Agent;
use crate::error::{Error, Result, Tails};
use crate::host::memfd;
use crate::host::process::Jailed;
use crate::host::procfs::{self, Usage};
use crate::image::template::Template;
use crate::model::{VmId, VmSpec};
use crate::store::disk::Disk;
use crate::store::VmDir;
use crate::vmm::{LaunchPlan, Launched, LiveTails, Origin, Transport, Vmm, VmmControl};

/// Stages in which a guest boots.
pub const GUEST_BOOT: &str = "guest boot";
pub const TEMPLATE: &str = "template";

/// How far a start has come, and how long each stage took.
#[derive(Debug)]
pub struct Progress {
    begun: Instant,
    stages: Mutex<Vec<(&'static str, Instant)>>,
}

impl Progress {
    pub fn begin(stage: &'static str) -> Self {
        Self::since(Instant::now(), stage)
    }

    /// A start that has gone on since `begun` and is at another beginning now.
    pub fn since(begun: Instant, stage: &'static str) -> Self {
        Self { begun, stages: Mutex::new(vec![(stage, Instant::now())]) }
    }

    pub fn at(&self, stage: &'static str) {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner).push((stage, Instant::now()));
    }

    pub fn stage(&self) -> &'static str {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner).last().map_or("", |(stage, _)| stage)
    }

    /// The stages up to now and their lengths.
    pub fn lengths(&self) -> Vec<(&'static str, Duration)> {
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = stages.iter().skip(1).map(|(_, end)| *end).chain([Instant::now()]);
        stages.iter().zip(ends).map(|((stage, begun), end)| (*stage, end - *begun)).collect()
    }
}

/// A VMM that was launched and is watched until it is of use, or not.
pub struct Attempt<'a> {
    pub vm_id: &'a VmId,
    pub progress: &'a Progress,
    pub jailed: &'a Jailed,
    pub tails: &'a LiveTails,
    /// How long the whole start may take.
    pub limit: Duration,
    pub vmm: &'a dyn Vmm,
}

/// The share of its time for which a VMM computes, or waits for a CPU, whose guest does not wait for anything.
const BUSY_SHARE: f64 = 0.5;

impl Attempt<'_> {
    /// Waits for `work`, for the VMM's end or for the deadline, whichever is first. A VMM that failed is gone when this
    /// returns, and the error says what it said.
    pub async fn race<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let left = self.limit.saturating_sub(self.progress.begun.elapsed());
        let outcome = tokio::select! {
            biased;
            done = work => done,
            exit = self.jailed.exited() => Err(self.failed(format!("the VMM ended ({exit})"))),
            () = tokio::time::sleep(left) => Err(Error::StartTimeout {
                vm_id: self.vm_id.clone(),
                stage: self.progress.stage(),
                limit_s: self.limit.as_secs_f64(),
                busy: self.busy(),
                tails: Box::default(),
            }),
        };
        match outcome {
            Ok(done) => Ok(done),
            Err(error) => {
                let error = self.explain(error).await;
                self.jailed.kill();
                self.jailed.reaped().await;
                // The pipes are drained once no process holds their other ends.
                self.tails.console.drained().await;
                self.tails.vmm_stderr.drained().await;
                Err(with_tails(error, self.tails.read()))
            }
        }
    }

    /// What may be the matter with a guest that computes and says nothing.
    fn busy(&self) -> Option<String> {
        if self.progress.stage() != GUEST_BOOT {
            return None;
        }
        let pid = self.jailed.pid()?;
        let (computed_s, waited_s) = (procfs::usage(pid)?.cpu_s, procfs::scheduling(pid)?.waited_s);
        let (_, elapsed) = self.progress.lengths().pop()?;
        (computed_s + waited_s >= BUSY_SHARE * elapsed.as_secs_f64()).then(|| {
            format!(
                "its VMM computed for {computed_s:.0} s, waited {waited_s:.0} s for a CPU, and the agent said nothing. Either the host is too slow, or this VMM and the \
                 guest's kernel do not go together: {}",
                self.vmm.pairing()
            )
        })
    }

    fn failed(&self, reason: String) -> Error {
        Error::StartFailed { vm_id: self.vm_id.clone(), stage: self.progress.stage(), reason, tails: Box::default() }
    }

    /// A transport that closed means a VMM that ended: say how.
    async fn explain(&self, error: Error) -> Error {
        let (Error::HandshakeFailed { reason, .. } | Error::Vmm { reason, .. }) = error else { return error };
        let soon = Duration::from_millis(500);
        match tokio::time::timeout(soon, self.jailed.exited()).await {
            Ok(exit) => self.failed(format!("the VMM ended ({exit})")),
            Err(_) => self.failed(reason),
        }
    }
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
        Error::StartTimeout { vm_id, stage, limit_s, busy, .. } => {
            Error::StartTimeout { vm_id, stage, limit_s, busy, tails }
        }
        other => other,
    }
}

/// Starts a VM and waits for its agent, at most `start_timeout`.
pub async fn boot(vm_id: &VmId, spec: &Arc<VmSpec>, settings: &Settings, warm: Option<WarmVm>) -> Result<Running> {
    let begun = Instant::now();
    if let Some(name) = &spec.template {
        return snapshot::clone_of(name, vm_id, spec, settings).await;
    }
    if let Some(warm) = warm {
        match warm.become_vm(vm_id, settings).await {
            Ok(running) => return Ok(running),
            Err(error) => log::warn!("{vm_id}: a VM of the pool could not be used: {error}"),
        }
    }
    let progress = Progress::since(begun, "prepare");
    let prepared = prepare(vm_id, spec, settings).await?;
    progress.at(TEMPLATE);
    let template = template::find_or_make(&prepared, settings, Some(template::patience(begun, settings))).await;
    let failed = match run(prepared, settings, progress, template.clone()).await {
        Err(error @ Error::StartFailed { .. }) if template.is_some() => error,
        outcome => return outcome,
    };
    log::warn!("{failed}; its template is discarded, the VM boots instead");
    if let Some(template) = template {
        template::discard(settings, &template).await;
    }
    let progress = Progress::since(begun, "prepare");
    run(prepare(vm_id, spec, settings).await?, settings, progress, None).await
}

/// Launches what is prepared and brings it up.
pub async fn run(
    prepared: Prepared,
    settings: &Settings,
    progress: Progress,
    template: Option<Arc<Template>>,
) -> Result<Running> {
    let mut launching = Launching::launch(prepared, settings, progress, template).await?;
    launching.load(true).await?;
    let running = launching.bring_up().await?;
    running.open_broker(&running.vm_id, settings)?;
    Ok(running)
}

/// A VMM that was launched and to whose guest nobody has spoken yet.
pub struct Launching {
    dir: VmDir,
    disk: Disk,
    vmm: Box<dyn Vmm>,
    chosen: String,
    plan: LaunchPlan,
    seen: Vec<Seen>,
    spec: Arc<VmSpec>,
    identity: Identity,
    identity_delivery: IdentityDelivery,
    jailed: Jailed,
    transport: Transport,
    control: Box<dyn VmmControl>,
    tails: LiveTails,
    confinement: Confinement,
    connection: Option<Connection>,
    template: Option<Arc<Template>>,
    progress: Progress,
    /// How long the whole start may take.
    limit: Duration,
}

impl Launching {
    /// Launches what is prepared, as a clone or from its kernel.
    pub async fn launch(
        prepared: Prepared,
        settings: &Settings,
        progress: Progress,
        template: Option<Arc<Template>>,
    ) -> Result<Self> {
        progress.at("drives");
        let (prepared, identity) = prepared.write_drives(settings, template.clone()).await?;
        let Prepared { dir, disk, vmm, chosen, mut plan, seen, spec, network, held, mut confinement, .. } = prepared;
        progress.at("launch");
        if let Some(template) = &template {
            let untouched = memfd::untouched_bytes(&template.ram);
            let untouched = untouched.map_err(|e| Error::host("look at", "a template's memory", e))?;
            held.allow_first_touch(untouched)?;
            confinement.note_first_touch(untouched);
        }
        let origin = template.as_ref().map_or(Origin::Boot, |template| Origin::Clone { ram: template.ram.clone() });
        let launched = vmm.launch(&plan, &origin, Box::new(held))?;
        let Launched { jailed, agent: transport, control, tails, identity: port } = launched;
        let identity_delivery = IdentityDelivery::by(port);
        // The tap is the VMM's from here on: it goes when the VMM does.
        plan.nic = None;
        let connection = network.map(|network| network.connection);
        let limit = settings.start_timeout;
        Ok(Self {
            dir,
            disk,
            vmm,
            chosen,
            plan,
            seen,
            spec,
            identity,
            identity_delivery,
            jailed,
            transport,
            control,
            tails,
            confinement,
            connection,
            template,
            progress,
            limit,
        })
    }

    fn attempt(&self) -> Attempt<'_> {
        let Self { plan, progress, jailed, tails, limit, vmm, .. } = self;
        Attempt { vm_id: &plan.vm_id, progress, jailed, tails, limit: *limit, vmm: vmm.as_ref() }
    }

    /// Waits until the VMM can be told to restore.
    pub async fn connect(&self) -> Result<()> {
        self.attempt().race(self.control.connect()).await
    }

    /// Restores a clone; has any other boot.
    pub async fn load(&mut self, run: bool) -> Result<()> {
        let Some(template) = &self.template else { return self.attempt().race(self.control.boot()).await };
        self.progress.at("restore");
        let restored = async {
            let state = memfd::reopen(&template.state).map_err(|e| Error::host("open", "a template's state", e))?;
            self.control.load(state, run).await
        };
        self.attempt().race(restored).await
    }

    pub fn is_alive(&self) -> bool {
        self.jailed.is_alive()
    }

    /// Lets a clone run that was loaded only.
    pub async fn resume(&self) -> Result<()> {
        self.progress.at("resume");
        self.attempt().race(self.control.resume()).await
    }

    /// Makes a warm VM the VM `name`; its guest has not read its identity yet.
    pub async fn rename(mut self, name: &VmId) -> Result<Self> {
        let begun = Instant::now();
        let vm_id = name.clone();
        let renaming = tokio::task::spawn_blocking(move || {
            self.dir.rename(&vm_id)?;
            self.disk.rename(&vm_id)?;
            self.identity = prepare::identity(&vm_id, &self.spec.limits, None, Ids::generate()?)?;
            self.plan.vm_id = vm_id;
            self.progress = Progress::since(begun, "take");
            Ok(self)
        });
        renaming.await.map_err(|error| Error::host("rename", name, error))?
    }

    /// Waits for the agent and shakes hands with it.
    pub async fn bring_up(self) -> Result<Running> {
        // The connection first: it is let go of last.
        let Self {
            connection,
            dir,
            disk,
            vmm,
            chosen,
            plan,
            seen,
            identity,
            identity_delivery,
            jailed,
            transport,
            control,
            tails,
            confinement,
            template,
            progress,
            limit,
            ..
        } = self;
        let vm_id = &plan.vm_id;
        let attempt = Attempt { vm_id, progress: &progress, jailed: &jailed, tails: &tails, limit, vmm: vmm.as_ref() };
        let in_guest = async {
            if template.is_none() {
                progress.at(GUEST_BOOT);
            }
            // A connection that is made begins with HELLO, a clone's as well.
            let said = template.as_ref().filter(|_| transport.is_open()).map(|made| made.manifest.hello.clone());
            let mut transport = transport.open().await?;
            let hello = match said {
                Some(hello) => hello,
                None => Agent::hello(vm_id, &mut transport).await?,
            };
            progress.at("handshake");
            identity_delivery.deliver(&identity, dir.path())?;
            Agent::connect(vm_id.clone(), transport, identity.credentials.of_peer(), &hello).await
        };
        let agent = Arc::new(attempt.race(in_guest).await?);
        progress.at("done");
        identity_delivery.wipe(dir.path())?;
        Ok(Running {
            vm_id: vm_id.clone(),
            backend: vmm.backend(),
            chosen,
            capabilities: vmm.capabilities(),
            grade: vmm.grade(),
            accelerator: vmm.accelerator(),
            vmm_version: vmm.version().map(str::to_owned),
            seen,
            confinement,
            ids: Ids { machine_id: identity.machine_id, boot_id: identity.boot_id },
            identity_delivery,
            origin: if template.is_some() { "clone" } else { "boot" },
            base: template
                .map(|template| Box::new(Base { ram: template.ram.clone(), fit: template.manifest.fit.clone() })),
            stages: progress.lengths(),
            since: Instant::now(),
            cpu_sample: Mutex::new((progress.begun, Usage::default())),
            health_history: Mutex::default(),
            broker: Mutex::new(None),
            agent,
            control,
            jailed,
            tails,
            connection: Mutex::new(connection),
            dir: Mutex::new(Some(dir)),
            disk: Mutex::new(Some(disk)),
        })
    }
}
