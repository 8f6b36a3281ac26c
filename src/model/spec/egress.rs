//! Where a connected VM may go.

use std::fmt;

use crate::error::{Error, Result};
use crate::model::Ipv4Net;

/// One entry of an allow-list, as in `93.184.216.0/24`, `10.0.0.7:443`, `example.com:443` or `*.example.com`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressRule {
    pub to: EgressTarget,
    /// TCP and UDP to this port; `None`: everything.
    pub port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EgressTarget {
    Net(Ipv4Net),
    Name(NamePattern),
}

/// A host name, or with `*.` all names below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern {
    below: bool,
    /// In lower case, the top level last.
    labels: Vec<String>,
}

impl EgressRule {
    /// # Errors
    /// [`Error::InvalidValue`] naming `egress`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || Error::InvalidValue {
            field: "egress".into(),
            value: format!("{text:?}"),
            allowed: "an IPv4 address or network, a host name or *.NAME, each with :PORT or without".into(),
        };
        let (target, port) = match text.rsplit_once(':') {
            Some((target, port)) => (target, Some(parse_port(port).ok_or_else(bad)?)),
            None => (text, None),
        };
        let net = Ipv4Net::parse(target).map(EgressTarget::Net);
        let to = net.or_else(|| NamePattern::parse(target).map(EgressTarget::Name)).ok_or_else(bad)?;
        Ok(Self { to, port })
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            EgressTarget::Net(net) => write!(f, "{net}")?,
            EgressTarget::Name(name) => write!(f, "{name}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| plain && *port > 0)
}

impl NamePattern {
    fn parse(text: &str) -> Option<Self> {
        let (below, name) = text.strip_prefix("*.").map_or((false, text), |name| (true, name));
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let label = |label: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            (1..=63).contains(&label.len()) && label.bytes().all(plain) && !label.starts_with('-')
        };
        // No top-level domain is a number: what looks like an address but is none is not a name either.
        let last = name.rsplit('.').next().unwrap_or_default();
        let is_name = name.len() <= 253 && name.split('.').all(label) && !last.bytes().all(|b| b.is_ascii_digit());
        is_name.then(|| Self { below, labels: name.split('.').map(str::to_owned).collect() })
    }

    /// Whether the name with these labels, the top level last and the root left out, is meant. Labels are compared one by
    /// one: a label of DNS may itself hold a dot.
    #[must_use]
    pub fn matches(&self, labels: &[&[u8]]) -> bool {
        let Some(above) = labels.len().checked_sub(self.labels.len()) else { return false };
        let same = |(label, own): (&&[u8], &String)| label.eq_ignore_ascii_case(own.as_bytes());
        (above > 0) == self.below && labels.iter().skip(above).zip(&self.labels).all(same)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.labels.join("."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NamePattern {
        NamePattern::parse(text).unwrap()
    }

    #[test]
    fn test_parse_every_form_is_understood() {
        let net = |text| EgressTarget::Net(Ipv4Net::parse(text).unwrap());
        for (text, to, port) in [
            ("10.1.0.0/16", net("10.1.0.0/16"), None),
            ("10.1.2.3:8443", net("10.1.2.3"), Some(8443)),
            ("10.1.0.0/16:53", net("10.1.0.0/16"), Some(53)),
            ("Example.COM", EgressTarget::Name(name("example.com")), None),
            ("*.example.com:443", EgressTarget::Name(name("*.example.com")), Some(443)),
        ] {
            let rule = EgressRule::parse(text).unwrap();
            assert_eq!(rule, EgressRule { to, port }, "{text}");
            assert_eq!(rule.to_string(), text.to_ascii_lowercase());
        }
    }

    #[test]
    fn test_parse_what_is_neither_names_the_field_and_the_entry() {
        for bad in
            ["", "*", "*.", "a b", "300.1.1.1", "10.0.0.1/8", "host:0", "host:65536", "host:+1", "::1", "-a.b", "a..b"]
        {
            let message = EgressRule::parse(bad).unwrap_err().to_string();
            assert!(message.starts_with("egress=") && message.contains(&format!("{bad:?}")), "{message}");
        }
    }

    fn is_meant(pattern: &str, labels: &[&str]) -> bool {
        name(pattern).matches(&labels.iter().map(|label| label.as_bytes()).collect::<Vec<_>>())
    }

    #[test]
    fn test_matches_takes_the_name_or_what_is_below_and_nothing_else() {
        assert!(is_meant("example.com", &["Example", "COM"]) && !is_meant("example.com", &["a", "example", "com"]));
        let below = |labels: &[&str]| is_meant("*.example.com", labels);
        assert!(below(&["a", "example", "com"]) && below(&["a", "b", "example", "com"]));
        assert!(!below(&["example", "com"]) && !below(&["badexample", "com"]) && !below(&["com"]) && !below(&[]));
    }

    #[test]
    fn test_matches_a_label_that_holds_a_dot_is_one_label() {
        assert!(!is_meant("*.wild.test", &["secret-data.wild", "test"]));
        assert!(!is_meant("a.test", &["a.test"]) && !is_meant("*.test", &["a.test"]));
        assert!(is_meant("*.wild.test", &["secret.data", "wild", "test"]));
    }

    #[test]
    fn test_display_is_what_was_written() {
        assert_eq!(name("*.Example.com").to_string(), "*.example.com");
    }
}
