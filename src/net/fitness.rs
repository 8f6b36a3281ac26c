//! Whether a host's network lets a VM's packets out and its answers back in: what is checked before a VM is connected, and reported
//! of one that is. Pure; nothing is sent to find out.

use super::firewall::{Firewall, Obstacle, Packet};
use super::GENERATED_TAP;

/// What the host is like, as far as it matters to connected VMs.
#[derive(Debug, Default)]
pub struct HostNetwork {
    /// The interfaces by which the host's packets to the internet leave, and whether each forwards what comes in. They are
    /// found by the kernel's own answer, which takes rules, other tables and the half-routes of VPNs into account.
    pub uplinks: Vec<(String, bool)>,
    /// Some part of the internet has no route.
    pub cut_off: bool,
    /// `None`: it cannot be read.
    pub firewall: Option<Firewall>,
}

/// Something about the host that keeps a connected VM from what it was connected for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub what: String,
    pub remedy: String,
    /// A VM would reach nothing; else it may reach something, or it is not known.
    pub is_certain: bool,
}

/// Judges a host for a VM with this tap (`None`: one with a name of ours), whose questions the gateway answers if `relayed`.
#[must_use]
pub fn problems(host: &HostNetwork, tap: Option<&str>, relayed: bool) -> Vec<Problem> {
    let mut found: Vec<Problem> = uplink(host).into_iter().collect();
    let Some(firewall) = &host.firewall else { return found };
    let pattern = tap.map_or_else(|| GENERATED_TAP.replace("%d", "*"), str::to_owned);
    let example = tap.map_or_else(|| GENERATED_TAP.replace("%d", "0"), str::to_owned);
    let uplink = host.uplinks.first().map(|(name, _)| name.as_str());
    let (out, back) = (accept_from(&pattern), accept_to(&pattern));
    let packet = |hook, from, to, reply| Packet { hook, from, to, reply };
    let tap = Some(example.as_str());
    let forwarded = [packet("forward", tap, uplink, false), packet("forward", uplink, tap, true)];
    for Obstacle { place, certain } in obstacles(firewall, &forwarded) {
        found.push(Problem {
            what: format!("packets of VMs are dropped by {}", shown(&place)),
            remedy: remedy(firewall, &place, &pattern, &[out.clone(), back.clone()]),
            is_certain: certain,
        });
    }
    let served = [packet("input", tap, None, false), packet("output", None, tap, true)];
    for Obstacle { place, .. } in obstacles(firewall, if relayed { &served } else { &[] }) {
        let rules = if firewall.is_hook(&place, "input") { out.clone() } else { back.clone() };
        found.push(Problem {
            what: format!("no names are resolved: VMs' questions to their gateway are dropped by {}", shown(&place)),
            remedy: format!(
                "{}; or give the VM dns_servers that it can ask itself",
                remedy(firewall, &place, &pattern, &[rules])
            ),
            is_certain: false,
        });
    }
    found
}

fn uplink(host: &HostNetwork) -> Option<Problem> {
    let deaf: Vec<&str> =
        host.uplinks.iter().filter(|(_, forwards)| !forwards).map(|(name, _)| name.as_str()).collect();
    if !deaf.is_empty() {
        let settings: Vec<String> = deaf.iter().map(|name| format!("net.ipv4.conf.{name}.forwarding=1")).collect();
        return Some(Problem {
            what: format!("answers could not come back: {} does not forward packets", deaf.join(" nor ")),
            remedy: format!("let it: sysctl -w {} (or net.ipv4.ip_forward=1 for all interfaces)", settings.join(" ")),
            is_certain: deaf.len() == host.uplinks.len(),
        });
    }
    host.cut_off.then(|| Problem {
        what: match host.uplinks.is_empty() {
            true => {
                "this host has no way to the internet: VMs reach their gateway, and no more than networks it has a \
                     route to"
                    .into()
            }
            false => "this host has no way to a part of the internet".into(),
        },
        remedy: "give it a default route (ip route add default via GATEWAY), or connect its VPN".into(),
        is_certain: false,
    })
}

