//! What dead processes left of their VMs' networks. A tap vanishes with its VM; its ifb, the rules and, on a tap that was
//! made to last, addresses and settings stay. An ifb is made first and removed last, so where there is none that
//! lost its VM there is nothing to look for.

use super::has_flag;
use crate::host::net::{self as host, Tool};
use crate::host::privileges;
use crate::net::{Rules, GENERATED_TAP, IFB_PREFIX};

/// Removes what belongs to nobody; blocking. What cannot be removed is logged.
pub fn sweep() {
    let interfaces = host::interfaces();
    let tap_of = |name: &str| name.strip_prefix(IFB_PREFIX).and_then(|index| index.parse::<u32>().ok());
    let is_held = |tap: u32| {
        let tap = interfaces.iter().find(|(index, _)| *index == tap);
        tap.is_some_and(|(_, name)| links(&["dev", name]).iter().any(|link| has_end(link)))
    };
    let ifbs = interfaces.iter().filter(|(_, name)| tap_of(name).is_some_and(|tap| !is_held(tap)));
    let ifbs: Vec<String> = ifbs.map(|(_, name)| format!("link delete dev {name}\n")).collect();
    // Whoever may not make a VM network has left none, and can remove none.
    if ifbs.is_empty() || !privileges::probe().net_admin {
        return;
    }
    match Tool::Nft.ask(&["list", "tables"]) {
        Ok(tables) => tables.lines().filter_map(stale_rules).for_each(|rules| remove(&rules)),
        Err(refusal) => log::warn!("stale rules were not looked for: {}", refusal.reason),
    }
    Tool::Ip.run_all(&ifbs.concat());
    log::warn!("removed the networks of {} VMs of dead processes", ifbs.len());
}

/// Lines of `ip link show`, one for each interface asked for.
fn links(which: &[&str]) -> Vec<String> {
    let shown = Tool::Ip.ask(&[&["-oneline", "link", "show"], which].concat()).unwrap_or_default();
    shown.lines().map(str::to_owned).collect()
}

/// Whether somebody is, or is about to be, at the other end of a tap: one that is up without has been left, one that is
/// down may be on its way up.
fn has_end(link: &str) -> bool {
    !has_flag(link, "UP") || has_flag(link, "LOWER_UP")
}

/// Reads `table inet NAME`; gives the rules if none of their taps has another end.
fn stale_rules(line: &str) -> Option<Rules> {
    let rules = Rules::of_table(line.strip_prefix("table inet ")?)?;
    let held = links(&["group", &rules.group().to_string()]).iter().any(|link| has_end(link));
    (!held).then_some(rules)
}

/// Whether a tap has a name that we gave it: what lasts of those was made for a VMM that opens its tap by name.
fn is_generated(name: &str) -> bool {
    let number = name.strip_prefix(GENERATED_TAP.trim_end_matches("%d"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn remove(rules: &Rules) {
    // Taps that were made to last go back to what they were, as far as can be told.
    for link in links(&["group", &rules.group().to_string()]) {
        let Some(name) = link.split(": ").nth(1) else { continue };
        Tool::Tc.run_all(&format!("qdisc delete dev {name} ingress\nqdisc delete dev {name} root\n"));
        let down =
            format!("link set dev {name} down\naddress flush dev {name} scope link\nlink set dev {name} group 0\n");
        Tool::Ip.run_all(&down);
        if is_generated(name) {
            Tool::Ip.run_all(&format!("link delete dev {name}\n"));
        }
    }
    if let Err(refusal) = Tool::Nft.run(&rules.drop()) {
        log::warn!("stale rules were not removed: {}", refusal.reason);
    }
}
