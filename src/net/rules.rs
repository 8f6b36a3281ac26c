//! The rules, as text for `nft -f -`.
//!
//! One process has one table (in the families `inet` and `arp`), and every tap of its VMs is in one interface group. The
//! base chains let go of everything that has nothing to do with the group, and drop whatever of the group is not let
//! pass by name: a tap that is not known yet, or not any more, is cut off. A VM's own part is keyed by the index of its
//! tap, which no other interface ever gets. A VM that sends to a forbidden address is told so (ICMP, rationed); packets
//! whose sender is not proven are dropped without a word, so that refusals hit no third party.

use std::net::Ipv4Addr;

use super::VmNetwork;
use crate::model::{EgressRule, EgressTarget, Ipv4Net};

/// The names of all our tables begin so.
const TABLE_PREFIX: &str = "tw_microvm_";
/// Where no VM may go: this network and this machine, link-local addresses with the clouds' metadata services, those
/// metadata services that lie elsewhere (Alibaba, Azure, Oracle), multicast, what is reserved, broadcast.
const NEVER: [(Ipv4Addr, u8); 7] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(100, 100, 100, 200), 32),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(192, 0, 0, 192), 32),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];
/// Connections that one VM may have with the host (its DNS questions) and beyond: each costs the host an entry in a table
/// that all share.
const MAX_HOST_FLOWS: u32 = 512;
const MAX_FLOWS: u32 = 2048;
/// Addresses that the names of one allow-list may stand for at once.
pub const MAX_PINNED: usize = 2048;
/// Elements that a set of them has room for: the kernel counts those whose time is over until it has collected them.
const PINNED_ROOM: usize = 2 * MAX_PINNED;
/// Refusals that one VM is told by the second: ICMP errors are rationed for the whole host (`icmp_msgs_per_sec`).
const REFUSALS_PER_S: u32 = 20;

fn never() -> impl Iterator<Item = Ipv4Net> {
    NEVER.into_iter().filter_map(|(address, prefix)| Ipv4Net::around(address, prefix))
}

/// Whether no VM may go to `address`.
#[must_use]
pub fn is_never(address: Ipv4Addr) -> bool {
    never().any(|net| net.contains(address))
}

/// An address that a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pinned {
    pub address: Ipv4Addr,
    pub port: Option<u16>,
}

/// The table of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    table: String,
    group: u32,
    refuses_early: bool,
}

impl Rules {
    /// `token` tells one process from another; the group is the same number.
    #[must_use]
    pub fn new(token: u32) -> Self {
        // Group 0 is where every interface begins; iproute2 reads groups as signed.
        let group = (token & 0x7fff_ffff).max(1);
        Self { table: format!("{TABLE_PREFIX}{group:08x}"), group, refuses_early: true }
    }

    /// The same for a kernel that cannot reject before it routes (before 5.9): there such packets are dropped.
    #[must_use]
    pub fn without_early_refusals(self) -> Self {
        Self { refuses_early: false, ..self }
    }

    /// Whether a table of this name is one of ours, of this process or another.
    #[must_use]
    pub fn is_table(name: &str) -> bool {
        Self::of_table(name).is_some()
    }

    /// The rules of whoever has a table of this name.
    #[must_use]
    pub fn of_table(name: &str) -> Option<Self> {
        let group = u32::from_str_radix(name.strip_prefix(TABLE_PREFIX)?, 16).ok()?;
        Some(Self::new(group)).filter(|rules| rules.table == name)
    }

    #[must_use]
    pub fn table(&self) -> &str {
        &self.table
    }

    #[must_use]
    pub fn group(&self) -> u32 {
        self.group
    }

