//! The operations on one file on its way. A path is read and written by the runtime; an object of Python's by the loop, piece by
//! piece.

use std::future::Future;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm_protocol::message::Transferred;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyo3::IntoPyObjectExt;

use super::super::gate::OnInterrupt;
use super::super::transfer::{result, DownloadArguments, SizeLimit, UploadArguments, DEFAULT_MODE, PIECE};
use super::super::{convert, errors};
use super::queue::OperationQueue;
use crate::channel::{Download, Fetched, Upload};
use crate::error::{Error, Result};
use crate::host::async_file::{DestinationFile, SourceFile};
use crate::mutex::Mutex;
use crate::vm::{Live, Machine};

fn raised<T>(py: Python<'_>, result: Result<T>) -> PyResult<T> {
    result.map_err(|error| errors::raise(py, &error))
}

fn failed(operation: &'static str, path: &Path, error: io::Error) -> Error {
    Error::host(operation, path.display(), error)
}

/// A transfer between two steps. A step has it meanwhile; one that is aborted or fails drops it, which undoes the transfer.
struct Between<T>(Mutex<State<T>>);

enum State<T> {
    Idle(T),
    Busy,
    Closed,
}

impl<T: Send + 'static> Between<T> {
    fn new(transfer: T) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State::Idle(transfer))))
    }

    fn take(&self) -> Result<T> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Busy) {
            State::Idle(transfer) => Ok(transfer),
            other => {
                *state = other;
                Err(Error::host("go on with", "a transfer", "it has ended, or another step of it is under way"))
            }
        }
    }

    /// Drops it when it was closed meanwhile.
    fn put_back(&self, transfer: T) {
        let mut state = self.0.lock();
        if let State::Busy = *state {
            *state = State::Idle(transfer);
        }
    }

    fn close(&self) {
        let old = std::mem::replace(&mut *self.0.lock(), State::Closed);
        drop(old);
    }

    /// Begins a step of the transfer, which gives it back unless it was the last one.
    fn step<F, O, R>(
        self: &Arc<Self>,
        queue: &Bound<'_, OperationQueue>,
        step: impl FnOnce(T) -> F,
        finish: impl FnOnce(Python<'_>, Result<O>) -> PyResult<R> + Send + 'static,
    ) -> PyResult<u64>
    where
        F: Future<Output = Result<(Option<T>, O)>> + Send + 'static,
        O: Send + 'static,
        R: for<'py> IntoPyObject<'py>,
    {
        let (between, stepping) = (self.clone(), step(raised(queue.py(), self.take())?));
        let stepping = async move {
            let (transfer, outcome) = stepping.await?;
            transfer.into_iter().for_each(|transfer| between.put_back(transfer));
            Ok(outcome)
        };
        queue.get().begin(OnInterrupt::Abandon, stepping, finish)
    }
}

/// How far a transfer is.
enum Progress {
    Moved(u64),
    Done(Transferred),
}

fn told(py: Python<'_>, progress: Result<Progress>) -> PyResult<Py<PyAny>> {
    match raised(py, progress)? {
        Progress::Moved(bytes) => bytes.into_py_any(py),
        Progress::Done(done) => result(py, &done)?.into_py_any(py),
    }
}

struct Sending {
    upload: Live<Upload>,
    source: Option<(PathBuf, SourceFile)>,
}

impl Sending {
    /// The next bytes of the file; none at its end, and where there is no file.
    async fn read(&self) -> Result<Vec<u8>> {
        let Some((path, file)) = &self.source else { return Ok(Vec::new()) };
        file.read(PIECE).await.map_err(|error| failed("read", path, error))
    }
}

/// One upload: each step begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct UploadOperations {
    sending: Arc<Between<Sending>>,
    total: Option<u64>,
}

impl UploadOperations {
    /// Begins an upload from a path, or of the pieces that [`UploadOperations::write`] will bring.
    pub fn begin<'py>(
        vm: Arc<impl Machine + 'static>,
        queue: &Bound<'py, OperationQueue>,
        arguments: &UploadArguments<'py>,
    ) -> PyResult<u64> {
        let (request, path) = (arguments.parse()?, arguments.path()?);
        let from = request.offset.unwrap_or(0);
        let beginning = async move {
            let source = match path {
                None => None,
                Some(path) => match SourceFile::open(path.clone(), from).await {
                    Ok(file) => Some((path, file)),
                    Err(error) => return Err(failed("read", &path, error)),
                },
            };
            let meta = source.as_ref().and_then(|(_, file)| file.meta());
            let total = meta.map(|meta| meta.len().saturating_sub(from));
            let modes = (request.mode, meta.map(|meta| meta.mode() & 0o777));
            let upload = vm.upload(&request.guest_path, request.offset, modes, request.stall).await?;
            Ok(Self { sending: Between::new(Sending { upload, source }), total })
        };
        queue.get().begin(OnInterrupt::Abandon, beginning, |py, begun| Py::new(py, raised(py, begun)?))
    }
}

#[pymethods]
impl UploadOperations {
    /// Bytes that there are to send; `None` where that is not known.
    #[getter]
    fn total(&self) -> Option<u64> {
        self.total
    }

