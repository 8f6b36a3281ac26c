//! What the host may ask for.

mod connect;
mod custom;
mod execute;
mod files;
mod kernel_log;
mod place;
mod program;
mod stream;
mod system;
mod tool;
mod transfer;

use microvm_protocol::message::{
    fail, read_params, refuse_internal, Code, Failure, Request, Response, ADOPT, CONNECT, DOWNLOAD, STREAM, UPLOAD,
};
use serde_json::{json, Value};

use crate::identity::GuestIdentity;
use crate::job::Job;

pub use kernel_log::watch as watch_kernel_log;

pub type Outcome = Result<Value, Failure>;

/// What a request is answered with.
pub enum Answer {
    Result(Value),
    /// A whole response of a program of ours, as it is sent.
    Encoded(Vec<u8>),
}

/// The actions that every guest has; `shutdown` answers before it happens.
const BUILT_IN: [&str; 12] = [
    "exec",
    "execute",
    "health",
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

/// The guest as the actions see it.
pub struct Guest {
    guest: GuestIdentity,
}

impl Guest {
    pub fn new(guest: GuestIdentity) -> Self {
        Self { guest }
    }

    /// Takes on all names, unless that was done.
    pub fn settle(&self) -> Result<(), Failure> {
        self.guest.settle().map_err(|message| Failure { code: Code::IoError, message })
    }

    /// The answer to a request that is done faster than it is handed to another thread.
    pub fn at_once(&self, request: &Request) -> Option<Response> {
        let quick = request.action == "ping" && request.params.is_null() && !request.stream;
        quick.then(|| Response::Ok { result: json!("pong") })
    }

    pub fn perform(&self, request: Request, job: &Job) -> Result<Answer, Failure> {
        let Request { action, params, stream } = request;
        if action != "shutdown" {
            self.settle()?;
        }
        match action.as_str() {
            STREAM | UPLOAD | DOWNLOAD | CONNECT if !stream => {
                fail(Code::BadParams, format!("{action} needs a stream of the host: use the method of that name"))
            }
            STREAM => stream::stream(params, &self.guest.identity, job).map(Answer::Result),
            UPLOAD => transfer::upload(params, job).map(Answer::Result),
            DOWNLOAD => transfer::download(params, job).map(Answer::Result),
            CONNECT => connect::connect(params, job).map(Answer::Result),
            action => self.act(action, params, job),
        }
    }

    fn act(&self, action: &str, params: Value, job: &Job) -> Result<Answer, Failure> {
        let identity = &self.guest.identity;
        let outcome = match action {
            "render_page" | "process_request" => return tool::run(action, params, identity, job),
            "execute" | "exec" => return self.execute(params, job),
            "ping" => no_params(params).map(|()| json!("pong")),
            "list_actions" => no_params(params).map(|()| json!({"actions": self.actions()})),
            "system_info" => no_params(params).and_then(|()| system::info(&self.guest)),
            "read_file" => files::read_file(params, job),
            "write_file" => files::write_file(params, job),
            "health" => no_params(params).and_then(|()| system::health()),
            "set_clock" => system::set_clock(params),
            ADOPT => system::adopt(params, &self.guest),
            "shutdown" => no_params(params).map(|()| json!({})),
            other => match custom::find(other) {
                Some(path) => custom::run(&path, &params, identity, job),
                None => {
                    let known = self.actions().join(", ");
                    let shown: String = other.chars().take(80).collect();
                    fail(Code::UnknownAction, format!("there is no action {shown:?}; there are {known}"))
                }
            },
        };
        outcome.map(Answer::Result)
    }

    fn actions(&self) -> Vec<String> {
        let mut names: Vec<String> = BUILT_IN.iter().map(|name| (*name).to_owned()).collect();
        names.extend(custom::names());
        names.sort();
        names.dedup();
        names
    }

    /// `execute` with an `action` and no `program` means that action: the form of the legacy callers.
    fn execute(&self, params: Value, job: &Job) -> Result<Answer, Failure> {
        match redirect(params) {
            Redirect::To(action, params) if action != "execute" && action != "exec" => match refuse_internal(&action) {
                Some(failure) => Err(failure),
                None => self.act(&action, params, job),
            },
            Redirect::To(action, _) => fail(Code::BadParams, format!("action: {action:?} needs a program")),
            Redirect::Bad(message) => fail(Code::BadParams, message),
            Redirect::None(params) => execute::execute(params, &self.guest.identity, job).map(Answer::Result),
        }
    }
}

fn no_params(params: Value) -> Result<(), Failure> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct None {}
    read_params::<None>(params).map(|None {}| ())
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
        let message = |params| files::write_file(params, &place::tests::Impatient).unwrap_err().message;
        assert!(message(json!({"pth": "x"})).contains("pth"));
        assert!(message(json!({"path": 3, "data": "x"})).contains("path"));
    }
}
