//! Frames of the VM, taken apart and put together.
//!
//! Architecture invariant: pure. What a VM sends is hostile: only what is wholly as expected becomes a value, the rest is
//! nothing.

use std::net::Ipv4Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr,
    UdpPacket, UdpRepr, ETHERNET_HEADER_LEN, IPV4_HEADER_LEN, UDP_HEADER_LEN,
};

/// The longest IP packet on the wire, which is what the guest's device has.
pub const MTU: usize = 1500;
/// The longest payload of UDP or ICMP that fits a packet.
pub const MAX_DATAGRAM: usize = MTU - IPV4_HEADER_LEN - UDP_HEADER_LEN;
/// What an ICMP error repeats of the packet that it is about, as Linux does (RFC 1812: as much as fits 576 bytes).
const MAX_QUOTE: usize = 548;
const TTL: u8 = 64;

/// Who is at the two ends of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wire {
    pub guest_mac: EthernetAddress,
    pub guest: Ipv4Addr,
    pub gateway_mac: EthernetAddress,
    pub gateway: Ipv4Addr,
}

/// What a VM sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Inbound<'a> {
    /// It asks for the gateway's MAC address; this is the answer.
    Arp(Vec<u8>),
    Packet(Packet<'a>),
}

/// An IP packet from the VM's own address: whole, and without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    pub bytes: &'a [u8],
    pub to: Ipv4Addr,
    pub content: Content<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    Tcp {
        from: u16,
        to: u16,
        is_syn: bool,
        is_rst: bool,
    },
    Udp {
        from: u16,
        to: u16,
        payload: &'a [u8],
    },
    Echo {
        id: u16,
        sequence: u16,
        payload: &'a [u8],
    },
    /// Any other protocol, or another message of ICMP.
    Other,
}

impl Content<'_> {
    /// The port that it goes to, where it has one.
    pub fn port(&self) -> Option<u16> {
        match self {
            Content::Tcp { to, .. } | Content::Udp { to, .. } => Some(*to),
            Content::Echo { .. } | Content::Other => None,
        }
    }
}

/// Why a packet is not let pass, as the VM is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    Prohibited,
    Network,
    Host,
    Port,
}

