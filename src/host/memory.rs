//! The host's memory.

use std::fs;

/// Memory that can be had without swapping, and all there is, in MiB (`MemAvailable`, `MemTotal` of proc(5)).
#[must_use]
pub fn available_and_total_mib() -> Option<(u64, u64)> {
    parse(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok().map(|kib| kib >> 10)
    };
    Some((field("MemAvailable:")?, field("MemTotal:")?))
}

/// Whether `mib` more can be used and `share` per cent of the host's memory be left; true where nothing is known.
#[must_use]
pub fn has_spare(mib: u64, share: u64) -> bool {
    available_and_total_mib().is_none_or(|(available, total)| available >= mib + total * share / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_finds_both_fields() {
        let text = "MemTotal:       24689764 kB\nMemFree:         100 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(parse(text), Some((2, 24_111)));
    }

    #[test]
    fn test_has_spare_a_world_of_memory_is_not_there() {
        assert!(has_spare(0, 0) && !has_spare(1 << 40, 0));
    }
}
