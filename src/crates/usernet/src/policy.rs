//! Where the VM may go.
//!
//! Architecture invariant: pure. What the kernel says of an address comes in; a [`Ruling`] comes out. It is asked before
//! each new flow, and what is not let pass by name is not let pass.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use microvm_isolation::host::net::Destination;
use microvm_isolation::model::{EgressRule, EgressTarget};
use microvm_isolation::net::{is_never, Pinned, Relayed, MAX_PINNED};

/// For how long an address is let pass at least and at most: programs keep what they learned, whatever its TTL. Twice as
/// long, so that the next answers find it in place.
const MIN_PIN_S: u32 = 60;
const MAX_PIN_S: u32 = 3600;

/// What becomes of a packet that would begin a new flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    Pass,
    /// It is for the gateway itself.
    Gateway,
    /// The VM is told that it may not.
    Refuse,
    /// The VM is told that there is no way.
    NoRoute,
    /// What is for many is dropped without a word.
    Drop,
}

#[derive(Debug)]
pub struct Policy {
    guest: Ipv4Addr,
    gateway: Ipv4Addr,
    egress: Option<Vec<EgressRule>>,
    /// Where names of the allow-list lead, and until when.
    pins: HashMap<Pinned, Instant>,
}

impl Policy {
    #[must_use]
    pub fn new(guest: Ipv4Addr, gateway: Ipv4Addr, egress: Option<Vec<EgressRule>>) -> Self {
        Self { guest, gateway, egress, pins: HashMap::new() }
    }

    #[must_use]
    pub fn egress(&self) -> Option<&[EgressRule]> {
        self.egress.as_deref()
    }

    /// Decides on a flow to `to`, at `port` if it has ports. `destination` is asked last: it costs a system call.
    pub fn ruling(
        &self,
        to: Ipv4Addr,
        port: Option<u16>,
        now: Instant,
        destination: impl FnOnce(Ipv4Addr) -> Destination,
    ) -> Ruling {
        if to.is_multicast() || to.is_broadcast() {
            return Ruling::Drop;
        }
        if to == self.gateway {
            return Ruling::Gateway;
        }
        if is_never(to) || to == self.guest || !self.is_listed(to, port, now) {
            return Ruling::Refuse;
        }
        match destination(to) {
            Destination::Elsewhere => Ruling::Pass,
            Destination::Local => Ruling::Refuse,
            Destination::Other => Ruling::Drop,
            Destination::Unreachable => Ruling::NoRoute,
        }
    }

    fn is_listed(&self, to: Ipv4Addr, port: Option<u16>, now: Instant) -> bool {
        let Some(rules) = &self.egress else { return true };
        let named = |rule: &EgressRule| match &rule.to {
            EgressTarget::Net(net) => net.contains(to) && (rule.port.is_none() || rule.port == port),
            EgressTarget::Name(_) => false,
        };
        let pinned = |port| self.pins.get(&Pinned { address: to, port }).is_some_and(|until| *until > now);
        rules.iter().any(named) || pinned(None) || port.is_some_and(|port| pinned(Some(port)))
    }

