//! The host's end of a VM network, as messages of rtnetlink, a batch for `tc` and settings of the kernel.
//!
//! ```text
//!   guest --> tap --redirect--> ifb --tbf--> the host's stack        what the VM sends
//!   guest <-- tap <----tbf----------------------------the host's stack        what the VM receives
//! ```
//! A tap's own queue shapes only what leaves by it; what arrives is sent through a second queue, the ifb's.

use std::net::IpAddr;

use netlink_packet_core::{NetlinkMessage, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::vm_network::{Before, VmNetwork};

/// What is to be done to a link, an address, a neighbour or a route.
pub type Change = NetlinkMessage<RouteNetlinkMessage>;
/// The thing must not be there yet.
const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

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
    pub fn links_begin(&self, group: u32) -> Vec<Change> {
        let mut ifb = named(self.tap.ifb());
        ifb.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
        vec![
            change(RouteNetlinkMessage::SetLink(in_group(self.tap.index, group)), 0),
            change(RouteNetlinkMessage::NewLink(ifb), NEW),
        ]
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
    pub fn links_up(&self) -> Vec<Change> {
        let mut changes = vec![
            change(RouteNetlinkMessage::SetLink(up(named(self.tap.ifb()))), 0),
            change(RouteNetlinkMessage::SetLink(up(indexed(self.tap.index))), 0),
        ];
        if !self.before.is_some_and(|before| before.gateway) {
            changes.push(change(RouteNetlinkMessage::NewAddress(self.gateway()), NEW));
        }
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = AddressFamily::Inet;
        neighbour.header.ifindex = self.tap.index;
        neighbour.header.state = NeighbourState::Permanent;
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(self.addresses.address)),
            NeighbourAttribute::LinkLayerAddress(self.mac.octets().to_vec()),
        ];
        changes.push(change(RouteNetlinkMessage::NewNeighbour(neighbour), NLM_F_CREATE | NLM_F_REPLACE));
        let mut route = RouteMessage::default();
        route.header = RouteHeader {
            address_family: AddressFamily::Inet,
            destination_prefix_length: 32,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Boot,
            scope: RouteScope::Link,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        route.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet(self.addresses.address)),
            RouteAttribute::PrefSource(RouteAddress::Inet(self.addresses.gateway)),
            RouteAttribute::Oif(self.tap.index),
        ];
        changes.push(change(RouteNetlinkMessage::NewRoute(route), NEW));
        changes
    }

    /// Stops all traffic; to be made before the rules go. The tap is named by its index: it may be gone by now, and its name
    /// another's.
    #[must_use]
    pub fn links_down(&self) -> Vec<Change> {
        let tap = indexed(self.tap.index);
        match self.before {
            None => vec![removed(tap)],
            // With the link go the route and the neighbour, but not the address.
            Some(Before { gateway: true, .. }) => vec![change(RouteNetlinkMessage::SetLink(down(tap)), 0)],
            Some(_) => vec![
                change(RouteNetlinkMessage::SetLink(down(tap)), 0),
                change(RouteNetlinkMessage::DelAddress(self.gateway()), 0),
            ],
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
    pub fn links_end(&self) -> Vec<Change> {
        let back = in_group(self.tap.index, 0);
        let back = self.before.map(|before| if before.up { up(back) } else { back });
        let ifb = ifb_removed(&self.tap.ifb());
        back.map(|back| change(RouteNetlinkMessage::SetLink(back), 0)).into_iter().chain([ifb]).collect()
    }

    /// The gateway's address on the tap. `Link`: no packet to anywhere else is given this source address.
    fn gateway(&self) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.scope = AddressScope::Link;
        message.header.index = self.tap.index;
        let gateway = IpAddr::V4(self.addresses.gateway);
        message.attributes = vec![AddressAttribute::Local(gateway), AddressAttribute::Address(gateway)];
        message
    }
}

