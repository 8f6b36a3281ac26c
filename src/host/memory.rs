//! How much memory this host has to give.

use std::fs;

use super::cgroup;

/// Memory in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    pub total_mib: u64,
    /// What could be had without swapping, for this process: the kernel's estimate, or what its control groups leave
    /// when that is less.
    pub available_mib: u64,
}

/// Reads it; `None` where there is no `/proc/meminfo`.
#[must_use]
pub fn read() -> Option<HostMemory> {
    let memory = parse(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let left_mib = cgroup::memory_left().map_or(u64::MAX, |bytes| bytes >> 20);
    Some(HostMemory { available_mib: memory.available_mib.min(left_mib), ..memory })
}

/// Whether `mib` more can be used and `share` per cent of the host's memory be left; true where nothing is known.
#[must_use]
pub fn has_spare(mib: u64, share: u64) -> bool {
    read().is_none_or(|memory| memory.available_mib >= mib + memory.total_mib * share / 100)
}

fn parse(meminfo: &str) -> Option<HostMemory> {
    let mib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib >> 10)
    };
    Some(HostMemory { total_mib: mib("MemTotal")?, available_mib: mib("MemAvailable")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_takes_total_and_available() {
        let text = "MemTotal:       2048000 kB\nMemFree:  10 kB\nMemAvailable:   1024000 kB\n";
        assert_eq!(parse(text), Some(HostMemory { total_mib: 2000, available_mib: 1000 }));
    }

    #[test]
    fn test_has_spare_a_world_of_memory_is_not_there() {
        assert!(has_spare(0, 0) && !has_spare(1 << 40, 0));
    }

    #[test]
    fn test_read_of_this_host_is_plausible() {
        let memory = read().unwrap();
        assert!(memory.total_mib >= memory.available_mib && memory.available_mib > 0);
    }
}
