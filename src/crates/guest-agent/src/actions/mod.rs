//! What the host may ask for.

mod custom;
mod execute;
mod fetch;
mod files;
mod render;
mod system;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use microvm_protocol::identity::Identity;
use microvm_protocol::message::{Code, Failure};
use serde::de::DeserializeOwned;
use serde_json::{json, Map, Value};

use crate::children::Spawned;

pub type Outcome = Result<Value, Failure>;

/// The actions that every guest has; `shutdown` answers before it happens.
const BUILT_IN: [&str; 11] = [
    "exec",
    "execute",
    "list_actions",
    "ping",
    "process_request",
    "read_file",
    "render_page",
    "set_clock",
    "shutdown",
    "system_info",
    "write_file",
];

pub fn fail<T>(code: Code, message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { code, message: message.into() })
}

/// Reads an action's parameters; the error names the field.
pub fn read<T: DeserializeOwned>(params: Value) -> Result<T, Failure> {
    let params = if params.is_null() { Value::Object(Map::new()) } else { params };
    serde_path_to_error::deserialize(params).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        Failure { code: Code::BadParams, message: format!("{place}{}", error.inner()) }
    })
}

/// One request that runs; cancelling it kills the program that it waits for.
#[derive(Default)]
pub struct Job {
    cancelled: AtomicBool,
    program: Mutex<Option<Arc<Spawned>>>,
}

impl Job {
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        if let Some(program) = self.program.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            program.kill();
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    fn runs(&self, program: &Arc<Spawned>) {
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = Some(program.clone());
        // A cancel that came before the program was noted.
        if self.is_cancelled() {
            program.kill();
        }
    }
}

/// The guest as the actions see it.
pub struct Guest {
    identity: Identity,
}

impl Guest {
    pub fn new(identity: Identity) -> Self {
        Self { identity }
    }

    pub fn perform(&self, action: &str, params: Value, job: &Job) -> Outcome {
        match action {
            "ping" => no_params(params).map(|()| json!("pong")),
            "list_actions" => no_params(params).map(|()| json!({"actions": self.actions()})),
            "system_info" => no_params(params).and_then(|()| system::info(&self.identity)),
            "execute" | "exec" => self.execute(params, job),
            "read_file" => files::read_file(params),
            "write_file" => files::write_file(params),
            "render_page" => render::render_page(params, self.identity.network.is_some()),
            "process_request" => fetch::process_request(params, self.identity.network.is_some()),
            "set_clock" => system::set_clock(params),
            "shutdown" => no_params(params).map(|()| json!({})),
            other => match custom::find(other) {
                Some(path) => custom::run(&path, &params, &self.identity, job),
                None => {
                    let known = self.actions().join(", ");
                    let shown: String = other.chars().take(80).collect();
                    fail(Code::UnknownAction, format!("there is no action {shown:?}; there are {known}"))
                }
            },
        }
    }

    fn actions(&self) -> Vec<String> {
        let mut names: Vec<String> = BUILT_IN.iter().map(|name| (*name).to_owned()).collect();
        names.extend(custom::names());
        names.sort();
        names.dedup();
        names
    }

    /// `execute` with an `action` and no `program` means that action: the form of the legacy callers.
    fn execute(&self, params: Value, job: &Job) -> Outcome {
        match redirect(params) {
            Redirect::To(action, params) if action != "execute" && action != "exec" => {
                self.perform(&action, params, job)
            }
            Redirect::To(action, _) => fail(Code::BadParams, format!("action: {action:?} needs a program")),
            Redirect::Bad(message) => fail(Code::BadParams, message),
            Redirect::None(params) => execute::execute(params, &self.identity, job),
        }
    }
}

fn no_params(params: Value) -> Result<(), Failure> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct None {}
    read::<None>(params).map(|None {}| ())
}

enum Redirect {
    To(String, Value),
    Bad(String),
    None(Value),
}

fn redirect(params: Value) -> Redirect {
    let mut map = match params {
        Value::Object(map) if map.contains_key("action") && !map.contains_key("program") => map,
        other => return Redirect::None(other),
    };
    let action = match map.remove("action") {
        Some(Value::String(action)) => action,
        other => return Redirect::Bad(format!("action: it must be a string, not {}", other.unwrap_or(Value::Null))),
    };
    let inner = map.remove("params").or_else(|| map.remove("data"));
    match (inner, map.is_empty()) {
        (Some(inner), true) => Redirect::To(action, inner),
        (Some(_), false) => Redirect::Bad("give the action's parameters either in \"params\" or beside it".into()),
        (None, _) => Redirect::To(action, Value::Object(map)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_redirect_the_descriptions_form_is_the_action() {
        let Redirect::To(action, params) = redirect(json!({"action": "render_page"})) else { panic!() };
        assert_eq!((action.as_str(), params), ("render_page", json!({})));
        let Redirect::To(_, params) = redirect(json!({"action": "x", "data": {"a": 1}})) else { panic!() };
        assert_eq!(params, json!({"a": 1}));
        let Redirect::To(_, params) = redirect(json!({"action": "x", "html": "h"})) else { panic!() };
        assert_eq!(params, json!({"html": "h"}));
    }

    #[test]
    fn test_redirect_a_program_is_none() {
        assert!(matches!(redirect(json!({"program": "ls", "action": "x"})), Redirect::None(_)));
        assert!(matches!(redirect(json!({"action": 3})), Redirect::Bad(_)));
    }

    #[test]
    fn test_read_unknown_and_mistyped_fields_are_named() {
        let message = |params| files::write_file(params).unwrap_err().message;
        assert!(message(json!({"pth": "x"})).contains("pth"));
        assert!(message(json!({"path": 3, "data": "x"})).contains("path"));
    }
}