    /// Lets the VM go where an answer points, before the VM hears it.
    ///
    /// # Errors
    /// The names stand for too many addresses already.
    pub fn pin(&mut self, relayed: &Relayed, now: Instant) -> Result<(), String> {
        self.pins.retain(|_, until| *until > now);
        let new = relayed.pinned.iter().filter(|pinned| !self.pins.contains_key(pinned)).count();
        if self.pins.len() + new > MAX_PINNED {
            return Err(format!("its names stand for {} addresses already, the most that may be", self.pins.len()));
        }
        let until = now + Duration::from_secs(u64::from(relayed.ttl_s.clamp(MIN_PIN_S, MAX_PIN_S)) * 2);
        for pinned in &relayed.pinned {
            let known = self.pins.entry(*pinned).or_insert(until);
            *known = until.max(*known);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn address(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn policy(egress: Option<&[&str]>) -> Policy {
        let rules = egress.map(|texts| texts.iter().map(|text| EgressRule::parse(text).unwrap()).collect());
        Policy::new(address("10.173.0.2"), address("10.173.0.1"), rules)
    }

    fn ruling(policy: &Policy, to: &str, port: Option<u16>) -> Ruling {
        policy.ruling(address(to), port, Instant::now(), |_| Destination::Elsewhere)
    }

    fn relayed(addresses: impl Iterator<Item = (u32, Option<u16>)>, ttl_s: u32) -> Relayed {
        let pinned = addresses.map(|(address, port)| Pinned { address: address.into(), port }).collect();
        Relayed { message: Vec::new(), pinned, ttl_s, withheld: None }
    }

    #[test]
    fn test_ruling_where_no_vm_may_go_is_refused_whatever_the_list_says() {
        let everything = ["0.0.0.0/0"];
        for policy in [policy(None), policy(Some(&everything))] {
            for never in [
                "127.0.0.1",
                "0.0.0.0",
                "169.254.169.254",
                "100.100.100.200",
                "168.63.129.16",
                "192.0.0.192",
                "240.0.0.1",
            ] {
                assert_eq!(ruling(&policy, never, Some(80)), Ruling::Refuse, "{never}");
            }
            for many in ["224.0.0.251", "239.255.255.250", "255.255.255.255"] {
                assert_eq!(ruling(&policy, many, Some(80)), Ruling::Drop, "{many}");
            }
            assert_eq!(ruling(&policy, "10.173.0.1", Some(80)), Ruling::Gateway);
            assert_eq!(ruling(&policy, "10.173.0.2", Some(80)), Ruling::Refuse);
            assert_eq!(ruling(&policy, "192.0.2.1", None), Ruling::Pass);
        }
    }

    #[test]
    fn test_ruling_what_the_kernel_says_of_an_address_decides() {
        let policy = policy(None);
        for (destination, expected) in [
            (Destination::Local, Ruling::Refuse),
            (Destination::Other, Ruling::Drop),
            (Destination::Unreachable, Ruling::NoRoute),
            (Destination::Elsewhere, Ruling::Pass),
        ] {
            assert_eq!(policy.ruling(address("192.0.2.1"), Some(80), Instant::now(), |_| destination), expected);
        }
    }

    #[test]
    fn test_ruling_the_list_is_held_by_address_and_port() {
        let listed = policy(Some(&["10.20.0.0/16:443", "192.0.2.1", "a.test"]));
        assert_eq!(ruling(&listed, "10.20.9.9", Some(443)), Ruling::Pass);
        for (to, port) in [("10.20.9.9", Some(80)), ("10.20.9.9", None), ("10.21.0.1", Some(443)), ("192.0.2.2", None)]
        {
            assert_eq!(ruling(&listed, to, port), Ruling::Refuse, "{to} {port:?}");
        }
        assert_eq!(ruling(&listed, "192.0.2.1", None), Ruling::Pass);
        assert_eq!(ruling(&policy(Some(&[])), "192.0.2.1", None), Ruling::Refuse);
    }

    #[test]
    fn test_pin_opens_the_address_at_its_port_for_twice_its_ttl() {
        let mut listed = policy(Some(&["a.test:443"]));
        let (now, to) = (Instant::now(), address("192.0.2.7"));
        listed.pin(&relayed([(u32::from(to), Some(443))].into_iter(), 100), now).unwrap();
        let at = |policy: &Policy, port, seconds| {
            policy.ruling(to, port, now + Duration::from_secs(seconds), |_| Destination::Elsewhere)
        };
        assert_eq!(at(&listed, Some(443), 199), Ruling::Pass);
        assert_eq!(at(&listed, Some(80), 1), Ruling::Refuse);
        assert_eq!(at(&listed, None, 1), Ruling::Refuse);
        assert_eq!(at(&listed, Some(443), 201), Ruling::Refuse);
        // A shorter answer takes nothing away.
        listed.pin(&relayed([(u32::from(to), Some(443))].into_iter(), 0), now).unwrap();
        assert_eq!(at(&listed, Some(443), 199), Ruling::Pass);
    }

    #[test]
    fn test_pin_there_is_a_most_and_time_makes_room() {
        let mut listed = policy(Some(&["a.test"]));
        let now = Instant::now();
        let many = u32::try_from(MAX_PINNED).unwrap();
        listed.pin(&relayed((0..many).map(|n| (n, None)), 60), now).unwrap();
        assert!(listed.pin(&relayed([(many, None)].into_iter(), 60), now).is_err());
        listed.pin(&relayed([(7, None)].into_iter(), 60), now).unwrap();
        listed.pin(&relayed([(many, None)].into_iter(), 60), now + Duration::from_secs(121)).unwrap();
    }
}