impl Wire {
    /// Takes a frame apart; `None` for what is not from the VM itself, or not to be understood.
    #[must_use]
    pub fn parse<'a>(&self, frame: &'a [u8]) -> Option<Inbound<'a>> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        if ethernet.src_addr() != self.guest_mac {
            return None;
        }
        match ethernet.ethertype() {
            EthernetProtocol::Arp => self.answer(&ethernet).map(Inbound::Arp),
            EthernetProtocol::Ipv4 if ethernet.dst_addr() == self.gateway_mac => {
                self.packet(ethernet.payload()).map(Inbound::Packet)
            }
            _ => None,
        }
    }

    /// The answer to a question for the gateway.
    fn answer(&self, ethernet: &EthernetFrame<&[u8]>) -> Option<Vec<u8>> {
        let asked = ArpRepr::parse(&ArpPacket::new_checked(ethernet.payload()).ok()?).ok()?;
        let ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = asked
        else {
            return None;
        };
        let is_theirs = source_hardware_addr == self.guest_mac && source_protocol_addr == self.guest;
        let reached = ethernet.dst_addr().is_broadcast() || ethernet.dst_addr() == self.gateway_mac;
        if !is_theirs || !reached || target_protocol_addr != self.gateway {
            return None;
        }
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: self.gateway_mac,
            source_protocol_addr: self.gateway,
            target_hardware_addr: self.guest_mac,
            target_protocol_addr: self.guest,
        };
        let mut frame = vec![0; ETHERNET_HEADER_LEN + answer.buffer_len()];
        let payload = self.header(&mut frame, EthernetProtocol::Arp);
        answer.emit(&mut ArpPacket::new_unchecked(payload));
        Some(frame)
    }

    fn packet<'a>(&self, bytes: &'a [u8]) -> Option<Packet<'a>> {
        let ip = Ipv4Packet::new_checked(bytes).ok()?;
        let plain = ip.version() == 4 && usize::from(ip.header_len()) == IPV4_HEADER_LEN;
        let whole = !ip.more_frags() && ip.frag_offset() == 0 && usize::from(ip.total_len()) <= MTU;
        if !plain || !whole || ip.src_addr() != self.guest || !ip.verify_checksum() {
            return None;
        }
        let bytes = bytes.get(..usize::from(ip.total_len()))?;
        let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
        let payload = bytes.get(IPV4_HEADER_LEN..)?;
        let content = match ip.next_header() {
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(payload).ok()?;
                if tcp.src_port() == 0 || tcp.dst_port() == 0 || !tcp.verify_checksum(&from, &to) {
                    return None;
                }
                let is_syn = tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin();
                Content::Tcp { from: tcp.src_port(), to: tcp.dst_port(), is_syn, is_rst: tcp.rst() }
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(payload).ok()?;
                if udp.src_port() == 0 || udp.dst_port() == 0 || !udp.verify_checksum(&from, &to) {
                    return None;
                }
                Content::Udp { from: udp.src_port(), to: udp.dst_port(), payload: udp.payload() }
            }
            IpProtocol::Icmp => {
                let icmp = Icmpv4Packet::new_checked(payload).ok()?;
                match Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default()).ok()? {
                    Icmpv4Repr::EchoRequest { ident, seq_no, data } => {
                        Content::Echo { id: ident, sequence: seq_no, payload: data }
                    }
                    // An error of the VM's own concerns nobody: no packet goes to it that it could be about.
                    _ => return None,
                }
            }
            _ => Content::Other,
        };
        Some(Packet { bytes, to: ip.dst_addr(), content })
    }

    /// Writes the Ethernet header of a frame to the VM; gives the rest of the frame.
    pub fn header<'a>(&self, frame: &'a mut [u8], ethertype: EthernetProtocol) -> &'a mut [u8] {
        let mut ethernet = EthernetFrame::new_unchecked(frame);
        EthernetRepr { src_addr: self.gateway_mac, dst_addr: self.guest_mac, ethertype }.emit(&mut ethernet);
        ethernet.into_inner().split_at_mut(ETHERNET_HEADER_LEN).1
    }

    /// A frame to the VM with an IP packet from `from`, whose payload `fill` writes.
    fn frame(
        &self,
        from: Ipv4Addr,
        next_header: IpProtocol,
        payload_len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Vec<u8> {
        let ip = Ipv4Repr { src_addr: from, dst_addr: self.guest, next_header, payload_len, hop_limit: TTL };
        let mut frame = vec![0; ETHERNET_HEADER_LEN + IPV4_HEADER_LEN + payload_len];
        let packet = self.header(&mut frame, EthernetProtocol::Ipv4);
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut *packet), &ChecksumCapabilities::default());
        fill(packet.split_at_mut(IPV4_HEADER_LEN).1);
        frame
    }

    /// A datagram to the VM; `None`: it does not fit a packet.
    #[must_use]
    pub fn udp(&self, from: Ipv4Addr, src_port: u16, dst_port: u16, payload: &[u8]) -> Option<Vec<u8>> {
        let udp = UdpRepr { src_port, dst_port };
        let fill = |bytes: &mut [u8]| {
            let (from, to) = (from.into(), self.guest.into());
            let copy = |room: &mut [u8]| room.copy_from_slice(payload);
            let mut packet = UdpPacket::new_unchecked(bytes);
            udp.emit(&mut packet, &from, &to, payload.len(), copy, &ChecksumCapabilities::default());
        };
        let fits = payload.len() <= MAX_DATAGRAM;
        fits.then(|| self.frame(from, IpProtocol::Udp, UDP_HEADER_LEN + payload.len(), fill))
    }

    /// An answer to an echo request; `None`: it does not fit a packet.
    #[must_use]
    pub fn echo(&self, from: Ipv4Addr, ident: u16, seq_no: u16, data: &[u8]) -> Option<Vec<u8>> {
        (data.len() <= MAX_DATAGRAM).then(|| self.icmp(from, &Icmpv4Repr::EchoReply { ident, seq_no, data }))
    }

    fn icmp(&self, from: Ipv4Addr, message: &Icmpv4Repr<'_>) -> Vec<u8> {
        self.frame(from, IpProtocol::Icmp, message.buffer_len(), |bytes| {
            message.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
        })
    }

    /// Tells the VM that its packet does not get where it was to go; `None`: it is none that the VM may have sent.
    #[must_use]
    pub fn unreachable(&self, about: &[u8], why: Unreachable) -> Option<Vec<u8>> {
        let ip = Ipv4Packet::new_checked(about).ok()?;
        let header = Ipv4Repr {
            src_addr: ip.src_addr(),
            dst_addr: ip.dst_addr(),
            next_header: ip.next_header(),
            payload_len: about.len().checked_sub(IPV4_HEADER_LEN)?,
            hop_limit: ip.hop_limit(),
        };
        let reason = match why {
            Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
            Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
            Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
        };
        let quote = about.get(IPV4_HEADER_LEN..about.len().min(MAX_QUOTE))?;
        Some(self.icmp(self.gateway, &Icmpv4Repr::DstUnreachable { reason, header, data: quote }))
    }

    /// The packet of a datagram that the VM sent, as far as an ICMP error about it repeats it.
    #[must_use]
    pub fn sent(&self, to: Ipv4Addr, src_port: u16, dst_port: u16) -> Vec<u8> {
        let ip = Ipv4Repr {
            src_addr: self.guest,
            dst_addr: to,
            next_header: IpProtocol::Udp,
            payload_len: UDP_HEADER_LEN,
            hop_limit: TTL,
        };
        let mut packet = vec![0; IPV4_HEADER_LEN + UDP_HEADER_LEN];
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut packet), &ChecksumCapabilities::default());
        let mut udp = UdpPacket::new_unchecked(packet.split_at_mut(IPV4_HEADER_LEN).1);
        udp.set_src_port(src_port);
        udp.set_dst_port(dst_port);
        udp.set_len(UDP_HEADER_LEN as u16);
        packet
    }

    /// Resets the connection that a segment belongs to, or would open (RFC 9293, 3.10.7.1); `None` for a reset.
    #[must_use]
    pub fn reset(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        let (from, to) = (ip.dst_addr(), ip.src_addr());
        let segment = TcpPacket::new_checked(ip.payload()).ok()?;
        if segment.rst() {
            return None;
        }
        let (seq_number, ack_number) = match segment.ack() {
            true => (segment.ack_number(), None),
            false => {
                let length = segment.segment_len();
                (smoltcp::wire::TcpSeqNumber(0), Some(segment.seq_number() + length))
            }
        };
        let reset = TcpRepr {
            src_port: segment.dst_port(),
            dst_port: segment.src_port(),
            control: TcpControl::Rst,
            seq_number,
            ack_number,
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let fill = |bytes: &mut [u8]| {
            let mut tcp = TcpPacket::new_unchecked(bytes);
            reset.emit(&mut tcp, &from.into(), &to.into(), &ChecksumCapabilities::default());
        };
        Some(self.frame(from, IpProtocol::Tcp, reset.buffer_len(), fill))
    }
}
