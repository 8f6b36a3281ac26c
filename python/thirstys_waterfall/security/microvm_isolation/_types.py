"""The dicts that the package returns, for type checkers: plain JSON types, as ``json.dumps`` takes them.

A key that is not always there stands in a class with ``total=False``: ``NotRequired`` is not in Python 3.8.
"""

from typing import Any, Dict, List, Optional, TypedDict


class LimitsInfo(TypedDict):
    """``info["resource_limits"]``: the fields of ``VMResourceLimits``.

    Keys:
        vcpu_count: Virtual CPUs.
        memory_mb: Guest memory in MiB.
        disk_size_mb: The VM's disk in MiB.
        network_bandwidth_mbps: Limit of the network in each direction, in Mbit/s.
        max_file_handles: Open files of each program in the guest.
        max_processes: Processes in the guest.
        disk_bytes_per_s: Limit of the disk in bytes per second; ``None`` for no limit.
        disk_ops_per_s: Limit of the disk in operations per second; ``None`` for no limit.
    """

    vcpu_count: int
    memory_mb: int
    disk_size_mb: int
    network_bandwidth_mbps: int
    max_file_handles: int
    max_processes: int
    disk_bytes_per_s: Optional[int]
    disk_ops_per_s: Optional[int]


class Finding(TypedDict):
    """What is wrong, and what to do about it.

    Keys:
        what: What is wrong or missing.
        remedy: What to do; ``None`` when nothing is known.
    """

    what: str
    remedy: Optional[str]


class _Network(TypedDict):
    isolated: bool
    tap_device: Optional[str]
    ip_address: Optional[str]
    mac_address: Optional[str]
    gateway: Optional[str]
    dns_servers: List[str]
    egress: Optional[List[str]]
    ipv6: bool
    mode: str
    problems: List[Finding]


class NetworkInfo(_Network, total=False):
    """``info["network_config"]``: what the VM got while it is connected, else what was asked for.

    Keys:
        isolated: Whether the VM has no network device.
        tap_device: Name of the TAP interface on the host; ``None`` in user mode.
        ip_address: The VM's IPv4 address.
        mac_address: The VM's MAC address.
        gateway: The IPv4 address of the host's end.
        dns_servers: The name servers that the VM asks.
        egress: The only places that the VM may reach; ``None`` for no such list.
        ipv6: Whether IPv6 was asked for.
        mode: ``tap`` or ``user`` while the VM is connected, else what was asked for.
        problems: What on the host keeps the VM from reaching anything.
        mode_reason: Why it is that mode; while the VM is connected.
        prefix_length: Length of the subnet's prefix in bits, 1 to 30; while the VM is connected.
    """

    mode_reason: str
    prefix_length: int


class StartInfo(TypedDict):
    """``info["start"]``: how the VM came to run.

    Keys:
        origin: ``boot``, ``clone``, ``pool`` or ``resume``.
        stages_seconds: How long each stage took, in seconds, by the stage's name.
    """

    origin: str
    stages_seconds: Dict[str, float]


class JailLayer(TypedDict):
    """One layer of the jail.

    Keys:
        given: Whether the VM has it.
        how: How it is enforced, or why it is missing.
    """

    given: bool
    how: str


class MetricsInfo(TypedDict):
    """``info["health_metrics"]``: the fields of ``VMHealthMetrics``, two of them under a second name.

    Keys:
        cpu_usage_percent: CPU time of the VMM's process since the last measurement, in percent of one
            host CPU.
        cpu_usage: The same.
        memory_usage_mb: Resident memory of the VMM's process, in MiB.
        disk_io_bytes: Bytes read and written on the VM's disks.
        network_rx_bytes: Bytes that the VM received.
        network_tx_bytes: Bytes that the VM sent.
        uptime_seconds: Seconds since the VM became ready.
        last_health_check: Unix seconds of the measurement.
        health_status: ``unknown``, ``healthy``, ``unhealthy`` or ``dead``.
        status: The same.
    """

    cpu_usage_percent: float
    cpu_usage: float
    memory_usage_mb: int
    disk_io_bytes: int
    network_rx_bytes: int
    network_tx_bytes: int
    uptime_seconds: float
    last_health_check: float
    health_status: str
    status: str


