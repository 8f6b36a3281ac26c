"""The value objects of the public API. Sizes called ``mb`` are MiB: the unit that every VMM takes."""

from dataclasses import dataclass, field
from typing import List, Optional

from . import _native


@dataclass(unsafe_hash=True)
class VMResourceLimits:
    """How much one VM may have. Equal limits have equal hashes, so they serve as keys; one that is a key is left as it is.

    Args:
        vcpu_count: Virtual CPUs, 1 to 32.
        memory_mb: Guest memory in MiB, at least 64.
        disk_size_mb: The VM's own scratch disk in MiB, at least 8; sparse, gone with the VM.
        network_bandwidth_mbps: Network limit in Mbit/s, each way.
        max_file_handles: Open files in the guest.
        max_processes: Processes in the guest.
        disk_bytes_per_s: Bytes that the VM's disk moves in a second, reads and writes together; None: no limit.
        disk_ops_per_s: Operations on the VM's disk in a second; None: no limit.

    Raises:
        TypeError: A value is not an ``int`` (``bool`` is none here).
        ValueError: A value is out of range; the message names the field, the value and the range.

    Example:
        >>> VMResourceLimits(vcpu_count=2, memory_mb=256).disk_size_mb
        1024
    """

    vcpu_count: int = 1
    memory_mb: int = 512
    disk_size_mb: int = 1024
    network_bandwidth_mbps: int = 100
    max_file_handles: int = 1024
    max_processes: int = 128
    disk_bytes_per_s: Optional[int] = None
    disk_ops_per_s: Optional[int] = None

    def __post_init__(self) -> None:
        _native.check_resource_limits(
            self.vcpu_count,
            self.memory_mb,
            self.disk_size_mb,
            self.network_bandwidth_mbps,
            self.max_file_handles,
            self.max_processes,
            self.disk_bytes_per_s,
            self.disk_ops_per_s,
        )


@dataclass
class VMNetworkConfig:
    """How one VM is, or is not, on a network. Isolated, the default, means that the VM has no network device.

    What a connected VM is not given is chosen for it: a tap, addresses from ``config["network_range"]``, a MAC, and
    the host's own name servers behind the gateway.

    Args:
        tap_device: Name of the host's TAP interface, at most 15 characters; made if it is not there.
        ip_address: The VM's IPv4 address, with ``/prefix`` or without (then /24).
        mac_address: A unicast MAC address.
        gateway: An IPv4 address inside the VM's subnet: the host's end.
        dns_servers: IP addresses of name servers.
        isolated_network: No network at all when true.
        egress: Where the VM may go, and nowhere else: IPv4 addresses or networks, host names or ``*.NAME``, each with
            ``:PORT`` or without. A name stands for public addresses; a private one must be listed itself. ``None``:
            wherever the policy of all VMs lets it.
        ipv6: IPv6, too. This release refuses it at start.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is malformed or does not fit the others; the message names the field.

    Example:
        >>> VMNetworkConfig().isolated_network
        True
    """

    tap_device: Optional[str] = None
    ip_address: Optional[str] = None
    mac_address: Optional[str] = None
    gateway: Optional[str] = None
    dns_servers: List[str] = field(default_factory=list)
    isolated_network: bool = True
    egress: Optional[List[str]] = None
    ipv6: bool = False

    def __post_init__(self) -> None:
        _native.check_network_config(
            self.tap_device,
            self.ip_address,
            self.mac_address,
            self.gateway,
            self.dns_servers,
            self.isolated_network,
            self.egress,
            self.ipv6,
        )


@dataclass
class VMHealthMetrics:
    """One measurement of a VM.

    Args:
        cpu_usage_percent: CPU time of the VM's process since the last measurement; 100 is one host CPU.
        memory_usage_mb: Host memory that the VM holds, in MiB.
        disk_io_bytes: Bytes read and written on the VM's disks.
        network_rx_bytes: Bytes that the VM received.
        network_tx_bytes: Bytes that the VM sent.
        uptime_seconds: Since the VM became ready.
        last_health_check: Unix time of the measurement, in seconds; 0 when there was none.
        health_status: ``unknown``, ``healthy``, ``unhealthy`` or ``dead``.
    """

    cpu_usage_percent: float = 0.0
    memory_usage_mb: int = 0
    disk_io_bytes: int = 0
    network_rx_bytes: int = 0
    network_tx_bytes: int = 0
    uptime_seconds: float = 0.0
    last_health_check: float = 0.0
    health_status: str = "unknown"
