"""Ethernet frames by hand, the hand that a VMM in an attacker's power has, and eyes on every interface of the host."""

import ctypes
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import List, NamedTuple, Tuple

IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
BROADCAST = "ff:ff:ff:ff:ff:ff"
SYN, RST = 2, 4
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 434, 438


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(to: str, sender: str, kind: int, payload: bytes) -> bytes:
    return mac(to) + mac(sender) + struct.pack("!H", kind) + payload


def checksum(data: bytes) -> int:
    total = sum(struct.unpack("!%dH" % ((len(data) + 1) // 2), data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(sender: str, to: str, protocol: int, payload: bytes, fragment: int = 0, options: bytes = b"", ttl: int = 64) -> bytes:
    size = 20 + len(options)
    fields = (0x40 | size // 4, 0, size + len(payload), 7, fragment, ttl, protocol)
    head = struct.pack("!BBHHHBB", *fields) + b"\0\0" + socket.inet_aton(sender) + socket.inet_aton(to) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(sender: str, to: str, port: int, payload: bytes, **ip: int) -> bytes:
    # A checksum of 0 is none.
    return ipv4(sender, to, 17, struct.pack("!HHHH", 40000, port, 8 + len(payload), 0) + payload, **ip)  # type: ignore[arg-type]


def tcp(sender: str, to: str, port: int, payload: bytes, flags: int = SYN) -> bytes:
    head = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, flags, 1024, 0, 0)
    pseudo = socket.inet_aton(sender) + socket.inet_aton(to) + struct.pack("!BBH", 0, 6, len(head) + len(payload))
    return ipv4(sender, to, 6, head[:16] + struct.pack("!H", checksum(pseudo + head + payload)) + head[18:] + payload)


def echo(sender: str, to: str, payload: bytes, kind: int = 8) -> bytes:
    message = struct.pack("!BBHHH", kind, 0, 0, 1, 1) + payload
    return ipv4(sender, to, 1, message[:2] + struct.pack("!H", checksum(message)) + message[4:])


def arp(operation: int, sender_mac: str, sender: str, target_mac: str, target: str) -> bytes:
    head = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    return head + mac(sender_mac) + socket.inet_aton(sender) + mac(target_mac) + socket.inet_aton(target)


def ipv6_udp(sender: str, to: str, port: int, payload: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, sender) + socket.inet_pton(socket.AF_INET6, to)
    datagram = struct.pack("!HHHH", 40000, port, 8 + len(payload), 0) + payload
    value = checksum(addresses + struct.pack("!IHBB", len(datagram), 0, 0, 17) + datagram) or 0xFFFF
    return struct.pack("!IHBB", 6 << 28, len(datagram), 17, 64) + addresses + datagram[:6] + struct.pack("!H", value) + datagram[8:]


def ipv6_echo(sender: str, to: str, payload: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, sender) + socket.inet_pton(socket.AF_INET6, to)
    message = struct.pack("!BBHHH", 128, 0, 0, 1, 1) + payload
    value = checksum(addresses + struct.pack("!IHBB", len(message), 0, 0, 58) + message)
    return struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + addresses + message[:2] + struct.pack("!H", value) + message[4:]


def borrow(pid: int, number: int) -> int:
    """A descriptor of our own of what another process has open (pidfd_getfd(2), Linux 5.6)."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = libc.syscall(SYS_PIDFD_OPEN, pid, 0)
    assert process >= 0, os.strerror(ctypes.get_errno())
    descriptor = libc.syscall(SYS_PIDFD_GETFD, process, number, 0)
    os.close(process)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    return int(descriptor)


def hand_of(pid: int, tap: str) -> int:
    """The VMM's own descriptor of its tap: what is written to it, the host takes for the guest's."""
    for entry in Path("/proc/{}/fdinfo".format(pid)).iterdir():
        if "iff:\t{}\n".format(tap) in entry.read_text():
            return borrow(pid, int(entry.name))
    raise AssertionError("process {} holds no tap {}".format(pid, tap))


class Sighting(NamedTuple):
    interface: str
    frame: bytes


class Eyes:
    """Sees every frame that the host sends out by any of its interfaces, until closed."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self.socket.settimeout(0.1)
        self.lock = threading.Lock()
        self.seen: List[Sighting] = []
        self.open = True
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self) -> None:
        while self.open:
            try:
                frame, (interface, _, kind, _, _) = self.socket.recvfrom(65535)
            except socket.timeout:
                continue
            # An ifb is a queue of what came in, not a way out.
            if kind == socket.PACKET_OUTGOING and not interface.startswith(("tw-ifb", "lo")):
                with self.lock:
                    self.seen.append(Sighting(interface, frame))

    def of(self, mark: bytes) -> List[Sighting]:
        with self.lock:
            return [sighting for sighting in self.seen if mark in sighting.frame]

    def close(self) -> None:
        self.open = False
        self.thread.join()
        self.socket.close()


class Inbox:
    """Host services on every address of the host: a datagram and a stream port."""

    PORT = 9999

    def __init__(self) -> None:
        self.got: List[Tuple[bytes, str]] = []
        self.sockets = []
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            datagrams = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            datagrams.bind((any_address, self.PORT))
            datagrams.settimeout(0.1)
            self.sockets.append(datagrams)
        self.listener = socket.socket()
        self.listener.bind(("0.0.0.0", self.PORT))
        self.listener.listen(8)
        self.open = True
        self.threads = [threading.Thread(target=self.read, args=(s,), daemon=True) for s in self.sockets]
        for thread in self.threads:
            thread.start()

    def read(self, datagrams: socket.socket) -> None:
        while self.open:
            try:
                data, peer = datagrams.recvfrom(65535)
            except socket.timeout:
                continue
            self.got.append((data, peer[0]))

    def of(self, mark: bytes) -> List[str]:
        return [peer for data, peer in self.got if mark in data]

    def close(self) -> None:
        self.open = False
        for thread in self.threads:
            thread.join()
        for opened in self.sockets + [self.listener]:
            opened.close()


def settle() -> None:
    """As long as a frame may take through the host's stack."""
    time.sleep(0.3)
