//! What the host's own rules do with the packets of VMs, read from `nft --json list ruleset`. Pure.
//!
//! Each base chain of a hook has a say: a packet gets by that all of them accept. What a rule asks of a packet is known, or it
//! is not; so a chain has an outcome where every unknown match fails, and a set of outcomes that are possible at all. Only a
//! packet that no rule can accept is called dropped for certain.

use std::collections::HashMap;

use serde_json::Value;

/// A rule set that is nested more deeply, or goes on for longer, is not followed further.
const MAX_DEPTH: usize = 16;
const MAX_RULES: usize = 50_000;

/// The rules of all tables but ours.
#[derive(Debug, Default)]
pub struct Firewall {
    chains: HashMap<Place, Chain>,
}

/// A chain's family, table and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub family: String,
    pub table: String,
    pub chain: String,
}

#[derive(Debug, Default)]
struct Chain {
    /// Hook and policy of a base chain.
    base: Option<(String, Outcomes)>,
    rules: Vec<Vec<Value>>,
}

/// A packet between a VM and the uplink, or between a VM and the host.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a> {
    pub hook: &'static str,
    /// By which it comes and goes; `None` is for one that is not known.
    pub from: Option<&'a str>,
    pub to: Option<&'a str>,
    /// It answers one that was let by.
    pub reply: bool,
}

/// A base chain that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    pub place: Place,
    /// No rule accepts the packet, whatever else it is like.
    pub certain: bool,
}

/// A set of what may become of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Outcomes(u8);

impl Outcomes {
    const NONE: Self = Self(0);
    const ACCEPT: Self = Self(1);
    const DROP: Self = Self(2);
    /// The next rule is asked.
    const NEXT: Self = Self(4);
    /// The chain that jumped here goes on.
    const RETURN: Self = Self(8);
    const ANY: Self = Self(15);

    const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// With one in place of another.
    fn instead(self, old: Self, new: Self) -> Self {
        if self.has(old) {
            self.without(old).or(new)
        } else {
            self
        }
    }
}

/// Whether a rule's match holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    No,
    Maybe,
    Yes,
}

impl From<bool> for Holds {
    fn from(holds: bool) -> Self {
        if holds {
            Self::Yes
        } else {
            Self::No
        }
    }
}

impl Firewall {
    /// Reads what `nft --json list ruleset` printed, leaving out the tables that `is_ours`.
    #[must_use]
    pub fn parse(ruleset: &Value, is_ours: impl Fn(&str) -> bool) -> Self {
        let mut firewall = Self::default();
        for item in ruleset["nftables"].as_array().into_iter().flatten() {
            let (chain, rule) = (&item["chain"], &item["rule"]);
            let (of, name) = if chain.is_object() { (chain, &chain["name"]) } else { (rule, &rule["chain"]) };
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let place = Place { family: text(&of["family"]), table: text(&of["table"]), chain: text(name) };
            let sees_ipv4 = ["ip", "inet"].contains(&place.family.as_str());
            if !sees_ipv4 || is_ours(&place.table) {
                continue;
            }
            let entry = firewall.chains.entry(place).or_default();
            if let Some(hook) = chain["hook"].as_str().filter(|_| chain["type"] == "filter") {
                let policy = if chain["policy"] == "drop" { Outcomes::DROP } else { Outcomes::ACCEPT };
                entry.base = Some((hook.to_owned(), policy));
            }
            if let Some(expressions) = rule["expr"].as_array() {
                entry.rules.push(expressions.clone());
            }
        }
        firewall
    }

    #[must_use]
    pub fn has_chain(&self, place: &Place) -> bool {
        self.chains.contains_key(place)
    }

    /// Whether a base chain is one of this hook's.
    #[must_use]
    pub fn is_hook(&self, place: &Place, hook: &str) -> bool {
        self.chains.get(place).and_then(|chain| chain.base.as_ref()).is_some_and(|(own, _)| own == hook)
    }

    /// The base chains that drop the packet, or do unless a match holds that is not known.
    #[must_use]
    pub fn obstacles(&self, packet: &Packet<'_>) -> Vec<Obstacle> {
        let mut found = Vec::new();
        for (place, chain) in &self.chains {
            let Some((_, policy)) = chain.base.as_ref().filter(|(hook, _)| hook == packet.hook) else { continue };
            let ended = |outcomes: Outcomes| outcomes.instead(Outcomes::RETURN, *policy);
            let usual = ended(self.run(place, packet, false, 0, &mut 0));
            if usual == Outcomes::DROP {
                let possible = ended(self.run(place, packet, true, 0, &mut 0));
                found.push(Obstacle { place: place.clone(), certain: !possible.has(Outcomes::ACCEPT) });
            }
        }
        found.sort_by(|a, b| a.place.cmp(&b.place));
        found
    }

