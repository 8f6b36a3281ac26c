//! Files between Python and a guest: paths, or objects with `read` or `write`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::gate::{self, OnInterrupt};
use super::{convert, errors};
use crate::channel::Fetched;
use crate::error::Error;
use crate::vm::MicroVm;

/// What is read at a time: one window of the channel.
const PIECE: usize = 256 * 1024;

fn failed(py: Python<'_>, operation: &'static str, path: &Path, error: &io::Error) -> PyErr {
    let (object, reason) = (path.display().to_string(), error.to_string());
    errors::raise(py, &Error::Host { operation, object, reason })
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

fn result<'py>(py: Python<'py>, done: &microvm_protocol::message::Transferred) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    result.set_item("bytes", done.bytes)?;
    result.set_item("crc32", done.crc32)?;
    Ok(result)
}

enum Source<'py> {
    File { path: PathBuf, file: File },
    Object(Bound<'py, PyAny>),
}

impl<'py> Source<'py> {
    /// A file from `offset`, and how many bytes it has from there; an object as it stands.
    fn open(value: &Bound<'py, PyAny>, offset: u64) -> PyResult<(Self, Option<u64>)> {
        let py = value.py();
        if value.hasattr("read")? {
            return Ok((Source::Object(value.clone()), None));
        }
        let path = convert::path("source", value)?;
        let opened = py.detach(|| {
            let mut file = File::open(&path)?;
            let meta = file.metadata()?;
            if meta.is_dir() {
                return Err(io::Error::from(io::ErrorKind::IsADirectory));
            }
            file.seek(SeekFrom::Start(offset))?;
            Ok((file, meta.len().saturating_sub(offset)))
        });
        let (file, size) = opened.map_err(|error| failed(py, "read", &path, &error))?;
        Ok((Source::File { path, file }, Some(size)))
    }

    /// The next bytes; none at the end.
    fn read(&mut self, py: Python<'py>) -> PyResult<Vec<u8>> {
        match self {
            Source::Object(object) => convert::bytes("what read() gave", &object.call_method1("read", (PIECE,))?),
            Source::File { path, file } => {
                let mut bytes = Vec::with_capacity(PIECE);
                let read = py.detach(|| file.take(PIECE as u64).read_to_end(&mut bytes));
                read.map_err(|error| failed(py, "read", path, &error))?;
                Ok(bytes)
            }
        }
    }
}

/// Writes a file of the guest.
pub fn upload<'py>(
    vm: &Arc<MicroVm>,
    source: &Bound<'py, PyAny>,
    guest_path: String,
    offset: Option<u64>,
    mode: Option<u32>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let py = source.py();
    let (mut source, total) = Source::open(source, offset.unwrap_or(0))?;
    let opening = vm.clone();
    let upload = gate::wait(py, OnInterrupt::Abandon, async move { opening.upload(&guest_path, offset, mode).await })?;
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
    /// `draft` is what is written, and takes the place of `path` when it is whole; without one it is written in place.
    File {
        path: PathBuf,
        draft: Option<PathBuf>,
        file: File,
    },
    Object(Bound<'py, PyAny>),
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        if let Sink::File { draft: Some(draft), .. } = self {
            if let Err(error) = fs::remove_file(&draft) {
                log::warn!("{}: an unfinished download could not be removed: {error}", draft.display());
            }
        }
    }
}

impl<'py> Sink<'py> {
    fn open(value: &Bound<'py, PyAny>, offset: Option<u64>) -> PyResult<Self> {
        let py = value.py();
        if value.hasattr("write")? {
            return Ok(Sink::Object(value.clone()));
        }
        let path = convert::path("destination", value)?;
        let opened = py.detach(|| match offset {
            None => {
                let draft = draft_beside(&path)?;
                OpenOptions::new().write(true).create_new(true).open(&draft).map(|file| (file, Some(draft)))
            }
            Some(offset) => {
                let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
                // What stands there is, from now on, what arrived: its size says where to resume.
                file.set_len(offset)?;
                file.seek(SeekFrom::Start(offset))?;
                Ok((file, None))
            }
        });
        let (file, draft) = opened.map_err(|error| failed(py, "write", &path, &error))?;
        Ok(Sink::File { path, draft, file })
    }

    fn write(&mut self, py: Python<'py>, bytes: &[u8]) -> PyResult<()> {
        match self {
            Sink::File { path, file, .. } => {
                py.detach(|| file.write_all(bytes)).map_err(|error| failed(py, "write", path, &error))
            }
            Sink::Object(object) => write_all(object, bytes),
        }
    }

    fn keep(&mut self, py: Python<'py>) -> PyResult<()> {
        let Sink::File { path, draft, .. } = self else { return Ok(()) };
        let Some(finished) = draft.take() else { return Ok(()) };
        fs::rename(&finished, &*path).map_err(|error| {
            *draft = Some(finished);
            failed(py, "rename", path, &error)
        })
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

fn draft_beside(path: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().filter(|_| !path.is_dir()).ok_or(io::ErrorKind::IsADirectory)?;
    // A file name has at most 255 bytes.
    let name: String = name.to_string_lossy().chars().take(50).collect();
    let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    Ok(path.with_file_name(format!(".{name}.download-{pid}-{number}")))
}

/// Reads a file of the guest.
pub fn download<'py>(
    vm: &Arc<MicroVm>,
    guest_path: String,
    destination: &Bound<'py, PyAny>,
    offset: Option<u64>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let py = destination.py();
    let opening = vm.clone();
    let from = offset.unwrap_or(0);
    let download = gate::wait(py, OnInterrupt::Abandon, async move { opening.download(&guest_path, from).await })?;
    let mut download = raise(py, download)?;
    let total = Some(download.inner.size().saturating_sub(from));
    let mut sink = Sink::open(destination, offset)?;
    loop {
        let fetched = gate::wait(py, OnInterrupt::Abandon, async move { (download.next().await, download) })?;
        let outcome;
        (outcome, download) = fetched;
        match raise(py, outcome)? {
            Fetched::Bytes(bytes) => {
                sink.write(py, &bytes)?;
                report(progress, download.inner.received(), total)?;
            }
            Fetched::Whole(done) => {
                sink.keep(py)?;
                return result(py, &done);
            }
        }
    }
}
