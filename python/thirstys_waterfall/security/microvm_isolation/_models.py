"""The value objects of the public API. Sizes called ``mb`` are MiB: the unit that every VMM takes."""

from dataclasses import dataclass, field
from typing import List, Optional

from . import _native


@dataclass(unsafe_hash=True)
class VMResourceLimits:
    """How much one VM may have.

    Equal limits have equal hashes, so they serve as keys; do not change limits that are a key.
    ``info["limits"]`` says where and how each limit of a running VM is enforced.

    Args:
        vcpu_count: Virtual CPUs, 1 to 32 (NR_CPUS of the guest's kernel, and Firecracker's limit).
        memory_mb: Guest memory in MiB, 64 to 1048576.
        disk_size_mb: The VM's own disk in MiB, 8 to 1048576; sparse, and removed with the VM.
        network_bandwidth_mbps: Limit of the network in each direction, 1 to 100000 Mbit/s.
        max_file_handles: Open files of each program in the guest, 16 to 1048576 (RLIMIT_NOFILE,
            getrlimit(2)).
        max_processes: Processes in the guest, 1 to 1048576 (RLIMIT_NPROC, and ``pids.max`` of cgroups(7)).
        disk_bytes_per_s: Limit of the VM's disk, reads and writes together, 65536 to 2**40 bytes per
            second; ``None`` for no limit.
        disk_ops_per_s: Limit of the VM's disk, 10 to 2**40 operations per second; ``None`` for no limit.

    Raises:
        InvalidTypeError: A value is not an ``int``; a ``bool`` is not one here.
        InvalidValueError: A value is out of range; the message names the field, the value and the range.

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
    """The network of one VM, or that it has none: an isolated VM, the default, has no network device.

    A field of a connected VM that is left out is chosen for it: a tap, addresses from
    ``config["network_range"]``, a MAC address, and the host's own name servers behind the gateway.
    A tap needs CAP_NET_ADMIN, a network in user mode no privilege; docs/network.md has the rules.

    Args:
        tap_device: Name of the TAP interface on the host, 1 to 15 characters (IFNAMSIZ, netdevice(7));
            made if it does not exist.
        ip_address: The VM's IPv4 address, with ``/prefix`` of 1 to 30 bits, or without for /24.
        mac_address: A unicast MAC address, as in ``52:54:00:12:34:56``.
        gateway: The IPv4 address of the host's end, inside the VM's subnet.
        dns_servers: IP addresses of name servers.
        isolated_network: ``True`` for no network at all.
        egress: The only places that the VM may reach, at most 256: IPv4 addresses or networks, host names
            or ``*.NAME``, each with ``:PORT`` (1 to 65535) or without. A name stands for public addresses;
            a private one must be listed itself. ``None`` for every place that the rules of all VMs allow.
        ipv6: ``True`` for IPv6, too; this release refuses it at start.
        mode: ``tap`` for an interface of the host, ``user`` for a gateway in a process of its own (QEMU
            alone), ``auto`` for a tap where this process may make one and the host is fit for it, else
            ``user``. ``info["network_config"]`` says which it was, and why.

    Raises:
        InvalidTypeError: A value has the wrong type.
        InvalidValueError: A value is malformed or does not fit the others; the message names the field.

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
    mode: str = "auto"

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
            self.mode,
        )


@dataclass
class VMHealthMetrics:
    """One measurement of a VM, as ``MicroVMInstance.get_health_metrics`` returns it.

    Args:
        cpu_usage_percent: CPU time of the VMM's process since the last measurement, in percent of one
            host CPU (proc_pid_stat(5)).
        memory_usage_mb: Resident memory of the VMM's process, in MiB.
        disk_io_bytes: Bytes read and written on the VM's disks, as its VMM counts them.
        network_rx_bytes: Bytes that the VM received, as its tap counts them.
        network_tx_bytes: Bytes that the VM sent, as its tap counts them.
        uptime_seconds: Seconds since the VM became ready.
        last_health_check: Unix seconds of the measurement; 0 when there was none.
        health_status: ``unknown``, ``healthy``, ``unhealthy`` or ``dead``; docs/reliability.md says when.

    Example:
        >>> VMHealthMetrics().health_status
        'unknown'
    """

    cpu_usage_percent: float = 0.0
    memory_usage_mb: int = 0
    disk_io_bytes: int = 0
    network_rx_bytes: int = 0
    network_tx_bytes: int = 0
    uptime_seconds: float = 0.0
    last_health_check: float = 0.0
    health_status: str = "unknown"
