//! The closed sets of names that callers use.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

macro_rules! named {
    ($(#[$doc:meta])* $type:ident, $field:literal { $($member:ident = $name:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $type { $($member),+ }

        impl $type {
            pub const ALL: &'static [$type] = &[$($type::$member),+];

            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $($type::$member => $name),+ }
            }

            /// Accepts the name in any case, with `-` or `_`.
            ///
            /// # Errors
            /// [`Error::InvalidValue`] listing the allowed names.
            pub fn parse(text: &str) -> Result<Self> {
                let wanted = text.to_ascii_lowercase().replace('_', "-");
                Self::ALL.iter().copied().find(|m| m.as_str().replace('_', "-") == wanted).ok_or_else(|| Error::InvalidValue {
                    field: $field.into(),
                    value: format!("{text:?}"),
                    allowed: format!("one of {}", Self::ALL.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(", ")),
                })
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

named!(
    /// A VMM that we can drive.
    Backend, "backend" { Firecracker = "firecracker", Qemu = "qemu", CloudHypervisor = "cloud-hypervisor" }
);
named!(
    /// What of the browser a VM holds.
    IsolationType, "isolation_type" {
        BrowserTab = "browser_tab", Extension = "extension", Session = "session", Plugin = "plugin",
    }
);
named!(
    /// The boundary a VM got, weakest first. QEMU does not call TCG a security boundary: there the jail is.
    Grade, "min_isolation" { Emulated = "emulated", Hardware = "hardware" }
);
named!(
    /// How a VMM is confined: as far as this host can, wholly or not at all, or on trial.
    JailMode, "jail" { Default = "default", Strict = "strict", Audit = "audit" }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_any_case_and_separator_finds_the_member() {
        for text in ["cloud-hypervisor", "CLOUD_HYPERVISOR", "Cloud-Hypervisor"] {
            assert_eq!(Backend::parse(text).unwrap(), Backend::CloudHypervisor);
        }
        assert_eq!(IsolationType::parse("BROWSER_TAB").unwrap(), IsolationType::BrowserTab);
    }

    #[test]
    fn test_parse_unknown_name_lists_the_allowed_ones() {
        let message = Backend::parse("xen").unwrap_err().to_string();
        assert!(message.contains("\"xen\"") && message.contains("firecracker, qemu, cloud-hypervisor"), "{message}");
    }

    #[test]
    fn test_grade_hardware_is_above_emulated() {
        assert!(Grade::Hardware > Grade::Emulated);
    }
}
