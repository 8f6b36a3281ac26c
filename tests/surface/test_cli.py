"""The command line ``microvm``, as a shell, a script and a person at a terminal use it."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
import urllib.request
from pathlib import Path
from typing import Any, Iterator, List, Tuple

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, __version__, _cli, doctor
from thirstys_waterfall.security.microvm_isolation._cli import man

from ..support import IMPORT, ROOT, alive, children, eventually, limits

MICROVM = [sys.executable, "-m", IMPORT]
SMALL = ["run", "-m", "128m", "--disk", "64m"]
# A start under load, and the program.
TIMEOUT_S = 120.0
MIB = 1 << 20


def microvm(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[Any]":
    """Runs it to its end; text unless told otherwise."""
    options.setdefault("universal_newlines", True)
    if "stdout" not in options:
        options.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.run([*MICROVM, *arguments], timeout=TIMEOUT_S, **options)


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """It while it runs, in a session of its own, so that only what a test sends comes to it."""
    process = subprocess.Popen([*MICROVM, *arguments], start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


def descendants(pid: int) -> List[int]:
    """The processes below one, in every generation."""
    below = children(pid)
    return below + [one for child in below for one in descendants(child)]


def resize(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Usage(unittest.TestCase):
    def test_wrong_use_has_its_exit_code_and_one_sentence(self) -> None:
        for arguments, code, words in [
            (["run", "--foo", "ls"], 125, "--foo"),
            (["run", "-m", "128m", "--foo", "ls"], 125, "--foo"),
            (["run"], 125, "name a program"),
            (["run", "--"], 125, "name a program"),
            (["run", "-m", "1q", "ls"], 125, "'1q' is no size"),
            (["run", "-m", "256", "ls"], 125, "write 256m"),
            (["run", "-m", "1m", "ls"], 125, "64 to 1048576"),
            (["run", "--cpus", "0", "ls"], 125, "1 to 32"),
            (["run", "--egress", "a b", "ls"], 125, "egress"),
            (["run", "--timeout", "0", "ls"], 125, "'0' is not above 0"),
            (["run", "-u", "root", "ls"], 125, "'root' is no uid"),
            (["run", "-e", "=b", "ls"], 125, "'=b' is not K=V"),
            (["run", "--label", "a", "ls"], 125, "'a' is not K=V"),
            (["run", "--mem", "128m", "ls"], 125, "--mem"),
            (["run", "--backend", "xen", "ls"], 125, "'xen'"),
            (["run", "-d", "-it", "ls"], 125, "microvm exec"),
            (["run", "-d", "--timeout", "1"], 125, "name one"),
            (["run", "-p", "80:x", "ls"], 125, "'80:x' is no port; write 8080:80"),
            (["run", "-p", "80:65536", "ls"], 125, "at most 65535"),
            (["run", "-p", "0", "ls"], 125, "at least 1"),
            (["run", "-p", "53:53/udp", "ls"], 125, "only tcp"),
            (["port"], 2, "VM"),
            (["port", "no-such-vm"], 1, "microvm ps"),
            (["exec"], 125, "VM"),
            (["exec", "x"], 125, "name a program"),
            (["exec", "--foo", "x", "ls"], 125, "--foo"),
            (["exec", "no-such-vm", "ls"], 125, "no-such-vm"),
            (["exec", "../up", "ls"], 125, "vm_id"),
            (["shell"], 125, "VM"),
            (["stop"], 2, "VM"),
            (["stop", "no-such-vm"], 1, "microvm ps"),
            (["cp", "a"], 2, "DESTINATION"),
            (["ps", "--runtime-dir", "/tmp"], 1, "runtime_dir"),
            (["stats", "no-such-vm"], 1, "microvm ps"),
            (["stats", "--interval", "0"], 2, "'0' is not 0.1 to 3600 seconds"),
            (["top"], 2, "microvm stats"),
            (["snapshot", "no-such-vm", "name"], 1, "microvm ps"),
            (["snapshot", "no-such-vm"], 2, "NAME"),
            (["clone", "no-such-vm"], 1, "microvm ps"),
            (["logs"], 2, "VM"),
            (["logs", "no-such-vm"], 1, "microvm ps"),
            (["logs", "-n", "-1", "x"], 2, "-n"),
            (["logs", "-n", "many", "x"], 2, "'many' is no number of lines"),
            (["no-such-command"], 2, "no-such-command"),
            (["doctor", "--foo"], 2, "--foo"),
            ([], 2, ""),
        ]:
            with self.subTest(arguments):
                done = microvm(*arguments)
                self.assertEqual(done.returncode, code, done.stderr)
                self.assertIn(words, done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_version_is_the_packages(self) -> None:
        for argument in ("version", "--version"):
            self.assertEqual(microvm(argument).stdout, "microvm {}\n".format(__version__))

    def test_project_installs_it_as_microvm(self) -> None:
        scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].splitlines()
        self.assertEqual(scripts[0], 'microvm = "{}:{}"'.format(_cli.__name__, _cli.main.__name__))

    def test_every_command_and_option_of_run_has_its_row_in_the_docs(self) -> None:
        page = (ROOT / "docs" / "cli.md").read_text()
        commands, _ = _cli.completion.commands_of(_cli.make_parser())
        for command in commands:
            self.assertRegex(page, r"\n\| `{}\b".format(command))
        for action in [action for command in ("run", "exec", "shell", "ps", "inspect", "logs", "cp", "port", "rm", "stats", "top", "df", "prune") for action in commands[command]._actions]:
            for option in set(action.option_strings) - {"-h", "--help", "--env", "--workdir", "--user"}:
                self.assertRegex(page, r"\n\|.*`{}\b".format(option))

    def test_every_option_of_mcp_has_its_row_in_the_docs(self) -> None:
        page = (ROOT / "docs" / "agents.md").read_text()
        commands, _ = _cli.completion.commands_of(_cli.make_parser())
        options = {option for action in commands["mcp"]._actions for option in action.option_strings}
        for option in options - {"-h", "--help", "--memory"}:
            self.assertRegex(page, r"\n\|.*`{}\b".format(option))

    def test_man_page_is_what_make_man_writes_and_man_reads_it(self) -> None:
        page = ROOT / "wheel" / "data" / "share" / "man" / "man1" / "microvm.1"
        self.assertEqual(page.read_text(), man.page(_cli.make_parser()))
        if shutil.which("man") is None:
            self.skipTest("needs man (man-db)")
        done = subprocess.run(
            ["man", "--warnings", "-l", str(page)],
            env=dict(os.environ, MANWIDTH="80", LC_ALL="C.UTF-8"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for words in ("run [--] PROGRAM [ARGUMENT]...", "-m SIZE" , "--runtime-dir DIR", "EXIT STATUS"):
            self.assertIn(words, re.sub(".\b", "", done.stdout))

    def test_completion_of_bash_completes_commands_and_options(self) -> None:
        script = microvm("completion", "bash").stdout
        for words, wanted in [(["te"], ["templates"]), (["in"], ["inspect"]), (["exec", "--wo"], ["--workdir"]), (["run", "--ti"], ["--timeout"]), (["completion", "z"], ["zsh"]), (["foo", ""], [])]:
            ask = "{}\nCOMP_WORDS=(microvm {}); COMP_CWORD={}; _microvm; printf '%s\\n' \"${{COMPREPLY[@]}}\"".format(
                script, " ".join(word or "''" for word in words), len(words)
            )
            said = subprocess.run(["bash", "-c", ask], stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
            self.assertEqual(said.split(), wanted)

    def test_completion_of_every_shell_has_every_command_and_option(self) -> None:
        for shell, option in (("bash", "--timeout"), ("zsh", "--timeout"), ("fish", "-l timeout -r")):
            script = microvm("completion", shell).stdout
            for word in ("run", "exec", "ps", "wait", "microvm ps -q", "doctor", "bench", "templates", "completion", "version", option):
                self.assertIn(word, script)

    def test_output_that_nobody_reads_is_no_traceback(self) -> None:
        done = subprocess.run(
            "{} completion fish | true".format(" ".join(MICROVM)), shell=True, stderr=subprocess.PIPE, universal_newlines=True
        )
        self.assertEqual(done.stderr, "")


class Programs(unittest.TestCase):
    def test_exit_code_and_outputs_are_the_programs(self) -> None:
        done = microvm(*SMALL, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (3, "out\n", "err\n"))
        self.assertEqual(microvm(*SMALL, "sh", "-c", "kill -SEGV $$").returncode, 128 + signal.SIGSEGV)

    def test_program_that_cannot_run_has_the_shells_exit_codes(self) -> None:
        for program, code in (("no-such-program", 127), ("/etc/hostname", 126)):
            done = microvm(*SMALL, program)
            self.assertEqual((done.returncode, done.stdout), (code, ""))
            self.assertRegex(done.stderr, r"\Amicrovm: {}: [^\n]+; [^\n]+\n\Z".format(program))

    def test_line_in_one_word_is_told_how_to_write_it(self) -> None:
        done = microvm(*SMALL, "ls -la")
        self.assertEqual(done.returncode, 127)
        self.assertIn("sh -c", done.stderr)

    def test_text_that_utf8_cannot_hold_is_refused(self) -> None:
        done = microvm(*SMALL, "echo", b"a\xff".decode("utf-8", "surrogateescape"))
        self.assertEqual(done.returncode, 125)
        self.assertIn("UTF-8", done.stderr)

    def test_vm_has_what_was_asked_for_beyond_the_quota_of_a_manager(self) -> None:
        done = microvm(*SMALL, "--cpus", "20", "nproc")
        self.assertEqual((done.stdout, done.stderr), ("20\n", ""))

    def test_vm_that_dies_is_told(self) -> None:
        with started(*SMALL, "sh", "-c", "echo ready; sleep 60", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            self.assertEqual(process.stdout.readline(), b"ready\n")
            for pid in descendants(process.pid):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    if Path("/proc/{}/comm".format(pid)).read_text().startswith("qemu"):
                        os.kill(pid, signal.SIGKILL)
            self.assertEqual(process.wait(TIMEOUT_S), 125)
            self.assertRegex(process.stderr.read().decode(), r"\Amicrovm: [^\n]*VMM[^\n]+\n\Z")

    def test_output_that_cannot_be_written_is_told(self) -> None:
        with open("/dev/full", "wb") as full:
            done = microvm(*SMALL, "echo", "hello", stdout=full, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr), (125, "microvm: stdout: No space left on device\n"))

    def test_backend_that_is_not_there_is_told_with_its_remedy(self) -> None:
        done = microvm(*SMALL, "--backend", "firecracker", "ls", env=dict(os.environ, PATH="/nonexistent"))
        self.assertEqual((done.returncode, done.stdout), (125, ""))
        self.assertRegex(done.stderr, r"\Amicrovm: [^\n]+install[^\n]+\n\Z")

    def test_options_of_the_program_are_its_own_and_those_before_it_are_runs(self) -> None:
        arguments = ["-e", "A=b=c", "-e", "FROM_HERE", "-e", "NOT_SET", "-w", "/data", "-u", "1000", "--label", "a=b", "--rm"]
        script = 'echo "$A $FROM_HERE ${NOT_SET-unset} $PWD $(id -u) $*"'
        done = microvm(*SMALL, *arguments, "sh", "-c", script, "sh", "-t", "--", "--rm", env=dict(os.environ, FROM_HERE="1"))
        self.assertEqual((done.stdout, done.stderr), ("b=c 1 unset /data 1000 -t -- --rm\n", ""))

    def test_twenty_megabytes_pass_both_ways(self) -> None:
        data = os.urandom(20 * MIB)
        done = microvm(*SMALL, "-i", "cat", input=data, universal_newlines=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout == data)

    def test_without_i_the_program_reads_nothing(self) -> None:
        done = microvm(*SMALL, "cat", input="not for it")
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_closed_descriptors_are_taken_for_dev_null(self) -> None:
        command = " ".join([*MICROVM, *SMALL, "-i", "sh", "-c", "'cat; echo out; echo err >&2'"])
        for closed, stdout, stderr in (("<&-", "out\n", "err\n"), (">&-", "", "err\n"), ("2>&-", "out\n", ""), ("<&- >&- 2>&-", "", "")):
            with self.subTest(closed):
                done = subprocess.run(
                    "{} {}".format(command, closed), shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
                )
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, stdout, stderr))

    def test_reader_that_goes_ends_it_as_a_shell_says(self) -> None:
        with started(*SMALL, "yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            self.assertEqual(process.stdout.readline(), b"y\n")
            process.stdout.close()
            self.assertEqual(process.wait(TIMEOUT_S), 128 + signal.SIGPIPE)
            self.assertEqual(process.stderr.read(), b"")

    def test_descriptor_that_does_not_block_gets_all_of_it(self) -> None:
        ours, its = os.pipe()
        os.set_blocking(its, False)
        with started(*SMALL, "head", "-c", str(MIB), "/dev/zero", stdout=its) as process:
            os.close(its)
            time.sleep(1.0)
            with open(ours, "rb") as pipe:
                self.assertEqual(len(pipe.read()), MIB)
            self.assertEqual(process.wait(TIMEOUT_S), 0)

    def test_timeout_ends_it(self) -> None:
        done = microvm(*SMALL, "--timeout", "0.5", "sleep", "60")
        self.assertEqual((done.returncode, done.stdout), (124, ""))
        self.assertEqual(done.stderr, "microvm: sleep did not end within 0.5 s (--timeout)\n")


class Signals(unittest.TestCase):
    @contextlib.contextmanager
    def ready(self, trap: str) -> Iterator["subprocess.Popen[bytes]"]:
        script = trap + "; echo ready; sleep 60 & wait; wait"
        with started(*SMALL, "sh", "-c", script, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"ready\n")
            yield process

    def test_signals_are_passed_on_and_the_program_decides(self) -> None:
        for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2"):
            with self.subTest(name), self.ready("trap 'echo got {0}; exit 9' {0}".format(name)) as process:
                process.send_signal(getattr(signal, "SIG" + name))
                self.assertEqual(process.wait(TIMEOUT_S), 9)
                assert process.stdout is not None
                self.assertEqual(process.stdout.read().decode(), "got {}\n".format(name))

    def test_signal_that_ends_the_program_is_in_the_exit_code(self) -> None:
        with self.ready("true") as process:
            process.terminate()
            self.assertEqual(process.wait(TIMEOUT_S), 128 + signal.SIGTERM)

    def test_control_c_twice_in_a_second_ends_at_once_and_slowly_it_does_not(self) -> None:
        with self.ready("trap '' INT") as process:
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(2.0)
            self.assertIsNone(process.poll())
            # Where it got no CPU between two of them, they were one.
            for _ in range(10):
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.2)
            self.assertEqual(process.wait(20.0), 128 + signal.SIGINT)

    def test_control_c_while_the_vm_starts_ends_the_start(self) -> None:
        with started(*SMALL, "sleep", "60", stderr=subprocess.PIPE) as process:
            caught = Path("/proc/{}/status".format(process.pid))
            # Its handler of SIGALRM is set when it sets those of all.
            bit = 1 << (signal.SIGALRM - 1)
            self.assertTrue(eventually(lambda: int(re.findall(r"SigCgt:\s*(\w+)", caught.read_text())[0], 16) & bit, 60.0))
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(TIMEOUT_S), 128 + signal.SIGINT)
            assert process.stderr is not None
            self.assertEqual(process.stderr.read(), b"")


class Terminals(unittest.TestCase):
    def setUp(self) -> None:
        self.master, self.slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        self.addCleanup(os.close, self.slave)
        resize(self.master, 30, 100)
        self.before = termios.tcgetattr(self.slave)
        self.said = b""

    def words(self, *options: str, script: str) -> List[str]:
        return [*SMALL, *options, "sh", "-c", script]

    @contextlib.contextmanager
    def at_terminal(self, script: str, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        """It as the foreground of a terminal of its own."""

        def control() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        arguments = self.words(*(options or ("-it",)), script=script)
        with started(*arguments, stdin=self.slave, stdout=self.slave, stderr=self.slave, preexec_fn=control) as process:
            yield process

    def hear(self, words: bytes, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.said and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self.said += os.read(self.master, 65536)
        self.assertIn(words, self.said)

    def test_program_has_a_terminal_of_its_size_that_follows_it(self) -> None:
        with self.at_terminal("stty size; while read x; do stty size; done") as process:
            self.hear(b"30 100\r\n")
            resize(self.master, 40, 120)
            end = time.monotonic() + 30.0
            while b"40 120" not in self.said and time.monotonic() < end:
                os.write(self.master, b"\r")
                with contextlib.suppress(AssertionError):
                    self.hear(b"40 120\r\n", 0.3)
            self.hear(b"40 120\r\n", 0.1)
            os.write(self.master, b"\x04")
            self.assertEqual(process.wait(TIMEOUT_S), 0)
        self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_keys_are_the_programs_and_the_terminal_is_as_it_was_at_the_end(self) -> None:
        with self.at_terminal("trap 'echo got it; exit 9' INT; echo ready; sleep 60 & wait") as process:
            self.hear(b"ready")
            self.assertTrue(eventually(lambda: termios.tcgetattr(self.slave) != self.before))
            os.write(self.master, b"\x03")
            self.hear(b"got it\r\n")
            self.assertEqual(process.wait(TIMEOUT_S), 9)
        self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_terminal_is_as_it_was_after_a_signal_and_after_the_timeout(self) -> None:
        for options, number, code in ((["-it"], signal.SIGTERM, 143), (["-it"], signal.SIGHUP, 129), (["-it", "--timeout", "2"], 0, 124)):
            with self.subTest(options=options, number=number), self.at_terminal("echo ready; exec sleep 60", *options) as process:
                self.said = b""
                self.hear(b"ready")
                process.send_signal(number)
                self.assertEqual(process.wait(TIMEOUT_S), code)
                self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_terminal_is_as_it_was_after_a_storm_of_signals(self) -> None:
        with self.at_terminal("trap '' INT TERM USR1; echo ready; sleep 60") as process:
            self.hear(b"ready")
            end = time.monotonic() + 60.0
            while process.poll() is None and time.monotonic() < end:
                for number in (signal.SIGINT, signal.SIGWINCH, signal.SIGTERM, signal.SIGUSR1):
                    process.send_signal(number)
                time.sleep(0.001)
            self.assertEqual(process.wait(TIMEOUT_S), 130)
        self.assertEqual(termios.tcgetattr(self.slave), self.before)
        while select.select([self.master], [], [], 0.1)[0]:
            self.said += os.read(self.master, 65536)
        self.assertNotIn(b"Traceback", self.said)

    def test_stopped_it_gives_the_terminal_back_and_takes_it_again(self) -> None:
        with self.at_terminal("echo ready; read x; echo got $x") as process:
            self.hear(b"ready")
            self.assertTrue(eventually(lambda: termios.tcgetattr(self.slave) != self.before))
            process.send_signal(signal.SIGTSTP)
            status = Path("/proc/{}/stat".format(process.pid))
            self.assertTrue(eventually(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", 20.0))
            self.assertEqual(termios.tcgetattr(self.slave), self.before)
            process.send_signal(signal.SIGCONT)
            self.assertTrue(eventually(lambda: termios.tcgetattr(self.slave) != self.before, 20.0))
            os.write(self.master, b"words\r")
            self.hear(b"got words\r\n")
            self.assertEqual(process.wait(TIMEOUT_S), 0)

    def test_t_without_a_terminal_gives_the_program_one(self) -> None:
        done = microvm(*self.words("-it", script="stty size; cat"), input=b"words\n", universal_newlines=False)
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"24 80\r\n", done.stdout)
        self.assertIn(b"words\r\n", done.stdout)


class AttachedTerminals(Terminals):
    """The same with ``exec``."""

    def setUp(self) -> None:
        super().setUp()
        manager = MicroVMIsolationManager({"raise_on_error": True})
        self.addCleanup(manager.stop)
        self.vm = manager.run_vm(resource_limits=limits())

    def words(self, *options: str, script: str) -> List[str]:
        return ["exec", *options, self.vm.vm_id, "sh", "-c", script]


class Attached(unittest.TestCase):
    """What is done to a VM that another process has: here, this one."""

    def setUp(self) -> None:
        self.manager = MicroVMIsolationManager({"raise_on_error": True})
        self.addCleanup(self.manager.stop)
        self.vm = self.manager.run_vm(resource_limits=limits(), labels={"team": "web"})
        self.id = self.vm.vm_id

    def test_exec_has_the_exit_code_the_input_and_the_outputs_of_its_program(self) -> None:
        done = microvm("exec", "-i", "-e", "A=b", "-w", "/data", self.id, "sh", "-c", "cat; echo $A $PWD >&2; exit 3", input="in")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (3, "in", "b /data\n"))
        self.assertEqual(microvm("exec", self.id, "--", "sh", "-c", "kill -SEGV $$").returncode, 128 + signal.SIGSEGV)
        done = microvm("exec", "--timeout", "0.5", self.id, "sleep", "60")
        self.assertEqual((done.returncode, done.stderr), (124, "microvm: sleep did not end within 0.5 s (--timeout)\n"))
        done = microvm("exec", self.id, "no-such-program")
        self.assertEqual(done.returncode, 127)
        self.assertIn("microvm exec {} ls /bin".format(self.id), done.stderr)

    def test_port_lists_what_is_published(self) -> None:
        with self.vm.publish(8000) as first, self.vm.publish(8001, address="::1") as second:
            said = microvm("port", self.id).stdout
            places = "127.0.0.1:{}".format(first.host_port), "[::1]:{}".format(second.host_port)
            self.assertEqual(said, "8000/tcp -> {}\n8001/tcp -> {}\n".format(*places))
            self.assertEqual(microvm("port", self.id, "8001").stdout, places[1] + "\n")
            self.assertEqual(json.loads(microvm("port", "--json", self.id).stdout), self.vm.ports())
        done = microvm("port", self.id, "8000")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("port 8000 of {} is not published".format(self.id), done.stderr)

    def test_exec_passes_twenty_megabytes_both_ways(self) -> None:
        data = os.urandom(20 * MIB)
        done = microvm("exec", "-i", self.id, "cat", input=data, universal_newlines=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout == data)

    def test_exec_passes_signals_on_and_leaves_no_program(self) -> None:
        script = "trap 'echo got; exit 9' TERM; echo ready; sleep 61 & wait"
        with started("exec", self.id, "sh", "-c", script, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"ready\n")
            process.terminate()
            self.assertEqual((process.wait(TIMEOUT_S), process.stdout.read()), (9, b"got\n"))
        with started("exec", self.id, "sh", "-c", "echo ready; sleep 62", stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
        self.assertTrue(eventually(lambda: "sleep 62" not in self.vm.run(["ps", "-o", "args"]).stdout))

    def test_exec_in_a_vm_that_ends_is_told_within_a_second_or_so(self) -> None:
        with started("exec", self.id, "sh", "-c", "echo ready; sleep 60", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            self.vm.destroy()
            self.assertEqual(process.wait(20.0), 125)
            self.assertRegex(process.stderr.read().decode(), r"\Amicrovm: [^\n]+\n\Z")

    def test_shell_reads_a_script_where_stdin_is_no_terminal(self) -> None:
        done = microvm("shell", self.id, input="echo $((6 * 7))\nexit 5\n")
        self.assertEqual((done.returncode, done.stdout), (5, "42\n"))

    def test_ps_is_a_table_ids_json_or_what_is_asked_for(self) -> None:
        self.assertRegex(microvm("ps").stdout, r"\AVM +TYPE +STATE +GRADE +CPUS +MEMORY +UP +OWNER +LABELS\n")
        row = r"(?m)^{} +session +running +\w+ +1 +128 MiB +\d+s +{} +team=web$".format(self.id, os.getpid())
        self.assertRegex(microvm("ps").stdout, row)
        self.assertIn(self.id + "\n", microvm("ps", "-q").stdout)
        said = {vm["vm_id"]: vm for vm in json.loads(microvm("ps", "--json").stdout)}
        self.assertEqual((said[self.id]["state"], said[self.id]["labels"]), ("running", {"team": "web"}))
        self.assertIn("{} running\n".format(self.id), microvm("ps", "--format", "{vm_id} {state}").stdout)
        wrong = microvm("ps", "--format", "{colour}")
        self.assertEqual(wrong.returncode, 2)
        self.assertIn("vm_id", wrong.stderr)

    def test_inspect_tells_all_and_goes_on_after_a_vm_that_is_not_there(self) -> None:
        done = microvm("inspect", "no-such-vm", self.id)
        self.assertEqual((done.returncode, [vm["vm_id"] for vm in json.loads(done.stdout)]), (1, [self.id]))
        self.assertRegex(done.stderr, r"\Amicrovm: [^\n]*no-such-vm[^\n]*microvm ps[^\n]*\n\Z")
        self.assertEqual(microvm("inspect", "--format", "{owner_pid}", self.id).stdout, "{}\n".format(os.getpid()))

    def test_vms_are_paused_resumed_stopped_killed_and_removed(self) -> None:
        for command, state in (("pause", "paused"), ("resume", "running"), ("stop", "stopped")):
            done = microvm(command, self.id)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, self.id + "\n", ""))
            self.assertEqual(self.vm.instance.get_state().value, state)
        self.assertEqual(microvm("stop", self.id).returncode, 1)
        others = [self.manager.run_vm(resource_limits=limits()) for _ in range(2)]
        with started("wait", others[0].vm_id, others[1].vm_id, stdout=subprocess.PIPE) as waiting:
            assert waiting.stdout is not None
            # The listener's line, and that of its client: it waits already (proc_pid_net(5)).
            socket = others[0].instance.get_info()["socket_path"]
            self.assertTrue(eventually(lambda: Path("/proc/net/unix").read_text().count(socket) > 1, 60.0))
            self.assertEqual(microvm("kill", others[0].vm_id).returncode, 0)
            self.assertEqual(waiting.stdout.readline().decode(), others[0].vm_id + "\n")
            self.assertEqual(microvm("rm", "-f", others[1].vm_id).stdout, others[1].vm_id + "\n")
            self.assertEqual(waiting.wait(TIMEOUT_S), 0)
        self.assertNotIn(others[1].vm_id, self.manager.list_vms())

    def test_stats_is_a_table_json_or_what_is_asked_for(self) -> None:
        said = microvm("stats", "--no-stream").stdout
        self.assertRegex(said, r"\AVM +CPU % +MEMORY +OF +DISK I/O +RECEIVED +SENT +HEALTH +UP\n")
        self.assertRegex(said, r"(?m)^{} +\d+\.\d +\d+ MiB +128 MiB +[\d.]+ [KM]iB +- +- +\w+ +\d+s$".format(self.id))
        (reading,) = json.loads(microvm("stats", "--no-stream", "--json", self.id).stdout)
        self.assertEqual((reading["vm_id"], reading["memory_mb"]), (self.id, 128))
        self.assertGreater(reading["memory_usage_mb"], 1)
        self.assertEqual(microvm("stats", "--no-stream", "--format", "{vm_id} {vcpu_count}", self.id).stdout, self.id + " 1\n")
        wrong = microvm("stats", "--no-stream", "--format", "{colour}", self.id)
        self.assertEqual(wrong.returncode, 2)
        self.assertIn("cpu_usage_percent", wrong.stderr)

    def test_stats_of_a_busy_vm_follow_it_to_its_end(self) -> None:
        with self.vm.popen(["sh", "-c", "while :; do :; done"]):
            with started("stats", "--json", "--interval", "0.5", self.id, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                busiest = max(json.loads(process.stdout.readline())[0]["cpu_usage_percent"] for _ in range(8))
                self.assertGreater(busiest, 10.0)
                self.vm.destroy()
                self.assertEqual(process.wait(TIMEOUT_S), 0)

    def test_stats_end_with_control_c_as_they_are_meant_to(self) -> None:
        with started("stats", self.id, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            self.assertEqual((process.wait(TIMEOUT_S), process.stderr.read()), (0, b""))

    def test_snapshot_is_taken_once_under_a_name_and_suspend_ends_a_vm(self) -> None:
        name = "cli-snapshot-{}".format(os.getpid())
        self.addCleanup(lambda: MicroVMIsolationManager().delete_template(name))
        done = microvm("snapshot", self.id, name)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, name + "\n", ""))
        self.assertEqual([one["name"] for one in self.manager.list_templates() if one["name"] == name], [name])
        again = microvm("snapshot", self.id, name)
        self.assertEqual((again.returncode, again.stdout), (1, ""))
        self.assertRegex(again.stderr, r"\Amicrovm: [^\n]*{}[^\n]*exists[^\n]*\n\Z".format(name))
        self.assertEqual(microvm("suspend", self.id).stdout, self.id + "\n")
        self.assertTrue(self.vm.instance.get_info()["suspended"])
        self.assertTrue(self.manager.resume_vm(self.id))

    def test_cp_of_more_than_a_moment_says_on_a_terminal_how_far_it_is(self) -> None:
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        said: List[bytes] = []

        def hear() -> None:
            with contextlib.suppress(OSError):
                while True:
                    said.append(os.read(master, 65536))

        hearing = threading.Thread(target=hear)
        hearing.start()
        with started("cp", "-", self.id + ":/data/slow", stdin=subprocess.PIPE, stderr=slave) as process:
            assert process.stdin is not None
            for _ in range(2):
                process.stdin.write(bytes(MIB))
                process.stdin.flush()
                time.sleep(1.0)
            process.stdin.close()
            self.assertEqual(process.wait(TIMEOUT_S), 0)
        os.close(slave)
        hearing.join(TIMEOUT_S)
        self.assertRegex(b"".join(said), rb"\rslow: [12]\.\d MiB\x1b\[K(?s:.*)\r\x1b\[K\Z")

    def test_cp_copies_files_both_ways_and_says_how_folders_go(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            here = Path(name) / "here"
            here.write_bytes(os.urandom(MIB))
            self.assertEqual(microvm("cp", str(here), self.id + ":/data/").stderr, "")
            self.assertEqual(microvm("cp", self.id + ":/data/here", name + "/back").stderr, "")
            self.assertEqual((Path(name) / "back").read_bytes(), here.read_bytes())
            microvm("cp", self.id + ":/etc/hostname", name)
            self.assertTrue((Path(name) / "hostname").exists())
            folder = microvm("cp", name, self.id + ":/data")
            self.assertEqual(folder.returncode, 2)
            self.assertIn("tar x -C /data", folder.stderr)
        self.assertEqual(microvm("cp", "-", self.id + ":/tmp/in", input="words").returncode, 0)
        self.assertEqual(microvm("cp", self.id + ":/tmp/in", "-").stdout, "words")
        self.assertEqual(microvm("cp", "a", "b").returncode, 2)
        self.assertEqual(microvm("cp", self.id + ":/no-such-file", "-").returncode, 1)


class Top(unittest.TestCase):
    """The screen, as a person at a terminal has it."""

    def setUp(self) -> None:
        manager = MicroVMIsolationManager({"raise_on_error": True})
        self.addCleanup(manager.stop)
        self.vm = manager.run_vm(resource_limits=limits())
        self.master, self.slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        self.addCleanup(os.close, self.slave)
        resize(self.master, 30, 120)
        self.before = termios.tcgetattr(self.slave)
        self.said = ""

    @contextlib.contextmanager
    def shown(self, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
        def control() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = dict(os.environ, LC_ALL="C.UTF-8", **env)
        with started(
            "top", "--interval", "0.3", stdin=self.slave, stdout=self.slave, stderr=self.slave, preexec_fn=control, env=environment
        ) as process:
            yield process

    def hear(self, pattern: str) -> None:
        end = time.monotonic() + 60.0
        while not re.search(pattern, self.said) and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self.said += os.read(self.master, 65536).decode("utf-8", "replace")
        self.assertTrue(re.search(pattern, self.said), self.said[-2000:])

    def test_busy_vm_has_a_chart_and_q_ends_it(self) -> None:
        with self.vm.popen(["sh", "-c", "while :; do :; done"]), self.shown() as process:
            self.hear(r"\x1b\[\?1049h")
            self.hear(r"1 VM, \d+ % of a CPU, \d+ MiB of memory; q quits")
            self.hear(r"\x1b\[1mVM +CPU +CPU %")
            self.hear(r"{} +[▂▃▄▅▆▇█]".format(self.vm.vm_id))
            os.write(self.master, b"q")
            self.assertEqual(process.wait(TIMEOUT_S), 0)
        self.hear(r"\x1b\[\?25h\x1b\[\?1049l")
        self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_lines_fit_the_terminal_whose_size_changes(self) -> None:
        with self.shown(NO_COLOR="1") as process:
            self.hear(r"UP\x1b\[K")
            resize(self.master, 4, 30)
            self.said = ""
            process.send_signal(signal.SIGWINCH)
            self.hear(r"\x1b\[H[^\r\n]{1,30}\x1b\[K\r\n\x1b\[K\r\nVM[^\r\n]{1,28}\x1b\[K\r\n[^\r\n]{1,30}\x1b\[K\x1b\[J")
            self.assertNotIn("\x1b[1m", self.said)
            os.write(self.master, b"\x03")
            self.assertEqual(process.wait(TIMEOUT_S), 0)
        self.assertEqual(termios.tcgetattr(self.slave), self.before)

    def test_stopped_or_terminated_it_gives_the_terminal_back(self) -> None:
        with self.shown() as process:
            self.hear("q quits")
            process.send_signal(signal.SIGTSTP)
            status = Path("/proc/{}/stat".format(process.pid))
            self.assertTrue(eventually(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", 20.0))
            self.assertEqual(termios.tcgetattr(self.slave), self.before)
            self.said = ""
            process.send_signal(signal.SIGCONT)
            self.hear("q quits")
            process.terminate()
            self.assertEqual(process.wait(TIMEOUT_S), 128 + signal.SIGTERM)
        self.assertEqual(termios.tcgetattr(self.slave), self.before)


def _read(url: str) -> bytes:
    """What is there; nothing while there is no server."""
    try:
        with urllib.request.urlopen(url, timeout=10.0) as answer:
            return bytes(answer.read())
    except OSError:
        return b""


class Detached(unittest.TestCase):
    """VMs that stay when ``microvm`` has ended."""

    def setUp(self) -> None:
        self.id = "cli-detached-{}".format(os.getpid())
        self.addCleanup(microvm, "rm", self.id)

    def leave(self, *arguments: str) -> int:
        """The process that has the VM."""
        done = microvm(*SMALL, "-d", "--name", self.id, *arguments)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, self.id + "\n", ""))
        return int(microvm("inspect", "--format", "{owner_pid}", self.id).stdout)

    def ends(self, pid: int) -> bool:
        return eventually(lambda: not alive(pid), 30.0)

    def test_vm_stays_until_it_is_removed_and_its_owner_goes_with_it(self) -> None:
        pid = self.leave()
        # A session of its own, and nothing of this terminal.
        self.assertEqual(os.getsid(pid), os.getpgid(pid))
        self.assertNotEqual(os.getsid(pid), os.getsid(0))
        self.assertEqual({os.readlink("/proc/{}/fd/{}".format(pid, number)) for number in range(3)}, {"/dev/null"})
        self.assertEqual(microvm("exec", self.id, "echo", "hello").stdout, "hello\n")
        again = microvm(*SMALL, "-d", "--name", self.id)
        self.assertEqual((again.returncode, again.stdout), (125, ""))
        self.assertRegex(again.stderr, r"\Amicrovm: [^\n]*{}[^\n]*taken[^\n]*\n\Z".format(self.id))
        self.assertEqual(microvm("stop", self.id).returncode, 0)
        self.assertTrue(self.ends(pid))

    def test_vm_of_a_program_ends_with_it(self) -> None:
        pid = self.leave("sh", "-c", "read x; while [ ! -e /tmp/end ]; do sleep 0.1; done")
        self.assertEqual(microvm("exec", self.id, "touch", "/tmp/end").returncode, 0)
        self.assertTrue(self.ends(pid))
        self.assertNotIn(self.id, microvm("ps", "-q", "-a").stdout)

    def test_output_is_kept_for_logs_each_stream_for_itself(self) -> None:
        self.leave("sh", "-c", "echo one; echo two >&2; printf 'three\\377'; touch /tmp/said; sleep 60")
        self.assertTrue(eventually(lambda: microvm("exec", self.id, "ls", "/tmp/said").returncode == 0, 30.0))
        said = lambda *options: microvm("logs", *options, self.id, universal_newlines=False)
        # The output comes by another way than the answer of ls.
        self.assertTrue(eventually(lambda: said().stdout == b"one\nthree\xff", 10.0))
        self.assertEqual((said().returncode, said().stderr), (0, b"two\n"))
        self.assertEqual((said("--tail", "9").stdout, said("-n", "9").stderr), (b"one\nthree\xff", b"two\n"))
        self.assertEqual((said("-n", "0").stdout, said("-n", "0").stderr), (b"", b""))
        folder = Path(microvm("inspect", "--format", "{socket_path}", self.id).stdout.strip()).parent
        self.assertEqual([path.stat().st_mode & 0o777 for path in folder.glob("output*")], [0o600])

    def test_last_lines_are_those_that_began_last(self) -> None:
        out, err = (_cli.output.CHANNELS[name] for name in ("stdout", "stderr"))
        pieces = [(out, b"one\ntw"), (err, b"wrong\n"), (out, b"o\nthree"), (err, b"again")]
        for count, wanted in [
            (0, []),
            (1, [(err, b"again")]),
            (2, [(out, b"three"), (err, b"again")]),
            (3, [(err, b"wrong\n"), (out, b"o\nthree"), (err, b"again")]),
            (4, [(out, b"tw"), (err, b"wrong\n"), (out, b"o\nthree"), (err, b"again")]),
            (5, pieces),
            (6, pieces),
        ]:
            self.assertEqual(_cli.output.last_lines(pieces, count), wanted, count)

    def test_output_that_nobody_follows_is_kept_to_a_bound_and_ends_where_the_program_is(self) -> None:
        self.leave("sh", "-c", "i=0; while [ $i -lt 400 ]; do i=$((i + 1)); printf '%09999d\\n' $i; done; touch /tmp/said; sleep 60")
        self.assertTrue(eventually(lambda: microvm("exec", self.id, "ls", "/tmp/said").returncode == 0, 60.0))
        folder = Path(microvm("inspect", "--format", "{socket_path}", self.id).stdout.strip()).parent
        self.assertTrue(eventually(lambda: microvm("logs", self.id).stdout.endswith("0400\n"), 30.0))
        sizes = [path.stat().st_size for path in folder.glob("output*")]
        self.assertEqual((len(sizes), max(sizes) <= MIB), (2, True), sizes)
        # Nothing in between is missing.
        numbers = [int(line[-6:]) for line in microvm("logs", self.id).stdout.splitlines()[1:]]
        self.assertEqual(numbers, list(range(numbers[0], 401)))
        self.assertGreater(len(numbers), 100)

    def test_logs_follow_to_the_end_of_the_vm(self) -> None:
        self.leave("sh", "-c", "echo first; while [ ! -e /tmp/end ]; do sleep 0.1; done; seq 1 1000; echo last")
        with started("logs", "-f", self.id, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
            assert following.stdout is not None and following.stderr is not None
            self.assertEqual(following.stdout.readline(), b"first\n")
            self.assertEqual(microvm("exec", self.id, "touch", "/tmp/end").returncode, 0)
            numbers = "".join("{}\n".format(number) for number in range(1, 1001)).encode()
            self.assertTrue(following.stdout.read() == numbers + b"last\n")
            self.assertEqual((following.wait(TIMEOUT_S), following.stderr.read()), (0, b""))

    def test_logs_of_an_owner_that_stands_still_or_is_killed(self) -> None:
        pid = self.leave("sh", "-c", "echo words; sleep 60")
        self.assertTrue(eventually(lambda: microvm("logs", self.id).stdout == "words\n", 10.0))
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(lambda: alive(pid) and os.kill(pid, signal.SIGKILL))
        self.assertEqual(microvm("logs", self.id).stdout, "words\n")
        with started("logs", "-f", self.id, stdout=subprocess.PIPE) as following:
            assert following.stdout is not None
            self.assertEqual(following.stdout.readline(), b"words\n")
            os.kill(pid, signal.SIGKILL)
            self.assertEqual(following.wait(TIMEOUT_S), 0)
        self.assertTrue(self.ends(pid))
        self.assertEqual(microvm("logs", self.id).returncode, 1)

    def test_logs_of_a_vm_without_a_program_say_how_there_are_some(self) -> None:
        self.leave()
        done = microvm("logs", self.id)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Amicrovm: [^\n]*{}[^\n]*microvm run -d PROGRAM[^\n]*\n\Z".format(self.id))

    def test_clone_is_another_vm_with_the_programs_and_files_of_the_first(self) -> None:
        self.leave()
        other = self.id + "-clone"
        self.addCleanup(microvm, "rm", other)
        self.assertEqual(microvm("exec", self.id, "sh", "-c", "echo kept > /tmp/it").returncode, 0)
        before = json.loads(microvm("templates", "--json").stdout)
        done = microvm("clone", self.id, other)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, other + "\n", ""))
        self.assertEqual(microvm("exec", self.id, "rm", "/tmp/it").returncode, 0)
        self.assertEqual(microvm("exec", other, "cat", "/tmp/it").stdout, "kept\n")
        self.assertEqual(json.loads(microvm("templates", "--json").stdout), before)
        taken = microvm("clone", self.id, other)
        self.assertEqual((taken.returncode, taken.stdout), (1, ""))
        self.assertIn("taken", taken.stderr)
        self.assertEqual(json.loads(microvm("templates", "--json").stdout), before)

    def test_ports_of_a_program_lead_to_it(self) -> None:
        done = microvm(*SMALL, "-d", "--name", self.id, "-p", "8000", "-p", "127.0.0.2::8000", "httpd", "-f", "-p", "8000", "-h", "/etc")
        self.assertEqual((done.returncode, done.stdout), (0, self.id + "\n"))
        places = re.findall(r"microvm: (\S+):(\d+) leads to port 8000 of the VM\n", done.stderr)
        self.assertEqual([address for address, _ in places], ["127.0.0.1", "127.0.0.2"])
        self.assertEqual(microvm("port", self.id, "8000").stdout.split(), [":".join(place) for place in places])
        for place in places:
            url = "http://{}:{}/hostname".format(*place)
            self.assertTrue(eventually(lambda: _read(url) == (self.id + "\n").encode(), 30.0))

    def test_a_port_that_is_taken_keeps_the_program_from_running(self) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen(1)
            taken = other.getsockname()[1]
            done = microvm(*SMALL, "-p", "{}:80".format(taken), "echo", "ran")
        self.assertEqual((done.returncode, done.stdout), (125, ""))
        self.assertRegex(done.stderr, r"\Amicrovm: 127\.0\.0\.1:{} [^\n]*another program listens there[^\n]*\n\Z".format(taken))

    def test_program_that_cannot_run_leaves_nothing(self) -> None:
        done = microvm(*SMALL, "-d", "--name", self.id, "no-such-program")
        self.assertEqual((done.returncode, done.stdout), (125, ""))
        self.assertRegex(done.stderr, r"\Amicrovm: [^\n]*no-such-program[^\n]*\n\Z")
        self.assertTrue(eventually(lambda: self.id not in microvm("ps", "-q", "-a").stdout, 30.0))

    def test_suspended_vm_comes_back_with_another_owner(self) -> None:
        pid = self.leave()
        self.assertEqual(microvm("exec", self.id, "sh", "-c", "echo kept > /tmp/it").returncode, 0)
        self.assertEqual(microvm("suspend", self.id).returncode, 0)
        self.assertTrue(self.ends(pid))
        done = microvm("resume", self.id)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, self.id + "\n", ""))
        self.assertEqual(microvm("exec", self.id, "cat", "/tmp/it").stdout, "kept\n")

    def test_owner_that_is_terminated_destroys_its_vm(self) -> None:
        pid = self.leave()
        os.kill(pid, signal.SIGTERM)
        self.assertTrue(self.ends(pid))
        self.assertNotIn(self.id, microvm("ps", "-q", "-a").stdout)

    def test_control_c_before_it_runs_leaves_nothing(self) -> None:
        with started(*SMALL, "-d", "--name", self.id, stderr=subprocess.PIPE) as process:
            self.assertTrue(eventually(lambda: self.id in microvm("ps", "-q", "-a").stdout, 60.0))
            process.send_signal(signal.SIGINT)
            # It may have come too late.
            if process.wait(TIMEOUT_S) == 0:
                return
            self.assertEqual(process.returncode, 130)
        self.assertTrue(eventually(lambda: self.id not in microvm("ps", "-q", "-a").stdout, 30.0))

    def test_control_c_once_it_runs_comes_too_late(self) -> None:
        with started(*SMALL, "-d", "--name", self.id, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            self.assertEqual(process.stdout.readline(), self.id.encode() + b"\n")
            process.send_signal(signal.SIGINT)
            self.assertEqual((process.wait(TIMEOUT_S), process.stderr.read()), (0, b""))
        self.assertEqual(microvm("exec", self.id, "echo", "hello").stdout, "hello\n")

    def test_vm_is_cloned_from_a_snapshot(self) -> None:
        self.leave("--label", "a=b")
        name = self.id + "-snapshot"
        self.addCleanup(lambda: MicroVMIsolationManager().delete_template(name))
        self.assertEqual(microvm("exec", self.id, "sh", "-c", "echo kept > /tmp/it").returncode, 0)
        self.assertEqual(microvm("snapshot", self.id, name).returncode, 0)
        self.assertEqual(microvm("run", "--template", name, "cat", "/tmp/it").stdout, "kept\n")
        other = microvm("run", "-m", "256m", "--template", name, "true")
        self.assertEqual(other.returncode, 125)
        self.assertIn("memory_mb", other.stderr)


class Templates(unittest.TestCase):
    def test_snapshots_are_listed_as_a_table_and_as_json(self) -> None:
        name = "cli-{}".format(os.getpid())
        with MicroVMIsolationManager({"raise_on_error": True}) as manager, manager.run_vm(resource_limits=limits()) as vm:
            vm.instance.snapshot(name)
            self.addCleanup(lambda: MicroVMIsolationManager().delete_template(name))
            said = microvm("templates").stdout
            self.assertRegex(said, r"\ANAME +STATE +BACKEND +SIZE +CREATED\n")
            self.assertRegex(said, r"\n{} +usable +qemu +[\d.]+ MiB +\d{{4}}-\d\d-\d\d \d\d:\d\d\n".format(name))
            self.assertIn('"name": "{}"'.format(name), microvm("templates", "--json").stdout)


class Space(unittest.TestCase):
    def setUp(self) -> None:
        self.name = "cli-space-{}".format(os.getpid())
        with MicroVMIsolationManager({"raise_on_error": True}) as manager, manager.run_vm(resource_limits=limits()) as vm:
            vm.instance.snapshot(self.name)
        self.addCleanup(lambda: MicroVMIsolationManager().delete_template(self.name))

    def names(self) -> List[str]:
        return [one["name"] for one in MicroVMIsolationManager().list_templates()]

    def test_df_has_a_row_for_each_folder_of_the_cache(self) -> None:
        self.assertRegex(microvm("df").stdout, r"\ATYPE +COUNT +SIZE\n(?s:.*)\nsnapshots +[1-9]\d* +\d+\.\d MiB\n")
        rows = {row["type"]: row for row in json.loads(microvm("df", "--json").stdout)}
        taken = sum(one["disk_bytes"] for one in MicroVMIsolationManager().list_templates())
        self.assertEqual((rows["snapshots"]["count"], rows["snapshots"]["bytes"]), (len(self.names()), taken))
        self.assertTrue({"disks", "templates"} <= set(rows), rows)

    def test_prune_leaves_what_is_of_use_unless_all_is_asked_for(self) -> None:
        done = microvm("prune", stdin=subprocess.DEVNULL)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        done = microvm("prune", "--all", stdin=subprocess.DEVNULL)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("give -f", done.stderr)
        self.assertIn(self.name, self.names())
        self.assertIn(self.name, microvm("prune", "--all", "-f").stdout.splitlines())
        self.assertNotIn(self.name, self.names())

    def test_prune_takes_a_snapshot_that_is_damaged_and_no_stranger_file(self) -> None:
        cache = Path(doctor()["cache_dir"])
        (cache / "snapshots" / self.name / "manifest").write_bytes(b"no manifest")
        stranger = cache / "snapshots" / "a-file-of-somebody"
        stranger.write_text("")
        self.addCleanup(stranger.unlink)
        self.assertEqual(microvm("prune", "-f").stdout, self.name + "\n")
        self.assertTrue(stranger.exists())

    def test_prune_asks_on_a_terminal(self) -> None:
        for answer, is_gone in ((b"n\n", False), (b"\x04", False), (b"y\n", True)):
            master, slave = pty.openpty()
            self.addCleanup(os.close, master)
            with started("prune", "-a", stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                assert process.stdout is not None
                os.write(master, answer)
                said = process.stdout.read().decode()
                self.assertEqual(process.wait(TIMEOUT_S), 0 if is_gone else 1)
            os.close(slave)
            self.assertRegex(said, r"\A\d+\.\d MiB in snapshots: (.*, )?{}(,.*)?\nDelete them\? \[y/N\] ".format(self.name))
            self.assertEqual(self.name not in self.names(), is_gone)

    def test_prune_removes_what_a_killed_process_left(self) -> None:
        script = "import time; from {} import *; m = MicroVMIsolationManager(); m.start(); v = m.run_vm(); print(v.vm_id, flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", script.format(IMPORT)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            vm_id = process.stdout.readline().decode().strip()
            for pid in descendants(process.pid):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    # Who would remove it at once.
                    if Path("/proc/{}/comm".format(pid)).read_text().startswith("microvm-janitor"):
                        os.kill(pid, signal.SIGKILL)
            process.kill()
        self.assertIn(vm_id, microvm("ps", "-aq").stdout)
        self.assertEqual(microvm("prune", "-f").returncode, 0)
        self.assertNotIn(vm_id, microvm("ps", "-aq").stdout)


class Pages(unittest.TestCase):
    def lines(self) -> List[Tuple[str, str]]:
        """Each command line of the page and of README, and what it is said to print."""
        text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "cli.md").read_text()
        blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        return [(found[0], found[1]) for block in blocks for found in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)]

    def test_every_line_of_a_page_prints_what_it_says(self) -> None:
        self.assertGreater(len(self.lines()), 9)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "microvm"
            script.write_text("#!/bin/sh\nexec {} \"$@\"\n".format(" ".join(MICROVM)))
            script.chmod(0o755)
            for line, said in self.lines():
                with self.subTest(line):
                    done = subprocess.run(
                        ["bash", "-c", line],
                        env=dict(os.environ, PATH="{}:{}".format(folder, os.environ["PATH"])),
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        universal_newlines=True,
                        timeout=TIMEOUT_S,
                    )
                    self.assertEqual(done.stdout, said)


if __name__ == "__main__":
    unittest.main()
