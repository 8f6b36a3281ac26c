//! Files of any size, through a window: what is in memory is one piece.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use microvm_protocol::frame::MAX_DATA;
use microvm_protocol::message::{Code, Started, Transferred};
use microvm_protocol::mux::{STDOUT, WINDOW};
use serde::Deserialize;
use serde_json::{json, Value};

use super::files::{io_failure, Mode, DEFAULT_MODE};
use super::{fail, read, Outcome};
use crate::checksum::Crc32;
use crate::job::{cancelled, Input, Job};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UploadParams {
    path: String,
    /// Write in place from here; absent: a new file, which takes the path's place when it is whole.
    offset: Option<u64>,
    mode: Option<Mode>,
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

/// A file that is written under another name, and removed unless it is kept.
struct Draft {
    path: PathBuf,
    kept: bool,
}

impl Draft {
    fn beside(path: &Path) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A file name has at most 255 bytes.
        let name: String = name.chars().take(50).collect();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { path: path.with_file_name(format!(".{name}.upload-{number}")), kept: false }
    }

    fn keep_as(mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path).or_else(absent_is_fine) {
            eprintln!("microvm-agent: {}: {error}", self.path.display());
        }
    }
}

fn absent_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound {
        Ok(())
    } else {
        Err(error)
    }
}

pub fn upload(params: Value, job: &Job) -> Outcome {
    let params: UploadParams = read(params)?;
    let mode = params.mode.as_ref().map(Mode::bits).transpose()?;
    let path = Path::new(&params.path);
    let failed = |error: io::Error| io_failure(&params.path, &error);
    if path.is_dir() || path.file_name().is_none() {
        return fail(Code::IoError, format!("{}: it is a directory", params.path));
    }
    if let Some(parent) = path.parent().filter(|_| params.make_dirs) {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut options = OpenOptions::new();
    options.write(true).mode(mode.unwrap_or(DEFAULT_MODE));
    let (mut file, draft) = match params.offset {
        None => {
            let draft = Draft::beside(path);
            (options.create_new(true).open(&draft.path).map_err(failed)?, Some(draft))
        }
        Some(offset) => {
            let file = options.create(true).open(path).map_err(failed)?;
            let size = file.metadata().map_err(failed)?.len();
            if offset > size {
                return fail(Code::BadParams, format!("offset: {offset} is beyond the file's {size} bytes"));
            }
            // What stands there is, from now on, what arrived: its size says where to resume.
            file.set_len(offset).map_err(failed)?;
            (file, None)
        }
    };
    file.seek(SeekFrom::Start(params.offset.unwrap_or(0))).map_err(failed)?;
    job.started(&Started::File { size: params.offset.unwrap_or(0) })?;
    let (mut bytes, mut checksum, mut owed) = (0, Crc32::default(), 0);
    loop {
        match job.input() {
            Input::Bytes(piece) => {
                file.write_all(&piece).map_err(failed)?;
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
            Input::Empty => job.bell().wait(),
        }
    }
    if let Some(mode) = mode {
        file.set_permissions(Permissions::from_mode(mode)).map_err(failed)?;
    }
    draft.map_or(Ok(()), |draft| draft.keep_as(path)).map_err(failed)?;
    Ok(json!(Transferred { bytes, crc32: checksum.value() }))
}

pub fn download(params: Value, job: &Job) -> Outcome {
    let params: DownloadParams = read(params)?;
    let failed = |error: io::Error| io_failure(&params.path, &error);
    let mut file = File::open(&params.path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_dir() {
        return fail(Code::IoError, format!("{}: it is a directory", params.path));
    }
    if params.offset > 0 {
        file.seek(SeekFrom::Start(params.offset)).map_err(failed)?;
    }
    job.started(&Started::File { size: meta.len() })?;
    let mut buffer = vec![0; MAX_DATA];
    let (mut bytes, mut checksum) = (0, Crc32::default());
    loop {
        let length = file.read(&mut buffer).map_err(failed)?;
        if length == 0 {
            break;
        }
        let mut rest = buffer.get(..length).unwrap_or_default();
        checksum.update(rest);
        bytes += length as u64;
        while !rest.is_empty() {
            match job.send(STDOUT, rest)? {
                None => return Err(cancelled(&params.path)),
                Some(0) => job.bell().wait(),
                Some(taken) => rest = rest.get(taken..).unwrap_or_default(),
            }
        }
    }
    job.finish(STDOUT)?;
    Ok(json!(Transferred { bytes, crc32: checksum.value() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_draft_is_removed_unless_kept() {
        let dir = std::env::temp_dir().join(format!("agent-drafts-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("file");
        let (dropped, kept) = (Draft::beside(&path), Draft::beside(&path));
        assert_ne!(dropped.path, kept.path);
        fs::write(&dropped.path, b"half").unwrap();
        fs::write(&kept.path, b"whole").unwrap();
        drop(dropped);
        kept.keep_as(&path).unwrap();
        let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!((names, fs::read(&path).unwrap()), (vec!["file".into()], b"whole".to_vec()));
        fs::remove_dir_all(dir).unwrap();
    }
}
