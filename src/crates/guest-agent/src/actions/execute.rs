//! Programs: run, fed, watched, capped.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::prelude::{Engine, BASE64_STANDARD};
use microvm_protocol::identity::Identity;
use microvm_protocol::message::{Code, Failure};
use nix::sys::resource::{setrlimit, Resource};
use serde::Deserialize;
use serde_json::{json, Value};

use super::{fail, read, Job, Outcome};
use crate::boot;
use crate::children::{self, Ended, Group, Spawned};

const DEFAULT_OUTPUT: usize = 1 << 20;
const MAX_OUTPUT: usize = 4 << 20;
const DEFAULT_TIMEOUT_S: f64 = 30.0;
const MAX_TIMEOUT_S: f64 = 86_400.0;
/// How long a program's children may go on holding its pipes after it has ended.
const GRACE: Duration = Duration::from_millis(200);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    program: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    stdin: Option<String>,
    stdin_base64: Option<String>,
    timeout: Option<f64>,
    uid: Option<u32>,
    max_output_bytes: Option<usize>,
}

/// A program to run, whoever asked for it.
pub struct Program<'a> {
    pub path: &'a str,
    pub args: &'a [String],
    pub env: &'a BTreeMap<String, String>,
    pub cwd: &'a str,
    pub stdin: Vec<u8>,
    pub timeout: Duration,
    pub uid: u32,
    pub max_output: usize,
}

/// What a program did.
pub struct Done {
    pub ended: Ended,
    pub stdout: Stream,
    pub stderr: Stream,
    pub duration: Duration,
}

#[derive(Default)]
pub struct Stream {
    pub bytes: Vec<u8>,
    pub truncated: bool,
}

pub fn execute(params: Value, identity: &Identity, job: &Job) -> Outcome {
    let params: Params = read(params)?;
    let seconds = params.timeout.unwrap_or(DEFAULT_TIMEOUT_S);
    if !(seconds > 0.0 && seconds <= MAX_TIMEOUT_S) {
        return fail(Code::BadParams, format!("timeout: {seconds} is not above 0 and at most {MAX_TIMEOUT_S} seconds"));
    }
    let max_output = params.max_output_bytes.unwrap_or(DEFAULT_OUTPUT);
    if max_output > MAX_OUTPUT {
        return fail(Code::BadParams, format!("max_output_bytes: {max_output} is over {MAX_OUTPUT}"));
    }
    let stdin = match (params.stdin, params.stdin_base64) {
        (Some(_), Some(_)) => return fail(Code::BadParams, "stdin: give either stdin or stdin_base64"),
        (Some(text), None) => text.into_bytes(),
        (None, Some(text)) => BASE64_STANDARD
            .decode(text)
            .map_err(|e| Failure { code: Code::BadParams, message: format!("stdin_base64: {e}") })?,
        (None, None) => Vec::new(),
    };
    let texts = [&params.program].into_iter().chain(&params.args).chain(params.env.keys()).chain(params.env.values());
    if params.program.is_empty() || texts.into_iter().any(|text| text.contains('\0')) {
        return fail(Code::BadParams, "program: it must not be empty, and no text may hold a NUL");
    }
    if params.env.keys().any(|key| key.is_empty() || key.contains('=')) {
        return fail(Code::BadParams, "env: a name must not be empty or hold '='");
    }
    let program = Program {
        path: &params.program,
        args: &params.args,
        env: &params.env,
        cwd: params.cwd.as_deref().unwrap_or("/"),
        stdin,
        timeout: Duration::from_secs_f64(seconds),
        uid: params.uid.unwrap_or(0),
        max_output,
    };
    let done = run(program, identity, job)?;
    let (code, signal) = match done.ended {
        Ended::Code(code) => (Some(code), None),
        Ended::Signal(signal) => (None, Some(signal)),
    };
    let mut result = json!({
        "exit_code": code,
        "signal": signal,
        "duration_seconds": done.duration.as_secs_f64(),
        "stdout_truncated": done.stdout.truncated,
        "stderr_truncated": done.stderr.truncated,
    });
    for (name, stream) in [("stdout", done.stdout), ("stderr", done.stderr)] {
        if let Err(error) = std::str::from_utf8(&stream.bytes) {
            // A cut in the middle of a character is no reason for a second copy.
            if !stream.truncated || error.error_len().is_some() {
                result[format!("{name}_base64")] = json!(BASE64_STANDARD.encode(&stream.bytes));
            }
        }
        result[name] = json!(String::from_utf8_lossy(&stream.bytes));
    }
    Ok(result)
}

