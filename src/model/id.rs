//! The names of VMs and templates.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with a dot: safe as a file name, a host name's source and in a log.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

impl VmId {
    pub const MAX_LENGTH: usize = 64;

    /// # Errors
    /// [`Error::InvalidValue`] naming `vm_id`.
    pub fn parse(text: &str) -> Result<Self> {
        check("vm_id", text).map(|()| Self(text.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name that the guest gets as its host name: RFC 1123 allows no underscore and 63 characters.
    #[must_use]
    pub fn hostname(&self) -> String {
        let name: String = self.0.chars().take(63).map(|c| if c == '_' || c == '.' { '-' } else { c }).collect();
        let name = name.trim_matches('-');
        if name.is_empty() {
            "microvm".into()
        } else {
            name.to_owned()
        }
    }
}

/// The name of a template of the user's own, of the same letters as a VM's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateName(String);

impl TemplateName {
    /// # Errors
    /// [`Error::InvalidValue`] naming `field`.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        check(field, text).map(|()| Self(text.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VmId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl TryFrom<String> for TemplateName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse("template", &text)
    }
}

impl From<VmId> for String {
    fn from(vm_id: VmId) -> Self {
        vm_id.0
    }
}

impl From<TemplateName> for String {
    fn from(name: TemplateName) -> Self {
        name.0
    }
}

fn check(field: &str, text: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let fits = (1..=VmId::MAX_LENGTH).contains(&text.len());
    if fits && text.chars().all(allowed) && !text.starts_with(['.', '-']) {
        return Ok(());
    }
    let shown: String = text.chars().take(80).collect();
    Err(Error::InvalidValue {
        field: field.into(),
        value: format!("{shown:?}"),
        allowed: "1 to 64 of the letters, digits, '.', '_' and '-', beginning with a letter, digit or '_'".into(),
    })
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn test_vm_id_bad_forms_are_refused() {
        for bad in ["", "a/b", "..", ".a", "-a", "a b", "ä", "a\0b", &"x".repeat(65)] {
            assert!(VmId::parse(bad).is_err(), "{bad:?}");
            let message = TemplateName::parse("template", bad).unwrap_err().to_string();
            assert!(message.starts_with("template="), "{message}");
        }
    }

    proptest! {
        #[test]
        fn test_vm_id_hostname_is_rfc1123(id in "[A-Za-z0-9_][A-Za-z0-9._-]{0,63}") {
            let name = VmId::parse(&id).unwrap().hostname();
            prop_assert!((1..=63).contains(&name.len()));
            prop_assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
            prop_assert!(!name.starts_with('-') && !name.ends_with('-'));
        }
    }
}
