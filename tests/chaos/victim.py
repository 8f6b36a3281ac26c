"""A process under load, for those who kill it: ``python -m tests.chaos.victim RUNTIME_DIR PREFIX THREADS``.

Prints ``begun`` when its manager is made, and a line for everything that should not be.
"""

import itertools
import logging
import random
import sys
import threading

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMNetworkConfig

from ..support import limits


def main() -> None:
    runtime_dir, prefix, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # A start warns about what the process before this one left behind; the parent reads that warning.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    config = {"runtime_dir": runtime_dir, "max_vcpus": 64, "health_interval_s": 0.5}
    manager = MicroVMIsolationManager(config)
    manager.start()
    print("begun", flush=True)
    numbers = itertools.count()
    connected = "connected" in sys.argv

    def live() -> None:
        while True:
            name = "{}{}".format(prefix, next(numbers))
            network = VMNetworkConfig(isolated_network=not (connected and random.random() < 0.3))
            vm = manager.get_vm(manager.create_vm("browser_tab", limits(), vm_id=name, network_config=network))
            for _ in range(random.randrange(1, 4)):
                if not vm.start():
                    break
                vm.send_command("exec", {"program": "echo", "args": [name]})
                vm.send_command("write_file", {"path": "/data/file", "data": "x" * 100000})
                if random.random() < 0.3:
                    vm.pause()
                    vm.resume()
                vm.stop()
            manager.destroy_vm(name)

    workers = [threading.Thread(target=live, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