    /// The table without a VM.
    #[must_use]
    pub fn head(&self) -> String {
        let Self { table, group, .. } = self;
        let never = never().map(|net| net.to_string()).collect::<Vec<_>>().join(", ");
        // Only from here on is the sender known to be the VM itself: nobody else is told anything.
        let refuse = match self.refuses_early {
            true => "goto forbidden",
            false => "drop",
        };
        format!(
            "table inet {table} {{
  set guests {{
    type iface_index . ether_addr . ipv4_addr
  }}
  set gateways {{
    type iface_index . ipv4_addr
  }}
  set addresses {{
    type ipv4_addr
  }}
  map resolving {{
    type iface_index : verdict
  }}
  map to_host {{
    type iface_index : verdict
  }}
  map egress {{
    type iface_index : verdict
  }}
  map refuse {{
    type iface_index : verdict
  }}
  set never {{
    type ipv4_addr
    flags interval
    elements = {{ {never} }}
  }}
  chain forbidden {{
    iif vmap @refuse
    drop
  }}
  chain prerouting {{
    type filter hook prerouting priority -450; policy accept;
    iifgroup != {group} accept
    meta nfproto != ipv4 drop
    meta pkttype != host drop
    iif . ether saddr . ip saddr != @guests drop
    ip hdrlength != 5 drop
    ip frag-off & 0x3fff != 0 drop
    ip daddr {{ 224.0.0.0/4, 255.255.255.255 }} drop
    ip daddr @never {refuse}
    iif . ip daddr != @gateways fib daddr type local {refuse}
    iif . ip daddr != @gateways fib daddr type != unicast drop
  }}
  chain question {{
    type nat hook prerouting priority dstnat; policy accept;
    iifgroup {group} iif vmap @resolving
  }}
  chain host {{
    type filter hook input priority -1; policy accept;
    iifgroup != {group} accept
    ct state invalid,related drop
    iif vmap @to_host
    drop
  }}
  chain forward {{
    type filter hook forward priority -1; policy accept;
    iifgroup != {group} oifgroup != {group} accept
    iifgroup {group} oifgroup {group} goto forbidden
    oifgroup {group} ct state established,related accept
    oifgroup {group} drop
    ct state invalid,related drop
    iif vmap @egress
    drop
  }}
  chain answer {{
    type filter hook output priority -1; policy accept;
    oifgroup != {group} accept
    ct state established,related accept
    icmp type {{ destination-unreachable, time-exceeded }} accept
    drop
  }}
  chain departure {{
    type nat hook postrouting priority srcnat; policy accept;
    oifgroup != {group} ip saddr @addresses masquerade
  }}
}}
table arp {table} {{
  set guests {{
    type iface_index . ether_addr . ether_addr . ipv4_addr . ipv4_addr
  }}
  chain input {{
    type filter hook input priority 0; policy accept;
    iifgroup != {group} accept
    arp operation request iif . ether saddr . arp saddr ether . arp saddr ip . arp daddr ip @guests accept
    drop
  }}
}}
"
        )
    }

    /// Removes the table, whether it is there or not.
    #[must_use]
    pub fn drop(&self) -> String {
        let each = ["inet", "arp"].map(|family| format!("{family} {}", self.table));
        each.iter().map(|table| format!("add table {table}\ndelete table {table}\n")).collect()
    }

    /// One VM's part; `relay_port` is where its DNS relay listens.
    #[must_use]
    pub fn add(&self, vm_network: &VmNetwork, relay_port: Option<u16>) -> String {
        let (n, gateway) = (vm_network.tap.index, vm_network.addresses.gateway);
        let mut blocks = Vec::new();
        if vm_network.named_rules().next().is_some() {
            for (set, kind) in [("names", "ipv4_addr"), ("name_ports", "ipv4_addr . inet_service")] {
                let lines = [format!("type {kind}"), "flags timeout".into(), format!("size {PINNED_ROOM}")];
                blocks.push(block("set", &format!("{set}_{n}"), &lines));
            }
        }
        let refusals = [
            format!("limit rate over {REFUSALS_PER_S}/second burst {REFUSALS_PER_S} packets drop"),
            "reject with icmp type admin-prohibited".into(),
        ];
        blocks.push(block("chain", &format!("refuse_{n}"), &refusals));
        let mut to_host = vec![
            format!("ip daddr != {gateway} goto refuse_{n}"),
            format!("ct state new ct count over {MAX_HOST_FLOWS} drop"),
            "icmp type echo-request accept".into(),
        ];
        if let Some(port) = relay_port {
            let question =
                format!("ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {gateway}:{port}");
            blocks.push(block("chain", &format!("resolving_{n}"), &[question]));
            to_host.push(format!("meta l4proto {{ tcp, udp }} th dport {port} accept"));
        }
        to_host.push(format!("goto refuse_{n}"));
        blocks.push(block("chain", &format!("to_host_{n}"), &to_host));
        let mut egress = vec!["ct state established accept".into(), format!("ct count over {MAX_FLOWS} drop")];
        egress.extend(allowed(vm_network));
        blocks.push(block("chain", &format!("egress_{n}"), &egress));
        let elements = self.elements(vm_network, relay_port.is_some());
        let elements: String = elements.iter().map(|element| format!("add element {element}\n")).collect();
        format!("table inet {} {{\n{}}}\n{elements}", self.table, blocks.concat())
    }

    /// Takes one VM's part out again.
    #[must_use]
    pub fn remove(&self, vm_network: &VmNetwork, relayed: bool) -> String {
        let (table, n) = (&self.table, vm_network.tap.index);
        let elements =
            self.elements(vm_network, relayed).into_iter().map(|element| format!("delete element {element}\n"));
        let chains =
            ["resolving", "to_host", "egress", "refuse"].into_iter().filter(|chain| relayed || *chain != "resolving");
        let chains = chains.map(|chain| format!("delete chain inet {table} {chain}_{n}\n"));
        let named = vm_network.named_rules().next().is_some();
        let sets = ["names", "name_ports"].into_iter().filter(|_| named);
        elements.chain(chains).chain(sets.map(|set| format!("delete set inet {table} {set}_{n}\n"))).collect()
    }

    fn elements(&self, vm_network: &VmNetwork, relayed: bool) -> Vec<String> {
        let Self { table, .. } = self;
        let (n, mac) = (vm_network.tap.index, &vm_network.mac);
        let (address, gateway) = (vm_network.addresses.address, vm_network.addresses.gateway);
        let mut elements = vec![
            format!("inet {table} guests {{ {n} . {mac} . {address} }}"),
            format!("arp {table} guests {{ {n} . {mac} . {mac} . {address} . {gateway} }}"),
            format!("inet {table} gateways {{ {n} . {gateway} }}"),
            format!("inet {table} addresses {{ {address} }}"),
            format!("inet {table} to_host {{ {n} : goto to_host_{n} }}"),
            format!("inet {table} egress {{ {n} : goto egress_{n} }}"),
            format!("inet {table} refuse {{ {n} : goto refuse_{n} }}"),
        ];
        if relayed {
            elements.push(format!("inet {table} resolving {{ {n} : goto resolving_{n} }}"));
        }
        elements
    }

    /// Lets the VM behind the interface with index `n` reach what names stand for, each for so many seconds from now on.
    #[must_use]
    pub fn pin(&self, n: u32, pinned: &[(Pinned, u32)]) -> String {
        let each = |Pinned { address, port }: &Pinned| match port {
            None => format!("inet {} names_{n} {{ {address}", self.table),
            Some(port) => format!("inet {} name_ports_{n} {{ {address} . {port}", self.table),
        };
        // Adding what is there changes nothing; to begin its time anew it must go first, and to go it must be there.
        let lines = pinned.iter().map(|(pinned, seconds)| {
            let element = each(pinned);
            let lasting = format!("add element {element} timeout {seconds}s }}\n");
            format!("{lasting}delete element {element} }}\n{lasting}")
        });
        lines.collect()
    }
}

