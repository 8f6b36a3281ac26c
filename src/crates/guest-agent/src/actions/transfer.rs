//! Files of any size, through a window: what is in memory is one piece.

use std::fs;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use microvm_protocol::frame::MAX_DATA;
use microvm_protocol::message::{Started, Transferred};
use microvm_protocol::mux::{STDOUT, WINDOW};
use serde::Deserialize;
use serde_json::{json, Value};

use super::files::{io_failure, Mode, DEFAULT_MODE};
use super::place::{open_to_read, read_some, Destination};
use super::{read_params, Outcome};
use crate::checksum::Crc32;
use crate::job::{cancelled, Input, Job};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UploadParams {
    path: String,
    /// Write in place from here; absent: a new file, which takes the path's place when it is whole.
    offset: Option<u64>,
    /// What its mode becomes, whatever stood there.
    mode: Option<Mode>,
    /// The mode that it gets, less the umask, where nothing stood there.
    new_mode: Option<u32>,
    #[serde(default)]
    make_dirs: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DownloadParams {
    path: String,
    #[serde(default)]
    offset: u64,
}

pub fn upload(params: Value, job: &Job) -> Outcome {
    let params: UploadParams = read_params(params)?;
    let mode = params.mode.as_ref().map(Mode::bits).transpose()?;
    let new_mode = mode.or(params.new_mode).unwrap_or(DEFAULT_MODE);
    let failed = |error: io::Error| io_failure(&params.path, &error);
    if let Some(parent) = Path::new(&params.path).parent().filter(|_| params.make_dirs) {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut destination = match params.offset {
        None => Destination::replace(&params.path, new_mode, job)?,
        Some(offset) => Destination::resume(&params.path, offset, new_mode, job)?,
    };
    job.started(&Started::File { size: params.offset.unwrap_or(0), mode: None })?;
    let (mut bytes, mut checksum, mut owed) = (0, Crc32::default(), 0);
    loop {
        match job.input() {
            Input::Bytes(piece) => {
                destination.write(&piece, job)?;
                checksum.update(&piece);
                bytes += piece.len() as u64;
                owed += piece.len();
                // By halves: what is left of the window keeps the host busy, and each CREDIT costs a way to the device.
                if owed >= WINDOW / 2 {
                    job.consumed(std::mem::take(&mut owed))?;
                }
            }
            Input::Ended => break,
            Input::Empty if job.is_cancelled() => return Err(cancelled(&params.path)),
            Input::Empty => job.notifier().wait(),
        }
    }
    destination.finish(mode)?;
    Ok(json!(Transferred { bytes, crc32: checksum.value() }))
}

pub fn download(params: Value, job: &Job) -> Outcome {
    let params: DownloadParams = read_params(params)?;
    let failed = |error: io::Error| io_failure(&params.path, &error);
    let (mut file, meta) = open_to_read(&params.path)?;
    if params.offset > 0 {
        file.seek(SeekFrom::Start(params.offset)).map_err(failed)?;
    }
    let mode = meta.is_file().then(|| meta.mode() & 0o7777);
    job.started(&Started::File { size: meta.len(), mode })?;
    let mut buffer = vec![0; MAX_DATA];
    let (mut bytes, mut checksum) = (0, Crc32::default());
    loop {
        let length = read_some(&params.path, &mut file, &mut buffer, job)?;
        if length == 0 {
            break;
        }
        let mut rest = buffer.get(..length).unwrap_or_default();
        checksum.update(rest);
        bytes += length as u64;
        while !rest.is_empty() {
            match job.send(STDOUT, rest)? {
                None => return Err(cancelled(&params.path)),
                Some(0) => job.notifier().wait(),
                Some(taken) => rest = rest.get(taken..).unwrap_or_default(),
            }
        }
    }
    job.finish(STDOUT)?;
    Ok(json!(Transferred { bytes, crc32: checksum.value() }))
}