class PressureInfo(TypedDict):
    """Share of the last 10 s in which some task of the guest stalled, in percent (Documentation/accounting/psi.rst).

    Keys:
        cpu: For want of a CPU.
        memory: For want of memory.
        io: For want of its disk.
    """

    cpu: float
    memory: float
    io: float


class GuestHealth(TypedDict):
    """``info["health"]["guest"]``: what the guest says of itself; a hostile guest can say anything.

    Keys:
        uptime_seconds: Seconds since the guest's kernel booted; a clone's began with its template's.
        cpu_seconds: Seconds that the guest's CPUs worked (proc_stat(5)).
        load: Load average over 1, 5 and 15 minutes (proc_loadavg(5)).
        processes: Processes and threads.
        memory_total_bytes: Bytes of memory (MemTotal, proc_meminfo(5)).
        memory_available_bytes: Bytes that programs can have (MemAvailable, proc_meminfo(5)).
        disk_total_bytes: Bytes of the VM's disk (statvfs(3)).
        disk_free_bytes: Bytes of it that are free.
        oom_kills: Processes that the guest's kernel killed for want of memory.
        process_limit_hits: How often a program was refused a process for ``max_processes``.
        pressure_percent: Stalls, in percent; ``None`` when the guest's kernel does not count them.
    """

    uptime_seconds: float
    cpu_seconds: float
    load: List[float]
    processes: int
    memory_total_bytes: int
    memory_available_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int
    oom_kills: int
    process_limit_hits: int
    pressure_percent: Optional[PressureInfo]


class HostHealth(TypedDict):
    """``info["health"]["host"]``: what the host counts of the VM's process and control group (cgroups(7)).

    Keys:
        cpu_seconds: Seconds of CPU time of the VMM.
        resident_memory_mb: Resident memory of the VMM, in MiB.
        group_memory_bytes: Bytes of memory of the control group.
        oom_kills: Processes of the group that the host's kernel killed for want of memory.
        throttled_seconds: Seconds for which the group was held back at its CPU quota.
        memory_pressure_percent: Share of the last 10 s in which the group stalled for memory, in
            percent; control groups v2 only.
    """

    cpu_seconds: float
    resident_memory_mb: int
    group_memory_bytes: Optional[int]
    oom_kills: Optional[int]
    throttled_seconds: Optional[float]
    memory_pressure_percent: Optional[float]


class HealthRecord(TypedDict):
    """One measurement in ``info["health"]["history"]``.

    Keys:
        time: Unix seconds of the measurement.
        status: ``unknown``, ``healthy``, ``unhealthy`` or ``dead``.
        reason: Why, in one word; docs/reliability.md lists them.
        cpu_usage_percent: CPU time of the VMM since the measurement before, in percent of one host CPU.
        memory_usage_mb: Resident memory of the VMM, in MiB.
        guest_memory_available_bytes: Bytes of memory that programs in the guest can have.
        round_trip_seconds: Seconds that the agent's answer took.
    """

    time: float
    status: str
    reason: str
    cpu_usage_percent: float
    memory_usage_mb: int
    guest_memory_available_bytes: Optional[int]
    round_trip_seconds: Optional[float]


class HealthInfo(TypedDict):
    """``info["health"]``: the VM's health and the sample behind it.

    Keys:
        status: ``unknown``, ``healthy``, ``unhealthy`` or ``dead``.
        reason: Why, in one word; docs/reliability.md lists them.
        detail: Why, for people.
        since: Unix seconds since which it has this status.
        heartbeats_missed: Heartbeats that were missed in a row.
        round_trip_seconds: Seconds that the agent's answer took; ``None`` without an answer.
        clock_offset_seconds: The guest's clock minus the host's, in seconds.
        guest: What the guest says of itself.
        host: What the host counts.
        history: The last 60 measurements of the heartbeat.
    """

    status: str
    reason: str
    detail: str
    since: Optional[float]
    heartbeats_missed: int
    round_trip_seconds: Optional[float]
    clock_offset_seconds: Optional[float]
    guest: Optional[GuestHealth]
    host: HostHealth
    history: List[HealthRecord]