fn block(kind: &str, name: &str, lines: &[String]) -> String {
    let lines: String = lines.iter().map(|line| format!("    {line}\n")).collect();
    format!("  {kind} {name} {{\n{lines}  }}\n")
}

/// Where a VM's new connections may go.
fn allowed(vm_network: &VmNetwork) -> Vec<String> {
    let Some(rules) = &vm_network.egress else { return vec!["accept".into()] };
    let n = vm_network.tap.index;
    let net = |rule: &EgressRule| match (&rule.to, rule.port) {
        (EgressTarget::Net(net), None) => Some(format!("ip daddr {net} accept")),
        (EgressTarget::Net(net), Some(port)) => {
            Some(format!("ip daddr {net} meta l4proto {{ tcp, udp }} th dport {port} accept"))
        }
        (EgressTarget::Name(_), _) => None,
    };
    let mut lines: Vec<String> = rules.iter().filter_map(net).collect();
    if vm_network.named_rules().next().is_some() {
        lines.push(format!("ip daddr @names_{n} accept"));
        lines.push(format!("meta l4proto {{ tcp, udp }} ip daddr . th dport @name_ports_{n} accept"));
    }
    // The list's owner, or a program that strays from it, is told at once.
    lines.push(format!("goto refuse_{n}"));
    lines
}

