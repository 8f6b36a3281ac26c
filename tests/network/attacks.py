"""What a guest, or a VMM in an attacker's power, may try on its wire: each attempt as frames that carry a mark.

None of the marks may be seen again: not on another interface, not in a service of the host's, not in an answer. Only the
host's refusal, an ICMP error to the VM itself, quotes what it refuses; ``TOLD`` are the attempts that get one.
"""

import socket
import struct
from typing import Callable, Dict, List, NamedTuple

from .frames import (
    BROADCAST,
    IPV4,
    IPV6,
    RST,
    VLAN,
    Inbox,
    echo,
    ethernet,
    ipv4,
    ipv6_echo,
    ipv6_udp,
    mac,
    tcp,
    udp,
)
from .lab import HOST_ADDRESS, HOST_OTHER_ADDRESS

INTERNET = "198.51.100.1"
ANOTHER_MAC = "02:00:00:00:00:99"
SOMEWHERE = "203.0.113.99"
PORT = Inbox.PORT
MORE_FRAGMENTS = 0x2000


class End(NamedTuple):
    """One end of a wire: the tap on the host, and who is said to be behind it."""

    tap: str
    tap_mac: str
    mac: str
    address: str
    gateway: str

    @property
    def tap_link_local(self) -> str:
        """The IPv6 address that the tap would make of its MAC."""
        return link_local(self.tap_mac)

    def frame(self, packet: bytes, kind: int = IPV4, to: str = "", sender: str = "") -> bytes:
        return ethernet(to or self.tap_mac, sender or self.mac, kind, packet)


def link_local(address: str) -> str:
    octets = bytearray(mac(address))
    octets[0] ^= 2
    raw = b"\xfe\x80" + bytes(6) + bytes(octets[:3]) + b"\xff\xfe" + bytes(octets[3:])
    return socket.inet_ntop(socket.AF_INET6, raw)


Attempt = Callable[[End, End, bytes], List[bytes]]


def to(address: str, port: int = PORT) -> Attempt:
    """A datagram, a connection and an echo to one address."""
    return lambda me, _, mark: [
        me.frame(udp(me.address, address, port, mark)),
        me.frame(tcp(me.address, address, port, mark)),
        me.frame(echo(me.address, address, mark)),
    ]


