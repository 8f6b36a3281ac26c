//! What dead processes left of their segments. A tap vanishes with its VM; its shaper, the rules and, on a tap that was
//! made to last, addresses and settings stay. A shaper is made first and removed last, so where there is none that
//! lost its VM there is nothing to look for.

use super::has_flag;
use crate::host::net::{self as host, Tool};
use crate::net::{Rules, SHAPER_PREFIX};

/// Removes what belongs to nobody; blocking. What cannot be removed is logged.
pub fn sweep() {
    let interfaces = host::interfaces();
    let of_shaper = |name: &String| name.strip_prefix(SHAPER_PREFIX).and_then(|index| index.parse::<u32>().ok());
    let shapers = interfaces.iter().filter_map(|(_, name)| Some((name, of_shaper(name)?)));
    let stale: Vec<(&String, u32)> = shapers.filter(|(_, tap)| !is_held(*tap)).collect();
    if stale.is_empty() {
        return;
    }
    match Tool::Nft.ask(&["list", "tables"]) {
        Ok(tables) => tables.lines().filter_map(stale_rules).for_each(|rules| remove(&rules)),
        Err(refusal) => log::warn!("stale rules were not looked for: {}", refusal.reason),
    }
    let shapers: String = stale.iter().map(|(name, _)| format!("link delete dev {name}\n")).collect();
    Tool::Ip.run_all(&shapers);
    log::warn!("removed the segments of {} VMs of dead processes", stale.len());
}

/// Whether somebody is, or is about to be, at the other end of the tap with this index.
fn is_held(index: u32) -> bool {
    links(&["dev", &format!("if{index}")]).iter().any(|link| has_end(link))
}

/// A tap that is up without its other end has been left; one that is down may be on its way up.
fn has_end(link: &str) -> bool {
    !has_flag(link, "UP") || has_flag(link, "LOWER_UP")
}

fn links(which: &[&str]) -> Vec<String> {
    let shown = Tool::Ip.ask(&[&["-oneline", "link", "show"], which].concat()).unwrap_or_default();
    shown.lines().map(str::to_owned).collect()
}

/// Reads `table inet NAME`; gives the rules if none of their taps has a VMM.
fn stale_rules(line: &str) -> Option<Rules> {
    let rules = Rules::of_table(line.strip_prefix("table inet ")?)?;
    let held = links(&["group", &rules.group().to_string()]).iter().any(|link| has_end(link));
    (!held).then_some(rules)
}

fn remove(rules: &Rules) {
    // A tap that was made to last: it goes back to what it was, as far as can be told.
    for link in links(&["group", &rules.group().to_string()]) {
        let Some(index) = link.split(':').next().and_then(|index| index.trim().parse::<u32>().ok()) else { continue };
        Tool::Ip.run_all(&format!("link set dev if{index} down\nlink set dev if{index} group 0\n"));
        Tool::Tc.run_all(&format!("qdisc delete dev if{index} ingress\nqdisc delete dev if{index} root\n"));
        Tool::Ip.run_all(&format!("address flush dev if{index} scope link\n"));
    }
    if let Err(refusal) = Tool::Nft.run(&rules.drop()) {
        log::warn!("stale rules were not removed: {}", refusal.reason);
    }
}
