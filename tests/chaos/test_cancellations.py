"""Tasks that are cancelled at random moments: MICROVM_CANCELLATIONS of them, each ends within a second and leaves nothing."""

import asyncio
import gc
import io
import os
import random
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, List, Set

from thirstys_waterfall.security.microvm_isolation.aio import AsyncMicroVMIsolationManager, AsyncVM, running_vms

from ..support import children, disks_of, eventually, limits, open_files

# Read by tests/runner.py, which runs this module by itself.
ALONE = "it holds how long an end takes"
# MICROVM_CHAOS_SEED repeats a failed run as far as the clock does; each run prints its seed.
SEED = int(os.environ.get("MICROVM_CHAOS_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
CANCELLATIONS = int(os.environ.get("MICROVM_CANCELLATIONS", "60"))
AT_ONCE = 4
# How long each kind of call is let go on at most, in seconds: about as long as it takes.
KINDS = {"run_vm": 0.5, "create": 0.02, "exec": 0.3, "stream": 0.3, "upload": 0.2, "download": 0.2, "snapshot": 0.5, "pool": 0.5,
         "attach": 0.05, "events": 0.05}
CONFIG: Dict[str, Any] = {"default_memory_mb": 128, "default_disk_size_mb": 64, "max_vcpus": 64, "overcommit_memory": True,
                          "pool": [{"size": 2, "memory_mb": 128, "disk_size_mb": 64}]}


class Cancellations:
    """VMs that stay, calls on them and on new ones, and what was wrong."""

    def __init__(self, manager: AsyncMicroVMIsolationManager, folder: Path, seed: int) -> None:
        self.manager, self.folder, self.random = manager, folder, random.Random(seed)
        self.vms: List[AsyncVM] = []
        self.wrong: List[str] = []
        self.longest_s: Dict[str, float] = {}
        self.names = 0
        self.source = folder / "source"
        self.source.write_bytes(os.urandom(4 << 20))

    def name(self, kind: str) -> str:
        self.names += 1
        return "{}-{}".format(kind, self.names)

    async def call(self, kind: str) -> None:
        """One call, to its end."""
        vm = self.random.choice(self.vms)
        if kind == "run_vm":
            # Other limits than the pool's.
            await (await self.manager.run_vm("plugin", limits(disk_size_mb=80))).destroy()
        elif kind == "pool":
            await (await self.manager.run_vm("session", limits())).destroy()
        elif kind == "create":
            await self.manager.destroy_vm(await self.manager.create_vm("plugin", limits()))
        elif kind == "exec":
            await vm.run("sleep 4321 & sleep 4321", shell=True)
        elif kind == "stream":
            async with vm.popen("yes & yes sleep 4321", shell=True) as program:
                async for _ in program:
                    pass
        elif kind == "upload":
            source: Any = self.random.choice([self.source, io.BytesIO(self.source.read_bytes())])
            await vm.instance.upload(source, "/tmp/" + self.name("upload"))
        elif kind == "download":
            await vm.instance.download("/root/file", self.folder / self.name("download"))
        elif kind == "snapshot":
            await vm.instance.snapshot(self.name("cancelled"))
        elif kind == "attach":
            async with self.manager.attach(vm.vm_id) as attached:
                await attached.run(["sleep", "4321"])
        else:
            await self.manager.events().get()

    async def cancel(self, kind: str) -> None:
        task = asyncio.ensure_future(self.call(kind))
        await asyncio.sleep(self.random.random() * KINDS[kind])
        task.cancel()
        begun = time.monotonic()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self.wrong.append("{}: {!r}".format(kind, error))
        took = time.monotonic() - begun
        self.longest_s[kind] = max(took, self.longest_s.get(kind, 0.0))
        if took > 1.0:
            self.wrong.append("{}: ended after {:.1f} s".format(kind, took))

    async def storm(self, count: int) -> None:
        self.vms = list(await asyncio.gather(*(self.manager.run_vm("plugin", limits()) for _ in range(3))))
        for vm in self.vms:
            await vm.instance.upload(self.source, "/root/file")
        kinds = [list(KINDS)[number % len(KINDS)] for number in range(count)]
        self.random.shuffle(kinds)

        async def some() -> None:
            while kinds:
                await self.cancel(kinds.pop())

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    async def check(self, condition: Callable[[], Awaitable[Any]], what: str, seconds: float = 10.0) -> None:
        """Notes what is wrong unless the condition, which answers with what is left, comes to nothing in time."""
        end, left = time.monotonic() + seconds, await condition()
        while left and time.monotonic() < end:
            await asyncio.sleep(0.1)
            left = await condition()
        if left:
            self.wrong.append("{}: {}".format(what, left))

    async def look(self) -> None:
        """What is left in the guests and on the host while the manager runs."""

        async def programs() -> str:
            return "".join([(await vm.run("grep -l 'sleep.[4]321' /proc/[0-9]*/cmdline", shell=True)).stdout for vm in self.vms])

        async def halves() -> List[str]:
            """Files that are there, and are not whole."""
            found = []
            for vm in self.vms:
                found += (await vm.run("find /tmp -type f ! -size 4194304c", shell=True)).stdout.split()
            return found + [path.name for path in self.folder.iterdir() if path.stat().st_size != 4 << 20]

        async def strangers() -> Set[str]:
            return set(self.manager.list_vms()) - {vm.vm_id for vm in self.vms}

        await self.check(programs, "programs in guests")
        await self.check(halves, "halves of files")
        await self.check(strangers, "VMs")
        for vm in self.vms:
            # Waits for a snapshot that goes on.
            await vm.instance.pause()
            await vm.instance.resume()
        for template in await self.manager.list_templates():
            if template["name"].startswith("cancelled-"):
                await self.manager.delete_template(template["name"])


class Random(unittest.TestCase):
    def test_cancelled_tasks_end_within_a_second_and_leave_nothing(self) -> None:
        async def run(count: int, folder: Path) -> Cancellations:
            async with AsyncMicroVMIsolationManager(CONFIG) as manager:
                storm = Cancellations(manager, folder, SEED)
                events = manager.events(capacity=1 << 16)

                async def filling() -> int:
                    pools = (await manager.get_resource_usage())["pool"]
                    return sum(one["wanted"] - one["ready"] for one in pools)

                await storm.check(filling, "the pool", 120.0)
                before = await manager.get_resource_usage()
                await storm.storm(count)
                await storm.look()
                await asyncio.gather(*(vm.destroy() for vm in storm.vms))

                async def reserved() -> List[int]:
                    usage = await manager.get_resource_usage()
                    pairs = [(before["vcpus_allocated"], usage["vcpus_allocated"]), (before["memory_allocated_mb"], usage["memory_allocated_mb"]),
                             (before["total_vms"], usage["total_vms"])]
                    return [there for here, there in pairs if here != there]

                await storm.check(filling, "the pool", 60.0)
                await storm.check(reserved, "quota")
            made = {event["vm_id"] async for event in events}
            left = [vm["vm_id"] for vm in await running_vms() if vm["vm_id"] in made]
            storm.wrong += ["{} is left".format(one) for one in left + [str(disk) for vm_id in made for disk in disks_of(vm_id)]]
            return storm

        with tempfile.TemporaryDirectory() as name:
            # What a process has from then on: the runtime's threads, the janitor, templates in memory.
            asyncio.run(run(len(KINDS), Path(name)))
            gc.collect()
            before = len(children()), open_files()
            storm = asyncio.run(run(CANCELLATIONS, Path(name)))
        wrong, longest_s = storm.wrong, storm.longest_s
        del storm
        gc.collect()
        print("seed {}; longest ends: {}".format(SEED, {kind: round(took, 3) for kind, took in sorted(longest_s.items())}))
        self.assertEqual(wrong, [], "seed {}".format(SEED))
        self.assertTrue(eventually(lambda: len(children()) <= before[0] and open_files() <= before[1], 10.0),
                        (before, children(), open_files()))
        self.assertEqual(set(longest_s), set(KINDS))