def fragments(me: End, sender: str, address: str, mark: bytes) -> List[bytes]:
    # A mark is a whole number of the 8 bytes that a fragment's place is counted in.
    whole = struct.pack("!HHHH", 40000, PORT, 8 + len(mark) * 2, 0) + mark * 2
    first, last = whole[: 8 + len(mark)], whole[8 + len(mark) :]
    return [
        me.frame(ipv4(sender, address, 17, first, fragment=MORE_FRAGMENTS)),
        me.frame(ipv4(sender, address, 17, last, fragment=len(first) // 8)),
    ]


def loose_route(me: End, you: End, mark: bytes) -> List[bytes]:
    option = bytes([131, 7, 4]) + socket.inet_aton(you.address) + b"\0"
    datagram = struct.pack("!HHHH", 40000, PORT, 8 + len(mark), 0) + mark
    return [me.frame(ipv4(me.address, me.gateway, 17, datagram, options=option))]


def record_route(me: End, you: End, mark: bytes) -> List[bytes]:
    option = bytes([7, 7, 4, 0, 0, 0, 0, 0])
    datagram = struct.pack("!HHHH", 40000, PORT, 8 + len(mark), 0) + mark
    return [me.frame(ipv4(me.address, INTERNET, 17, datagram, options=option))]


# Between VMs: run for every pair.
BETWEEN: Dict[str, Attempt] = {
    "another VM, directly": lambda me, you, mark: to(you.address)(me, you, mark),
    "another VM, by its MAC": lambda me, you, mark: [me.frame(udp(me.address, you.address, PORT, mark), to=you.mac)],
    "another VM, by its tap's MAC": lambda me, you, mark: [me.frame(udp(me.address, you.address, PORT, mark), to=you.tap_mac)],
    "another VM's gateway": lambda me, you, mark: to(you.gateway)(me, you, mark),
    "as another VM, to a third place": lambda me, you, mark: [
        me.frame(udp(you.address, INTERNET, PORT, mark)),
        me.frame(udp(you.address, INTERNET, PORT, mark), sender=you.mac),
    ],
    "as the internet, to another VM": lambda me, you, mark: [me.frame(udp(INTERNET, you.address, PORT, mark))],
    "as its gateway, to another VM": lambda me, you, mark: [me.frame(udp(you.gateway, you.address, PORT, mark))],
    "another VM, in fragments": lambda me, you, mark: fragments(me, me.address, you.address, mark),
    "as another VM, in fragments": lambda me, you, mark: fragments(me, you.address, INTERNET, mark),
    "another VM, by a loose source route": loose_route,
    "another VM, by IPv6": lambda me, you, mark: [
        me.frame(ipv6_udp(link_local(me.mac), link_local(you.mac), PORT, mark), IPV6, to=you.mac),
        me.frame(ipv6_udp(link_local(me.mac), link_local(you.mac), PORT, mark), IPV6),
    ],
    "another VM, in a frame of 9000 bytes": lambda me, you, mark: [
        me.frame(udp(me.address, you.address, PORT, mark + bytes(8900)))
    ],
    "another VM, with a VLAN's tag": lambda me, you, mark: [
        me.frame(struct.pack("!HH", 1, IPV4) + udp(me.address, you.address, PORT, mark), VLAN)
    ],
    "all VMs, by multicast and broadcast": lambda me, you, mark: [
        me.frame(udp(me.address, "224.0.0.1", PORT, mark), to="01:00:5e:00:00:01"),
        me.frame(udp(me.address, "255.255.255.255", PORT, mark), to=BROADCAST),
        me.frame(udp(me.address, you.address, PORT, mark), to=BROADCAST),
    ],
    "another VM, in a tunnel": lambda me, you, mark: [
        me.frame(ipv4(me.address, me.gateway, 4, udp(me.address, you.address, PORT, mark)))
    ],
}

# To the host and beyond: run for one VM.
ELSEWHERE: Dict[str, Attempt] = {
    "the host": to(HOST_ADDRESS),
    "the host's other address": to(HOST_OTHER_ADDRESS),
    "the host's loopback": to("127.0.0.1"),
    "a service on the gateway": lambda me, _, mark: [
        me.frame(udp(me.address, me.gateway, PORT, mark)),
        me.frame(tcp(me.address, me.gateway, PORT, mark)),
    ],
    "the metadata service": to("169.254.169.254", 80),
    "metadata services that lie elsewhere": lambda me, you, mark: to("100.100.100.200", 80)(me, you, mark)
    + to("168.63.129.16", 80)(me, you, mark),
    "a link-local address": to("169.254.7.7"),
    "this network": to("0.0.0.0"),
    "what is reserved": to("240.0.0.1"),
    "everybody": lambda me, _, mark: [
        me.frame(udp(me.address, "255.255.255.255", PORT, mark), to=BROADCAST),
        me.frame(udp(me.address, me.gateway, PORT, mark), to=BROADCAST),
    ],
    "a DHCP server": lambda me, _, mark: [me.frame(udp("0.0.0.0", "255.255.255.255", 67, mark), to=BROADCAST)],
    "a multicast group": lambda me, _, mark: [
        me.frame(udp(me.address, "224.0.0.1", PORT, mark), to="01:00:5e:00:00:01"),
        me.frame(udp(me.address, "224.0.0.251", PORT, mark)),
    ],
    "as somebody else": lambda me, _, mark: [me.frame(udp(SOMEWHERE, INTERNET, PORT, mark))],
    "as the host": lambda me, _, mark: [me.frame(udp(HOST_ADDRESS, INTERNET, PORT, mark))],
    "as the host's loopback, to the host": lambda me, _, mark: [me.frame(udp("127.0.0.1", HOST_ADDRESS, PORT, mark))],
    "by another MAC": lambda me, _, mark: [me.frame(udp(me.address, INTERNET, PORT, mark), sender=ANOTHER_MAC)],
    "in fragments": lambda me, _, mark: fragments(me, me.address, INTERNET, mark),
    "as somebody else, in fragments": lambda me, _, mark: fragments(me, SOMEWHERE, INTERNET, mark),
    "with IP options": record_route,
    # What belongs to no connection is not translated: it would leave with the VM's own address.
    "an answer that nobody asked for": lambda me, _, mark: [
        me.frame(echo(me.address, INTERNET, mark, kind=0)),
        me.frame(tcp(me.address, INTERNET, PORT, mark, flags=RST)),
        me.frame(tcp(me.address, INTERNET, PORT, mark, flags=0)),
    ],
    "the host, by IPv6": lambda me, _, mark: [
        me.frame(ipv6_echo(link_local(me.mac), me.tap_link_local, mark), IPV6),
        me.frame(ipv6_udp(link_local(me.mac), me.tap_link_local, PORT, mark), IPV6),
    ],
    "every IPv6 neighbour": lambda me, _, mark: [
        me.frame(ipv6_udp(link_local(me.mac), "ff02::1", PORT, mark), IPV6, to="33:33:00:00:00:01")
    ],
    "a redirect of the host's route": lambda me, _, mark: [
        me.frame(echo(me.address, me.gateway, socket.inet_aton(me.address) + echo(me.gateway, INTERNET, mark), kind=5))
    ],
}

# Denied by destination: the sender gets an ICMP error. Packets with a forged sender are dropped, and no error is sent.
TOLD = {
    "another VM, directly",
    "another VM's gateway",
    "another VM, in a frame of 9000 bytes",
    "the host",
    "the host's other address",
    "the host's loopback",
    "a service on the gateway",
    "the metadata service",
    "metadata services that lie elsewhere",
    "a link-local address",
    "this network",
    "what is reserved",
}

# These attacks reach their target when no rules are loaded; the others are refused by any host's network stack.
WORKS_ON_A_BARE_WIRE = [
    "another VM, directly",
    "another VM's gateway",
    "as another VM, to a third place",
    "as the internet, to another VM",
    "another VM, in fragments",
    "as another VM, in fragments",
    "another VM, in a frame of 9000 bytes",
    "all VMs, by multicast and broadcast",
    "the host",
    "the host's other address",
    "a service on the gateway",
    "the metadata service",
    "metadata services that lie elsewhere",
    "a link-local address",
    "everybody",
    "a multicast group",
    "as somebody else",
    "by another MAC",
    "in fragments",
    "as somebody else, in fragments",
    "with IP options",
    "an answer that nobody asked for",
    "the host, by IPv6",
    "every IPv6 neighbour",
]
