//! What dead processes left of their VMs' networks. A tap vanishes with its VM; its ifb, the rules and, on a tap that was
//! made to last, addresses and settings stay. An ifb is made first and removed last, so where there is none that
//! lost its VM there is nothing to look for.

use crate::host::net::{self as host, Link, Tool};
use crate::host::privileges;
use crate::net::{self, Rules, GENERATED_TAP, IFB_PREFIX};

/// Removes what belongs to nobody; blocking. What cannot be removed is logged.
pub fn sweep() {
    // Whoever may not make a VM network has left none, and can remove none.
    if !privileges::probe().net_admin {
        return;
    }
    let links = match host::links() {
        Ok(links) => links,
        Err(errno) => return log::warn!("the networks of dead processes were not looked for: {errno}"),
    };
    let tap_of = |name: &str| name.strip_prefix(IFB_PREFIX).and_then(|index| index.parse::<u32>().ok());
    let is_held = |tap: u32| links.iter().any(|link| link.index == tap && has_end(link));
    let ifbs = links.iter().filter(|link| tap_of(&link.name).is_some_and(|tap| !is_held(tap)));
    let ifbs: Vec<host::Change> = ifbs.map(|link| net::ifb_removed(&link.name)).collect();
    if ifbs.is_empty() {
        return;
    }
    match Tool::Nft.ask(&["list", "tables"]) {
        Ok(tables) => tables.lines().filter_map(rules_of).for_each(|rules| remove_if_stale(&rules)),
        Err(refusal) => log::warn!("stale rules were not looked for: {}", refusal.cause),
    }
    host::apply_all(&ifbs);
    log::info!("removed the networks of {} VMs of dead processes", ifbs.len());
}

/// Whether somebody is, or is about to be, at the other end of a tap: one that is up without has been left, one that is
/// down may be on its way up.
fn has_end(link: &Link) -> bool {
    !link.is_up || link.has_carrier
}

/// Reads `table inet NAME`.
fn rules_of(line: &str) -> Option<Rules> {
    Rules::of_table(line.strip_prefix("table inet ")?)
}

/// Removes the rules and what is left of their taps, if none of these has another end.
fn remove_if_stale(rules: &Rules) {
    // Read anew: the table may be younger than an earlier look at the interfaces.
    let mut taps = match host::links() {
        Ok(links) => links,
        Err(errno) => return log::warn!("the taps of stale rules were not looked for: {errno}"),
    };
    taps.retain(|link| link.group == rules.group());
    if !taps.iter().any(has_end) {
        remove(rules, &taps);
    }
}

/// Whether a tap has a name that we gave it: what lasts of those was made for a VMM that opens its tap by name.
fn is_generated(name: &str) -> bool {
    let number = name.strip_prefix(GENERATED_TAP.trim_end_matches("%d"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn remove(rules: &Rules, taps: &[Link]) {
    // Taps that were made to last go back to what they were, as far as can be told.
    for Link { index, name, .. } in taps {
        Tool::Tc.run_all(&format!("qdisc delete dev {name} ingress\nqdisc delete dev {name} root\n"));
        host::apply_all(&[net::abandoned_down(*index)]);
        match host::without_link_addresses(*index) {
            Ok(changes) => host::apply_all(&changes),
            Err(errno) => log::warn!("the addresses of {name} were not removed: {errno}"),
        }
        host::apply_all(&net::abandoned_end(*index, is_generated(name)));
    }
    if let Err(refusal) = Tool::Nft.run(&rules.drop()) {
        log::warn!("stale rules were not removed: {}", refusal.cause);
    }
}
