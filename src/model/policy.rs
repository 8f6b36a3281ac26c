//! What a manager does with VMs of one isolation type by itself: the configuration's `policies`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::config::{seconds, wrong_type};
use super::IsolationType;
use crate::error::{Error, Result};

const KEYS: &str = "on_failure, deadline_s, idle_limit_s";

/// What becomes of a VM that died or hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// It stays in ERROR, and is removed after `cleanup_interval_s`; one that hangs is left alone.
    #[default]
    Leave,
    /// The same VM is started again, with a new disk.
    Restart,
    /// Another VM of the same kind takes its place, under another name; from the pool if that has one.
    Replace,
}

impl OnFailure {
    const ALL: [Self; 3] = [Self::Leave, Self::Restart, Self::Replace];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            OnFailure::Leave => "leave",
            OnFailure::Restart => "restart",
            OnFailure::Replace => "replace",
        }
    }
}

/// The policy of one isolation type.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Policy {
    pub on_failure: OnFailure,
    /// How long after its start a VM is destroyed, seconds.
    pub deadline_s: Option<f64>,
    /// How long a VM may be used by nobody before it is destroyed, seconds.
    pub idle_limit_s: Option<f64>,
}

/// The policies of the types that have one other than the default.
pub type Policies = BTreeMap<IsolationType, Policy>;

/// Reads `{"browser_tab": {"on_failure": "restart", "deadline_s": 3600, "idle_limit_s": 600}, ...}`.
pub fn policies(key: &str, value: &Value) -> Result<Policies> {
    let allowed = "a dict of isolation types and their policies";
    let types = match value {
        Value::Null => return Ok(Policies::new()),
        Value::Object(types) => types,
        other => return Err(wrong_type(key, other, allowed)),
    };
    let mut out = Policies::new();
    for (name, entry) in types {
        let field = format!("config[{key:?}][{name:?}]");
        let isolation_type = IsolationType::parse(name).map_err(|error| match error {
            Error::InvalidValue { value, allowed, .. } => {
                Error::InvalidValue { field: format!("config[{key:?}]"), value, allowed }
            }
            other => other,
        })?;
        let Value::Object(entry) = entry else { return Err(wrong_type(&field, entry, "a dict")) };
        out.insert(isolation_type, policy(&field, entry)?);
    }
    Ok(out)
}

fn policy(name: &str, entry: &Map<String, Value>) -> Result<Policy> {
    let mut policy = Policy::default();
    for (key, value) in entry {
        let field = format!("{name}[{key:?}]");
        let optional = |value: &Value| match value {
            Value::Null => Ok(None),
            value => seconds(&field, value).map(Some),
        };
        match key.as_str() {
            "on_failure" => policy.on_failure = on_failure(&field, value)?,
            "deadline_s" => policy.deadline_s = optional(value)?,
            "idle_limit_s" => policy.idle_limit_s = optional(value)?,
            key => {
                let value = format!("{{{key:?}: ...}}");
                return Err(Error::InvalidValue { field: name.into(), value, allowed: format!("the keys {KEYS}") });
            }
        }
    }
    Ok(policy)
}

fn on_failure(field: &str, value: &Value) -> Result<OnFailure> {
    let names = OnFailure::ALL.map(OnFailure::as_str).join(", ");
    let text = value.as_str().ok_or_else(|| wrong_type(field, value, &format!("one of {names}")))?;
    let found = OnFailure::ALL.into_iter().find(|what| what.as_str() == text.to_ascii_lowercase());
    found.ok_or_else(|| Error::InvalidValue {
        field: field.into(),
        value: format!("{text:?}"),
        allowed: format!("one of {names}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_policies_of_a_type_are_read() {
        let value = json!({"BROWSER_TAB": {"on_failure": "Restart", "idle_limit_s": 60, "deadline_s": null}});
        let read = policies("policies", &value).unwrap();
        let wanted = Policy { on_failure: OnFailure::Restart, deadline_s: None, idle_limit_s: Some(60.0) };
        assert_eq!(read, Policies::from([(IsolationType::BrowserTab, wanted)]));
        assert_eq!(policies("policies", &Value::Null).unwrap(), Policies::new());
    }

    #[test]
    fn test_policies_malformed_are_named() {
        for (value, expected) in [
            (json!(3), "config[\"policies\"] must be a dict"),
            (json!({"tab": {}}), "config[\"policies\"]=\"tab\""),
            (json!({"plugin": 3}), "config[\"policies\"][\"plugin\"] must be a dict"),
            (json!({"plugin": {"on_failure": "retry"}}), "leave, restart, replace"),
            (json!({"plugin": {"deadline_s": 0}}), "config[\"policies\"][\"plugin\"][\"deadline_s\"]=0"),
            (json!({"plugin": {"idle_s": 1}}), "on_failure, deadline_s, idle_limit_s"),
        ] {
            let message = policies("policies", &value).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
