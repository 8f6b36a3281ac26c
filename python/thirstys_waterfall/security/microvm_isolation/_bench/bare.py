"""QEMU as anyone would run it by hand: the machine of one of our VMs, without jail, encryption or manager.

The arguments are those of a VM that runs, so that both sides run the same machine; only the names of files and the
numbers of descriptors are this module's own.
"""

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

# Options that only the jail needs: where its root has QEMU's files, and QEMU's own sandbox.
JAIL_OPTIONS = ("-L", "-sandbox")
# A record of the agent's prelude: length 1, kind 4. The agent answers it with its HELLO, in plain text.
AGAIN = b"\x00\x01\x04"
DEADLINE_S = 60.0


class Machine:
    """The arguments of a VM of ours."""

    def __init__(self, pid: int, program: str) -> None:
        # The command line of a forked VMM is padded with zeros to the length of its zygote's.
        arguments = Path("/proc/{}/cmdline".format(pid)).read_bytes().decode().rstrip("\0").split("\0")[1:]
        pairs = zip([""] + arguments, arguments)
        ours = [argument for pair in pairs for argument in pair[1:] if not set(pair) & set(JAIL_OPTIONS)]
        self.arguments = [program] + ours

    def launch(self, drives: Dict[str, Path], ram: Optional[Path], more: Dict[str, str]) -> "Running":
        """Start QEMU with drives by their ids; ``more`` maps an option to the value it gets instead of its own."""
        ours, theirs = zip(*(socket.socketpair() for _ in range(3)))
        ends = dict(zip(("agent", "qmp", "identity"), (end.fileno() for end in theirs)))
        arguments: List[str] = []
        option = ""
        for argument in self.arguments:
            if option in more:
                argument = more[option]
            elif option == "-chardev":
                argument = re.sub(r"id=(\w+),fd=\d+", lambda found: "id={0},fd={1}".format(found[1], ends[found[1]]), argument)
            elif option == "-drive":
                name = re.search(r"id=(\w+)", argument)
                assert name is not None, argument
                argument = re.sub(r"file=.*", "file={}".format(drives[name.group(1)]), argument)
            elif option == "-object" and ram is not None:
                argument = re.sub(r"mem-path=[^,]*", "mem-path={}".format(ram), argument)
            option = argument if argument.startswith("-") else ""
            arguments.append(argument)
        begun = time.perf_counter()
        process = subprocess.Popen(  # QEMU's stderr has only warnings about states without a description
            arguments, pass_fds=tuple(ends.values()), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in theirs:
            end.close()
        return Running(process, ours, begun)


class Running:
    """A QEMU of this module's."""

    def __init__(self, process: "subprocess.Popen[bytes]", ends: Sequence[socket.socket], begun: float) -> None:
        self.process, self.begun = process, begun
        # The last socket is the identity port; nothing is sent on it.
        self.agent, qmp, self._identity = ends
        self.agent.settimeout(DEADLINE_S)
        qmp.settimeout(DEADLINE_S)
        self._qmp = qmp
        self._lines = qmp.makefile("r")

    def first_byte(self) -> float:
        """Seconds from the spawn to the agent's first byte."""
        assert self.agent.recv(1), "QEMU ended"
        return time.perf_counter() - self.begun

    def restore(self, state: Path) -> None:
        """Load a template's device state and run."""
        self._command("qmp_capabilities")
        capabilities = [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]
        self._command("migrate-set-capabilities", {"capabilities": capabilities})
        fd = os.open(str(state), os.O_RDONLY)
        try:
            self._send({"execute": "getfd", "arguments": {"fdname": "s"}}, fd)
        finally:
            os.close(fd)
        self._answer()
        self._command("migrate-incoming", {"uri": "fd:s"})
        while True:
            line = self._line()
            if line.get("event") == "MIGRATION" and line["data"]["status"] in ("completed", "failed"):
                assert line["data"]["status"] == "completed", line
                break
        self._command("cont")

    def stop(self) -> None:
        self._command("stop")

    def resume(self) -> float:
        """Seconds for QEMU to let the vCPUs go on."""
        begun = time.perf_counter()
        self._command("cont")
        return time.perf_counter() - begun

    def echo(self) -> float:
        """Seconds for one question and its answer over the bare transport."""
        begun = time.perf_counter()
        self.agent.sendall(AGAIN)
        assert self.agent.recv(4096), "QEMU ended"
        return time.perf_counter() - begun

    def memory_mib(self) -> Tuple[float, float]:
        return memory_mib(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.agent.close()
        self._lines.close()
        self._qmp.close()
        self._identity.close()

    def _command(self, name: str, arguments: Optional[Dict[str, Any]] = None) -> None:
        self._send({"execute": name, "arguments": arguments or {}})
        self._answer()

    def _send(self, command: Dict[str, Any], fd: Optional[int] = None) -> None:
        text = json.dumps(command).encode()
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))]
        self._qmp.sendmsg([text], rights)

    def _line(self) -> Dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU ended"
        return dict(json.loads(line))

    def _answer(self) -> None:
        line: Dict[str, Any] = {}
        while "return" not in line:
            line = self._line()
            assert "error" not in line, line


def memory_mib(pid: int) -> Tuple[float, float]:
    """PSS and RSS of a process, in MiB."""
    text = Path("/proc/{}/smaps_rollup".format(pid)).read_text()
    pss, rss = (re.search(r"^{}:\s+(\d+)".format(name), text, re.M) for name in ("Pss", "Rss"))
    assert pss is not None and rss is not None
    return int(pss.group(1)) / 1024, int(rss.group(1)) / 1024
