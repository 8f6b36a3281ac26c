//! Why a VMM did not do what it was asked for.

use std::error::Error;
use std::io;
use std::time::Duration;

use crate::error::Cause;

/// What went wrong with a request to a VMM's control API, or with what it wrote.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// In the VMM's own words.
    #[error("{0}")]
    Refused(String),
    #[error("no answer within {} s", .0.as_secs_f64())]
    NoAnswer(Duration),
    #[error("the VMM closed the connection")]
    Closed,
    #[error("{0}")]
    NotConnected(#[source] Cause),
    #[error("{}", chain(&**.0))]
    Http(#[source] Box<dyn Error + Send + Sync>),
    #[error("{what}: {source}")]
    NotJson { what: &'static str, source: serde_json::Error },
    #[error("{what} has no {part}")]
    Incomplete { what: String, part: &'static str },
    #[error("the process did not stop within {} s", .0.as_secs_f64())]
    NotStopped(Duration),
    #[error("it wrote no counters into its pipe")]
    NoCounters,
    #[error("it was not launched to become a template")]
    NoTemplate,
    #[error("the device state was not transferred; the VMM's stderr says why")]
    NotTransferred,
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl ControlError {
    /// For `map_err`: `what` is not what it should be.
    pub fn not_json(what: &'static str) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| ControlError::NotJson { what, source }
    }

    pub fn http(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        ControlError::Http(error.into())
    }
}

/// hyper's errors say what they are about in their sources.
fn chain(error: &(dyn Error + 'static)) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
