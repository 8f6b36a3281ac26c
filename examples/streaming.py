"""A program live, and a file to the guest and back."""

import io
import sys
import zlib

from thirstys_waterfall.security.microvm_isolation import IsolationType, MicroVMIsolationManager, VMResourceLimits


def main() -> int:
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        vm_id = manager.create_vm(IsolationType.SESSION, VMResourceLimits(memory_mb=128, disk_size_mb=64))
        assert vm_id is not None
        vm = manager.get_vm(vm_id)
        assert vm is not None
        vm.start()

        with vm.stream("/bin/sh", ["-c", "for i in 1 2 3; do echo line $i; sleep 0.2; done; exit 4"]) as program:
            for channel, data in program:
                print(channel, data)
        print("exit code:", program.exit_code)

        calculator = vm.stream("/bin/sh", ["-c", "while read line; do echo $((line)); done"])
        calculator.write(b"6 * 7\n")
        print("6 * 7 =", next(calculator)[1].decode().strip())
        calculator.close_stdin()
        calculator.wait(timeout=10)

        content = bytes(range(256)) * 4096
        sent = vm.upload(io.BytesIO(content), "/data/content", progress=lambda done, total: print("sent", done))
        back = io.BytesIO()
        received = vm.download("/data/content", back)
        print("unchanged:", back.getvalue() == content and sent == received, hex(zlib.crc32(content)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
