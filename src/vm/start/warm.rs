//! Warm VMs: starts that were made ahead, up to a tier, before a VM is asked for.
//!
//! Each is a clone with an identity of its own; the VM that it becomes gives it its name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::message::ADOPT;
use serde_json::{json, Value};

use super::attempt::Progress;
use super::launching::Launching;
use super::prepare::prepare;
use super::template;
use crate::error::{Error, Result};
use crate::host::clock;
use crate::model::{PoolTier, VmId, VmSpec};
use crate::vm::running::Running;
use crate::vm::settings::Settings;

/// How long a resumed guest may take to answer.
const ADOPT_DEADLINE: Duration = Duration::from_secs(5);

const PROGRAM_DEADLINE: Duration = Duration::from_secs(30);

/// So long that the guest's timers have run out when it wakes.
const WARM_UP_PAUSE: Duration = Duration::from_millis(100);

/// A VM that is started for no user yet.
pub enum WarmVm {
    /// The VMM runs, and waits for a template's state.
    Blank(Launching),
    /// The template's state is loaded, and its vCPUs are paused.
    Restored(Launching),
    /// The guest has an identity and a session; its vCPUs are paused.
    Ready(Running),
}

impl WarmVm {
    /// Makes one for VMs like `spec`, which is called `vm_id` until it is taken.
    ///
    /// # Errors
    /// As a start's; [`Error::Host`] when there is no template that it could be a clone of.
    pub async fn make(vm_id: &VmId, spec: &Arc<VmSpec>, settings: &Settings, tier: PoolTier) -> Result<Self> {
        let progress = Progress::begin("prepare");
        let prepared = prepare(vm_id, spec, settings).await?;
        let template = template::find_or_make(&prepared, settings, None).await;
        let template = template.ok_or_else(|| Error::host("make", "a VM of the pool", "there is no template"))?;
        let mut launching = Launching::launch(prepared, settings, progress, Some(template)).await?;
        if tier == PoolTier::Blank {
            launching.connect().await?;
            return Ok(WarmVm::Blank(launching));
        }
        launching.load(tier == PoolTier::Ready).await?;
        if tier == PoolTier::Restored {
            return Ok(WarmVm::Restored(launching));
        }
        let running = launching.bring_up().await?;
        // Warms up what happens only the first time: the way out of a pause, and a program's life.
        let program = json!({"program": "sh", "args": ["-c", "/bin/true"]});
        for is_last in [false, true] {
            running.adopt(vm_id).await?;
            running.agent().request("ping", Value::Null, ADOPT_DEADLINE).await?;
            // A guest without a shell answers with an error, and is as warm as it can be.
            running.agent().request("exec", program.clone(), PROGRAM_DEADLINE).await?;
            running.control().pause().await?;
            if !is_last {
                tokio::time::sleep(WARM_UP_PAUSE).await;
                running.control().resume().await?;
            }
        }
        Ok(WarmVm::Ready(running))
    }

    pub fn is_alive(&self) -> bool {
        match self {
            WarmVm::Blank(launching) | WarmVm::Restored(launching) => launching.is_alive(),
            WarmVm::Ready(running) => running.is_alive(),
        }
    }

    /// Makes it the VM `vm_id`, ready for commands.
    ///
    /// # Errors
    /// As a start's; it is gone then.
    pub async fn become_vm(self, vm_id: &VmId, settings: &Settings) -> Result<Running> {
        let begun = Instant::now();
        let mut running = match self {
            WarmVm::Blank(mut launching) => {
                // Before the renaming: QEMU opens its drives once more, by their names.
                launching.load(false).await?;
                launching.take(vm_id, settings).await?
            }
            WarmVm::Restored(launching) => launching.take(vm_id, settings).await?,
            WarmVm::Ready(mut running) => {
                let progress = Progress::since(begun, "take");
                // What the guest is told waits for it when it wakes.
                let moving_in = async {
                    running.rename(vm_id)?;
                    running.open_broker(vm_id, settings)
                };
                tokio::try_join!(running.adopt(vm_id), running.control().resume(), moving_in)?;
                running.vm_id = vm_id.clone();
                running.stages = progress.lengths();
                running
            }
        };
        running.origin = "pool";
        running.since = Instant::now();
        Ok(running)
    }
}

impl Launching {
    /// Gives a loaded clone its name, and lets it run.
    async fn take(self, vm_id: &VmId, settings: &Settings) -> Result<Running> {
        let launching = self.rename(vm_id).await?;
        launching.resume().await?;
        let running = launching.bring_up().await?;
        running.open_broker(vm_id, settings)?;
        Ok(running)
    }
}

impl Running {
    /// Tells the guest which VM it is, and the time.
    async fn adopt(&self, vm_id: &VmId) -> Result<()> {
        let params =
            json!({"vm_id": vm_id.as_str(), "hostname": vm_id.hostname(), "unix_time_ns": clock::unix_time_ns()});
        let answer = self.agent().request_internal(ADOPT, params, ADOPT_DEADLINE).await?;
        match answer {
            crate::channel::Answer::Ok { .. } => Ok(()),
            crate::channel::Answer::Error { error } => Err(Error::StartFailed {
                vm_id: vm_id.clone(),
                stage: "adopt",
                source: error.message.into(),
                tails: Box::new(self.tails.read()),
            }),
        }
    }
}
