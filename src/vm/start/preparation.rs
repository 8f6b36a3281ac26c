//! A template that is made ahead of time, stage by stage.

use std::future::{poll_fn, Future};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::Poll;

use super::template;
use crate::error::Result;
use crate::model::{EventKind, VmId, VmSpec};
use crate::mutex::Mutex;
use crate::vm::events::Subscriber;
use crate::vm::ids::new_id;
use crate::vm::settings::Settings;

/// Stages that may wait to be taken: more than a template has.
const STAGES: usize = 32;
const DONE: (&str, f64) = ("done", 1.0);

type TemplateWork = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// The making of a template for nobody yet. It goes on in [`Preparation::next`] alone, and is given up when that is dropped;
/// what has begun to boot is finished even then, and a later start finds it.
pub struct Preparation {
    vm_id: VmId,
    stages: Arc<Subscriber>,
    /// `None`: it has ended.
    making: Mutex<Option<TemplateWork>>,
    is_told: AtomicBool,
}

impl Preparation {
    /// Begins nothing yet.
    ///
    /// # Errors
    /// [`Error::Host`](crate::error::Error::Host).
    pub fn new(spec: VmSpec, settings: &Settings) -> Result<Self> {
        let vm_id = new_id("prepare")?;
        let stages = settings.events.subscribe(STAGES);
        let (settings, named) = (settings.clone(), vm_id.clone());
        let making: TemplateWork = Box::pin(async move { template::prepare(&named, spec, &settings).await });
        Ok(Self { vm_id, stages, making: Mutex::new(Some(making)), is_told: AtomicBool::new(false) })
    }

    /// The next stage that begins, and how much of the time has gone by there; `None` when the template is there. The last
    /// stage is "done" with 1.0, and the only one where the template was there, or was made for another VM meanwhile.
    ///
    /// # Errors
    /// As a start's; [`Error::Host`](crate::error::Error::Host) when templates are switched off or cannot be kept.
    pub async fn next(&self) -> Result<Option<(&'static str, f64)>> {
        // Whoever drops this future drops the making, too.
        let Some(mut making) = self.making.lock().take() else { return Ok(None) };
        let next = {
            let mut stage = std::pin::pin!(self.next_stage());
            // A stage first: all of them were published before the template was there.
            poll_fn(|cx| match stage.as_mut().poll(cx) {
                Poll::Ready(stage) => Poll::Ready(Ok(stage)),
                Poll::Pending => making.as_mut().poll(cx).map(Err),
            })
            .await
        };
        match next {
            Ok(stage) => {
                self.is_told.fetch_or(stage == DONE, Ordering::Relaxed);
                *self.making.lock() = Some(making);
                Ok(Some(stage))
            }
            Err(made) => made.map(|()| (!self.is_told.load(Ordering::Relaxed)).then_some(DONE)),
        }
    }

    async fn next_stage(&self) -> (&'static str, f64) {
        while let Some(event) = self.stages.next().await {
            if let EventKind::Template { stage, fraction } = event.kind {
                if event.vm_id == self.vm_id {
                    return (stage, fraction);
                }
            }
        }
        // The manager has stopped, and the making ends by itself.
        std::future::pending().await
    }
}
