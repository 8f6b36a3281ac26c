//! Files between Python and a guest: paths, or objects with `read` or `write`.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::gate::{self, OnInterrupt};
use super::{convert, errors};
use crate::channel::Fetched;
use crate::error::Error;
use crate::host::destination::{is_unread, open_source, read_some, Destination};
use crate::vm::Machine;

/// What is read at a time: one window of the channel.
pub const PIECE: usize = 256 * 1024;
/// How long a FIFO or a terminal is waited for at a time: signals are seen in between.
const SLICE: Duration = Duration::from_millis(20);
/// A new file's permission bits, less the umask, where the guest tells none.
pub const DEFAULT_MODE: u32 = 0o666;

/// The arguments of `upload`; `None`: it was left out.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct UploadArguments<'py> {
    pub source: Bound<'py, PyAny>,
    pub guest_path: Bound<'py, PyAny>,
    pub offset: Option<Bound<'py, PyAny>>,
    pub mode: Option<Bound<'py, PyAny>>,
    pub progress: Option<Bound<'py, PyAny>>,
    pub timeout: Option<Bound<'py, PyAny>>,
}

/// What the guest is asked for; how long it may take nothing.
pub struct UploadRequest {
    pub guest_path: String,
    pub offset: Option<u64>,
    pub mode: Option<u32>,
    pub stall: Option<Duration>,
}

impl UploadArguments<'_> {
    pub fn parse(&self) -> PyResult<UploadRequest> {
        let mode = self.mode.as_ref().map(|mode| convert::whole_in("mode", mode, 0, 0o7777)).transpose()?;
        convert::optional_callable("progress", self.progress.as_ref())?;
        Ok(UploadRequest {
            guest_path: convert::text("guest_path", &self.guest_path)?,
            offset: whole("offset", self.offset.as_ref())?,
            mode: mode.map(|mode| mode as u32),
            stall: stall(self.timeout.as_ref())?,
        })
    }

    /// `None` for an object with `read`.
    pub fn path(&self) -> PyResult<Option<PathBuf>> {
        let is_object = self.source.hasattr("read")?;
        (!is_object).then(|| convert::path("source", &self.source)).transpose()
    }
}

/// The arguments of `download`; `None`: it was left out.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct DownloadArguments<'py> {
    pub guest_path: Bound<'py, PyAny>,
    pub destination: Bound<'py, PyAny>,
    pub offset: Option<Bound<'py, PyAny>>,
    pub progress: Option<Bound<'py, PyAny>>,
    pub max_bytes: Option<Bound<'py, PyAny>>,
    pub timeout: Option<Bound<'py, PyAny>>,
}

/// What the guest is asked for; the most bytes that are taken, and how long it may send nothing.
pub struct DownloadRequest {
    pub guest_path: String,
    pub offset: Option<u64>,
    pub max_bytes: Option<u64>,
    pub stall: Option<Duration>,
}

impl DownloadArguments<'_> {
    pub fn parse(&self) -> PyResult<DownloadRequest> {
        convert::optional_callable("progress", self.progress.as_ref())?;
        Ok(DownloadRequest {
            guest_path: convert::text("guest_path", &self.guest_path)?,
            offset: whole("offset", self.offset.as_ref())?,
            max_bytes: whole("max_bytes", self.max_bytes.as_ref())?,
            stall: stall(self.timeout.as_ref())?,
        })
    }

    /// `None` for an object with `write`.
    pub fn path(&self) -> PyResult<Option<PathBuf>> {
        let is_object = self.destination.hasattr("write")?;
        (!is_object).then(|| convert::path("destination", &self.destination)).transpose()
    }
}