class ErrorInfo(TypedDict):
    """An error of this package or of a guest.

    Keys:
        code: A stable name of the failure.
        message: What failed, on what, and what to do: for people.
    """

    code: str
    message: str


class ProgramInfo(TypedDict):
    """The program of a VMM.

    Keys:
        path: Where it is.
        version: What it says of its version.
        packaged: Whether it is the QEMU of the package ``thirstys-waterfall-microvm-qemu``.
    """

    path: str
    version: Optional[str]
    packaged: bool


class VMInfo(TypedDict):
    """Everything there is to know about a VM, as ``MicroVMInstance.get_info`` returns it.

    Keys:
        vm_id: The VM's name.
        backend: The VMM that runs it, or would.
        backend_reason: Why it is that one; ``None`` before the first start.
        isolation_type: What the VM is for.
        isolation_grade: ``hardware`` (KVM) or ``emulated`` (TCG); ``None`` while it does not run.
        accelerator: ``kvm`` or ``tcg``; ``None`` while it does not run.
        vmm: The program that runs it; ``None`` while it does not run.
        start: How it came to run; ``None`` while it does not run.
        state: A value of ``VMState``.
        suspended: Whether its state is on disk and it has no process.
        template: The snapshot that it is a clone of.
        labels: The labels that it was given.
        pid: Process id of its VMM on the host.
        socket_path: Where its broker listens while it runs; see ``CommunicationChannel``.
        kernel_path: The kernel that it was given.
        rootfs_path: The image that it was given.
        resource_limits: What it may have.
        jail: ``mode`` (``default``, ``strict`` or ``audit``) and a ``JailLayer`` for each layer; with
            ``audit``, ``would_deny`` lists what it would have denied. ``None`` while it does not run.
        limits: For each limit, where and how it is enforced. ``None`` while it does not run.
        network_config: Its network.
        health_metrics: Figures of the measurement.
        health: Its health.
        last_error: The error of the last failure.
    """

    vm_id: str
    backend: str
    backend_reason: Optional[str]
    isolation_type: str
    isolation_grade: Optional[str]
    accelerator: Optional[str]
    vmm: Optional[ProgramInfo]
    start: Optional[StartInfo]
    state: str
    suspended: bool
    template: Optional[str]
    labels: Dict[str, str]
    pid: Optional[int]
    socket_path: str
    kernel_path: Optional[str]
    rootfs_path: Optional[str]
    resource_limits: LimitsInfo
    jail: Optional[Dict[str, Any]]
    limits: Optional[Dict[str, List[str]]]
    network_config: NetworkInfo
    health_metrics: MetricsInfo
    health: HealthInfo
    last_error: Optional[ErrorInfo]


class PoolUsage(TypedDict):
    """One entry of the pool.

    Keys:
        form: ``ready``, ``restored`` or ``blank``.
        wanted: How many VMs are to be kept warm.
        ready: How many do.
        resource_limits: Their limits.
        kernel_path: Their kernel.
        rootfs_path: Their image.
    """

    form: str
    wanted: int
    ready: int
    resource_limits: LimitsInfo
    kernel_path: Optional[str]
    rootfs_path: Optional[str]


class DiskUsage(TypedDict):
    """What lies in the cache folder.

    Keys:
        count: How many there are.
        disk_bytes: Bytes on disk that they take.
    """

    count: int
    disk_bytes: int


class ResourceUsage(TypedDict):
    """Quota and cache, as ``MicroVMIsolationManager.get_resource_usage`` returns them.

    Keys:
        total_vms: VMs of the manager.
        vcpus_allocated: vCPUs that are reserved.
        vcpus_available: vCPUs of the quota that are left.
        memory_allocated_mb: Memory that is reserved, in MiB.
        memory_available_mb: Memory of the quota that is left, in MiB.
        vms_by_type: How many VMs there are of each isolation type.
        vms_by_state: How many VMs there are in each state.
        pool: The entries of the pool.
        templates: Templates of the library.
        own_templates: Templates by ``MicroVMInstance.snapshot``.
        suspended: Suspended VMs.
    """

    total_vms: int
    vcpus_allocated: int
    vcpus_available: int
    memory_allocated_mb: int
    memory_available_mb: int
    vms_by_type: Dict[str, int]
    vms_by_state: Dict[str, int]
    pool: List[PoolUsage]
    templates: DiskUsage
    own_templates: DiskUsage
    suspended: DiskUsage