    /// What a chain makes of a packet; without `doubtful`, matches that are not known do not hold.
    fn run(&self, place: &Place, packet: &Packet<'_>, doubtful: bool, depth: usize, asked: &mut usize) -> Outcomes {
        let Some(chain) = self.chains.get(place).filter(|_| depth < MAX_DEPTH) else { return Outcomes::ANY };
        let mut outcomes = Outcomes::NONE;
        for rule in &chain.rules {
            *asked += 1;
            if *asked > MAX_RULES {
                return outcomes.or(Outcomes::ANY);
            }
            let (holds, effect) = self.rule(rule, place, packet, doubtful, depth, asked);
            if holds == Holds::No || (holds == Holds::Maybe && !doubtful) {
                continue;
            }
            outcomes = outcomes.or(effect.without(Outcomes::NEXT));
            if holds == Holds::Yes && !effect.has(Outcomes::NEXT) {
                return outcomes;
            }
        }
        outcomes.or(Outcomes::RETURN)
    }

    fn rule(
        &self,
        rule: &[Value],
        place: &Place,
        packet: &Packet<'_>,
        doubtful: bool,
        depth: usize,
        asked: &mut usize,
    ) -> (Holds, Outcomes) {
        let mut holds = Holds::Yes;
        for expression in rule {
            let Some((kind, value)) = expression.as_object().and_then(|object| object.iter().next()) else { continue };
            let mut called = |value: &Value| {
                let chain = value["target"].as_str().unwrap_or_default().to_owned();
                self.run(&Place { chain, ..place.clone() }, packet, doubtful, depth + 1, asked)
            };
            let effect = match kind.as_str() {
                "match" => match matches(value, packet) {
                    Holds::No => return (Holds::No, Outcomes::NEXT),
                    Holds::Maybe => {
                        holds = Holds::Maybe;
                        continue;
                    }
                    Holds::Yes => continue,
                },
                "counter" | "log" | "comment" | "mangle" | "notrack" | "meta" | "ct helper" | "set" => continue,
                "accept" => Outcomes::ACCEPT,
                "drop" | "reject" => Outcomes::DROP,
                "return" => Outcomes::RETURN,
                "continue" => Outcomes::NEXT,
                "jump" => called(value).instead(Outcomes::RETURN, Outcomes::NEXT),
                "goto" => called(value),
                "queue" | "vmap" => {
                    holds = Holds::Maybe;
                    Outcomes::ANY
                }
                // Limits, extensions of iptables, and what is not known yet.
                _ => {
                    holds = Holds::Maybe;
                    continue;
                }
            };
            return (holds, effect);
        }
        (holds, Outcomes::NEXT)
    }
}

fn matches(test: &Value, packet: &Packet<'_>) -> Holds {
    let (left, right) = (&test["left"], &test["right"]);
    let equals = match test["op"].as_str() {
        Some("==" | "in") => true,
        Some("!=") => false,
        _ => return Holds::Maybe,
    };
    let holds = match (left["meta"]["key"].as_str(), left["ct"]["key"].as_str()) {
        (Some("iif" | "iifname"), _) => named(right, packet.from),
        (Some("oif" | "oifname"), _) => named(right, packet.to),
        (Some("nfproto"), _) => one_of(right, |family| (family == "ipv4").into()),
        (Some("l4proto" | "protocol"), _) => one_of(right, transport),
        (_, Some("state")) => {
            let state = if packet.reply { "established" } else { "new" };
            one_of(right, |other| (other == state).into())
        }
        // Translated, as by a published port.
        (_, Some("status")) => one_of(right, |_| Holds::No),
        _ => match (left["payload"]["protocol"].as_str(), left["payload"]["field"].as_str()) {
            (Some("ip6" | "icmpv6" | "icmp" | "arp"), _) => return Holds::No,
            (Some("ip"), Some("protocol")) => one_of(right, transport),
            _ => Holds::Maybe,
        },
    };
    match (holds, equals) {
        (Holds::Yes, false) => Holds::No,
        (Holds::No, false) => Holds::Yes,
        (holds, _) => holds,
    }
}