    /// Sends the next piece of the file, or the rest of it: how many bytes were sent so far, or the result at the end.
    fn send(&self, queue: &Bound<'_, OperationQueue>, rest: bool) -> PyResult<u64> {
        let send = |mut sending: Sending| async move {
            loop {
                let bytes = sending.read().await?;
                if bytes.is_empty() {
                    return Ok((None, Progress::Done(sending.upload.finish().await?)));
                }
                sending.upload.write(&bytes).await?;
                if !rest {
                    let sent = sending.upload.inner.sent();
                    return Ok((Some(sending), Progress::Moved(sent)));
                }
            }
        };
        self.sending.step(queue, send, told)
    }

    /// Sends bytes: how many were sent so far, or the result when there were none.
    fn write(&self, queue: &Bound<'_, OperationQueue>, data: &Bound<'_, PyAny>) -> PyResult<u64> {
        let bytes = convert::bytes("what read() gave", data)?;
        let send = |mut sending: Sending| async move {
            if bytes.is_empty() {
                return Ok((None, Progress::Done(sending.upload.finish().await?)));
            }
            sending.upload.write(&bytes).await?;
            let sent = sending.upload.inner.sent();
            Ok((Some(sending), Progress::Moved(sent)))
        };
        self.sending.step(queue, send, told)
    }

    /// Gives the upload up unless it has ended: a new file never appears in the guest.
    fn close(&self) {
        self.sending.close();
    }
}

struct Receiving {
    download: Live<Download>,
    limit: SizeLimit,
    destination: Option<(PathBuf, DestinationFile)>,
}

/// One download: each step begins at once and returns its number in the queue.
///
/// Used by `aio` alone. Does not block.
#[pyclass(frozen, module = "thirstys_waterfall.security.microvm_isolation._native")]
pub struct DownloadOperations {
    receiving: Arc<Between<Receiving>>,
    total: u64,
}

impl DownloadOperations {
    /// Begins a download to a path, or of pieces that [`DownloadOperations::read`] hands on.
    pub fn begin<'py>(
        vm: Arc<impl Machine + 'static>,
        queue: &Bound<'py, OperationQueue>,
        arguments: &DownloadArguments<'py>,
    ) -> PyResult<u64> {
        let (request, path) = (arguments.parse()?, arguments.path()?);
        let from = request.offset.unwrap_or(0);
        let beginning = async move {
            let download = vm.download(&request.guest_path, from, request.stall).await?;
            let total = download.inner.size().saturating_sub(from);
            let limit = SizeLimit::new(&*vm, request.guest_path, request.max_bytes);
            limit.check(total)?;
            let new_mode = download.inner.mode().map_or(DEFAULT_MODE, |mode| mode & 0o777);
            let destination = match path {
                None => None,
                Some(path) => match DestinationFile::open(path.clone(), request.offset, new_mode).await {
                    Ok(file) => Some((path, file)),
                    Err(error) => return Err(failed("write", &path, error)),
                },
            };
            Ok(Self { receiving: Between::new(Receiving { download, limit, destination }), total })
        };
        queue.get().begin(OnInterrupt::Abandon, beginning, |py, begun| Py::new(py, raised(py, begun)?))
    }
}

#[pymethods]
impl DownloadOperations {
    /// Bytes that there are to receive.
    #[getter]
    fn total(&self) -> u64 {
        self.total
    }

    /// Writes the next piece to the file, or the rest of it: how many bytes have come so far, or the result at the end.
    fn save(&self, queue: &Bound<'_, OperationQueue>, rest: bool) -> PyResult<u64> {
        let save = |mut receiving: Receiving| async move {
            loop {
                let fetched = receiving.download.next().await?;
                let received = receiving.download.inner.received();
                let taken = receiving.destination.take();
                match (fetched, taken) {
                    (Fetched::Whole(done), Some((path, file))) => {
                        file.finish().await.map_err(|error| failed("write", &path, error))?;
                        return Ok((None, Progress::Done(done)));
                    }
                    (Fetched::Whole(done), None) => return Ok((None, Progress::Done(done))),
                    (Fetched::Bytes(bytes), taken) => {
                        receiving.limit.check(received)?;
                        if let Some((path, file)) = taken {
                            let file = file.write(bytes).await.map_err(|error| failed("write", &path, error))?;
                            receiving.destination = Some((path, file));
                        }
                    }
                }
                if !rest {
                    return Ok((Some(receiving), Progress::Moved(received)));
                }
            }
        };
        self.receiving.step(queue, save, told)
    }

    /// Returns the next bytes, and how many have come so far; at the end none, and the result.
    fn read(&self, queue: &Bound<'_, OperationQueue>) -> PyResult<u64> {
        let fetch = |mut receiving: Receiving| async move {
            match receiving.download.next().await? {
                Fetched::Whole(done) => Ok((None, (Vec::new(), Progress::Done(done)))),
                Fetched::Bytes(bytes) => {
                    let received = receiving.download.inner.received();
                    receiving.limit.check(received)?;
                    Ok((Some(receiving), (bytes, Progress::Moved(received))))
                }
            }
        };
        self.receiving.step(queue, fetch, |py, fetched| {
            let (bytes, progress) = raised(py, fetched)?;
            (PyBytes::new(py, &bytes), told(py, Ok(progress))?).into_py_any(py)
        })
    }

    /// Gives the download up unless it has ended: a file that it would have made does not appear.
    fn close(&self) {
        self.receiving.close();
    }
}
