"""``run_vm`` and its ``VM``: programs as ``subprocess`` runs them, files as ``pathlib`` reads them."""

import contextlib
import hashlib
import io
import pickle
import subprocess
import sys
import time
import unittest

from thirstys_waterfall.security.microvm_isolation import (
    VM,
    CommandError,
    CompletedProgram,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MicroVMError,
    ProgramFailedError,
    ProgramTimeoutError,
    QuotaExceededError,
    VMState,
    VmStateError,
)

from ..support import VMTestCase, eventually, limits

MIB = 1 << 20


class Case(VMTestCase):
    # The methods of `VM` raise without it.
    config = {"raise_on_error": False}

    def setUp(self) -> None:
        super().setUp()
        self.vm = self.manager.run_vm(resource_limits=limits())


class Life(VMTestCase):
    def test_with_block_is_the_life_of_the_vm(self) -> None:
        with self.manager.run_vm("plugin", limits(), vm_id="one", labels={"a": "b"}) as vm:
            self.assertIsInstance(vm, VM)
            self.assertEqual((vm.vm_id, repr(vm)), ("one", "<VM one running>"))
            self.assertIs(vm.instance, self.manager.get_vm("one"))
            self.assertEqual(vm.instance.get_info()["labels"], {"a": "b"})
        self.assertEqual(self.manager.list_vms(), [])
        self.assertEqual(vm.instance.get_state(), VMState.DESTROYED)

    def test_vm_is_destroyed_when_the_block_fails(self) -> None:
        with self.assertRaises(KeyError), self.manager.run_vm(resource_limits=limits()):
            raise KeyError
        self.assertEqual(self.manager.list_vms(), [])

    def test_destroy_twice_or_after_the_manager_did_is_no_error(self) -> None:
        vm = self.manager.run_vm(resource_limits=limits())
        vm.destroy()
        vm.destroy()
        with self.manager.run_vm(resource_limits=limits()) as vm:
            self.manager.destroy_all_vms()

    def test_failures_are_raised_and_leave_nothing_though_the_manager_does_not_raise(self) -> None:
        with self.assertRaises(QuotaExceededError):
            self.manager.run_vm(resource_limits=limits(memory_mb=1 << 20))
        with self.assertRaises(ImageError):
            self.manager.run_vm(resource_limits=limits(), kernel_path=sys.executable)
        self.assertEqual(self.manager.list_vms(), [])

    def test_suspended_in_its_block_it_is_destroyed_with_its_state(self) -> None:
        with self.manager.run_vm(resource_limits=limits()) as vm:
            self.assertTrue(vm.instance.suspend(), vm.instance.last_error)
        self.assertNotIn(vm.vm_id, [one["vm_id"] for one in self.manager.list_suspended()])


