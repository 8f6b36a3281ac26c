//! What a user-mode gateway is told: one message, from the manager to the program that is the gateway of one VM.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::model::{EgressRule, MacAddress};

/// A message is a line, and no longer than this, in bytes: an allow-list of names as long as they may be fits.
pub const MAX_USER_NETWORK: u64 = 256 << 10;

/// What the gateway says, each a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UserReport {
    /// It serves.
    Ready,
    /// What it has moved since it began.
    Moved {
        from_vm_bytes: u64,
        to_vm_bytes: u64,
    },
    Warning(String),
}

/// One VM's network as its user-mode gateway sees it. The wire's descriptor comes beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserNetwork {
    pub mac: String,
    pub address: Ipv4Addr,
    pub gateway_mac: String,
    pub gateway: Ipv4Addr,
    /// Whether the gateway answers the VM's questions for names; else the VM asks its servers itself.
    pub is_relayed: bool,
    /// Whom the gateway asks.
    pub resolvers: Vec<IpAddr>,
    /// Where the VM may go; `None`: wherever the policy of all VMs lets it.
    pub egress: Option<Vec<String>>,
    pub bandwidth_mbps: u64,
}

impl UserNetwork {
    /// The allow-list, as rules; `None` for one of the texts that is no rule: then nothing may be let pass.
    #[must_use]
    pub fn rules(&self) -> Option<Option<Vec<EgressRule>>> {
        let Some(texts) = &self.egress else { return Some(None) };
        let rules: Option<Vec<EgressRule>> = texts.iter().map(|text| EgressRule::parse(text).ok()).collect();
        rules.map(Some)
    }

    /// The VM's and the gateway's MAC addresses.
    #[must_use]
    pub fn macs(&self) -> Option<(MacAddress, MacAddress)> {
        Some((MacAddress::parse(&self.mac)?, MacAddress::parse(&self.gateway_mac)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_rules_an_entry_that_is_none_lets_nothing_pass() {
        let network = |egress: Option<&[&str]>| UserNetwork {
            mac: "52:54:00:12:34:56".into(),
            address: Ipv4Addr::new(10, 0, 0, 2),
            gateway_mac: "02:00:00:00:00:01".into(),
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            is_relayed: false,
            resolvers: Vec::new(),
            egress: egress.map(|texts| texts.iter().map(|text| (*text).to_owned()).collect()),
            bandwidth_mbps: 100,
        };
        assert_eq!(network(None).rules(), Some(None));
        assert_eq!(network(Some(&["a.test:443"])).rules().map(|rules| rules.map(|rules| rules.len())), Some(Some(1)));
        assert_eq!(network(Some(&["a.test:443", "a b"])).rules(), None);
    }
}
