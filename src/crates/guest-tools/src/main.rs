//! What reads strangers' documents in the guest: HTML and HTTP.
//!
//! Architecture invariant: one request, one process. It is started by the agent with limits on memory and time, reads a
//! [`Task`] from stdin and writes a response to stdout. What a hostile document makes of it ends with it.
#![forbid(unsafe_code)]

mod fetch;
mod render;
mod resolve;

use std::io::{self, Read, Write};

use microvm_protocol::json::{self, Unwritten};
use microvm_protocol::message::{fail, read_params, Code, Failure, Response};
use serde::Deserialize;
use serde_json::Value;

pub type Outcome = Result<Value, Failure>;

/// What the agent writes to stdin.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Task {
    action: String,
    params: Value,
    has_network: bool,
    /// How long the response may be, in bytes of JSON.
    max_response: usize,
}

fn main() -> io::Result<()> {
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text)?;
    let task: Task = serde_json::from_slice(&text)?;
    drop(text);
    let max = task.max_response;
    let response = match perform(task) {
        Ok(result) => Response::Ok { result },
        Err(error) => Response::Error { error },
    };
    let body = match json::encode(&response, || max) {
        Ok(body) => body,
        Err(Unwritten::TooLong { limit }) => {
            let error = Failure { code: Code::TooLarge, message: format!("the answer has over {limit} bytes of JSON") };
            serde_json::to_vec(&Response::Error { error })?
        }
        Err(Unwritten::Invalid(error)) => return Err(error.into()),
    };
    io::stdout().write_all(&body)
}

fn perform(task: Task) -> Outcome {
    match task.action.as_str() {
        "render_page" => render::render_page(task.params, task.has_network, task.max_response),
        "process_request" => fetch::process_request(task.params, task.has_network),
        other => fail(Code::UnknownAction, format!("there is no action {other:?} here")),
    }
}
