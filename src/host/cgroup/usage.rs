//! What a VM's groups have counted.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What the processes of one VM used together; `None` where no group counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupUse {
    /// Memory charged to them, page cache included, bytes.
    pub memory_bytes: Option<u64>,
    /// Processes that the kernel killed because the group was at its limit.
    pub oom_kills: Option<u64>,
    /// Time for which the group was held back at its CPU quota, microseconds.
    pub throttled_us: Option<u64>,
    /// Share of the last 10 s in which some task of the group waited for memory, in hundredths of a per cent (v2, PSI).
    pub memory_pressure_centi: Option<u64>,
}

/// The groups that a record names.
#[must_use]
pub fn recorded(record: &[u8]) -> Vec<PathBuf> {
    record
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| OsStr::from_bytes(line).into())
        .collect()
}

/// Reads what the groups in `folders` have counted.
#[must_use]
pub fn usage(folders: &[PathBuf]) -> GroupUse {
    let mut sum = GroupUse::default();
    for folder in folders {
        let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
        let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
        let keyed = |file: &str, key: &str| value_of(&read(file)?, key);
        let is_v2 = folder.join("cgroup.controllers").exists();
        if is_v2 {
            sum.memory_bytes = sum.memory_bytes.or_else(|| number("memory.current"));
            sum.oom_kills = sum.oom_kills.or_else(|| keyed("memory.events", "oom_kill"));
            sum.throttled_us = sum.throttled_us.or_else(|| keyed("cpu.stat", "throttled_usec"));
            sum.memory_pressure_centi = sum.memory_pressure_centi.or_else(|| some_avg10(&read("memory.pressure")?));
        } else {
            sum.memory_bytes = sum.memory_bytes.or_else(|| number("memory.usage_in_bytes"));
            sum.oom_kills = sum.oom_kills.or_else(|| keyed("memory.oom_control", "oom_kill"));
            sum.throttled_us = sum.throttled_us.or_else(|| Some(keyed("cpu.stat", "throttled_time")? / 1000));
        }
    }
    sum
}

fn value_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

/// Documentation/accounting/psi.rst: `some avg10=0.12 avg60=...`.
fn some_avg10(pressure: &str) -> Option<u64> {
    let line = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    let value = line.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?;
    let (whole, hundredths) = value.split_once('.')?;
    Some(whole.parse::<u64>().ok()?.checked_mul(100)? + hundredths.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_usage_reads_both_generations() {
        let base = tempfile::tempdir().unwrap();
        let group = |name: &str, files: &[(&str, &str)]| {
            let folder = base.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            files.iter().for_each(|(file, text)| fs::write(folder.join(file), text).unwrap());
            folder
        };
        let v1 = [
            group("cpu", &[("cpu.stat", "nr_periods 3\nnr_throttled 1\nthrottled_time 5000\n")]),
            group(
                "memory",
                &[
                    ("memory.usage_in_bytes", "4096\n"),
                    ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
                ],
            ),
        ];
        let v2 = [group(
            "v2",
            &[
                ("cgroup.controllers", "cpu memory"),
                ("memory.current", "4096\n"),
                ("memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 1\n"),
                ("cpu.stat", "usage_usec 9\nthrottled_usec 5\n"),
                ("memory.pressure", "some avg10=1.25 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00\n"),
            ],
        )];
        let wanted =
            GroupUse { memory_bytes: Some(4096), oom_kills: Some(2), throttled_us: Some(5), ..GroupUse::default() };
        assert_eq!(usage(&v1), wanted);
        assert_eq!(usage(&v2), GroupUse { memory_pressure_centi: Some(125), ..wanted });
        assert_eq!(usage(&[]), GroupUse::default());
    }
}
