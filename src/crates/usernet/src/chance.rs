//! Numbers that nobody guesses, from a process that can open no file.

use std::hash::{BuildHasher, RandomState};

/// SipHash of a counter, under a key that the standard library asks the kernel for (getrandom(2)): what Linux takes for its own
/// initial sequence numbers.
#[derive(Debug, Default)]
pub struct Chance {
    key: RandomState,
    count: u64,
}

impl Chance {
    pub fn next_u64(&mut self) -> u64 {
        self.count += 1;
        self.key.hash_one(self.count)
    }

    pub fn next_u16(&mut self) -> u16 {
        let [low, high, ..] = self.next_u64().to_ne_bytes();
        u16::from_ne_bytes([low, high])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn test_no_number_comes_twice_and_no_two_processes_have_the_same() {
        let (mut one, mut other) = (Chance::default(), Chance::default());
        let all: HashSet<u64> = (0..500).flat_map(|_| [one.next_u64(), other.next_u64()]).collect();
        assert_eq!(all.len(), 1000);
    }
}
