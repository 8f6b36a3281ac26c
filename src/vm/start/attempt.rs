//! A start under way: how far it has come, and the wait for a VMM that was launched until it is of use, or not.

use std::future::Future;
use std::time::{Duration, Instant};

use crate::error::{Cause, Error, Result, Tails};
use crate::host::process::Jailed;
use crate::host::procfs;
use crate::model::VmId;
use crate::mutex::Mutex;
use crate::vmm::{LiveTails, Vmm};

/// Stages in which a guest boots.
pub const GUEST_BOOT: &str = "guest boot";
pub const TEMPLATE: &str = "template";

/// How far a start has come, and how long each stage took.
#[derive(Debug)]
pub struct Progress {
    pub begun: Instant,
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
        self.stages.lock().push((stage, Instant::now()));
    }

    pub fn stage(&self) -> &'static str {
        self.stages.lock().last().map_or("", |(stage, _)| stage)
    }

    /// The stages up to now and their lengths.
    pub fn lengths(&self) -> Vec<(&'static str, Duration)> {
        let stages = self.stages.lock();
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
            exit = self.jailed.exited() => Err(self.failed(ended(exit))),
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

    fn failed(&self, cause: Cause) -> Error {
        let (vm_id, stage) = (self.vm_id.clone(), self.progress.stage());
        Error::StartFailed { vm_id, stage, source: cause, tails: Box::default() }
    }

    /// A transport that closed means a VMM that ended: say how.
    async fn explain(&self, error: Error) -> Error {
        let (Error::HandshakeFailed { source, .. } | Error::Vmm { source, .. }) = error else { return error };
        let soon = Duration::from_millis(500);
        match tokio::time::timeout(soon, self.jailed.exited()).await {
            Ok(exit) => self.failed(ended(exit)),
            Err(_) => self.failed(source),
        }
    }
}

fn ended(exit: impl std::fmt::Display) -> Cause {
    format!("the VMM ended ({exit})").into()
}

fn with_tails(error: Error, said: Tails) -> Error {
    let tails = Box::new(said);
    match error {
        Error::StartFailed { vm_id, stage, source, .. } => {
            let last = |text: &str| text.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned);
            // One line of what was said is worth a place in the message; the rest is in the details.
            let hint = last(&tails.vmm_stderr).map(|line| format!("; the VMM said: {line}"));
            let hint = hint.or_else(|| last(&tails.console).map(|line| format!("; the guest's console ends: {line}")));
            let source = match hint {
                Some(hint) => Cause::explained(source.clone(), format!("{source}{hint}")),
                None => source,
            };
            Error::StartFailed { vm_id, stage, source, tails }
        }
        Error::StartTimeout { vm_id, stage, limit_s, busy, .. } => {
            Error::StartTimeout { vm_id, stage, limit_s, busy, tails }
        }
        other => other,
    }
}