fn whole(field: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<u64>> {
    value.map(|value| convert::whole_in(field, value, 0, 1 << 62)).transpose()
}

fn stall(timeout: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Duration>> {
    timeout.map(|timeout| convert::seconds("timeout", timeout)).transpose()
}

fn failed(py: Python<'_>, operation: &'static str, path: &Path, error: io::Error) -> PyErr {
    errors::raise(py, &Error::host(operation, path.display(), error))
}

fn raise<T>(py: Python<'_>, result: Result<T, Error>) -> PyResult<T> {
    result.map_err(|error| errors::raise(py, &error))
}

/// Says how far it is; an exception there ends the transfer.
fn report(progress: Option<&Bound<'_, PyAny>>, done: u64, total: Option<u64>) -> PyResult<()> {
    match progress {
        Some(progress) => progress.call1((done, total)).map(drop),
        None => Ok(()),
    }
}

pub fn result<'py>(py: Python<'py>, done: &microvm_protocol::message::Transferred) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    result.set_item("bytes", done.bytes)?;
    result.set_item("crc32", done.crc32)?;
    Ok(result)
}

enum Source<'py> {
    File { path: PathBuf, file: File, meta: Metadata },
    Object(Bound<'py, PyAny>),
}

impl<'py> Source<'py> {
    /// A file from `offset`; an object as it stands.
    fn open(value: &Bound<'py, PyAny>, offset: u64) -> PyResult<Self> {
        let py = value.py();
        if value.hasattr("read")? {
            return Ok(Source::Object(value.clone()));
        }
        let path = convert::path("source", value)?;
        let opened = py.detach(|| open_source(&path, offset));
        let (file, meta) = opened.map_err(|error| failed(py, "read", &path, error))?;
        Ok(Source::File { path, file, meta })
    }

    /// A regular file's own.
    fn meta(&self) -> Option<&Metadata> {
        match self {
            Source::File { meta, .. } => Some(meta).filter(|meta| meta.is_file()),
            Source::Object(_) => None,
        }
    }

    /// The next bytes; none at the end.
    fn read(&mut self, py: Python<'py>) -> PyResult<Vec<u8>> {
        match self {
            Source::Object(object) => convert::bytes("what read() gave", &object.call_method1("read", (PIECE,))?),
            Source::File { path, file, meta } => loop {
                let read = py.detach(|| read_some(file, meta, PIECE, SLICE));
                if let Some(bytes) = read.map_err(|error| failed(py, "read", path, error))? {
                    return Ok(bytes);
                }
                py.check_signals()?;
            },
        }
    }
}

/// Writes a file of the guest.
pub fn upload<'py, M: Machine + 'static>(
    vm: &Arc<M>,
    arguments: &UploadArguments<'py>,
) -> PyResult<Bound<'py, PyDict>> {
    let (py, progress) = (arguments.source.py(), arguments.progress.as_ref());
    let UploadRequest { guest_path, offset, mode, stall } = arguments.parse()?;
    let mut source = Source::open(&arguments.source, offset.unwrap_or(0))?;
    let total = source.meta().map(|meta| meta.len().saturating_sub(offset.unwrap_or(0)));
    let modes = (mode, source.meta().map(|meta| meta.mode() & 0o777));
    let opening = vm.clone();
    let begun = async move { opening.upload(&guest_path, offset, modes, stall).await };
    let upload = gate::wait(py, OnInterrupt::Abandon, begun)?;
    let mut upload = raise(py, upload)?;
    loop {
        let bytes = source.read(py)?;
        if bytes.is_empty() {
            break;
        }
        // The upload goes through the gate and comes back: interrupted, it is dropped there, which undoes it.
        let written = gate::wait(py, OnInterrupt::Abandon, async move { (upload.write(&bytes).await, upload) })?;
        let outcome;
        (outcome, upload) = written;
        raise(py, outcome)?;
        report(progress, upload.inner.sent(), total)?;
    }
    let done = gate::wait(py, OnInterrupt::Abandon, async move { upload.finish().await })?;
    result(py, &raise(py, done)?)
}

enum Sink<'py> {
    File { path: PathBuf, destination: Destination },
    Object(Bound<'py, PyAny>),
}

impl<'py> Sink<'py> {
    fn open(value: &Bound<'py, PyAny>, offset: Option<u64>, new_mode: u32) -> PyResult<Self> {
        let py = value.py();
        if value.hasattr("write")? {
            return Ok(Sink::Object(value.clone()));
        }
        let path = convert::path("destination", value)?;
        loop {
            let opened = py.detach(|| match offset {
                None => Destination::replace(&path, new_mode),
                Some(offset) => Destination::resume(&path, offset, new_mode),
            });
            match opened {
                Ok(destination) => return Ok(Sink::File { path, destination }),
                Err(error) if is_unread(&path, &error) => py.detach(|| std::thread::sleep(SLICE)),
                Err(error) => return Err(failed(py, "write", &path, error)),
            }
            py.check_signals()?;
        }
    }

