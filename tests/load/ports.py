"""What a published port carries: ``make ports`` (``COUNT``, ``MIB``, ``RUNS``).

In one run, with one isolated VM: ``COUNT`` requests of HTTP with 100 at once, none of which may be lost; a file of ``MIB`` MiB that comes
by ``download`` and by a published port, and the same upwards, in turns ``RUNS`` times; and the round trip of a message on an open connection
beside that of ``ping``.
"""

import argparse
import http.client
import io
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import VM, MicroVMIsolationManager, PublishedPort, VMResourceLimits  # noqa: E402

AT_ONCE = 100
ROUND_TRIPS = 500
MIB = 1 << 20


class Sink(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        return len(data)


def dial(published: PublishedPort) -> socket.socket:
    connection = socket.create_connection((published.address, published.host_port), 60.0)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def drain(connection: socket.socket) -> int:
    buffer, size = bytearray(1 << 18), 0
    while True:
        length = connection.recv_into(buffer)
        if not length:
            return size
        size += length


def requests(published: PublishedPort, count: int) -> List[float]:
    """The milliseconds that each took; the first that fails raises."""

    def ask(_: int) -> float:
        begun = time.monotonic()
        client = http.client.HTTPConnection(published.address, published.host_port, timeout=120.0)
        client.request("GET", "/small")
        answer = client.getresponse()
        if answer.status != 200 or answer.read() != b"x" * 1000:
            raise SystemExit("an answer was wrong: {}".format(answer.status))
        client.close()
        return 1000 * (time.monotonic() - begun)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sorted(pool.map(ask, range(count)))


def seconds(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def percentiles(name: str, values: List[float], unit: str) -> None:
    cuts = [sorted(values)[min(len(values) - 1, int(len(values) * part))] for part in (0.5, 0.95, 0.99)]
    print("{:34} n {:6}  p50 {:9.1f}  p95 {:9.1f}  p99 {:9.1f} {}".format(name, len(values), *cuts, unit), flush=True)


def throughput(vm: VM, size: int, runs: int) -> None:
    content = bytes(MIB) * size
    vm.write_bytes("/tmp/large", content)
    vm.run("tcpsvd -c 4 127.0.0.1 7001 cat /tmp/large > /dev/null 2>&1 &", shell=True, check=True)
    vm.run("tcpsvd -c 4 127.0.0.1 7002 sh -c 'cat > /dev/null; echo done' > /dev/null 2>&1 &", shell=True, check=True)
    down, up = vm.publish(7001), vm.publish(7002)

    def port_down() -> None:
        with dial(down) as connection:
            assert drain(connection) == len(content)

    def port_up() -> None:
        with dial(up) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b"done\n"

    ways: Dict[str, Callable[[], object]] = {
        "download": lambda: vm.instance.download("/tmp/large", Sink()),
        "published port, from the guest": port_down,
        "upload": lambda: vm.instance.upload(io.BytesIO(content), "/dev/null"),
        "published port, to the guest": port_up,
    }
    rates: Dict[str, List[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, work in ways.items():
            rates[name].append(size / seconds(work))
    for name, values in rates.items():
        print("{:34} {:7.1f} MiB/s, median of {}".format(name, statistics.median(values), runs))
    for port, other in (("published port, from the guest", "download"), ("published port, to the guest", "upload")):
        ratio = statistics.median(rates[port]) / statistics.median(rates[other])
        print("{} / {}: {:.2f}".format(port, other, ratio), flush=True)


def round_trips(vm: VM) -> None:
    vm.run("tcpsvd -c 4 127.0.0.1 7003 cat > /dev/null 2>&1 &", shell=True, check=True)
    published = vm.publish(7003)
    times: Dict[str, List[float]] = {"ping": [], "a message on a published port": []}
    with dial(published) as connection:
        for _ in range(ROUND_TRIPS):
            times["ping"].append(1e6 * seconds(lambda: vm.instance.send_command("ping")))

            def talk() -> None:
                connection.sendall(b"hello")
                assert connection.recv(100) == b"hello"

            times["a message on a published port"].append(1e6 * seconds(talk))
    for name, values in times.items():
        percentiles(name, values, "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    shape = VMResourceLimits(memory_mb=256, disk_size_mb=64)
    with MicroVMIsolationManager({"raise_on_error": True, "health_interval_s": None}) as manager, manager.run_vm(resource_limits=shape) as vm:
        print("{}, isolated".format(vm.instance.get_info()["isolation_grade"]))
        vm.write_bytes("/tmp/small", b"x" * 1000)
        vm.run(["httpd", "-p", "8000", "-h", "/tmp"], check=True)
        published = vm.publish(8000)
        begun = time.monotonic()
        times = requests(published, options.count)
        elapsed = time.monotonic() - begun
        print("{} requests, {} at once: none lost, {:.0f} a second".format(options.count, AT_ONCE, options.count / elapsed))
        percentiles("a request", times, "ms")
        round_trips(vm)
        throughput(vm, options.mib, options.runs)


if __name__ == "__main__":
    main()
