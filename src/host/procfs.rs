//! What a process costs, from `/proc`.

use std::fs;

/// A process's use of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time of all threads, seconds.
    pub cpu_s: f64,
    /// Resident memory, bytes.
    pub rss_bytes: u64,
}

/// How the kernel's scheduler has treated a process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scheduling {
    /// Time that its threads were ready to run and did not, seconds; of all of them together.
    pub waited_s: f64,
    /// Whether it was stopped by a signal or a tracer.
    pub is_stopped: bool,
}

/// Clock ticks per second in `/proc/*/stat`; USER_HZ is 100 on every x86-64 kernel.
const USER_HZ: f64 = 100.0;
/// The page size on x86-64.
const PAGE: u64 = 4096;

/// Reads a process's usage; `None` when it is gone.
#[must_use]
pub fn usage(pid: i32) -> Option<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&stat)
}

/// Resident memory that is the process's alone: neither of files nor shared. `None` when it is gone.
#[must_use]
pub fn private_bytes(pid: i32) -> Option<u64> {
    parse_statm(&fs::read_to_string(format!("/proc/{pid}/statm")).ok()?)
}

/// Whether a process was stopped by a signal, with all its threads.
#[must_use]
pub fn is_stopped(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut states = threads.filter_map(|thread| parse_state(&fs::read_to_string(thread.path().join("stat")).ok()?));
    let first = states.next();
    first == Some('T') && states.all(|state| state == 'T')
}

/// proc_pid_stat(5): the state is the field behind the command.
fn parse_state(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Reads how a process was scheduled; `None` when it is gone.
#[must_use]
pub fn scheduling(pid: i32) -> Option<Scheduling> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit_once(')')?.1.split_whitespace().next()?.to_owned();
    // A thread that ends meanwhile takes its account with it.
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let waited = tasks.filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok());
    let waited_s = waited.filter_map(|text| parse_schedstat(&text)).sum();
    Some(Scheduling { waited_s, is_stopped: matches!(state.as_str(), "T" | "t") })
}

/// Documentation/scheduler/sched-stats.rst: time on a CPU and time waited for one, nanoseconds; time slices.
fn parse_schedstat(schedstat: &str) -> Option<f64> {
    schedstat.split_whitespace().nth(1)?.parse::<u64>().ok().map(|waited_ns| waited_ns as f64 / 1e9)
}

/// proc_pid_statm(5): size, resident, shared.
fn parse_statm(statm: &str) -> Option<u64> {
    let mut fields = statm.split_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok());
    Some(fields.next()?.saturating_sub(fields.next()?) * PAGE)
}

/// proc_pid_stat(5): the command may hold spaces and parentheses, so fields count from the last `)`.
fn parse_stat(stat: &str) -> Option<Usage> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index - 3)?.parse::<u64>().ok();
    Some(Usage { cpu_s: (number(14)? + number(15)?) as f64 / USER_HZ, rss_bytes: number(24)? * PAGE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_usage_of_this_process_is_above_zero() {
        assert!(usage(std::process::id() as i32).unwrap().rss_bytes > 1 << 20);
    }

    #[test]
    fn test_scheduling_of_this_process_and_of_a_stopped_one() {
        assert!(!scheduling(std::process::id() as i32).unwrap().is_stopped);
        assert_eq!(parse_schedstat("100 1500000000 3"), Some(1.5));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let stopped = || scheduling(pid.as_raw()).is_some_and(|scheduling| scheduling.is_stopped);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !stopped() && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        let was_stopped = stopped();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(was_stopped);
    }

    #[test]
    fn test_parse_statm_takes_the_shared_pages_off() {
        assert_eq!(parse_statm("900 30 10 1 0 5 0"), Some(20 * 4096));
        assert_eq!(parse_statm("900"), None);
    }

    #[test]
    fn test_parse_stat_with_a_hostile_name_finds_the_fields() {
        let stat = "1 (a) S 1) S 0 1 1 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 1 0 5 1000 25 18446744073709551615";
        assert_eq!(parse_stat(stat), Some(Usage { cpu_s: 2.0, rss_bytes: 25 * 4096 }));
    }
}
