"""Programs and files of a VM with the names of subprocess and pathlib."""

import subprocess
import sys

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits


def main() -> int:
    small = VMResourceLimits(memory_mb=128, disk_size_mb=64)
    with MicroVMIsolationManager() as manager, manager.run_vm(resource_limits=small) as vm:
        print(vm.run(["uname", "-sm"]).stdout, end="")
        print(vm.run(["tr", "a-z", "A-Z"], input="hello\n", check=True).stdout, end="")
        print(vm.run("ls / | wc -l", shell=True, user=1000).returncode)

        vm.write_text("/data/greeting", "hello\n")
        print(vm.read_text("/data/greeting"), end="")

        try:
            vm.run(["cat", "/no/such/file"], check=True)
        except subprocess.CalledProcessError as error:
            print("cat ended with", error.returncode, "and said", error.stderr, end="")
        try:
            vm.run(["sleep", "60"], timeout=0.5)
        except subprocess.TimeoutExpired as error:
            print(error)

        with vm.popen("for i in 1 2 3; do echo line $i; done", shell=True) as program:
            for channel, data in program:
                print(channel, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