class HealthReport(TypedDict):
    """Health of all VMs, as ``MicroVMIsolationManager.get_health_status`` returns it.

    Keys:
        total_vms: VMs of the manager.
        healthy_vms: Those that are healthy.
        unhealthy_vms: Those that are unhealthy or dead.
        resource_usage: Quota and cache.
    """

    total_vms: int
    healthy_vms: int
    unhealthy_vms: int
    resource_usage: ResourceUsage


class _Event(TypedDict):
    sequence: int
    time: float
    kind: str
    vm_id: str
    isolation_type: str
    detail: str


# "from" is a keyword of Python, so a class body cannot declare it.
_Change = TypedDict("_Change", {"from": str, "to": str}, total=False)


class VMEvent(_Event, _Change, total=False):
    """What happened to a VM, as ``EventStream`` and the callback of ``on_event`` get it.

    Keys:
        sequence: Counts up by one for each event of the manager; a gap is what this reader missed.
        time: Unix seconds.
        kind: ``created``, ``removed``, ``state``, ``health``, ``oom``, ``limit``, ``policy`` or ``template``.
        vm_id: The id of the VM.
        isolation_type: What the VM is for.
        detail: What happened and why, for people.
        from: The state or the health status before; of ``state`` and ``health``.
        to: The state or the health status now; of ``state`` and ``health``.
        reason: Why, in one word; of ``health``.
        place: ``guest`` or ``host``; of ``oom``.
        kills: Processes that were killed for want of memory; of ``oom``.
        what: The limit that was hit: ``quota``, ``processes`` or ``host_disk``; of ``limit``.
        action: ``restart``, ``replace``, ``give_up``, ``deadline`` or ``idle_limit``; of ``policy``.
        replacement: The id of the VM that takes its place, or ``None``; of ``policy``.
        stage: The part of making a template that begins; ``done`` or ``failed`` at its end; of ``template``.
        fraction: How much of that is done, from 0 to 1; of ``template``.
        labels: The labels of the VM; only where it has some.
    """

    reason: str
    place: str
    kills: int
    what: str
    action: str
    replacement: Optional[str]
    stage: str
    fraction: float
    labels: Dict[str, str]


class _Saved(TypedDict):
    disk_bytes: int
    damaged: bool
    usable: bool
    differences: List[str]


class _SavedVM(_Saved, total=False):
    backend: str
    isolation_type: str
    resource_limits: LimitsInfo
    isolated_network: bool
    labels: Dict[str, str]
    kernel_path: Optional[str]
    rootfs_path: Optional[str]
    created: int
    reason: str


class SuspendedVM(_SavedVM, total=False):
    """A suspended VM, as ``MicroVMIsolationManager.list_suspended`` returns it.

    Keys:
        disk_bytes: Bytes on disk that it takes.
        damaged: Whether its description cannot be read.
        usable: Whether it can be resumed on this host as it is now.
        differences: What has changed since, the old and the new.
        backend: The VMM that ran it.
        isolation_type: What the VM is for.
        resource_limits: Its limits.
        isolated_network: Whether it has no network.
        labels: The labels that it was given.
        kernel_path: The kernel that it was given.
        rootfs_path: The image that it was given.
        created: Unix seconds of its suspension.
        reason: Why it is damaged; the keys from ``backend`` to ``created`` are missing then.
        vm_id: The id of the VM.
    """

    vm_id: str


