"""A VM that may go to one place: it fetches a page from there, and nothing from elsewhere.

``python3 examples/network.py [URL]``; with a tap as root (CAP_NET_ADMIN, nftables, iproute2), else in user mode.
"""

import sys
from urllib.parse import urlsplit

from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMIsolationManager,
    NetworkUnavailableError,
    VMNetworkConfig,
    VMResourceLimits,
)


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else "https://example.com/"
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        vm_id = manager.create_vm(
            isolation_type=IsolationType.BROWSER_TAB,
            resource_limits=VMResourceLimits(memory_mb=128, disk_size_mb=64, network_bandwidth_mbps=20),
            network_config=VMNetworkConfig(isolated_network=False, egress=[str(urlsplit(url).hostname)]),
        )
        assert vm_id is not None
        try:
            manager.start_vm(vm_id)
        except NetworkUnavailableError as error:
            print("This host connects no VMs yet: {}".format(error))
            return 0
        info = manager.get_vm_info(vm_id)
        assert info is not None
        print("Network: {}".format(info["network_config"]))
        page = manager.send_command_to_vm(vm_id, "process_request", {"url": url})
        print("Allowed: {}".format(page))
        print("Refused: {}".format(manager.send_command_to_vm(vm_id, "process_request", {"url": "http://elsewhere.test/"})))
        metrics = manager.get_vm(vm_id).get_health_metrics()  # type: ignore[union-attr]
        print("Received {} bytes, sent {}".format(metrics.network_rx_bytes, metrics.network_tx_bytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
