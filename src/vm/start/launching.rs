//! A VMM from its launch to a running VM. Whatever is made on the way is undone when a step fails or the future is dropped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::identity::Identity;

use super::attempt::{Attempt, Progress, GUEST_BOOT};
use super::confine::Confinement;
use super::identity_delivery::IdentityDelivery;
use super::prepare::{self, Prepared, Seen};
use crate::channel::Agent;
use crate::error::{Error, Result};
use crate::host::memfd;
use crate::host::process::Jailed;
use crate::host::procfs::Usage;
use crate::image::template::Template;
use crate::model::{VmId, VmSpec};
use crate::mutex::Mutex;
use crate::store::disk::Disk;
use crate::store::VmDir;
use crate::vm::ids::Ids;
use crate::vm::network::Connection;
use crate::vm::running::{Base, Running};
use crate::vm::settings::{Settings, VmmFacts};
use crate::vmm::{LaunchPlan, Launched, LiveTails, Origin, Transport, Vmm, VmmControl};

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
    program: VmmFacts,
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
        let program = VmmFacts {
            path: vmm.binary().to_owned(),
            version: vmm.version().map(str::to_owned),
            packaged: settings.binaries.is_packaged(vmm.binary()),
        };
        Ok(Self {
            dir,
            disk,
            vmm,
            program,
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
            program,
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
            program,
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
