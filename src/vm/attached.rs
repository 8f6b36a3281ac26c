//! A VM of another process of this user's, and what this process does for the clients of its own.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde_json::{json, Value};
use tokio::task::JoinSet;

use super::ports::Ports;
use super::running::Running;
use super::{info, Machine, MicroVm};
use crate::channel::{attach, patience, Agent, Answer, Operation, Owner, Stream};
use crate::error::{Error, Result};
use crate::model::{TemplateName, VmId};
use crate::store::runtime;

/// Longer than any operation takes that the owner does: a snapshot writes a whole memory and a disk.
const OPERATION: Duration = Duration::from_secs(3600);
/// VMs that are asked at the same time.
const ASKED_AT_ONCE: usize = 16;

/// A VM of another process, which keeps it: dropping this ends this process's programs in it, and nothing else.
pub struct Attached {
    vm_id: VmId,
    agent: Agent,
    owner_pid: Option<i32>,
    command_timeout: Duration,
    file_limit: u64,
    ports: Arc<Ports>,
}

impl Attached {
    /// Attaches to the VM whose broker listens at `socket`.
    ///
    /// # Errors
    /// Those of [`attach`].
    pub async fn to(vm_id: VmId, socket: &Path, deadline: Duration) -> Result<Self> {
        let until = tokio::time::Instant::now() + deadline;
        let (agent, owner_pid) = attach(&vm_id, socket, deadline).await?;
        let left = until.saturating_duration_since(tokio::time::Instant::now());
        let described = agent.operate(&Operation::Describe, left).await?;
        let seconds =
            described["command_timeout_seconds"].as_f64().filter(|seconds| (0.0..=86_400.0).contains(seconds));
        Ok(Self {
            vm_id,
            agent,
            owner_pid,
            command_timeout: Duration::from_secs_f64(seconds.unwrap_or(30.0)),
            file_limit: described["file_limit_bytes"].as_u64().unwrap_or(0),
            ports: Arc::default(),
        })
    }

    /// The process that has the VM; `None` where it is not to be seen from here, as in another PID namespace.
    #[must_use]
    pub fn owner_pid(&self) -> Option<i32> {
        self.owner_pid.filter(|pid| *pid > 0)
    }

    /// Ends what this process has under way in the VM.
    pub fn close(&self) {
        self.ports.end();
        self.agent.close();
    }

    /// Returns when the owner has ended or let go of the VM, or this was closed.
    pub async fn closed(&self) {
        self.agent.closed().await;
    }

    /// As [`Attached::closed`], at most for `limit`; whether it is so.
    pub async fn closed_within(&self, limit: Option<Duration>) -> bool {
        match limit {
            Some(limit) => tokio::time::timeout(limit, self.closed()).await.is_ok(),
            None => {
                self.closed().await;
                true
            }
        }
    }

    /// As [`MicroVm::command`].
    ///
    /// # Errors
    /// Those of [`MicroVm::command`].
    pub async fn command(&self, action: &str, params: Value, timeout: Option<Duration>) -> Result<Answer> {
        let deadline = timeout.unwrap_or_else(|| patience(&params, self.command_timeout));
        self.agent.request(action, params, deadline).await
    }

    /// Has the owner do something.
    ///
    /// # Errors
    /// What that raises there, and the channel's.
    pub async fn operate(&self, operation: Operation) -> Result<Value> {
        self.agent.operate(&operation, OPERATION).await
    }
}

impl Machine for Attached {
    fn ports(&self) -> &Arc<Ports> {
        &self.ports
    }

    fn id(&self) -> &VmId {
        &self.vm_id
    }

    fn command_timeout(&self) -> Duration {
        self.command_timeout
    }

    fn file_limit(&self) -> u64 {
        self.file_limit
    }

    async fn open(&self, _: &'static str, action: &str, params: Value) -> Result<(Weak<Running>, Stream)> {
        Ok((Weak::new(), self.agent.open(action, params, self.command_timeout).await?))
    }
}

/// What this process does for clients that are attached to its VM.
pub(super) struct OwnerOf(pub Weak<MicroVm>);

impl Owner for OwnerOf {
    fn operate(&self, operation: Operation) -> Pin<Box<dyn Future<Output = Result<Value>> + Send>> {
        let vm = self.0.upgrade();
        Box::pin(async move {
            let gone = || Error::host(operation.name(), "the VM", "it is gone");
            let vm = vm.ok_or_else(gone)?;
            let done = |()| Value::Null;
            match operation {
                Operation::Describe => Ok(json!({
                    "command_timeout_seconds": vm.command_timeout().as_secs_f64(),
                    "file_limit_bytes": vm.file_limit(),
                })),
                Operation::Summary => Ok(info::summary(&vm)),
                Operation::Info => Ok(info::info(vm).await),
                Operation::Health => Ok(info::health_json(&vm.health().await)),
                Operation::Ports => Ok(vm.ports.list()),
                Operation::Pause => vm.pause().await.map(done),
                Operation::Resume => vm.resume().await.map(done),
                Operation::Snapshot { name } => {
                    let name = TemplateName::parse("name", &name)?;
                    vm.snapshot(&name).await.map(done)
                }
                Operation::Suspend => vm.suspend().await.map(done),
                Operation::Stop => vm.stop().await.map(done),
                Operation::Kill => vm.kill().await.map(done),
                Operation::Destroy => match vm.registry.as_ref().and_then(Weak::upgrade) {
                    Some(registry) => registry.destroy(vm).await.map(done),
                    None => {
                        vm.destroy().await;
                        Ok(Value::Null)
                    }
                },
            }
        })
    }
}

/// What the owners of these VMs say of them, in the order of their names; for one that does not answer within `deadline`,
/// why.
pub async fn list(found: Vec<runtime::Found>, deadline: Duration) -> Vec<Value> {
    let (mut asking, mut said) = (JoinSet::new(), Vec::new());
    for one in found {
        if asking.len() == ASKED_AT_ONCE {
            said.extend(asking.join_next().await.and_then(std::result::Result::ok));
        }
        asking.spawn(async move { ask(one, deadline).await });
    }
    said.extend(asking.join_all().await);
    said.sort_by(|one, other| one["vm_id"].as_str().cmp(&other["vm_id"].as_str()));
    said
}

async fn ask(found: runtime::Found, deadline: Duration) -> Value {
    let asked = async {
        let attached = Attached::to(found.vm_id.clone(), &found.socket, deadline).await?;
        let mut summary = attached.operate(Operation::Summary).await?;
        summary["owner_pid"] = json!(attached.owner_pid());
        summary["error"] = Value::Null;
        Ok::<_, Error>(summary)
    };
    let timeout = |_| {
        let (vm_id, what, limit_s) = (found.vm_id.to_string(), "an answer".to_owned(), deadline.as_secs_f64());
        Err(Error::ChannelTimeout { vm_id, what, limit_s, sent: false })
    };
    let mut said = tokio::time::timeout(deadline, asked).await.unwrap_or_else(timeout).unwrap_or_else(
        |error| json!({"vm_id": found.vm_id, "error": {"code": error.code(), "message": error.to_string()}}),
    );
    said["socket_path"] = json!(found.socket);
    said
}