    fn write(&mut self, py: Python<'py>, mut bytes: &[u8]) -> PyResult<()> {
        match self {
            Sink::File { path, destination } => {
                while !bytes.is_empty() {
                    let written = py.detach(|| destination.write(bytes, SLICE));
                    match written.map_err(|error| failed(py, "write", path, error))? {
                        0 => py.check_signals()?,
                        taken => bytes = &bytes[taken..],
                    }
                }
                Ok(())
            }
            Sink::Object(object) => write_all(object, bytes),
        }
    }

    fn finish(self, py: Python<'py>) -> PyResult<()> {
        match self {
            Sink::File { path, destination } => {
                py.detach(|| destination.finish()).map_err(|error| failed(py, "write", &path, error))
            }
            Sink::Object(_) => Ok(()),
        }
    }
}

/// A raw stream may take less than it is given (io.RawIOBase.write).
fn write_all(object: &Bound<'_, PyAny>, mut bytes: &[u8]) -> PyResult<()> {
    let py = object.py();
    while !bytes.is_empty() {
        let written = object.call_method1("write", (PyBytes::new(py, bytes),))?;
        let taken = written.extract::<usize>().unwrap_or(bytes.len()).clamp(1, bytes.len());
        bytes = &bytes[taken..];
    }
    Ok(())
}

/// How much is taken of a file: a guest may offer more than it holds, a file with holes, or one without end.
pub struct SizeLimit {
    vm_id: String,
    guest_path: String,
    bytes: u64,
    why: &'static str,
}

impl SizeLimit {
    pub fn new(vm: &impl Machine, guest_path: String, max_bytes: Option<u64>) -> Self {
        let why = match max_bytes {
            Some(_) => "max_bytes",
            None => "what its disk, memory and image hold; max_bytes sets another limit",
        };
        Self { vm_id: vm.id().to_string(), guest_path, bytes: max_bytes.unwrap_or_else(|| vm.file_limit()), why }
    }

    pub fn check(&self, bytes: u64) -> Result<(), Error> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let Self { vm_id, guest_path, bytes: limit, why } = self;
        let message = format!("{guest_path:?}: {bytes} bytes or more are over the limit of {limit}, {why}");
        Err(Error::Guest { vm_id: vm_id.clone(), what: "download".into(), code: "too_large", message })
    }
}

/// Reads a file of the guest.
pub fn download<'py, M: Machine + 'static>(
    vm: &Arc<M>,
    arguments: &DownloadArguments<'py>,
) -> PyResult<Bound<'py, PyDict>> {
    let (py, progress) = (arguments.destination.py(), arguments.progress.as_ref());
    let DownloadRequest { guest_path, offset, max_bytes, stall } = arguments.parse()?;
    let (opening, path) = (vm.clone(), guest_path.clone());
    let from = offset.unwrap_or(0);
    let begun = async move { opening.download(&path, from, stall).await };
    let mut download = raise(py, gate::wait(py, OnInterrupt::Abandon, begun)?)?;
    let total = download.inner.size().saturating_sub(from);
    let limit = SizeLimit::new(&**vm, guest_path, max_bytes);
    raise(py, limit.check(total))?;
    let new_mode = download.inner.mode().map_or(DEFAULT_MODE, |mode| mode & 0o777);
    let mut sink = Sink::open(&arguments.destination, offset, new_mode)?;
    loop {
        let fetched = gate::wait(py, OnInterrupt::Abandon, async move { (download.next().await, download) })?;
        let outcome;
        (outcome, download) = fetched;
        match raise(py, outcome)? {
            Fetched::Bytes(bytes) => {
                raise(py, limit.check(download.inner.received()))?;
                sink.write(py, &bytes)?;
                report(progress, download.inner.received(), Some(total))?;
            }
            Fetched::Whole(done) => {
                sink.finish(py)?;
                return result(py, &done);
            }
        }
    }
}
