//! Programs and files of a running VM, live.

use std::sync::{Arc, Weak};

use microvm_protocol::message::{DOWNLOAD, STREAM, UPLOAD};
use serde_json::{json, Value};

use super::running::Running;
use super::{explain, MicroVm};
use crate::channel::{Download, Fetched, Piece, Process, Stream, Upload};
use crate::error::Result;
use crate::model::VmState;

impl MicroVm {
    /// Starts a program whose descriptors stay open; `params` are those of `exec`, and `pty`, `rows`, `columns`.
    ///
    /// # Errors
    /// [`crate::error::Error::InvalidState`] unless RUNNING, [`crate::error::Error::Guest`] when it does not start, and
    /// the channel's.
    pub async fn stream(&self, params: Value) -> Result<Live<Process>> {
        let (running, stream) = self.open("run a program in", STREAM, params).await?;
        Live::begin(running, Process::start(stream)).await
    }

    /// Begins to write a file. Without `offset` it is a new one, which takes the place of `path` when it is whole; with
    /// one it is written in place from there.
    ///
    /// # Errors
    /// As for [`MicroVm::stream`].
    pub async fn upload(&self, path: &str, offset: Option<u64>, mode: Option<u32>) -> Result<Live<Upload>> {
        let params = json!({"path": path, "offset": offset, "mode": mode});
        let (running, stream) = self.open("upload to", UPLOAD, params).await?;
        Live::begin(running, Upload::begin(stream, path.to_owned())).await
    }

    /// Begins to read a file from `offset`.
    ///
    /// # Errors
    /// As for [`MicroVm::stream`].
    pub async fn download(&self, path: &str, offset: u64) -> Result<Live<Download>> {
        let (running, stream) = self.open("download from", DOWNLOAD, json!({"path": path, "offset": offset})).await?;
        Live::begin(running, Download::begin(stream, path.to_owned())).await
    }

    async fn open(&self, operation: &'static str, action: &str, params: Value) -> Result<(Arc<Running>, Stream)> {
        let running = self.running_in(operation, VmState::Running)?;
        match running.agent().open(action, params, self.settings.command_timeout).await {
            Ok(stream) => Ok((running, stream)),
            Err(error) => Err(explain(&running, error).await),
        }
    }
}

/// Something that goes on in a VM. It keeps nothing of the VM alive; when the channel closes, the error says what became
/// of the VM.
pub struct Live<T> {
    running: Weak<Running>,
    pub inner: T,
}

impl<T> Live<T> {
    async fn begin(running: Arc<Running>, inner: impl std::future::Future<Output = Result<T>>) -> Result<Self> {
        match inner.await {
            Ok(inner) => Ok(Self { running: Arc::downgrade(&running), inner }),
            Err(error) => Err(explain(&running, error).await),
        }
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