/// Runs a program to its end, in a session and control group of its own.
pub fn run(program: Program<'_>, identity: &Identity, job: &Job) -> Result<Done, Failure> {
    let begun = Instant::now();
    if !Path::new(program.cwd).is_dir() {
        return fail(Code::BadParams, format!("cwd: {:?} is not a directory", program.cwd));
    }
    let mut command = Command::new(program.path);
    command
        .args(program.args)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", if program.uid == 0 { "/root" } else { "/" })
        .envs(program.env)
        .current_dir(program.cwd)
        .stdin(if program.stdin.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if program.uid != 0 {
        command.uid(program.uid).gid(program.uid);
    }
    let failed = |e: io::Error| Failure { code: Code::IoError, message: format!("the program's control group: {e}") };
    let group = boot::work_cgroup(identity.max_processes).and_then(Group::create).map_err(failed)?;
    let procs = group.procs().map_err(failed)?;
    let (files, processes) = (identity.max_file_handles, identity.max_processes);
    // SAFETY: between fork and exec only system calls are made; nothing is allocated and no lock is taken.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            // Opened by root: the right to write was checked then.
            if libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) != 1 {
                return Err(io::Error::last_os_error());
            }
            setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
            setrlimit(Resource::RLIMIT_NPROC, processes, processes)?;
            Ok(())
        });
    }
    let (mut child, spawned) = children::spawn(&mut command, group).map_err(|error| {
        let code = match error.kind() {
            ErrorKind::NotFound => Code::ProgramNotFound,
            ErrorKind::PermissionDenied => Code::PermissionDenied,
            ErrorKind::WouldBlock => Code::Busy,
            _ => Code::IoError,
        };
        Failure { code, message: format!("{}: {error}", program.path) }
    })?;
    let spawned = Arc::new(spawned);
    job.runs(&spawned);
    if let Some(mut stdin) = child.stdin.take() {
        let bytes = program.stdin;
        // A program need not read what it is given.
        thread(&spawned, move || drop(stdin.write_all(&bytes)))?;
    }
    let stdout = pump(&spawned, child.stdout.take(), program.max_output)?;
    let stderr = pump(&spawned, child.stderr.take(), program.max_output)?;
    let deadline = begun.checked_add(program.timeout).unwrap_or(begun);
    let ended = spawned.wait_until(deadline);
    let Some(ended) = ended else {
        spawned.kill();
        let seconds = program.timeout.as_secs_f64();
        return fail(Code::Timeout, format!("{} was killed: it ran longer than {seconds} s", program.path));
    };
    if job.is_cancelled() {
        return fail(Code::Cancelled, format!("{} was killed: the request was cancelled", program.path));
    }
    let until = Instant::now() + GRACE;
    Ok(Done { ended, stdout: collect(&stdout, until), stderr: collect(&stderr, until), duration: begun.elapsed() })
}

/// A thread that serves `program`; without it the program is killed.
fn thread(program: &Spawned, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    match std::thread::Builder::new().spawn(work) {
        Ok(_) => Ok(()),
        Err(error) => {
            program.kill();
            fail(Code::Busy, format!("no thread: {error}"))
        }
    }
}

enum Piece {
    Bytes(Vec<u8>),
    Truncated,
}

/// Reads a pipe to its end on a thread; what is over `max` is read and dropped, so that the program does not stall.
fn pump(program: &Spawned, pipe: Option<impl Read + Send + 'static>, max: usize) -> Result<Receiver<Piece>, Failure> {
    let (sender, receiver) = mpsc::channel();
    let Some(mut pipe) = pipe else { return Ok(receiver) };
    thread(program, move || {
        let mut buffer = vec![0; 32 * 1024];
        let mut left = max;
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            let kept = length.min(left);
            left -= kept;
            if kept > 0 {
                drop(sender.send(Piece::Bytes(buffer.get(..kept).unwrap_or_default().to_vec())));
            }
            if kept < length {
                drop(sender.send(Piece::Truncated));
            }
        }
    })?;
    Ok(receiver)
}

fn collect(pieces: &Receiver<Piece>, until: Instant) -> Stream {
    let mut stream = Stream::default();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match pieces.recv_timeout(left) {
            Ok(Piece::Bytes(bytes)) => stream.bytes.extend_from_slice(&bytes),
            Ok(Piece::Truncated) => stream.truncated = true,
            Err(_) => return stream,
        }
    }
}