/// The chains in the way of any of these packets, each once.
fn obstacles(firewall: &Firewall, packets: &[Packet<'_>]) -> Vec<Obstacle> {
    let mut found: Vec<Obstacle> = Vec::new();
    for obstacle in packets.iter().flat_map(|packet| firewall.obstacles(packet)) {
        match found.iter_mut().find(|known| known.place == obstacle.place) {
            Some(known) => known.certain |= obstacle.certain,
            None => found.push(obstacle),
        }
    }
    found
}

fn shown(place: &super::firewall::Place) -> String {
    format!("chain {} of nftables' table {} {}", place.chain, place.family, place.table)
}

/// Two ways to say the same: to nft, and to iptables.
type Rule = (String, String);

fn accept_from(pattern: &str) -> Rule {
    let name = pattern.replace('*', "+");
    (format!("iifname \"{pattern}\" accept"), format!("-i {name} -j ACCEPT"))
}

fn accept_to(pattern: &str) -> Rule {
    let name = pattern.replace('*', "+");
    let iptables = format!("-o {name} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT");
    (format!("oifname \"{pattern}\" ct state established,related accept"), iptables)
}

/// Where those who manage the chain want to be told of more.
fn remedy(firewall: &Firewall, place: &super::firewall::Place, pattern: &str, rules: &[Rule]) -> String {
    let chain = |name: &str| super::firewall::Place { chain: name.into(), ..place.clone() };
    if place.table == "firewalld" {
        let name = pattern.replace('*', "+");
        return format!("let the taps pass: firewall-cmd --zone=trusted --add-interface={name}");
    }
    let docker = place.chain == "FORWARD" && firewall.has_chain(&chain("DOCKER-USER"));
    let commands: Vec<String> = rules
        .iter()
        .map(|(nft, iptables)| match docker {
            true => format!("iptables -I DOCKER-USER {iptables}"),
            false => format!("nft 'insert rule {} {} {} {nft}'", place.family, place.table, place.chain),
        })
        .collect();
    format!("let the taps pass there, too: {}", commands.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base(table: &str, chain: &str, hook: &str, policy: &str) -> serde_json::Value {
        let (family, kind) = ("ip", "filter");
        json!({"chain": {"family": family, "table": table, "name": chain, "type": kind, "hook": hook, "policy": policy}})
    }

    fn host(uplinks: &[(&str, bool)], items: &[serde_json::Value]) -> HostNetwork {
        let firewall = Firewall::parse(&json!({ "nftables": items }), |_| false);
        let uplinks: Vec<(String, bool)> = uplinks.iter().map(|(name, forwards)| ((*name).into(), *forwards)).collect();
        HostNetwork { cut_off: uplinks.is_empty(), uplinks, firewall: Some(firewall) }
    }

    #[test]
    fn test_problems_of_a_host_that_forwards_and_filters_nothing_are_none() {
        assert_eq!(problems(&host(&[("eth0", true)], &[]), None, true), []);
        assert_eq!(problems(&host(&[("eth0", true)], &[base("t", "f", "forward", "accept")]), None, true), []);
    }

    #[test]
    fn test_uplink_that_does_not_forward_is_certain_when_it_is_the_only_one() {
        let [problem] = &problems(&host(&[("tun0", false)], &[]), None, false)[..] else { panic!() };
        assert!(problem.is_certain && problem.remedy.contains("net.ipv4.conf.tun0.forwarding=1"), "{problem:?}");
        let [problem] = &problems(&host(&[("tun0", true), ("eth0", false)], &[]), None, false)[..] else { panic!() };
        assert!(!problem.is_certain && problem.what.contains("eth0 does not forward"), "{problem:?}");
    }

    #[test]
    fn test_no_uplink_at_all_is_told() {
        let [problem] = &problems(&host(&[], &[]), None, false)[..] else { panic!() };
        assert!(!problem.is_certain && problem.what.contains("no way to the internet"), "{problem:?}");
    }

    #[test]
    fn test_forward_policy_of_drop_is_told_with_the_commands_of_who_manages_it() {
        let chain = base("filter", "FORWARD", "forward", "drop");
        let plain = problems(&host(&[("eth0", true)], std::slice::from_ref(&chain)), None, true);
        let [problem] = &plain[..] else { panic!("{plain:?}") };
        let expected =
            "let the taps pass there, too: nft 'insert rule ip filter FORWARD iifname \"twm*\" accept'; nft 'insert \
                        rule ip filter FORWARD oifname \"twm*\" ct state established,related accept'";
        assert!(problem.is_certain && problem.remedy == expected, "{problem:?}");
        let user = json!({"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER"}});
        let docker = problems(&host(&[("eth0", true)], &[chain, user]), Some("tap0"), true);
        let [problem] = &docker[..] else { panic!("{docker:?}") };
        assert!(problem.remedy.contains("iptables -I DOCKER-USER -i tap0 -j ACCEPT"), "{problem:?}");
        let firewalld = problems(&host(&[("eth0", true)], &[base("firewalld", "f", "forward", "drop")]), None, true);
        assert!(firewalld[0].remedy.contains("firewall-cmd"), "{firewalld:?}");
    }

    #[test]
    fn test_input_policy_of_drop_matters_to_relays_alone() {
        let host = host(&[("eth0", true)], &[base("filter", "INPUT", "input", "drop")]);
        assert_eq!(problems(&host, None, false), []);
        let [problem] = &problems(&host, None, true)[..] else { panic!() };
        assert!(!problem.is_certain && problem.remedy.contains("INPUT iifname \"twm*\" accept"), "{problem:?}");
    }
}