#[cfg(test)]
mod tests {
    use super::super::assert_golden;
    use super::super::vm_network::tests::example;
    use super::*;

    const LIST: [&str; 5] = ["93.184.216.0/24", "10.0.0.7:443", "example.com", "*.example.org:443", "10.0.0.0/8:53"];

    #[test]
    fn test_rules_are_golden() {
        let rules = Rules::new(0x1234);
        let (open, listed) = (example(None), example(Some(&LIST)));
        let parts = [
            ("head", rules.head()),
            ("add, open, asking its servers itself", rules.add(&open, None)),
            ("remove, the same", rules.remove(&open, false)),
            ("add, with an allow-list", rules.add(&listed, Some(40053))),
            ("remove, the same", rules.remove(&listed, true)),
            (
                "pin",
                rules.pin(
                    7,
                    &[
                        (Pinned { address: Ipv4Addr::new(93, 184, 216, 34), port: None }, 300),
                        (Pinned { address: Ipv4Addr::new(93, 184, 216, 34), port: Some(443) }, 600),
                    ],
                ),
            ),
            ("drop", rules.drop()),
        ];
        let text: String = parts.iter().map(|(title, text)| format!("# {title}\n{text}\n")).collect();
        assert_golden("net-rules.nft", &text);
    }

    #[test]
    fn test_head_for_an_old_kernel_drops_where_others_refuse() {
        let (new, old) = (Rules::new(7), Rules::new(7).without_early_refusals());
        let (new, old) = (new.head(), old.head());
        let changed = new.lines().zip(old.lines()).filter(|(new, old)| new != old);
        let changed: Vec<_> = changed.map(|(new, old)| (new.trim().to_owned(), old.trim())).collect();
        assert_eq!(changed.len(), 2);
        assert!(changed.iter().all(|(new, old)| new.replace("goto forbidden", "drop") == *old), "{changed:?}");
    }

    #[test]
    fn test_of_table_knows_our_names_alone() {
        let rules = Rules::new(77);
        assert_eq!(Rules::of_table(rules.table()), Some(rules));
        for other in ["filter", "tw_microvm_", "tw_microvm_xyz", "tw_microvm_4d", "tw_microvm_000000004d"] {
            assert_eq!(Rules::of_table(other), None, "{other}");
        }
    }

    #[test]
    fn test_is_never_holds_metadata_and_multicast() {
        for never in ["169.254.169.254", "127.0.0.1", "224.0.0.251", "255.255.255.255", "0.0.0.0", "240.0.0.1"] {
            assert!(is_never(never.parse().unwrap()), "{never}");
        }
        assert!(!is_never(Ipv4Addr::new(223, 255, 255, 255)) && !is_never(Ipv4Addr::new(10, 0, 0, 1)));
    }
}
