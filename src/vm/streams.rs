//! Programs and files of a running VM, live.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use microvm_protocol::message::{DOWNLOAD, STREAM, UPLOAD};
use serde_json::{json, Value};

use super::ports::Ports;
use super::running::Running;
use super::{explain, MicroVm};
use crate::channel::{Download, Fetched, Piece, Process, Stream, Upload};
use crate::error::{Error, Result};
use crate::model::{VmId, VmState};

/// A VM whose guest runs programs and takes files: one of this process, or one that it is attached to.
pub trait Machine: Send + Sync {
    fn id(&self) -> &VmId;

    /// How long a command may take by default.
    fn command_timeout(&self) -> Duration;

    /// The most bytes that a file of the guest can hold without holes: its disk, its memory and its image together.
    fn file_limit(&self) -> u64;

    /// Its ports that this process has to do with.
    fn ports(&self) -> &Arc<Ports>;

    /// Begins a call of the guest whose channels stay open.
    ///
    /// # Errors
    /// [`Error::InvalidState`] unless RUNNING, and the channel's.
    fn open(
        &self,
        operation: &'static str,
        action: &str,
        params: Value,
    ) -> impl Future<Output = Result<(Weak<Running>, Stream)>> + Send;

    /// Starts a program whose descriptors stay open; `params` are those of `exec`, and `pty`, `rows`, `columns`.
    ///
    /// # Errors
    /// [`Machine::open`]'s, and [`Error::Guest`] when it does not start.
    fn stream(&self, params: Value) -> impl Future<Output = Result<Live<Process>>> + Send {
        async move {
            let (running, stream) = self.open("run a program in", STREAM, params).await?;
            Live::begin(running, Process::start(stream, self.command_timeout())).await
        }
    }

    /// Begins to write a file. Without `offset` it is a new one, which takes the place of `path` when it is whole; with
    /// one it is written in place from there. `mode` is set; `new_mode` is for a file that was not there. The guest may take
    /// no byte for `stall` at most, by default for the commands' time.
    ///
    /// # Errors
    /// As for [`Machine::stream`].
    fn upload(
        &self,
        path: &str,
        offset: Option<u64>,
        (mode, new_mode): (Option<u32>, Option<u32>),
        stall: Option<Duration>,
    ) -> impl Future<Output = Result<Live<Upload>>> + Send {
        async move {
            let stall = stall.unwrap_or(self.command_timeout());
            let begin = async |new_mode: Option<u32>| {
                let mut params = json!({"path": path, "offset": offset, "mode": mode});
                if let Some(new_mode) = new_mode {
                    params["new_mode"] = json!(new_mode);
                }
                let (running, stream) = self.open("upload to", UPLOAD, params).await?;
                Live::begin(running, Upload::begin(stream, path.to_owned(), stall)).await
            };
            match begin(new_mode).await {
                // An agent of before, in a snapshot, knows no such parameter. It names it in its message alone: those agents, and
                // the frames of generation 1, stay as they are.
                Err(Error::Guest { code: "bad_params", message, .. }) if message.contains("new_mode") => {
                    begin(None).await
                }
                begun => begun,
            }
        }
    }

    /// Begins to read a file from `offset`. The guest may send no byte for `stall` at most, by default for the commands' time.
    ///
    /// # Errors
    /// As for [`Machine::stream`].
    fn download(
        &self,
        path: &str,
        offset: u64,
        stall: Option<Duration>,
    ) -> impl Future<Output = Result<Live<Download>>> + Send {
        async move {
            let stall = stall.unwrap_or(self.command_timeout());
            let (running, stream) =
                self.open("download from", DOWNLOAD, json!({"path": path, "offset": offset})).await?;
            Live::begin(running, Download::begin(stream, path.to_owned(), stall)).await
        }
    }
}

impl Machine for MicroVm {
    fn ports(&self) -> &Arc<Ports> {
        &self.ports
    }

    fn id(&self) -> &VmId {
        MicroVm::id(self)
    }

    fn command_timeout(&self) -> Duration {
        self.settings.command_timeout
    }

    fn file_limit(&self) -> u64 {
        let limits = &self.spec.limits;
        let image =
            self.spec.image.rootfs_path.as_ref().and_then(|path| path.metadata().ok()).map_or(0, |meta| meta.len());
        ((limits.disk_size_mb + limits.memory_mb) << 20) + image
    }

    async fn open(&self, operation: &'static str, action: &str, params: Value) -> Result<(Weak<Running>, Stream)> {
        let running = self.running_in(operation, VmState::Running)?;
        match running.agent().open(action, params, self.settings.command_timeout).await {
            Ok(stream) => Ok((Arc::downgrade(&running), stream)),
            Err(error) => Err(explain(&running, error).await),
        }
    }
}

/// Something that goes on in a VM. It keeps nothing of the VM alive; when the channel closes, the error says what became
/// of the VM. Where another process has the VM, that process says so.
pub struct Live<T> {
    running: Weak<Running>,
    pub inner: T,
}

impl<T> Live<T> {
    async fn begin(running: Weak<Running>, inner: impl Future<Output = Result<T>>) -> Result<Self> {
        let inner = Self::explained(&running, inner.await).await?;
        Ok(Self { running, inner })
    }

    async fn explained<O>(running: &Weak<Running>, outcome: Result<O>) -> Result<O> {
        match (outcome, running.upgrade()) {
            (Err(error), Some(running)) => Err(explain(&running, error).await),
            (outcome, _) => outcome,
        }
    }
}

impl Live<Process> {
    /// [`Process::next`].
    ///
    /// # Errors
    /// Its, and [`crate::error::Error::VmDied`].
    pub async fn next(&self) -> Result<Option<Piece>> {
        Self::explained(&self.running, self.inner.next().await).await
    }

    /// [`Process::write`].
    ///
    /// # Errors
    /// Its, and [`crate::error::Error::VmDied`].
    pub async fn write(&self, bytes: &[u8]) -> Result<bool> {
        Self::explained(&self.running, self.inner.write(bytes).await).await
    }
}

impl Live<Upload> {
    /// [`Upload::write`].
    ///
    /// # Errors
    /// Its, and [`crate::error::Error::VmDied`].
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.inner.write(bytes).await;
        Self::explained(&self.running, written).await
    }

    /// [`Upload::finish`].
    ///
    /// # Errors
    /// Its, and [`crate::error::Error::VmDied`].
    pub async fn finish(self) -> Result<microvm_protocol::message::Transferred> {
        Self::explained(&self.running, self.inner.finish().await).await
    }
}

impl Live<Download> {
    /// [`Download::next`].
    ///
    /// # Errors
    /// Its, and [`crate::error::Error::VmDied`].
    pub async fn next(&mut self) -> Result<Fetched> {
        let fetched = self.inner.next().await;
        Self::explained(&self.running, fetched).await
    }
}
