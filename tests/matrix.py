"""All tests: the Rust crates, the type stubs, then the wheel under every Python that is asked for or found.

The first interpreter runs the whole suite, the others ``tests/surface``: what VMs do on the host and inside is the same code
below one stable ABI.

``make test`` calls it. ``MICROVM_TEST_PYTHONS`` (separated by spaces or colons) names interpreters; without it they are
python3 and whatever of CPython 3.8 and 3.13 is in PATH or below ``$PYENV_ROOT``.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # This folder is no place to import from: it would hide packages.
    sys.path[0] = str(ROOT)

from tests import runner, skips  # noqa: E402

MODULE = "thirstys_waterfall.security.microvm_isolation"
CRATES = ("microvm-protocol", "microvm-jail", "microvm-agent", "microvm-tools", "microvm-usernet")
WANTED = ("3.8", "3.13")
# What depends on the interpreter: names, errors, processes and threads, the examples, the package.
SURFACE = ("tests.surface",)


class Totals:
    """What passed, failed and was skipped so far."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: List[str] = []
        self.skipped: List[skips.Skip] = []
        self.notes: List[str] = []
        self.begun = time.monotonic()

    def add(self, name: str, passed: int, failed: Sequence[str], skipped: Sequence[skips.Skip] = ()) -> None:
        self.passed += passed
        self.failed += failed
        self.skipped += skipped
        seconds, self.begun = time.monotonic() - self.begun, time.monotonic()
        counts = (seconds, passed, len(failed), len(skipped), name)
        self.notes.append("{:8.0f} s  {:5} passed, {} failed, {} skipped: {}".format(*counts))


def cargo(command: str, totals: Totals) -> None:
    """Run ``cargo test`` for the core and each crate on its own: in one build their features would unify.

    A Rust test that cannot run prints ``skipped: `` and the reason, and returns: the test programs count it as passed.
    """
    runs = [["--no-default-features"]] + [["-p", crate] for crate in CRATES]
    for options in runs:
        call = [command, "test", "--locked", "--no-fail-fast"] + options + ["--", "--show-output"]
        print("+ " + " ".join(call), flush=True)
        done = subprocess.run(call, cwd=str(ROOT), stdout=subprocess.PIPE, universal_newlines=True)
        print(done.stdout, flush=True)
        counts = re.findall(r"test result: \w+\. (\d+) passed; \d+ failed; (\d+) ignored", done.stdout)
        passed, ignored = (sum(int(row[i]) for row in counts) for i in range(2))
        name = "cargo test " + " ".join(options)
        failed = list(failed_in(done.stdout))
        if done.returncode and not failed:
            failed = ["{} ended with {} and names no test: it did not compile, or ended early".format(name, done.returncode)]
        skipped = [(test, reason) for test, reason in skipped_in(done.stdout)] + [(name, "ignored")] * ignored
        unlisted = skips.unknown(skipped)
        totals.add(name, passed - len(skipped) + ignored, failed + unlisted, skipped)


def failed_in(output: str) -> Iterator[str]:
    """The Rust tests that failed, each with the end of what it said."""
    said = dict(said_in(output))
    for test in re.findall(r"^test (.+?)(?: - should panic)? \.\.\. FAILED$", output, re.M):
        yield runner.described_failure(test, said.get(test, ""))


def skipped_in(output: str) -> Iterator[skips.Skip]:
    """The Rust tests that said that they were skipped, once each."""
    for test, said in said_in(output):
        reason = re.search(r"^skipped: (.*)", said, re.M)
        if reason:
            yield test, reason.group(1)


def said_in(output: str) -> List[Tuple[str, str]]:
    return re.findall(r"^---- (\S+) stdout ----\n(.*?)(?=^----|^successes:|^failures:|\Z)", output, re.M | re.S)


def environment(build: Path, python: str, wheel: Path, qemu: Optional[Path] = None) -> str:
    """The interpreter of an environment that holds the wheel, with our QEMU's where that is given, and what tests try it with where that is to be had."""
    version = subprocess.check_output(
        [python, "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"], universal_newlines=True
    ).strip()
    folder = build / ("venv-test-" + version + ("-qemu" if qemu else ""))
    inner = folder / "bin" / "python"
    if not inner.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [str(inner), "-m", "pip", "install", "-q", "--no-index", "--force-reinstall", str(wheel)]
    subprocess.run(install + ([str(qemu)] if qemu else []), check=True)
    # Without a package index the tests that need it are skipped, and say so.
    subprocess.run([str(inner), "-m", "pip", "install", "-q", "-r", str(ROOT / ".ci" / "tests.txt")])
    return str(inner)


