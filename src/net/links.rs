//! The host's end of a VM network, as batches for `ip` and `tc` and as settings of the kernel.
//!
//! ```text
//!   guest --> tap --redirect--> ifb --tbf--> the host's stack        what the VM sends
//!   guest <-- tap <----tbf----------------------------the host's stack        what the VM receives
//! ```
//! A tap's own queue shapes only what leaves by it; what arrives is sent through a second queue, the ifb's.

use super::vm_network::{Before, VmNetwork};

/// The pattern by which the kernel names a tap that nobody named.
pub const GENERATED_TAP: &str = "twm%d";
/// An ifb is named after the index of its tap: indexes are never given out twice.
pub const IFB_PREFIX: &str = "tw-ifb-";

/// A network interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
}

impl Interface {
    #[must_use]
    pub fn ifb(&self) -> String {
        format!("{IFB_PREFIX}{}", self.index)
    }
}

/// What a frame of 1500 bytes has on the wire, without the checksum that a tap does not carry.
const FRAME: u64 = 1514;
/// How much may pass at once, as time: enough for a coarse timer, too little to notice.
const BURST_MS: u64 = 10;
/// How long a packet may wait.
const QUEUE_MS: u64 = 50;

impl VmNetwork {
    /// Before anything else: the interfaces exist, are down, and the tap is in the group that the rules know.
    #[must_use]
    pub fn ip_begin(&self, group: u32) -> String {
        format!("link set dev {} group {group}\nlink add {} type ifb\n", self.tap.name, self.tap.ifb())
    }

    /// Settings below `/proc/sys/net`, before the interfaces are up. All are the VM network's own.
    #[must_use]
    pub fn settings(&self) -> Vec<(String, &'static str)> {
        let tap = |name: &str| format!("ipv4/conf/{}/{name}", self.tap.name);
        let mut settings: Vec<(String, &'static str)> = [
            // Packets from this interface may be forwarded; the other direction is the uplink's setting.
            ("forwarding", "1"),
            // A second look at the source address.
            ("rp_filter", "1"),
            ("accept_redirects", "0"),
            ("accept_source_route", "0"),
            ("send_redirects", "0"),
            ("proxy_arp", "0"),
            ("route_localnet", "0"),
            // A guest does not fill the host's log.
            ("log_martians", "0"),
        ]
        .map(|(name, value)| (tap(name), value))
        .into();
        for interface in [&self.tap.name, &self.tap.ifb()] {
            settings.push((format!("ipv6/conf/{interface}/disable_ipv6"), "1"));
        }
        settings
    }

    #[must_use]
    pub fn tc(&self) -> String {
        let bytes_per_s = self.bandwidth_mbps * 1_000_000 / 8;
        let burst = (bytes_per_s * BURST_MS / 1000).max(4 * FRAME);
        let limit = (bytes_per_s * QUEUE_MS / 1000).max(16 * FRAME) + burst;
        let (tap, ifb) = (&self.tap.name, self.tap.ifb());
        let tbf = format!("root tbf rate {}mbit burst {burst} limit {limit}", self.bandwidth_mbps);
        format!(
            "qdisc replace dev {tap} {tbf}\n\
             qdisc replace dev {ifb} {tbf}\n\
             qdisc add dev {tap} ingress\n\
             filter add dev {tap} parent ffff: protocol all prio 1 u32 match u32 0 0 \
             action mirred egress redirect dev {ifb}\n"
        )
    }

    /// After the rules are in force. That the route is new is what tells that nobody else has the address.
    #[must_use]
    pub fn ip_up(&self) -> String {
        let (tap, ifb, mac) = (&self.tap.name, self.tap.ifb(), &self.mac);
        let (address, gateway) = (self.addresses.address, self.addresses.gateway);
        // `scope link`: no packet to anywhere else is given this source address.
        let own = match self.before {
            Some(Before { gateway: true, .. }) => String::new(),
            _ => format!("address add {gateway}/32 dev {tap} scope link\n"),
        };
        format!(
            "link set dev {ifb} up\n\
             link set dev {tap} up\n\
             {own}neighbour replace {address} lladdr {mac} dev {tap} nud permanent\n\
             route add {address}/32 dev {tap} scope link src {gateway}\n"
        )
    }

    /// Stops all traffic; to be run before the rules go. `ifN` means the interface with index N, whatever it is called:
    /// the tap may be gone by now, and its name another's.
    #[must_use]
    pub fn ip_down(&self) -> String {
        let (n, gateway) = (self.tap.index, self.addresses.gateway);
        match self.before {
            None => format!("link delete dev if{n}\n"),
            // With the link go the route and the neighbour, but not the address.
            Some(Before { gateway: true, .. }) => format!("link set dev if{n} down\n"),
            Some(_) => format!("link set dev if{n} down\naddress delete {gateway}/32 dev if{n}\n"),
        }
    }

    /// What a tap that was there before must lose.
    #[must_use]
    pub fn tc_down(&self) -> String {
        let n = self.tap.index;
        match self.before {
            None => String::new(),
            Some(_) => format!("qdisc delete dev if{n} ingress\nqdisc delete dev if{n} root\n"),
        }
    }

    /// The last step: that the ifb is there tells that there may be more to remove.
    #[must_use]
    pub fn ip_end(&self) -> String {
        let n = self.tap.index;
        let back = match self.before {
            None => String::new(),
            Some(Before { up: false, .. }) => format!("link set dev if{n} group 0\n"),
            Some(Before { up: true, .. }) => format!("link set dev if{n} group 0 up\n"),
        };
        format!("{back}link delete dev {}\n", self.tap.ifb())
    }
}

#[cfg(test)]
mod tests {
    use super::super::assert_golden;
    use super::super::vm_network::tests::example;
    use super::*;

    #[test]
    fn test_batches_are_golden() {
        let vm_network = example(None);
        let there = VmNetwork { before: Some(Before { up: true, gateway: false }), ..vm_network.clone() };
        let with_gateway = VmNetwork { before: Some(Before { up: false, gateway: true }), ..vm_network.clone() };
        let settings: String =
            vm_network.settings().iter().map(|(path, value)| format!("{path} = {value}\n")).collect();
        let mut parts = vec![
            ("ip_begin", vm_network.ip_begin(1234)),
            ("settings", settings),
            ("tc", vm_network.tc()),
            ("ip_up", vm_network.ip_up()),
            ("ip_up, the tap had the gateway's address", with_gateway.ip_up()),
        ];
        for (title, vm_network) in
            [("was made", &vm_network), ("was there and up", &there), ("had the gateway", &with_gateway)]
        {
            parts.push((title, vm_network.ip_down() + &vm_network.tc_down() + &vm_network.ip_end()));
        }
        let text: String = parts.iter().map(|(title, text)| format!("# {title}\n{text}\n")).collect();
        assert_golden("net-vm-network.batches", &text);
    }

    #[test]
    fn test_tc_at_the_lowest_rate_lets_whole_frames_pass() {
        let vm_network = VmNetwork { bandwidth_mbps: 1, ..example(None) };
        assert!(vm_network.tc().contains("rate 1mbit burst 6056 limit 30280"), "{}", vm_network.tc());
    }

    #[test]
    fn test_interface_names_fit_the_kernels_limit() {
        let tap = Interface { name: "x".into(), index: 99_999_999 };
        assert!(tap.ifb().len() <= 15);
    }
}