class Programs(Case):
    def test_run_answers_as_subprocess_does_with_the_same_arguments(self) -> None:
        cases = [
            (["sh", "-c", "echo out; echo err >&2; exit 3"], {}),
            (["cat"], {"input": "text \u00e9\n"}),
            ("printf '%s' \"$A\"; pwd", {"shell": True, "env": {"A": "1 2"}, "cwd": "/tmp"}),
            ("kill -TERM $$", {"shell": True}),
            ("true", {}),
        ]
        for args, more in cases:
            with self.subTest(args):
                ours = self.vm.run(args, **more)  # type: ignore[call-overload]
                theirs = subprocess.run(args, capture_output=True, text=True, **more)  # type: ignore[call-overload]
                self.assertEqual(vars(ours), vars(theirs))

    def test_text_is_decoded_and_bytes_are_whole(self) -> None:
        self.assertEqual(self.vm.run(["printf", r"a\377b"]).stdout, "a\ufffdb")
        every = bytes(range(256))
        self.assertEqual(self.vm.run(["cat"], input=every, text=False), CompletedProgram(["cat"], 0, every, b""))

    def test_many_megabytes_pass_both_ways_and_through_both_pipes(self) -> None:
        block = hashlib.sha256(b"seed").digest() * (MIB // 32)
        done = self.vm.run("tee /dev/stderr", shell=True, input=block * 20, text=False)
        self.assertEqual((done.returncode, len(done.stdout), len(done.stderr)), (0, 20 * MIB, 20 * MIB))
        self.assertTrue(done.stdout == done.stderr == block * 20)

    def test_program_that_does_not_read_its_input_ends_well(self) -> None:
        self.assertEqual(self.vm.run(["true"], input=b"x" * (4 * MIB)).returncode, 0)

    def test_without_input_it_reads_nothing(self) -> None:
        self.assertEqual(self.vm.run(["cat"], timeout=20).stdout, "")

    def test_output_is_handed_on_while_the_program_runs(self) -> None:
        heard = []

        def hear(channel: str, text: str) -> None:
            heard.append((channel, text))
            self.vm.write_text("/tmp/heard", "")

        # It ends only when somebody has heard it.
        script = "printf 'caf\\303'; sleep 0.2; printf '\\251\\n'; while [ ! -e /tmp/heard ]; do sleep 0.1; done; echo end >&2; printf '\\303'"
        done = self.vm.run(script, shell=True, timeout=60, on_output=hear)
        self.assertEqual((done.stdout, done.stderr), ("caf\u00e9\n\ufffd", "end\n"))
        for channel in ("stdout", "stderr"):
            self.assertEqual("".join(text for name, text in heard if name == channel), getattr(done, channel))
        pieces = []
        self.vm.run(["printf", "a\\377b"], text=False, on_output=lambda channel, data: pieces.append(data))
        self.assertEqual(b"".join(pieces), b"a\xffb")

    def test_function_that_fails_on_output_ends_the_program(self) -> None:
        def fail(channel: str, text: str) -> None:
            raise KeyError(text)

        with self.assertRaises(KeyError):
            self.vm.run("echo begun; sleep 61", shell=True, on_output=fail)
        self.assertTrue(eventually(lambda: "sleep 61" not in self.vm.run(["ps", "-o", "args"]).stdout))
        with self.assertRaisesRegex(InvalidTypeError, "on_output"):
            self.vm.run(["true"], on_output=3)  # type: ignore[call-overload]

    def test_check_raises_what_subprocess_raises(self) -> None:
        with self.assertRaises(ProgramFailedError) as caught:
            self.vm.run("echo out; echo err >&2; exit 3", shell=True, check=True)
        error = caught.exception
        self.assertIsInstance(error, subprocess.CalledProcessError)
        self.assertIsInstance(error, MicroVMError)
        self.assertEqual((error.returncode, error.stdout, error.stderr, error.code), (3, "out\n", "err\n", "program_failed"))
        self.assertIn("non-zero exit status 3", str(error))
        again = pickle.loads(pickle.dumps(error))
        self.assertEqual((str(again), vars(again)), (str(error), vars(error)))

    def test_timeout_kills_the_program_and_tells_what_it_wrote(self) -> None:
        for line in ("echo begun; sleep 60", "echo begun; exec yes"):
            with self.subTest(line):
                begun = time.monotonic()
                with self.assertRaises(ProgramTimeoutError) as caught:
                    self.vm.run(line, shell=True, timeout=1)
                self.assertLess(time.monotonic() - begun, 20)
                error = caught.exception
                self.assertIsInstance(error, subprocess.TimeoutExpired)
                self.assertEqual((error.stdout[:6], error.timeout, error.code), ("begun\n", 1, "program_timeout"))
                again = pickle.loads(pickle.dumps(error))
                self.assertEqual((str(again), vars(again)), (str(error), vars(error)))
        self.assertEqual(self.vm.run("pgrep sleep || pgrep yes", shell=True).stdout, "")

    def test_output_that_is_not_captured_goes_to_sys_stdout_and_stderr(self) -> None:
        out, err = io.StringIO(), io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            done = self.vm.run("printf '\\303'; printf '\\251'; printf '\\377' >&2", shell=True, capture_output=False)
        self.assertEqual((done.stdout, done.stderr), ("", ""))
        self.assertEqual(out.getvalue(), "\u00e9")
        self.assertEqual(err.buffer.getvalue(), b"\xff")  # type: ignore[attr-defined]

    def test_user_and_folder_and_variables_are_the_programs(self) -> None:
        done = self.vm.run("id -u; pwd; echo $A", shell=True, user=1000, cwd="/data", env={"A": "b"})
        self.assertEqual(done.stdout, "1000\n/data\nb\n")

    def test_one_string_with_arguments_gets_a_hint(self) -> None:
        with self.assertRaises(InvalidValueError) as caught:
            self.vm.run("ls -la '/a b'")
        self.assertIsInstance(caught.exception, ValueError)
        self.assertIn("['ls', '-la', '/a b']", str(caught.exception))
        self.assertIn("shell=True", str(caught.exception))

    def test_arguments_of_the_wrong_type_or_range_are_refused(self) -> None:
        for args, more, error in [
            ([], {}, InvalidValueError),
            (3, {}, InvalidTypeError),
            ([b"ls"], {}, InvalidTypeError),
            (["ls"], {"shell": True}, InvalidTypeError),
            ("ls", {"timeout": 0}, InvalidValueError),
            ("ls", {"timeout": "1"}, InvalidTypeError),
            ("ls", {"user": -1}, InvalidValueError),
        ]:
            with self.subTest(args=args, more=more), self.assertRaises(error):
                self.vm.run(args, **more)  # type: ignore[call-overload]

    def test_missing_program_and_stopped_vm_are_typed_errors(self) -> None:
        with self.assertRaises(CommandError) as caught:
            self.vm.run(["no-such-program"])
        self.assertEqual(caught.exception.code, "program_not_found")
        self.vm.instance.stop()
        with self.assertRaises(VmStateError):
            self.vm.run(["true"])

    def test_popen_and_exec_are_live_programs(self) -> None:
        with self.vm.popen(["cat"]) as program:
            program.write(b"\0\xff")
            self.assertEqual(next(program), ("stdout", b"\0\xff"))
            program.close_stdin()
            self.assertEqual(program.wait(), 0)
        with self.vm.popen("stty size", shell=True, pty=True, rows=10, columns=20) as program:
            self.assertEqual(b"".join(data for _, data in program), b"10 20\r\n")
        with self.vm.exec("sh", "-c", "exit 4") as program:
            self.assertEqual(program.wait(), 4)


class Files(Case):
    def test_bytes_and_texts_make_the_round_trip(self) -> None:
        for data in (b"", bytes(range(256)), b"x" * (3 * MIB)):
            self.vm.write_bytes("/data/file", data)
            self.assertTrue(self.vm.read_bytes("/data/file") == data)
        self.vm.write_text("/data/text", "caf\u00e9\r\n", mode=0o600)
        self.assertEqual(self.vm.read_text("/data/text"), "caf\u00e9\r\n")
        self.assertEqual(self.vm.run(["stat", "-c", "%a", "/data/text"]).stdout, "600\n")

    def test_failures_are_raised(self) -> None:
        with self.assertRaises(CommandError) as caught:
            self.vm.read_bytes("/no/such")
        self.assertEqual(caught.exception.code, "file_not_found")
        with self.assertRaises(InvalidTypeError):
            self.vm.write_bytes("/data/a", "text")  # type: ignore[arg-type]
        with self.assertRaises(InvalidTypeError):
            self.vm.write_text("/data/a", b"bytes")  # type: ignore[arg-type]
        self.vm.write_bytes("/data/a", b"\xff")
        with self.assertRaises(UnicodeDecodeError):
            self.vm.read_text("/data/a")


if __name__ == "__main__":
    unittest.main()
