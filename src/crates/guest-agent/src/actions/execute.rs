//! Programs on request: fed, watched, and answered with what they said.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::prelude::{Engine, BASE64_STANDARD};
use microvm_protocol::identity::Identity;
use microvm_protocol::message::{Code, Failure};
use serde::Deserialize;
use serde_json::{json, Value};

use super::program::{Collected, Program, ROOT};
use super::{fail, read, Outcome};
use crate::children::Ended;
use crate::job::Job;

const DEFAULT_OUTPUT: usize = 1 << 20;
const MAX_OUTPUT: usize = 4 << 20;
const DEFAULT_TIMEOUT_S: f64 = 30.0;
const MAX_TIMEOUT_S: f64 = 86_400.0;
/// A terminal's size when none is asked for: rows, columns.
const TERMINAL: (u16, u16) = (24, 80);

/// What `exec` and `stream` are given; each refuses what only the other one has.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Params {
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
    #[serde(default)]
    pty: bool,
    rows: Option<u16>,
    columns: Option<u16>,
}

impl Params {
    /// The program as a stream runs it: without a timeout of its own unless one is given, on a terminal if asked for.
    pub fn streamed(&self) -> Result<Program<'_>, Failure> {
        if self.stdin.is_some() || self.stdin_base64.is_some() || self.max_output_bytes.is_some() {
            return fail(Code::BadParams, "stdin, max_output_bytes: a stream has its input and output on its channels");
        }
        if !self.pty && (self.rows.is_some() || self.columns.is_some()) {
            return fail(Code::BadParams, "rows, columns: only a terminal has a size; ask for pty");
        }
        let size = (self.rows.unwrap_or(TERMINAL.0), self.columns.unwrap_or(TERMINAL.1));
        Ok(Program { terminal: self.pty.then_some(size), ..self.program(self.timeout)? })
    }

    fn program(&self, seconds: Option<f64>) -> Result<Program<'_>, Failure> {
        if let Some(seconds) = seconds.filter(|seconds| !(*seconds > 0.0 && *seconds <= MAX_TIMEOUT_S)) {
            let message = format!("timeout: {seconds} is not above 0 and at most {MAX_TIMEOUT_S} seconds");
            return fail(Code::BadParams, message);
        }
        let texts = [&self.program].into_iter().chain(&self.args).chain(self.env.keys()).chain(self.env.values());
        if self.program.is_empty() || texts.into_iter().any(|text| text.contains('\0')) {
            return fail(Code::BadParams, "program: it must not be empty, and no text may hold a NUL");
        }
        if self.uid == Some(u32::MAX) {
            return fail(
                Code::BadParams,
                format!("uid: {} stands for no user (setuid(2)); the last is {}", u32::MAX, u32::MAX - 1),
            );
        }
        if self.env.keys().any(|key| key.is_empty() || key.contains('=')) {
            return fail(Code::BadParams, "env: a name must not be empty or hold '='");
        }
        Ok(Program {
            path: &self.program,
            args: &self.args,
            env: &self.env,
            cwd: self.cwd.as_deref().unwrap_or("/"),
            timeout: seconds.map(Duration::from_secs_f64),
            uid: self.uid.unwrap_or(ROOT),
            terminal: None,
        })
    }
}

pub fn execute(params: Value, identity: &Identity, job: &Job) -> Outcome {
    let mut params: Params = read(params)?;
    if params.pty || params.rows.is_some() || params.columns.is_some() {
        return fail(Code::BadParams, "pty, rows, columns: only a stream runs on a terminal");
    }
    let max_output = params.max_output_bytes.unwrap_or(DEFAULT_OUTPUT);
    if max_output > MAX_OUTPUT {
        return fail(Code::BadParams, format!("max_output_bytes: {max_output} is over {MAX_OUTPUT}"));
    }
    let stdin = match (params.stdin.take(), params.stdin_base64.take()) {
        (Some(_), Some(_)) => return fail(Code::BadParams, "stdin: give either stdin or stdin_base64"),
        (Some(text), None) => text.into_bytes(),
        (None, Some(text)) => BASE64_STANDARD
            .decode(text)
            .map_err(|e| Failure { code: Code::BadParams, message: format!("stdin_base64: {e}") })?,
        (None, None) => Vec::new(),
    };
    let program = params.program(Some(params.timeout.unwrap_or(DEFAULT_TIMEOUT_S)))?;
    let begun = Instant::now();
    let mut said = Collected::new(stdin, max_output);
    let ended = program.start(identity, job, !said.stdin.is_empty())?.drive(&mut said)?;
    let mut result = ended_json(ended, begun.elapsed());
    for (name, stream) in ["stdout", "stderr"].into_iter().zip(said.streams) {
        result[format!("{name}_truncated")] = json!(stream.truncated);
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

/// How a program ended.
pub fn ended_json(ended: Ended, duration: Duration) -> Value {
    let (code, signal) = match ended {
        Ended::Code(code) => (Some(code), None),
        Ended::Signal(signal) => (None, Some(signal)),
    };
    json!({"exit_code": code, "signal": signal, "duration_seconds": duration.as_secs_f64()})
}