/// What VMs send: not ICMP alone, and no protocol of IPv6.
fn transport(protocol: &str) -> Holds {
    match protocol {
        "tcp" | "udp" | "6" | "17" => Holds::Maybe,
        "ip" | "2048" => Holds::Yes,
        _ => Holds::No,
    }
}

/// Whether an interface is meant: by its name, or by its beginning as in `twm*`.
fn named(right: &Value, interface: Option<&str>) -> Holds {
    one_of(right, |name| match (interface, name.strip_suffix('*')) {
        (None, _) => Holds::Maybe,
        (Some(interface), Some(beginning)) => interface.starts_with(beginning).into(),
        (Some(interface), None) => (interface == name).into(),
    })
}

/// Asks for one value, or for those of a list; a set with a name may hold anything.
fn one_of(right: &Value, holds: impl Fn(&str) -> Holds + Copy) -> Holds {
    match right {
        Value::String(name) if name.starts_with('@') => Holds::Maybe,
        Value::String(name) => holds(name),
        Value::Number(number) => holds(&number.to_string()),
        Value::Array(values) => {
            let each = values.iter().map(|value| one_of(value, holds));
            each.fold(Holds::No, |a, b| if a == Holds::Yes || b == Holds::No { a } else { b })
        }
        Value::Object(object) => object.get("set").map_or(Holds::Maybe, |set| one_of(set, holds)),
        _ => Holds::Maybe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A rule set as nft prints it: chains with their policies, and rules.
    fn firewall(table: &str, chains: &[(&str, Option<(&str, &str)>)], rules: &[(&str, Value)]) -> Firewall {
        let mut items = vec![json!({"metainfo": {"json_schema_version": 1}})];
        for (name, base) in chains {
            let mut chain = json!({"family": "ip", "table": table, "name": name, "handle": 1});
            if let Some((hook, policy)) = base {
                chain["type"] = "filter".into();
                chain["hook"] = (*hook).into();
                chain["policy"] = (*policy).into();
            }
            items.push(json!({"chain": chain}));
        }
        for (chain, expr) in rules {
            items.push(json!({"rule": {"family": "ip", "table": table, "chain": chain, "expr": expr}}));
        }
        Firewall::parse(&json!({ "nftables": items }), |table| table.starts_with("tw_microvm_"))
    }

    fn is(key: &str, name: &str) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": name}})
    }

    fn is_not(key: &str, name: &str) -> Value {
        json!({"match": {"op": "!=", "left": {"meta": {"key": key}}, "right": name}})
    }

    fn state(states: &[&str]) -> Value {
        json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": states}})
    }

    const OUT: Packet<'static> = Packet { hook: "forward", from: Some("twm0"), to: Some("eth0"), reply: false };
    const BACK: Packet<'static> = Packet { hook: "forward", from: Some("eth0"), to: Some("twm0"), reply: true };

    /// Whether there is an obstacle, and whether that is certain.
    fn blocked(firewall: &Firewall, packet: &Packet<'_>) -> Option<bool> {
        let found = firewall.obstacles(packet);
        assert!(found.len() < 2, "{found:?}");
        found.first().map(|obstacle| obstacle.certain)
    }

    fn docker(first: &[Value]) -> Firewall {
        let chains = [("FORWARD", Some(("forward", "drop"))), ("DOCKER-USER", None), ("DOCKER", None)];
        let accept = json!({"accept": null});
        let counter = json!({"counter": {"packets": 0, "bytes": 0}});
        let jump = |to: &str| json!({"jump": {"target": to}});
        let mut rules: Vec<(&str, Value)> = first.iter().map(|rule| ("DOCKER-USER", rule.clone())).collect();
        rules.extend([
            ("DOCKER-USER", json!([counter, {"return": null}])),
            ("FORWARD", json!([counter, jump("DOCKER-USER")])),
            ("FORWARD", json!([is("oifname", "docker0"), {"xt": null}, counter, accept])),
            ("FORWARD", json!([is("oifname", "docker0"), counter, jump("DOCKER")])),
            ("FORWARD", json!([is("iifname", "docker0"), is_not("oifname", "docker0"), counter, accept])),
        ]);
        firewall("filter", &chains, &rules)
    }

    #[test]
    fn test_dockers_forward_chain_drops_for_certain() {
        assert_eq!((blocked(&docker(&[]), &OUT), blocked(&docker(&[]), &BACK)), (Some(true), Some(true)));
    }

    #[test]
    fn test_documented_rules_take_the_obstacle_away() {
        let out = json!([is("iifname", "twm*"), {"accept": null}]);
        let back = json!([is("oifname", "twm*"), state(&["established", "related"]), {"accept": null}]);
        assert_eq!(blocked(&docker(std::slice::from_ref(&out)), &OUT), None);
        assert_eq!(blocked(&docker(std::slice::from_ref(&out)), &BACK), Some(true));
        assert_eq!(blocked(&docker(&[out, back.clone()]), &BACK), None);
        // What iptables checks itself is not seen by nft.
        let by_iptables = json!([is("oifname", "twm*"), {"xt": null}, {"accept": null}]);
        assert_eq!(blocked(&docker(&[by_iptables]), &BACK), Some(false));
        let others = json!([is("iifname", "twx*"), {"accept": null}]);
        assert_eq!(blocked(&docker(&[others]), &OUT), Some(true));
    }

    #[test]
    fn test_reject_at_the_end_of_an_accepting_chain_is_an_obstacle() {
        // As firewalld has it.
        let rules = [
            ("filter_FORWARD", json!([state(&["established", "related"]), {"accept": null}])),
            ("filter_FORWARD", json!([is("iifname", "lo"), {"accept": null}])),
            ("filter_FORWARD", json!([{"jump": {"target": "zones"}}])),
            ("filter_FORWARD", json!([{"reject": {"type": "icmpx", "expr": "admin-prohibited"}}])),
            ("zones", json!([is("iifname", "eth0"), {"accept": null}])),
        ];
        let chains = [("filter_FORWARD", Some(("forward", "accept"))), ("zones", None)];
        let firewall = firewall("firewalld", &chains, &rules);
        assert_eq!((blocked(&firewall, &OUT), blocked(&firewall, &BACK)), (Some(true), None));
        assert_eq!(firewall.obstacles(&OUT)[0].place.chain, "filter_FORWARD");
        let unknown = Packet { to: None, from: Some("twm0"), ..OUT };
        assert_eq!(blocked(&firewall, &unknown), Some(true));
    }

    #[test]
    fn test_accepting_chains_and_our_own_are_none() {
        let chains = [("forward", Some(("forward", "accept"))), ("input", Some(("input", "drop")))];
        let bad = [("forward", json!([state(&["invalid"]), {"drop": null}]))];
        assert_eq!(blocked(&firewall("filter", &chains, &bad), &OUT), None);
        let dropping = [("forward", Some(("forward", "drop")))];
        assert_eq!(blocked(&firewall("tw_microvm_0000004d", &dropping, &[]), &OUT), None);
        assert_eq!(blocked(&Firewall::default(), &OUT), None);
    }

    #[test]
    fn test_what_is_not_known_makes_an_obstacle_uncertain() {
        let chains = [("forward", Some(("forward", "drop"))), ("more", None)];
        for doubtful in [
            json!([{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.0.0.1"}}, {"accept": null}]),
            json!([{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "@inside"}}, {"accept": null}]),
            json!([{"limit": {"rate": 1, "per": "second"}}, {"accept": null}]),
            json!([{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@zones"}}]),
            json!([{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["tcp", "icmp"]}}}, {"accept": null}]),
        ] {
            assert_eq!(
                blocked(&firewall("t", &chains, &[("forward", doubtful.clone())]), &OUT),
                Some(false),
                "{doubtful}"
            );
        }
        for known in [
            json!([{"match": {"op": "==", "left": {"payload": {"protocol": "icmp", "field": "type"}}, "right": "echo-request"}}, {"accept": null}]),
            json!([{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}, {"accept": null}]),
            json!([{"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}, {"accept": null}]),
            json!([{"goto": {"target": "more"}}]),
        ] {
            assert_eq!(blocked(&firewall("t", &chains, &[("forward", known.clone())]), &OUT), Some(true), "{known}");
        }
    }

    #[test]
    fn test_chains_that_go_round_end() {
        let chains = [("forward", Some(("forward", "drop"))), ("a", None)];
        let rules = [("forward", json!([{"jump": {"target": "a"}}])), ("a", json!([{"jump": {"target": "a"}}]))];
        assert!(blocked(&firewall("t", &chains, &rules), &OUT).is_none_or(|certain| !certain));
    }
}