class VMSummary(TypedDict, total=False):
    """A VM of any process of this user, as ``running_vms`` finds it.

    Keys:
        vm_id: The VM's name.
        socket_path: Where its broker listens once it runs.
        error: ``None``, or the ``code`` and ``message`` of what kept its owner from answering: all other keys but these three
            are missing then.
        state: A value of ``VMState``.
        isolation_type: What the VM is for.
        isolation_grade: ``hardware`` (KVM) or ``emulated`` (TCG); ``None`` while it does not run.
        backend: The VMM that runs it.
        memory_mb: Memory of the VM, MiB.
        vcpu_count: Its vCPUs.
        uptime_seconds: Seconds that it has run.
        idle_seconds: Seconds since its last command or stream; 0 while one is open.
        labels: Its labels.
        pid: The VMM's process.
        owner_pid: The process that has the VM; ``None`` where this process cannot see it.
    """

    vm_id: str
    socket_path: str
    error: Optional[ErrorInfo]
    state: str
    isolation_type: str
    isolation_grade: Optional[str]
    backend: str
    memory_mb: int
    vcpu_count: int
    uptime_seconds: Optional[float]
    idle_seconds: Optional[float]
    labels: Dict[str, str]
    pid: Optional[int]
    owner_pid: Optional[int]


class TemplateInfo(_SavedVM, total=False):
    """A template of a snapshot, as ``MicroVMIsolationManager.list_templates`` returns it.

    Keys:
        disk_bytes: Bytes on disk that it takes.
        damaged: Whether its description cannot be read.
        usable: Whether clones can be started on this host as it is now.
        differences: What has changed since, the old and the new.
        backend: The VMM of the VM.
        isolation_type: What the VM was for.
        resource_limits: The limits of its clones.
        isolated_network: Whether its clones have no network.
        labels: The labels of the VM; clones have only their own.
        kernel_path: The kernel that the VM was given.
        rootfs_path: The image that the VM was given.
        created: Unix seconds of the snapshot.
        reason: Why it is damaged; the keys from ``backend`` to ``created`` are missing then.
        name: The name of the template.
        source_vm_id: The id of the VM that it was made of; missing when it is damaged.
    """

    name: str
    source_vm_id: str


class ExportedDisk(TypedDict):
    """What ``MicroVMIsolationManager.export_disk`` copied.

    Keys:
        bytes: Size of the disk in bytes.
        verified: Whether the copy has the digest that was noted when the VM was suspended.
    """

    bytes: int
    verified: bool


class Transferred(TypedDict):
    """What ``MicroVMInstance.upload`` or ``download`` moved.

    Keys:
        bytes: How many bytes this call moved.
        crc32: Their checksum (``zlib.crc32``), which both sides compared.
    """

    bytes: int
    crc32: int


class PortInfo(TypedDict):
    """A port of this host that leads to one of a guest, as ``MicroVMInstance.ports`` returns it.

    Keys:
        address: The address of the host that it listens at.
        host_port: The port of the host.
        guest_port: The port of the guest.
        protocol: ``tcp``.
        connections: How many connections are open.
    """

    address: str
    host_port: int
    guest_port: int
    protocol: str
    connections: int


class _Answer(TypedDict):
    status: str


class GuestError(ErrorInfo, total=False):
    """Why a guest refused or failed a command.

    Keys:
        code: A stable name of the failure, such as ``program_not_found``; docs/commands.md lists them.
        message: What failed, for people; the guest's own words.
        reason: Of ``network_error``: ``dns``, ``refused``, ``unreachable``, ``timeout``, ``tls`` or ``protocol``.
    """

    reason: str


class CommandAnswer(_Answer, total=False):
    """What a guest answers to ``MicroVMInstance.send_command``.

    Keys:
        status: ``ok`` or ``error``.
        result: What the command gives, with ``ok``: for example an ``ExecResult``.
        error: Why it failed, with ``error``.
    """

    result: Any
    error: GuestError


class _Exec(TypedDict):
    exit_code: Optional[int]
    signal: Optional[int]
    duration_seconds: float
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool


class ExecResult(_Exec, total=False):
    """The result of the command ``exec``.

    Keys:
        exit_code: The program's exit code; ``None`` when a signal ended it.
        signal: The number of that signal (signal(7)), else ``None``.
        duration_seconds: Seconds that it ran.
        stdout: Its output; bytes that are not UTF-8 are replaced.
        stderr: Its error output, likewise.
        stdout_truncated: Whether there was more than ``max_output_bytes``.
        stderr_truncated: Whether there was more than ``max_output_bytes``.
        stdout_base64: The bytes of the output, when it is not UTF-8.
        stderr_base64: The bytes of the error output, when it is not UTF-8.
    """

    stdout_base64: str
    stderr_base64: str


