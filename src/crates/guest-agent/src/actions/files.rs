//! Files of the guest, in pieces that fit a message.

use std::fs;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;

use base64::prelude::{Engine, BASE64_STANDARD};
use microvm_protocol::json::prefers_base64;
use microvm_protocol::message::{Code, Failure};
use nix::poll::PollFlags;
use serde::Deserialize;
use serde_json::{json, Value};

use super::place::{open_to_read, Destination, Waiter};
use super::{fail, read_params, Outcome};
use crate::memory;

const DEFAULT_READ: u64 = 1 << 20;
const MAX_READ: u64 = 8 << 20;
pub const DEFAULT_MODE: u32 = 0o644;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadParams {
    path: String,
    #[serde(default)]
    offset: u64,
    max_bytes: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteParams {
    path: String,
    data: Option<String>,
    data_base64: Option<String>,
    offset: Option<u64>,
    #[serde(default)]
    append: bool,
    mode: Option<Mode>,
    #[serde(default)]
    make_dirs: bool,
}

/// Octal text, as chmod(1) takes it, or the number itself.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Mode {
    Number(u32),
    Octal(String),
}

impl Mode {
    pub fn bits(&self) -> Result<u32, Failure> {
        let bad = |message: String| Failure { code: Code::BadParams, message };
        let bits = match self {
            Mode::Number(bits) => *bits,
            Mode::Octal(text) => {
                u32::from_str_radix(text, 8).map_err(|_| bad(format!("mode: {text:?} is not octal, as in \"0644\"")))?
            }
        };
        if bits > 0o7777 {
            return Err(bad("mode: at most 0o7777".into()));
        }
        Ok(bits)
    }
}

pub fn io_failure(path: &str, error: &io::Error) -> Failure {
    let code = match error.kind() {
        ErrorKind::NotFound => Code::FileNotFound,
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Code::PermissionDenied,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::NoSpace,
        ErrorKind::FileTooLarge => Code::TooLarge,
        _ => Code::IoError,
    };
    let shown: String = path.chars().take(200).collect();
    Failure { code, message: format!("{shown}: {error}") }
}

pub fn read_file(params: Value, waiter: &dyn Waiter) -> Outcome {
    let params: ReadParams = read_params(params)?;
    let max = params.max_bytes.unwrap_or(DEFAULT_READ);
    if max > MAX_READ {
        return fail(Code::BadParams, format!("max_bytes: {max} is over {MAX_READ}; read in pieces by offset"));
    }
    let failed = |error: io::Error| io_failure(&params.path, &error);
    let (mut file, meta) = open_to_read(&params.path)?;
    if params.offset > 0 {
        file.seek(SeekFrom::Start(params.offset)).map_err(failed)?;
    }
    // A file of /proc has no size.
    let expected = if meta.len() == 0 { max } else { max.min(meta.len().saturating_sub(params.offset)) };
    // The bytes, their base64, and that once more in the answer.
    let _promise = memory::afford(4 * expected, "max_bytes: the answer")?;
    let mut bytes = Vec::new();
    let mut is_drained = false;
    // One byte more tells whether the end was reached, also for files of /proc, whose size is 0.
    while let Err(error) = (&file).take(max + 1 - bytes.len() as u64).read_to_end(&mut bytes) {
        // What is read before an error is kept. A terminal or /proc/kmsg has no end: what it has now is the answer.
        match error.kind() {
            ErrorKind::WouldBlock if bytes.is_empty() => waiter.ready(Some(file.as_fd()), PollFlags::POLLIN, None)?,
            ErrorKind::WouldBlock => {
                is_drained = true;
                break;
            }
            _ => return Err(failed(error)),
        }
    }
    let eof = !is_drained && bytes.len() as u64 <= max;
    bytes.truncate(usize::try_from(max).unwrap_or(usize::MAX));
    let (size, offset) = (meta.len(), params.offset);
    let mut result = json!({"size": size, "offset": offset, "eof": eof});
    match String::from_utf8(bytes) {
        Ok(text) if !prefers_base64(&text) => result["data"] = Value::String(text),
        Ok(text) => result["data_base64"] = Value::String(BASE64_STANDARD.encode(text)),
        Err(error) => result["data_base64"] = Value::String(BASE64_STANDARD.encode(error.as_bytes())),
    }
    Ok(result)
}

pub fn write_file(params: Value, waiter: &dyn Waiter) -> Outcome {
    let params: WriteParams = read_params(params)?;
    let bad = |message: String| Failure { code: Code::BadParams, message };
    let bytes = match (params.data, params.data_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(text)) => BASE64_STANDARD.decode(text).map_err(|error| bad(format!("data_base64: {error}")))?,
        _ => return fail(Code::BadParams, "data: give either data or data_base64"),
    };
    let mode = params.mode.as_ref().map(Mode::bits).transpose()?;
    if params.append && params.offset.is_some() {
        return fail(Code::BadParams, "append: it excludes offset");
    }
    let failed = |error: io::Error| io_failure(&params.path, &error);
    if let Some(parent) = Path::new(&params.path).parent().filter(|_| params.make_dirs) {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let new_mode = mode.unwrap_or(DEFAULT_MODE);
    let mut destination = match (params.append, params.offset) {
        (false, None) => Destination::replace(&params.path, new_mode, waiter)?,
        (_, offset) => Destination::change(&params.path, offset, new_mode, waiter)?,
    };
    destination.write(&bytes, waiter)?;
    destination.finish(mode)?;
    Ok(json!({"bytes_written": bytes.len()}))
}

#[cfg(test)]
mod tests {
    use super::super::place::tests::Impatient;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn read_file(params: Value) -> Outcome {
        super::read_file(params, &Impatient)
    }

    fn write_file(params: Value) -> Outcome {
        super::write_file(params, &Impatient)
    }

    #[test]
    fn test_files_round_trip_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        write_file(json!({"path": path, "data": "hello", "make_dirs": true, "mode": "0600"})).unwrap();
        write_file(json!({"path": path, "data_base64": "/w==", "append": true})).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let first = read_file(json!({"path": path, "max_bytes": 5})).unwrap();
        assert_eq!(first, json!({"data": "hello", "size": 6, "offset": 0, "eof": false}));
        let rest = read_file(json!({"path": path, "offset": 5})).unwrap();
        assert_eq!(rest, json!({"data_base64": "/w==", "size": 6, "offset": 5, "eof": true}));
    }

    #[test]
    fn test_files_failures_have_their_codes() {
        let code = |outcome: Outcome| outcome.unwrap_err().code;
        assert_eq!(code(read_file(json!({"path": "/no/such"}))), Code::FileNotFound);
        assert_eq!(code(read_file(json!({"path": "/"}))), Code::IoError);
        assert_eq!(code(read_file(json!({"path": "/x", "max_bytes": 1u64 << 40}))), Code::BadParams);
        assert_eq!(code(write_file(json!({"path": "/x"}))), Code::BadParams);
        assert_eq!(code(write_file(json!({"path": "/x", "data": "", "mode": "9"}))), Code::BadParams);
        assert_eq!(code(write_file(json!({"path": "/dev/full", "data": "x", "append": true}))), Code::NoSpace);
    }
}
