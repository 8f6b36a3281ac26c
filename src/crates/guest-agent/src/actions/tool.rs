//! HTML and HTTP: work for a program of its own with limits, so that no document ends PID 1, and with it the VM.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::Duration;

use microvm_protocol::identity::Identity;
use microvm_protocol::json::{self, Unwritten};
use microvm_protocol::message::{Code, Failure, MAX_MESSAGE};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::program::{Collected, Program, Tool};
use super::{fail, Answer};
use crate::children::Ended;
use crate::job::Job;
use crate::{boot, memory};

/// What the program says of itself and of a failed allocation.
const MAX_SAID: usize = 64 << 10;
/// For parsing and cleaning the largest page, with its own deadline of 5 s for the first of the two, under emulation.
const CPU_SECONDS: u64 = 20;
/// What a fetch of `render_page` may take at most.
const FETCH: Duration = Duration::from_secs(30);
/// As the program has them: what it does not take for a timeout, it refuses.
const MAX_TIMEOUT_S: f64 = 3600.0;
/// nobody's, in every distribution.
const UID: u32 = 65_534;

/// As `microvm-tools` reads it.
#[derive(Serialize)]
struct Task<'a> {
    action: &'a str,
    params: Value,
    has_network: bool,
    max_response: usize,
}

#[derive(Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
enum Response {
    #[serde(rename = "ok")]
    Done {
        #[serde(rename = "result")]
        _result: IgnoredAny,
    },
    Error {
        error: Failure,
    },
}

pub fn run(action: &str, params: Value, identity: &Identity, job: &Job) -> Result<Answer, Failure> {
    let Some(tools) = boot::tools() else {
        return fail(Code::IoError, format!("{action}: this guest has no {}", boot::TOOLS));
    };
    let seconds =
        params.get("timeout").and_then(Value::as_f64).filter(|seconds| (0.0..=MAX_TIMEOUT_S).contains(seconds));
    let fetch = seconds.map_or(FETCH, Duration::from_secs_f64);
    // The answer is in PID 1's memory twice while it is sent.
    let spare = usize::try_from(memory::spare() / 4).unwrap_or(usize::MAX);
    let max_response = spare.min(MAX_MESSAGE);
    let has_network = identity.network.is_some();
    let task = Task { action, params, has_network, max_response };
    let stdin = json::encode(&task, || spare.min(2 * MAX_MESSAGE)).map_err(|error| match error {
        Unwritten::TooLong { .. } => Failure { code: Code::TooLarge, message: format!("params: {error}") },
        Unwritten::Invalid(_) => Failure { code: Code::BadParams, message: format!("params: {error}") },
    })?;
    drop(task);
    let memory_bytes = memory::total() / 2;
    let path = format!("/proc/self/fd/{}", tools.as_raw_fd());
    let program = Program {
        path: &path,
        args: &[],
        env: &BTreeMap::new(),
        cwd: "/",
        timeout: Some(fetch + Duration::from_secs(CPU_SECONDS)),
        uid: UID,
        terminal: None,
        tool: Some(Tool { name: action, memory_bytes, cpu_seconds: CPU_SECONDS }),
    };
    let mut said = Collected::new(stdin, max_response.max(MAX_SAID));
    let ended = program.start(identity, job, true)?.drive(&mut said)?;
    let [stdout, stderr] = said.streams;
    match ended {
        Ended::Code(0) if !stdout.truncated => match serde_json::from_slice(&stdout.bytes) {
            Ok(Response::Done { .. }) => Ok(Answer::Encoded(stdout.bytes)),
            Ok(Response::Error { error }) => Err(error),
            Err(error) => fail(Code::ActionFailed, format!("{action}: its program answered with no response: {error}")),
        },
        ended => Err(failure(action, ended, &String::from_utf8_lossy(&stderr.bytes), memory_bytes)),
    }
}

/// Why it ended without an answer.
fn failure(action: &str, ended: Ended, stderr: &str, memory_bytes: u64) -> Failure {
    let mib = memory_bytes >> 20;
    let (code, message) = match ended {
        // What Rust says before it aborts. SIGKILL: its group's limit, or the kernel looked for memory.
        Ended::Signal(libc::SIGABRT) if stderr.contains("memory allocation of") => {
            (Code::TooLarge, format!("it needs more than {mib} MiB, half of the VM's memory"))
        }
        Ended::Signal(libc::SIGKILL) => (Code::TooLarge, "the VM has not the memory for it".to_owned()),
        Ended::Signal(libc::SIGSEGV) => (Code::TooLarge, "it is nested too deeply".to_owned()),
        Ended::Signal(libc::SIGXCPU) => (Code::Timeout, format!("it took more than {CPU_SECONDS} s of CPU time")),
        Ended::Signal(signal) => (Code::ActionFailed, format!("signal {signal} ended it: {}", tail(stderr))),
        Ended::Code(status) => (Code::ActionFailed, format!("it ended with exit code {status}: {}", tail(stderr))),
    };
    Failure { code, message: format!("{action}: {message}") }
}

fn tail(stderr: &str) -> &str {
    let last = stderr.trim_end().lines().last().unwrap_or_default();
    last.get(..last.floor_char_boundary(300)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_failure_names_what_ran_out() {
        let code = |ended, stderr| failure("render_page", ended, stderr, 64 << 20).code;
        assert_eq!(code(Ended::Signal(libc::SIGABRT), "memory allocation of 9 bytes failed\n"), Code::TooLarge);
        assert_eq!(code(Ended::Signal(libc::SIGKILL), ""), Code::TooLarge);
        assert_eq!(code(Ended::Signal(libc::SIGXCPU), ""), Code::Timeout);
        assert_eq!(code(Ended::Signal(libc::SIGABRT), "thread main panicked"), Code::ActionFailed);
        assert_eq!(code(Ended::Code(1), "no stdin"), Code::ActionFailed);
    }
}
