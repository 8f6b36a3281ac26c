//! Labels: words of its owner's by which a VM is found again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Keys and values that a VM's owner gave it. They change nothing about the VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>")]
pub struct Labels(BTreeMap<String, String>);

/// How many a VM may have, and how many characters are in a key and in a value.
const MAX_LABELS: usize = 64;
const MAX_KEY: usize = 63;
const MAX_VALUE: usize = 256;
/// Characters of a wrong one that are shown.
const SHOWN: usize = 80;

impl Labels {
    /// # Errors
    /// [`Error::InvalidValue`] naming the label that is malformed.
    pub fn parse(pairs: BTreeMap<String, String>) -> Result<Self> {
        if pairs.len() > MAX_LABELS {
            let allowed = format!("at most {MAX_LABELS} labels");
            return Err(Error::InvalidValue { field: "labels".into(), value: pairs.len().to_string(), allowed });
        }
        let shown = |text: &str| format!("{:?}", text.chars().take(SHOWN).collect::<String>());
        for (key, value) in &pairs {
            if !is_key(key) {
                let allowed = format!(
                    "keys of 1 to {MAX_KEY} of the letters, digits, '.', '_', '/' and '-', beginning with a letter or digit"
                );
                return Err(Error::InvalidValue { field: "a key of labels".into(), value: shown(key), allowed });
            }
            if value.chars().count() > MAX_VALUE || value.chars().any(char::is_control) {
                let allowed = format!("at most {MAX_VALUE} characters, no control characters among them");
                return Err(Error::InvalidValue { field: format!("labels[{key:?}]"), value: shown(value), allowed });
            }
        }
        Ok(Self(pairs))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of `wanted` are among these, with the same values.
    #[must_use]
    pub fn contain(&self, wanted: &Self) -> bool {
        wanted.0.iter().all(|(key, value)| self.0.get(key) == Some(value))
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = Error;

    fn try_from(pairs: BTreeMap<String, String>) -> Result<Self> {
        Self::parse(pairs)
    }
}

fn is_key(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte);
    let begins_well = text.starts_with(|first: char| first.is_ascii_alphanumeric());
    begins_well && text.len() <= MAX_KEY && text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Labels> {
        Labels::parse(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn test_parse_the_longest_of_everything_passes() {
        let (key, value) = ("x".repeat(63), "ä".repeat(256));
        let pairs: BTreeMap<_, _> = (0..63).map(|n| (format!("0.a_b/c-{n}"), String::new())).collect();
        let labels = Labels::parse(pairs.into_iter().chain([(key, value)]).collect()).unwrap();
        assert_eq!(serde_json::from_value::<Labels>(serde_json::to_value(&labels).unwrap()).unwrap(), labels);
    }

    #[test]
    fn test_parse_malformed_labels_are_named() {
        let (long_key, long_value) = ("x".repeat(64), "ä".repeat(257));
        for (key, value, named) in [
            ("", "", "a key of labels=\"\""),
            (long_key.as_str(), "", "a key of labels=\"xxx"),
            (".a", "", "a key of labels=\".a\""),
            ("a b", "", "a key of labels=\"a b\""),
            ("ä", "", "a key of labels=\"ä\""),
            ("team", long_value.as_str(), "labels[\"team\"]=\"ää"),
            ("team", "a\nb", "labels[\"team\"]=\"a\\nb\""),
            ("team", "\u{9b}", "labels[\"team\"]="),
        ] {
            let message = parse(&[("good", "good"), (key, value)]).unwrap_err().to_string();
            assert!(message.starts_with(named) && message.chars().count() < 250, "{message}");
        }
        let many = Labels::parse((0..65).map(|n| (n.to_string(), String::new())).collect()).unwrap_err();
        assert_eq!(many.to_string(), "labels=65 is not allowed: at most 64 labels");
    }

    #[test]
    fn test_contain_wants_every_pair_with_its_value() {
        let labels = parse(&[("team", "web"), ("stage", "test")]).unwrap();
        assert!(labels.contain(&Labels::default()) && labels.contain(&parse(&[("team", "web")]).unwrap()));
        assert!(labels.contain(&labels));
        assert!(!labels.contain(&parse(&[("team", "db")]).unwrap()));
        assert!(!labels.contain(&parse(&[("team", "web"), ("owner", "x")]).unwrap()));
    }
}