def pythons() -> List[str]:
    """The interpreters to test with, each version once."""
    asked = os.environ.get("MICROVM_TEST_PYTHONS", "").replace(":", " ").split()
    if asked:
        return asked
    found = {".".join(map(str, sys.version_info[:2])): getattr(sys, "_base_executable", sys.executable)}
    root = Path(os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv")))
    for version in WANTED:
        candidates = sorted(str(path) for path in root.glob("versions/{}.*/bin/python{}".format(version, version)))
        in_path = shutil.which("python" + version)
        for candidate in candidates + ([in_path] if in_path else []):
            # pyenv's shims exist for versions that are not selected, too: only one that runs counts.
            if subprocess.run([candidate, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
                found.setdefault(version, candidate)
    for version in WANTED:
        if version not in found:
            print("CPython {} was not found: the wheel is not tested with it".format(version))
    return list(found.values())


def stubtest(python: str, build: Path, wheel: Path, totals: Totals) -> None:
    """Hold the stubs against the built module."""
    target = build / "stubtest"
    shutil.rmtree(str(target), ignore_errors=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-index", "--target", str(target), str(wheel)], check=True
    )
    settings = target / "mypy.ini"
    settings.write_text("[mypy]\nnamespace_packages = True\nexplicit_package_bases = True\nmypy_path = {}\n".format(target))
    with settings.open("a") as more:
        # What the extras bring is not here.
        more.write("".join("[mypy-{}.*]\nignore_missing_imports = True\n".format(name) for name in ("IPython", "mcp")))
    # It cannot be imported without the SDK.
    absent = target / "absent"
    absent.write_text(MODULE + "._mcp\n")
    variables = dict(os.environ, PYTHONPATH=str(target), MYPYPATH=str(target))
    call = [python, "-m", "mypy.stubtest", MODULE, "--mypy-config-file", str(settings), "--allowlist", str(absent), "--ignore-unused-allowlist"]
    print("+ " + " ".join(call), flush=True)
    done = subprocess.run(call, cwd=str(target), env=variables)
    failed = ["mypy.stubtest found a difference between the stubs and the module"] if done.returncode else []
    totals.add("mypy.stubtest", 1 - len(failed), failed)


def suite(python: str, build: Path, wheel: Path, totals: Totals, names: Sequence[str] = ()) -> None:
    """Run the Python suite, or the parts of it with these names, with one interpreter."""
    report = build / "report.json"
    if report.exists():
        report.unlink()
    call = [python, str(ROOT / "tests" / "runner.py"), "--report", str(report)] + list(names)
    print("+ " + " ".join(call), flush=True)
    subprocess.run(call, cwd=str(ROOT), env=dict(os.environ, MICROVM_WHEEL=str(wheel)))
    told = json.loads(report.read_text()) if report.exists() else {"passed": 0, "failed": ["has no result: " + " ".join(call)], "skipped": []}
    part = "surface" if names else "suite"
    name = "Python {} under {}".format(part, Path(python).parents[1].name)
    failed = ["{}: {}".format(name, text) for text in told["failed"]]
    totals.add(name, told["passed"], failed, [(test, reason) for test, reason in told["skipped"]])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--cargo", default="cargo")
    parser.add_argument("--stubtest", metavar="PYTHON", help="an interpreter that has mypy")
    parser.add_argument("--with-qemu", type=Path, metavar="WHEEL", help="run the suite alone, with one Python, on this QEMU of ours")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args(arguments)
    build, wheel = options.build.resolve(), options.wheel.resolve()
    totals = Totals()
    if options.with_qemu:
        qemu = options.with_qemu.resolve()
        os.environ["MICROVM_TEST_QEMU_WHEEL"] = str(qemu)
        suite(environment(build, pythons()[0], wheel, qemu), build, wheel, totals)
    else:
        cargo(options.cargo, totals)
        if options.stubtest:
            stubtest(options.stubtest, build, wheel, totals)
        for index, python in enumerate(pythons()):
            suite(environment(build, python, wheel), build, wheel, totals, SURFACE if index else ())
    print("\n" + "\n".join(totals.notes))
    skips.show(totals.skipped)
    # Last, where whoever sees only the end of a log finds them.
    for text in totals.failed:
        print("failed: " + text)
    print("{} passed, {} failed, {} skipped".format(totals.passed, len(totals.failed), len(totals.skipped)))
    return 1 if totals.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
