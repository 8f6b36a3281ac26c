//! What an attached client asks of the process that has the VM, and what that answers.

use std::future::Future;
use std::pin::Pin;

use microvm_protocol::message::{Failure, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// What the guest cannot do for itself. On the wire it stands where a request to the guest has its `action`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case", deny_unknown_fields)]
pub enum Operation {
    /// What a client needs to know before all else.
    Describe,
    /// What there is to say without asking the guest.
    Summary,
    Info,
    Health,
    /// The ports that the owner has published.
    Ports,
    Pause,
    Resume,
    Snapshot {
        name: String,
    },
    Suspend,
    Stop,
    /// As [`Operation::Stop`], without asking the guest.
    Kill,
    /// Removes every trace of the VM.
    Destroy,
}

impl Operation {
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Operation::Describe => "describe",
            Operation::Summary => "summary",
            Operation::Info => "info",
            Operation::Health => "health",
            Operation::Ports => "ports",
            Operation::Pause => "pause",
            Operation::Resume => "resume",
            Operation::Snapshot { .. } => "snapshot",
            Operation::Suspend => "suspend",
            Operation::Stop => "stop",
            Operation::Kill => "kill",
            Operation::Destroy => "destroy",
        }
    }
}

/// Does what an [`Operation`] says; one that was begun is done to its end, whatever becomes of its client.
pub trait Owner: Send + Sync {
    fn operate(&self, operation: Operation) -> Pin<Box<dyn Future<Output = Result<Value>> + Send>>;
}

/// A [`Response`], or what kept the owner from having one. A guest never says `refused`: its answers are read by the owner.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum OwnerAnswer {
    Ok { result: Value },
    Error { error: Failure },
    Refused { code: String, message: String, details: Value },
}

impl From<Result<Response>> for OwnerAnswer {
    fn from(answer: Result<Response>) -> Self {
        match answer {
            Ok(Response::Ok { result }) => OwnerAnswer::Ok { result },
            Ok(Response::Error { error }) => OwnerAnswer::Error { error },
            Err(error) => OwnerAnswer::Refused {
                code: error.code().to_owned(),
                message: error.to_string(),
                details: error.details(),
            },
        }
    }
}

impl From<OwnerAnswer> for Result<Response> {
    fn from(answer: OwnerAnswer) -> Self {
        match answer {
            OwnerAnswer::Ok { result } => Ok(Response::Ok { result }),
            OwnerAnswer::Error { error } => Ok(Response::Error { error }),
            OwnerAnswer::Refused { code, message, details } => Err(Error::of_owner(&code, message, details)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_operation_name_is_its_json_and_anything_beside_is_refused() {
        for operation in [Operation::Summary, Operation::Kill, Operation::Snapshot { name: "a".into() }] {
            assert_eq!(serde_json::to_value(&operation).unwrap()["operation"], operation.name());
        }
        assert!(serde_json::from_value::<Operation>(json!({"operation": "explode"})).is_err());
        assert!(serde_json::from_value::<Operation>(json!({"operation": "snapshot", "name": "a", "x": 1})).is_err());
    }

    #[test]
    fn test_owner_answer_keeps_code_and_details_of_an_error() {
        let refused = Error::ChannelTimeout { vm_id: "a".into(), what: "x".into(), limit_s: 1.0, sent: true };
        let said = serde_json::to_vec(&OwnerAnswer::from(Err(refused.clone()))).unwrap();
        let heard: Result<Response> = serde_json::from_slice::<OwnerAnswer>(&said).unwrap().into();
        let heard = heard.unwrap_err();
        assert_eq!((heard.code(), heard.details()), (refused.code(), refused.details()));
        assert_eq!(heard.to_string(), refused.to_string());
        assert_eq!(Error::of_owner("of a later version", String::new(), json!({})).code(), "host_error");
    }
}
