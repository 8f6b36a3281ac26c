"""Runs a test module where it can do no harm: in a network namespace that stands for the host.

Outside, a module's tests are stand-ins that report what the same tests did inside. Inside, ``Lab`` has an internet at
the other end of a wire. Both namespaces have no name and vanish with their processes, however those end.
"""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

ROOT = Path(__file__).resolve().parent.parent.parent
INSIDE = "MICROVM_TEST_LAB"
HOST_ADDRESS, HOST_OTHER_ADDRESS = "203.0.113.2", "192.0.2.77"
UPLINK = "up0"


def run(command: str) -> str:
    """What a command prints; it must succeed."""
    return run_words(command.split())


def run_words(command: List[str]) -> str:
    """The same for a command whose words have spaces in them."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    if done.returncode:
        raise AssertionError("{}: {}{}".format(" ".join(command), done.stdout, done.stderr))
    return done.stdout


def make_certificates(folder: Path) -> str:
    """An authority, whose certificate is the answer, and a key and certificate for web.test."""
    key = "openssl {} -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {}/{}.key -out {}/{} -subj /CN={}"
    run(key.format("req -x509 -days 3", folder, "authority", folder, "authority.pem", "authority.test"))
    run(key.format("req", folder, "web", folder, "web.csr", "web.test"))
    (folder / "names").write_text("subjectAltName=DNS:web.test\nbasicConstraints=CA:FALSE\n")
    sign = "openssl x509 -req -days 3 -in {0}/web.csr -CA {0}/authority.pem -CAkey {0}/authority.key -CAserial {0}/serial -CAcreateserial"
    run(sign.format(folder) + " -extfile {0}/names -out {0}/web.crt".format(folder))
    (folder / "web.pem").write_text((folder / "web.key").read_text() + (folder / "web.crt").read_text())
    return (folder / "authority.pem").read_text()


class Lab:
    """The internet's process and the wire to it. The host's side is this process's own network namespace."""

    def __init__(self) -> None:
        # unittest does not call load_tests() for a test that is named by itself, so that test would run on the host's network.
        if run("ip route show default"):
            raise RuntimeError("this is the host's network: run a single test in `unshare --net --mount`")
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        self.authority = make_certificates(folder)
        command = ["unshare", "--net", sys.executable, str(Path(__file__).with_name("internet.py")), str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True
        )
        assert self.process.stdout and self.process.stdout.readline() == "here\n"
        run("ip link add {} type veth peer name in0 netns {}".format(UPLINK, self.process.pid))
        # Without IPv6 the host sends no packets by itself on the wire.
        Path("/proc/sys/net/ipv6/conf/{}/disable_ipv6".format(UPLINK)).write_text("1")
        run("ip address add {}/24 dev {}".format(HOST_ADDRESS, UPLINK))
        run("ip address add {}/32 dev lo".format(HOST_OTHER_ADDRESS))
        run("ip link set lo up")
        run("ip link set {} up".format(UPLINK))
        run("ip route add default via 203.0.113.1")
        self.forwarding(True)
        self.order("set up")
        # In a mount namespace of this process: the host's own file stays what it is.
        resolv_conf = folder / "resolv.conf"
        resolv_conf.write_text("nameserver 198.51.100.53\n")
        run("mount --bind {} /etc/resolv.conf".format(resolv_conf))

    def forwarding(self, on: bool) -> None:
        Path("/proc/sys/net/ipv4/conf/{}/forwarding".format(UPLINK)).write_text("1" if on else "0")

    def order(self, what: str, **details: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(dict(details, do=what)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def frames(self) -> List[bytes]:
        return [base64.b64decode(frame) for frame in self.order("frames")]

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        # The interface is deleted before the namespace ends and takes the other end along.
        run("ip link delete {}".format(UPLINK))
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        run("umount /etc/resolv.conf")
        self.folder.cleanup()
        run("ip address delete {}/32 dev lo".format(HOST_OTHER_ADDRESS))


def state() -> Dict[str, str]:
    """All that a connected VM changes on the host."""
    commands = ("ip -oneline link", "ip -oneline address", "ip route show table all", "ip rule", "tc qdisc")
    state = {command: run(command) for command in commands + ("nft list ruleset",)}
    # A tap that nobody holds has no carrier; links and routes say so a moment later.
    carrier = re.compile(r" linkdown|NO-CARRIER,|(?<= state )(UP|DOWN)")
    state = {command: carrier.sub("", text) for command, text in state.items()}
    # The host's neighbours on the uplink change without any VM.
    neighbours = run("ip neigh").splitlines()
    return dict(state, neighbours="\n".join(line for line in neighbours if UPLINK not in line))


def flatten(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flatten(test)
        else:
            yield test


def why_not() -> Optional[str]:
    if os.geteuid() != 0:
        return "needs root: the test network is made of network namespaces"
    done = subprocess.run(["unshare", "--net", "--mount", "true"], stderr=subprocess.PIPE, universal_newlines=True)
    return "cannot make namespaces: {}".format(done.stderr) if done.returncode else None


class Inside:
    """One run of a module in a namespace of its own, when its first result is asked for."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.results: Optional[Dict[str, List[str]]] = None

    def result(self, name: str) -> List[str]:
        if self.results is None and why_not():
            self.results = {"": ["skipped", str(why_not())]}
        if self.results is None:
            with tempfile.NamedTemporaryFile("r") as file:
                command = ["unshare", "--net", "--mount", sys.executable, "-m", "tests.network.lab", self.module, file.name]
                done = subprocess.run(command, cwd=str(ROOT), env=dict(os.environ, **{INSIDE: "1"}))
                text = file.read()
                self.results = json.loads(text) if text else {}
                self.results[""] = ["failed", "the run inside the lab ended with {}".format(done.returncode)]
        return self.results.get(name, self.results[""])


class StandIn(unittest.TestCase):
    """Says what a test did inside."""

    def __init__(self, name: str, inside: Inside) -> None:
        super().__init__("report")
        self.name, self.inside = name, inside

    def report(self) -> None:
        outcome, text = self.inside.result(self.name)
        if outcome == "skipped":
            self.skipTest(text)
        if outcome != "passed":
            self.fail(text)

    def id(self) -> str:
        return self.name

    def __str__(self) -> str:
        return "{} (in the lab)".format(self.name)


def load(module: str, tests: unittest.TestSuite) -> unittest.TestSuite:
    """What a module's ``load_tests`` answers: the tests themselves inside, stand-ins outside."""
    if os.environ.get(INSIDE):
        return tests
    inside = Inside(module)
    return unittest.TestSuite(StandIn(test.id(), inside) for test in flatten(tests))


class Recording(unittest.TextTestResult):
    """Keeps every outcome by the test's id."""

    outcomes: Dict[str, List[str]] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.begun = time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.stream.writeln("    {:.1f} s".format(time.monotonic() - self.begun))

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.outcomes.setdefault(test.id(), ["passed", ""])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self.outcomes[test.id()] = ["failed", self.failures[-1][1]]

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self.outcomes[test.id()] = ["failed", self.errors[-1][1]]

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self.outcomes[test.id()] = ["skipped", reason]

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.outcomes[test.id()] = ["failed", self._exc_info_to_string(err, subtest)]  # type: ignore[attr-defined]


def main(module: str, results: str, *names: str) -> None:
    # The tests' folder is no place to import from: it would hide packages.
    suite = unittest.defaultTestLoader.loadTestsFromName(module)
    chosen = unittest.TestSuite(test for test in flatten(suite) if not names or any(n in test.id() for n in names))
    unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=Recording).run(chosen)
    Path(results).write_text(json.dumps(Recording.outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