class _Content(TypedDict):
    size: int
    offset: int
    eof: bool


class FileContent(_Content, total=False):
    """The result of the command ``read_file``; it has either ``data`` or ``data_base64``.

    Keys:
        size: Size of the file in bytes.
        offset: Where the data begins in the file, in bytes.
        eof: Whether the data reaches the file's end.
        data: The data as text.
        data_base64: The data, when it is not UTF-8 or is shorter so.
    """

    data: str
    data_base64: str


class FileWritten(TypedDict):
    """The result of the command ``write_file``.

    Keys:
        bytes_written: How many bytes were written.
    """

    bytes_written: int


class SystemInfo(TypedDict):
    """The result of the command ``system_info``: the guest's own words.

    Keys:
        vm_id: The id of the VM.
        hostname: Its host name.
        machine_id: Its machine id (machine-id(5)).
        kernel: Release of its kernel.
        agent_version: Version of its agent.
        uptime_seconds: Seconds since its kernel booted.
        time_unix: Unix seconds of its clock.
        cpus: CPUs.
        load: Load average over 1, 5 and 15 minutes (proc_loadavg(5)).
        processes: Processes.
        memory_total_mb: Memory in MiB.
        memory_available_mb: Memory that programs can have, in MiB.
        oom_kills: Processes that were killed for want of memory.
        disk_total_mb: The VM's disk in MiB.
        disk_free_mb: What of it is free, in MiB.
        network: Whether it has a network.
    """

    vm_id: str
    hostname: str
    machine_id: str
    kernel: str
    agent_version: str
    uptime_seconds: Optional[float]
    time_unix: float
    cpus: int
    load: List[float]
    processes: int
    memory_total_mb: Optional[int]
    memory_available_mb: Optional[int]
    oom_kills: Optional[int]
    disk_total_mb: Optional[int]
    disk_free_mb: Optional[int]
    network: bool


class PageLink(TypedDict):
    """A link of a page.

    Keys:
        href: Where it leads, made absolute.
        text: Its text, at most 1,000 characters.
    """

    href: str
    text: str


class RenderedPage(TypedDict):
    """The result of the command ``render_page``.

    Keys:
        url: The page's URL; ``about:blank`` for HTML that was given without one.
        title: Its title.
        text: Its visible text.
        links: Its links.
        sanitized_html: Its HTML without scripts and whatever else can act.
    """

    url: str
    title: str
    text: str
    links: List[PageLink]
    sanitized_html: str


class _Response(TypedDict):
    url: str
    status: int
    headers: List[List[str]]
    truncated: bool


class HttpResponse(_Response, total=False):
    """The result of the command ``process_request``; it has either ``body`` or ``body_base64``.

    Keys:
        url: The URL after redirects.
        status: The HTTP status.
        headers: Pairs of name and value.
        truncated: Whether the body has more than ``max_bytes``.
        body: The body as text.
        body_base64: The body, when it is not UTF-8 or is shorter so.
    """

    body: str
    body_base64: str


class HostVerdict(TypedDict):
    """Whether VMs start on the host.

    Keys:
        starts: Whether they do, measured with ``start``.
        text: The same and how, as a sentence.
        backend: The VMM that a VM gets without asking for one.
        backend_reason: Why it is that one.
        error: The code of the error that a start fails with.
    """

    starts: bool
    text: str
    backend: Optional[str]
    backend_reason: Optional[str]
    error: Optional[str]


class HostPlatform(TypedDict):
    """The host's CPU.

    Keys:
        arch: The architecture.
        cpu: The CPU's model.
        virtualization_flag: ``vmx`` or ``svm`` of proc_cpuinfo(5); ``None`` for neither.
    """

    arch: str
    cpu: str
    virtualization_flag: Optional[str]


class HostPrivileges(TypedDict):
    """The privileges of this process.

    Keys:
        root: Whether its user is root.
        user_namespaces: Whether it can make user namespaces (user_namespaces(7)).
        net_admin: Whether it has CAP_NET_ADMIN (capabilities(7)).
        cgroup: Control groups of the host: ``v1``, ``v2``, ``hybrid`` or ``none``.
    """

    root: bool
    user_namespaces: bool
    net_admin: bool
    cgroup: str


