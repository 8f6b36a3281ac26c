//! The hard limits that this process was started with (getrlimit(2)): what it starts has no more, whoever starts it.

use microvm_jail::Resource;
use nix::sys::resource::getrlimit;

/// The hard limit; `u64::MAX` where there is none, or where the kernel does not tell.
#[must_use]
pub fn hard(resource: Resource) -> u64 {
    getrlimit(resource.into()).map_or(u64::MAX, |(_, hard)| hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_hard_is_what_proc_says() {
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let told = line.split_whitespace().nth(4).unwrap();
        assert_eq!(hard(Resource::Nofile), told.parse().unwrap_or(u64::MAX));
    }
}
