//! From a spec to a running VM.
//!
//! A VM is a clone of its shape's template, which is made first when there is none; where that does not work out it
//! boots, with a warning.

use std::sync::Arc;
use std::time::Instant;

use super::running::Running;
use super::settings::Settings;
use super::snapshot::take::clone_of;
use super::start::attempt::{Progress, TEMPLATE};
use super::start::launching::run;
use super::start::prepare::prepare;
use super::start::template;
use super::start::warm::WarmVm;
use crate::error::{Error, Result};
use crate::model::{VmId, VmSpec};

/// Starts a VM and waits for its agent, at most `start_timeout`.
pub async fn boot(vm_id: &VmId, spec: &Arc<VmSpec>, settings: &Settings, warm: Option<WarmVm>) -> Result<Running> {
    let begun = Instant::now();
    if let Some(name) = &spec.template {
        return clone_of(name, vm_id, spec, settings).await;
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