/// What takes a tap that a dead process left out of use, before its addresses go.
#[must_use]
pub fn abandoned_down(tap: u32) -> Change {
    change(RouteNetlinkMessage::SetLink(down(indexed(tap))), 0)
}

/// What takes a tap that a dead process left out of the group of its rules, and removes it when it `is_ours`.
#[must_use]
pub fn abandoned_end(tap: u32, is_ours: bool) -> Vec<Change> {
    let mut changes = vec![change(RouteNetlinkMessage::SetLink(in_group(tap, 0)), 0)];
    changes.extend(is_ours.then(|| removed(indexed(tap))));
    changes
}

/// What removes an ifb.
#[must_use]
pub fn ifb_removed(name: &str) -> Change {
    removed(named(name.to_owned()))
}

fn removed(link: LinkMessage) -> Change {
    change(RouteNetlinkMessage::DelLink(link), 0)
}

fn change(message: RouteNetlinkMessage, flags: u16) -> Change {
    let mut change = Change::from(message);
    change.header.flags = flags;
    change
}

fn indexed(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link
}

/// A link by its name: the kernel looks at that where there is no index.
fn named(name: String) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name));
    link
}

fn in_group(index: u32, group: u32) -> LinkMessage {
    let mut link = indexed(index);
    link.attributes.push(LinkAttribute::Group(group));
    link
}

fn up(mut link: LinkMessage) -> LinkMessage {
    (link.header.flags, link.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
    link
}

fn down(mut link: LinkMessage) -> LinkMessage {
    (link.header.flags, link.header.change_mask) = (LinkFlags::empty(), LinkFlags::Up);
    link
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkPayload;

    use super::super::assert_golden;
    use super::super::vm_network::tests::example;
    use super::*;

    /// The changes as the kernel reads them: each is made into bytes and read back.
    fn decoded(changes: &[Change]) -> String {
        let line = |change: &Change| {
            let mut change = change.clone();
            change.finalize();
            let mut bytes = vec![0; change.buffer_len()];
            change.serialize(&mut bytes);
            let read = Change::deserialize(&bytes).unwrap();
            let names = [(NLM_F_CREATE, "create "), (NLM_F_EXCL, "exclusive "), (NLM_F_REPLACE, "replace ")];
            let flags: String =
                names.into_iter().filter(|(flag, _)| read.header.flags & flag != 0).map(|(_, name)| name).collect();
            let NetlinkPayload::InnerMessage(message) = read.payload else { panic!("{read:?}") };
            format!("{flags}{message:?}\n")
        };
        changes.iter().map(line).collect()
    }

    #[test]
    fn test_messages_and_batches_are_golden() {
        let vm_network = example(None);
        let there = VmNetwork { before: Some(Before { up: true, gateway: false }), ..vm_network.clone() };
        let with_gateway = VmNetwork { before: Some(Before { up: false, gateway: true }), ..vm_network.clone() };
        let settings: String =
            vm_network.settings().iter().map(|(path, value)| format!("{path} = {value}\n")).collect();
        let mut parts = vec![
            ("links_begin", decoded(&vm_network.links_begin(1234))),
            ("settings", settings),
            ("tc", vm_network.tc()),
            ("links_up", decoded(&vm_network.links_up())),
            ("links_up, the tap had the gateway's address", decoded(&with_gateway.links_up())),
        ];
        for (title, vm_network) in
            [("was made", &vm_network), ("was there and up", &there), ("had the gateway", &with_gateway)]
        {
            let (down, end) = (decoded(&vm_network.links_down()), decoded(&vm_network.links_end()));
            parts.push((title, down + &vm_network.tc_down() + &end));
        }
        parts.push(("abandoned, ours", decoded(&[vec![abandoned_down(7)], abandoned_end(7, true)].concat())));
        parts.push(("abandoned, made by others", decoded(&abandoned_end(7, false))));
        let text: String = parts.iter().map(|(title, text)| format!("# {title}\n{text}\n")).collect();
        assert_golden("net-vm-network.changes", &text);
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