class HostNetwork(TypedDict):
    """Whether VMs can be connected.

    Keys:
        connected_vms: Whether they can.
        mode: ``tap`` or ``user``, where the VM leaves the choice; ``None`` where they cannot.
        uplinks: Interfaces by which the host reaches other networks.
        reason: Why there can be no tap.
        remedy: What to do about that.
    """

    connected_vms: bool
    mode: Optional[str]
    uplinks: List[str]
    reason: Optional[str]
    remedy: Optional[str]


class HostKvm(TypedDict):
    """Whether the host has hardware virtualization.

    Keys:
        device: Whether ``/dev/kvm`` is there.
        usable: Whether VMs run on it.
        reason: Why, or why not.
        remedy: What to do.
    """

    device: bool
    usable: bool
    reason: str
    remedy: Optional[str]


class HostBackend(TypedDict):
    """One VMM on the host.

    Keys:
        backend: A value of ``VMBackend``.
        available: Whether it can run VMs here.
        path: Where it is installed.
        packaged: Whether it is the QEMU of the package ``thirstys-waterfall-microvm-qemu``.
        version: What it says of its version.
        accelerator: ``kvm`` or ``tcg``.
        isolation_grade: ``hardware`` or ``emulated``.
        reason: Why it can or cannot.
        remedy: What to do.
        snapshots: Whether its VMs can be snapshotted and suspended.
        lacks_layers: The layers of the jail that it lacks, and why.
    """

    backend: str
    available: bool
    path: Optional[str]
    packaged: Optional[bool]
    version: Optional[str]
    accelerator: Optional[str]
    isolation_grade: Optional[str]
    reason: str
    remedy: Optional[str]
    snapshots: Optional[bool]
    lacks_layers: Optional[Dict[str, str]]


class HostStart(TypedDict):
    """A VM that ``doctor(start=True)`` started.

    Keys:
        backend: A value of ``VMBackend``; ``None`` when the start failed before one was chosen.
        accelerator: ``kvm`` or ``tcg``; ``None`` when it failed.
        isolation_grade: ``hardware`` or ``emulated``; ``None`` when it failed.
        connected: Whether the VM was to be connected to the network.
        seconds: Seconds until it ran; ``None`` when it failed.
        jail: The layers of the jail that it got, and its ``mode``; ``None`` when it failed.
        error: Why it did not start or did not answer.
    """

    backend: Optional[str]
    accelerator: Optional[str]
    isolation_grade: Optional[str]
    connected: bool
    seconds: Optional[float]
    jail: Optional[Dict[str, Any]]
    error: Optional[str]


class HostImage(TypedDict):
    """The files of the package that a VM is made of.

    Keys:
        kernel: Path of the guest's kernel.
        initramfs: Path of the guest's initramfs.
        launcher: Path of the jail's launcher.
        complete: Whether all of them are there.
    """

    kernel: str
    initramfs: str
    launcher: str
    complete: bool


class DoctorReport(TypedDict):
    """What a host can run, as ``doctor`` returns it.

    Keys:
        verdict: Whether VMs start here.
        platform: The host's CPU.
        privileges: The privileges of this process.
        network: Whether VMs can be connected.
        jail: The layers of the jail.
        kvm: Hardware virtualization.
        backends: The VMMs.
        starts: The VMs that were started, the one of the best backend first; empty without ``start``.
        guest_image: The files of the package.
        runtime_dir: Where sockets and locks of running VMs live.
        cache_dir: Where disks and templates live.
        problems: What keeps VMs from starting, or from full isolation.
        hints: What is not needed, but possible.
    """

    verdict: HostVerdict
    platform: HostPlatform
    privileges: HostPrivileges
    network: HostNetwork
    jail: Dict[str, JailLayer]
    kvm: HostKvm
    backends: List[HostBackend]
    starts: List[HostStart]
    guest_image: HostImage
    runtime_dir: str
    cache_dir: str
    problems: List[Finding]
    hints: List[Finding]
