//! Programs on request: fed, watched, and answered with what they said.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::prelude::{Engine, BASE64_STANDARD};
use microvm_protocol::identity::Identity;
use microvm_protocol::message::{Code, Failure};
use serde::Deserialize;
use serde_json::{json, Value};

use super::program::{Collected, Program, ROOT};
use super::{fail, read_params, Outcome};
use crate::children::Ended;
use crate::job::Job;
use crate::memory;

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
        for (field, size) in [("rows", self.rows), ("columns", self.columns)] {
            if size == Some(0) {
                return fail(Code::BadParams, format!("{field}: 0 is not between 1 and 65535"));
            }
        }
        let size = (self.rows.unwrap_or(TERMINAL.0), self.columns.unwrap_or(TERMINAL.1));
        Ok(Program { terminal: self.pty.then_some(size), ..self.program(self.timeout)? })
    }

    /// The first field that holds a NUL.
    fn with_nul(&self) -> Option<String> {
        let has_nul = |text: &String| text.contains('\0');
        let argument = || self.args.iter().position(has_nul).map(|index| format!("args[{index}]"));
        let variable = || self.env.iter().any(|(name, value)| has_nul(name) || has_nul(value));
        if has_nul(&self.program) {
            return Some("program".into());
        }
        if self.cwd.as_ref().is_some_and(has_nul) {
            return Some("cwd".into());
        }
        argument().or_else(|| variable().then(|| "env".into()))
    }

    fn program(&self, seconds: Option<f64>) -> Result<Program<'_>, Failure> {
        if let Some(seconds) = seconds.filter(|seconds| !(*seconds > 0.0 && *seconds <= MAX_TIMEOUT_S)) {
            let message = format!("timeout: {seconds} is not above 0 and at most {MAX_TIMEOUT_S} seconds");
            return fail(Code::BadParams, message);
        }
        if self.program.is_empty() {
            return fail(Code::BadParams, "program: it must not be empty");
        }
        if let Some(field) = self.with_nul() {
            return fail(Code::BadParams, format!("{field}: it holds a NUL, which no argument of a program can"));
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
            tool: None,
        })
    }
}

pub fn execute(params: Value, identity: &Identity, job: &Job) -> Outcome {
    let mut params: Params = read_params(params)?;
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
    let _promise = memory::afford(2 * max_output as u64, "max_output_bytes: as much of both outputs")?;
    let mut said = Collected::new(stdin, max_output);
    let ended = program.start(identity, job, !said.stdin.is_empty())?.drive(&mut said)?;
    let mut result = ended_json(ended, begun.elapsed());
    for (name, stream) in ["stdout", "stderr"].into_iter().zip(said.streams) {
        result[format!("{name}_truncated")] = json!(stream.truncated);
        result[name] = Value::String(match String::from_utf8(stream.bytes) {
            Ok(text) => text,
            Err(error) => {
                let (bytes, at) = (error.as_bytes(), error.utf8_error());
                // Each byte may become a replacement character of three, and four thirds of one beside them.
                let _promise = memory::afford(5 * bytes.len() as u64, name)?;
                // A cut in the middle of a character is no reason for a second copy.
                if !stream.truncated || at.error_len().is_some() {
                    result[format!("{name}_base64")] = Value::String(BASE64_STANDARD.encode(bytes));
                }
                String::from_utf8_lossy(bytes).into_owned()
            }
        });
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(params: Value) -> String {
        let params: Params = read_params(params).unwrap();
        params.streamed().err().unwrap().message
    }

    #[test]
    fn test_program_a_nul_is_blamed_on_the_field_that_holds_it() {
        for (params, field) in [
            (json!({"program": "a\0"}), "program: "),
            (json!({"program": "a", "cwd": "/\0"}), "cwd: "),
            (json!({"program": "a", "args": ["b", "\0"]}), "args[1]: "),
            (json!({"program": "a", "env": {"A": "\0"}}), "env: "),
            (json!({"program": "a", "env": {"\0": "b"}}), "env: "),
        ] {
            let message = refusal(params);
            assert!(message.starts_with(field) && message.contains("NUL"), "{message}");
        }
    }

    #[test]
    fn test_streamed_a_terminal_without_rows_or_columns_is_refused() {
        assert!(refusal(json!({"program": "a", "pty": true, "rows": 0})).starts_with("rows: 0"));
        assert!(refusal(json!({"program": "a", "pty": true, "columns": 0})).starts_with("columns: 0"));
    }
}
