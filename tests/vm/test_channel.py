"""Streams, files and the broker on real VMs."""

import io
import json
import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from thirstys_waterfall.security.microvm_isolation import (
    ChannelError,
    CommandError,
    InvalidStateError,
    MicroVMError,
    VMState,
)

from ..support import ROOT, VMTestCase, eventually, limits, shell

SH = "/bin/sh"


def said(stream: Any) -> Tuple[bytes, bytes]:
    """Everything that a program says, by channel."""
    heard: Dict[str, bytes] = {"stdout": b"", "stderr": b""}
    for channel, data in stream:
        heard[channel] += data
    return heard["stdout"], heard["stderr"]


def rss_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


class Streams(VMTestCase):
    def test_stream_output_input_and_exit_code_are_the_programs(self) -> None:
        vm = self.running()
        script = "echo to $A $(pwd); echo err >&2; cat; exit 3"
        with vm.stream(SH, ["-c", script], env={"A": "b"}, cwd="/tmp", stdin=b"\0in\xff") as stream:
            self.assertIsNone(stream.exit_code)
            self.assertEqual(said(stream), (b"to b /tmp\n\0in\xff", b"err\n"))
            self.assertEqual(stream.exit_code, 3)
        self.assertEqual(vm.stream("id", ["-u"], uid=1000, on_output=None).wait(), 0)

    def test_stream_output_comes_while_the_program_runs(self) -> None:
        stream = self.running().stream("cat")
        for text in (b"one", b"two"):
            self.assertTrue(stream.write(text))
            self.assertEqual(next(stream), ("stdout", text))
        stream.close_stdin()
        self.assertEqual((list(stream), stream.exit_code), ([], 0))
        self.assertFalse(stream.write(b"nobody reads"))

    def test_stream_that_does_not_start_raises_at_once(self) -> None:
        vm = self.running()
        for program, options, code in [
            ("no-such-program", {}, "program_not_found"),
            ("/etc/passwd", {}, "permission_denied"),
            ("ls", {"cwd": "/none"}, "bad_params"),
            ("ls", {"rows": 10}, "bad_params"),
            ("ls", {"env": {"A=": ""}}, "bad_params"),
        ]:
            with self.subTest(program, **options), self.assertRaises(CommandError) as caught:
                vm.stream(program, **options)
            self.assertEqual((caught.exception.code, vm.last_error.code), (code, code))

    def test_stream_signal_reaches_the_program_and_its_end_is_told(self) -> None:
        vm = self.running()
        stream = vm.stream(SH, ["-c", "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done"])
        self.assertEqual(next(stream), ("stdout", b"ready\n"))
        stream.signal(signal.SIGTERM)
        self.assertIn(b"caught\n", said(stream)[0])
        self.assertEqual(stream.exit_code, 9)
        stream = vm.stream("sleep", ["1000"])
        stream.signal(signal.SIGKILL)
        self.assertEqual((stream.wait(10), stream.exit_code), (-9, -9))

    def test_stream_on_a_terminal_has_its_size_and_ends_by_control_d(self) -> None:
        vm = self.running()
        stream = vm.stream(SH, ["-c", "tty; stty size; read x; stty size; cat"], pty=True, rows=10, columns=20)
        heard = next(stream)[1]
        while b"10 20" not in heard:
            heard += next(stream)[1]
        self.assertIn(b"/dev/pts/", heard)
        stream.resize(33, 44)
        stream.write(b"\n")
        stream.close_stdin()
        self.assertIn(b"33 44", said(stream)[0])
        self.assertEqual(stream.exit_code, 0)

    def test_stream_terminal_is_the_controlling_one_of_a_plain_user(self) -> None:
        stream = self.running().stream(SH, ["-c", "echo x >/dev/tty; sleep 1000"], pty=True, uid=1000)
        self.assertEqual(next(stream), ("stdout", b"x\r\n"))
        stream.write(b"\x03")
        self.assertEqual(stream.wait(10), -signal.SIGINT)

    def test_programs_have_no_descriptor_of_anothers_terminal(self) -> None:
        vm = self.running()
        descriptors = "for fd in /proc/self/fd/*; do readlink $fd; done"
        with vm.stream(SH, ["-c", "echo up; sleep 1000"], pty=True) as terminal:
            next(terminal)
            beside = self.result(vm, "exec", dict(shell(descriptors), uid=1000))["stdout"]
            within = said(vm.stream(SH, ["-c", descriptors], pty=True))[0].decode()
        self.assertIn("pipe:", beside)
        self.assertIn("/dev/pts/", within)
        self.assertNotIn("pt", beside)
        self.assertNotIn("ptmx", within)

    def test_stream_left_is_killed_with_all_its_descendants(self) -> None:
        vm = self.running()
        with vm.stream(SH, ["-c", "setsid sleep 98765 & sleep 98765 & echo up; sleep 98765"]) as stream:
            next(stream)
        self.assertEqual((stream.wait(10), stream.exit_code, list(stream)), (-9, -9, []))
        count = lambda: self.result(vm, "exec", shell("ps -o args | grep -c 'sleep 9876[5]'"))["stdout"].strip()
        self.assertTrue(eventually(lambda: count() == "0"), count())

    def test_stream_dropped_is_killed(self) -> None:
        vm = self.running()
        stream = vm.stream("sleep", ["98765"])
        del stream
        count = lambda: self.result(vm, "exec", shell("ps -o args | grep -c 'sleep 9876[5]'"))["stdout"].strip()
        self.assertTrue(eventually(lambda: count() == "0"), count())

    def test_stream_timeout_kills_and_is_told(self) -> None:
        stream = self.running().stream("sleep", ["1000"], timeout=0.3)
        with self.assertRaises(CommandError) as caught:
            list(stream)
        self.assertEqual((caught.exception.code, stream.exit_code, stream.wait(10), list(stream)), ("timeout", -9, -9, []))

    def test_stream_killed_has_the_code_of_sigkill_unless_it_had_ended(self) -> None:
        vm = self.running()
        stream = vm.stream("sleep", ["1000"])
        stream.kill()
        stream.kill()
        self.assertEqual((stream.exit_code, stream.wait(10)), (-9, -9))
        stream = vm.stream(SH, ["-c", "echo left; exit 7"])
        gone = lambda: self.result(vm, "exec", shell("test -e /proc/{} || echo gone".format(stream.pid)))["stdout"]
        self.assertTrue(eventually(gone))
        # The guest's word of it is on its way.
        time.sleep(2.0)
        stream.kill()
        self.assertEqual(stream.wait(10), 7)

    def test_stream_signals_without_a_name_arrive(self) -> None:
        vm = self.running()
        for number in (31, 32, 34, 64):
            with self.subTest(number):
                stream = vm.stream("sleep", ["1000"])
                stream.signal(number)
                self.assertEqual(stream.wait(20), -number)
                # A program that signals itself is reported the same way.
                ended = self.result(vm, "exec", shell("kill -{} $$".format(number)))
                self.assertEqual((ended["exit_code"], ended["signal"]), (None, number))
        stream = vm.stream(SH, ["-c", "trap 'exit 5' 34; echo up; while :; do sleep 0.05; done"])
        next(stream)
        stream.signal(34)
        self.assertEqual(stream.wait(20), 5)

    def test_stream_wait_gives_up_and_can_be_tried_again(self) -> None:
        stream = self.running().stream("cat")
        with self.assertRaises(ChannelError) as caught:
            stream.wait(timeout=0.1)
        self.assertEqual(caught.exception.code, "channel_timeout")
        stream.close_stdin()
        self.assertEqual(stream.wait(timeout=10), 0)

    def test_stream_wait_keeps_its_time_while_output_flows(self) -> None:
        vm = self.running()
        for on_output in (None, lambda channel, data: None):
            with self.subTest(on_output), vm.stream("yes", on_output=on_output) as stream:
                begun = time.monotonic()
                with self.assertRaises(ChannelError) as caught:
                    stream.wait(timeout=0.3)
                self.assertEqual(caught.exception.code, "channel_timeout")
                self.assertLess(time.monotonic() - begun, 10.0)

    def test_stream_wait_of_no_time_returns_the_code_of_a_program_that_has_ended(self) -> None:
        vm = self.running()
        stream = vm.stream(SH, ["-c", "echo a; echo b >&2; exit 7"])
        self.assertTrue(eventually(lambda: self.result(vm, "exec", shell("test -e /proc/{} || echo gone".format(stream.pid)))["stdout"]))

        def code() -> Optional[int]:
            try:
                return stream.wait(timeout=0)
            except ChannelError:
                # The guest's word of it is on its way.
                return None

        self.assertEqual(eventually(code), 7)

    def test_communicate_gives_all_input_and_takes_all_output_at_once(self) -> None:
        vm = self.running()
        data = bytes(range(256)) * 4096
        with vm.stream("cat") as program:
            self.assertEqual(program.communicate(data, timeout=60), (data, b""))
            self.assertEqual(program.exit_code, 0)
        with vm.stream(SH, ["-c", "cat; echo err >&2"]) as program:
            self.assertEqual(program.communicate("caf\u00e9", text=True), ("caf\u00e9", "err\n"))
        with vm.stream(SH, ["-c", "echo first; sleep 1; echo second"]) as program:
            with self.assertRaises(ChannelError):
                program.communicate(timeout=0.3)
            self.assertEqual(program.communicate(), (b"first\nsecond\n", b""))

    def test_text_is_whole_however_its_bytes_were_cut(self) -> None:
        script = r"printf '\303'; sleep 0.2; printf '\251\377'; sleep 0.2; printf '\342\202'"
        with self.running().stream(SH, ["-c", script]) as program:
            texts = list(program.text())
        self.assertEqual("".join(text for _, text in texts), "\u00e9\ufffd\ufffd")

    def test_stream_callback_hears_everything_on_the_waiting_thread(self) -> None:
        heard: List[Tuple[str, bytes, int]] = []
        on_output = lambda channel, data: heard.append((channel, data, threading.get_ident()))
        self.assertEqual(self.running().stream("echo", ["x"], on_output=on_output).wait(), 0)
        self.assertEqual(heard, [("stdout", b"x\n", threading.get_ident())])

    def test_stream_callback_that_raises_ends_the_wait(self) -> None:
        stream = self.running().stream("yes", on_output=lambda *_: 1 // 0)
        with self.assertRaises(ZeroDivisionError):
            stream.wait()
        stream.kill()

    def test_stream_slow_reader_stops_the_program_and_nobody_else(self) -> None:
        vm = self.running()
        stream = vm.stream("yes")
        next(stream)
        ticks = lambda: self.result(vm, "exec", shell("cut -d' ' -f14 /proc/{}/stat".format(stream.pid)))["stdout"]
        # It fills one window and a pipe, and then stands still.
        self.assertTrue(eventually(lambda: ticks() == ticks() and ticks() == ticks()))
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(all(len(next(stream)[1]) > 0 for _ in range(100)))
        stream.kill()

    def test_stream_of_many_bytes_arrives_whole_within_constant_memory(self) -> None:
        mib = int(os.environ.get("MICROVM_STREAM_MIB", "128"))
        vm = self.running()
        self.assertEqual(vm.stream("true").wait(), 0)
        before, most, total, checksum = rss_mib(), 0, 0, 0
        stream = vm.stream("dd", ["if=/dev/zero", "bs=64k", "count={}".format(mib * 16)])
        for channel, data in stream:
            if channel == "stdout":
                total += len(data)
                checksum |= data.count(0) ^ len(data)
                most = max(most, rss_mib())
        self.assertEqual((total, checksum, stream.exit_code), (mib << 20, 0, 0))
        self.assertLessEqual(most - before, 32)

    def test_streams_beside_each_other_keep_apart(self) -> None:
        vm = self.running()
        streams = [vm.stream(SH, ["-c", "for i in $(seq 2000); do echo {}; done".format(n)]) for n in range(12)]
        heard: "queue.Queue[Tuple[int, bytes]]" = queue.Queue()
        threads = [threading.Thread(target=lambda n=n, s=s: heard.put((n, said(s)[0]))) for n, s in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, output in (heard.get_nowait() for _ in streams):
            self.assertEqual(output, b"%d\n" % number * 2000)

    def test_stream_is_told_what_became_of_its_vm(self) -> None:
        vm = self.running()
        stream = vm.stream("cat")
        os.kill(vm.get_info()["pid"], signal.SIGKILL)
        with self.assertRaises(MicroVMError) as caught:
            next(stream)
        self.assertEqual(caught.exception.code, "vm_died")
        self.assertTrue(eventually(lambda: vm.get_state() is VMState.ERROR))
        with self.assertRaises(InvalidStateError):
            vm.stream("true")

    def test_stream_of_a_paused_vm_waits_and_loses_nothing(self) -> None:
        vm = self.running()
        stream = vm.stream("cat")
        self.assertTrue(vm.pause())
        self.assertTrue(stream.write(b"while it slept"))
        with self.assertRaises(ChannelError):
            stream.wait(timeout=0.3)
        self.assertTrue(vm.resume())
        self.assertEqual(next(stream), ("stdout", b"while it slept"))

    def test_wrong_arguments_are_named(self) -> None:
        vm = self.running()
        stream = vm.stream("cat")
        for call, error, word in [
            (lambda: vm.stream(3), TypeError, "program"),
            (lambda: vm.stream("x", args=[b"x"]), TypeError, "args"),
            (lambda: vm.stream("x", timeout=0), ValueError, "timeout"),
            (lambda: vm.stream("x", stdin="text"), TypeError, "stdin"),
            (lambda: vm.stream("x", on_output=3), TypeError, "on_output"),
            (lambda: vm.stream("x", uid=-1), ValueError, "uid"),
            (lambda: vm.stream("x", uid=2**32 - 1), ValueError, "uid"),
            (lambda: vm.stream("x", pty=True, rows=0), ValueError, "rows"),
            (lambda: vm.stream("x", pty=True, columns=0), ValueError, "columns"),
            (lambda: stream.write("text"), TypeError, "data"),
            (lambda: stream.signal(0), ValueError, "number"),
            (lambda: stream.resize(0, 1), ValueError, "rows"),
            (lambda: stream.resize(10, 20), ValueError, "pty"),
            (lambda: vm.stream("x", env={"A": "\0"}), CommandError, "env: it holds a NUL"),
            (lambda: vm.stream("x", args=["a", "\0"]), CommandError, r"args\[1\]: it holds a NUL"),
            (lambda: vm.stream("x", cwd="/\0"), CommandError, "cwd: it holds a NUL"),
            (lambda: vm.upload(3, "/x"), TypeError, "source"),
            (lambda: vm.upload(io.StringIO("text"), "/tmp/x"), TypeError, "read"),
            (lambda: vm.upload(__file__, "/x", mode=0o10000), ValueError, "mode"),
            (lambda: vm.download("/x", __file__, offset=-1), ValueError, "offset"),
            (lambda: vm.download("/x", __file__, max_bytes=-1), ValueError, "max_bytes"),
            (lambda: vm.download("/x", __file__, timeout=-1), ValueError, "timeout"),
            (lambda: vm.upload(__file__, "/x", timeout="x"), TypeError, "timeout"),
        ]:
            with self.subTest(word), self.assertRaisesRegex(error, word):
                call()


class Files(VMTestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.vm = self.running(resource_limits=limits(disk_size_mb=256))

    def source(self, size: int) -> Path:
        path = self.folder / "source"
        path.write_bytes((os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size])
        return path

    def test_file_of_any_size_makes_the_round_trip(self) -> None:
        for size in (0, 1, 65_511, 65_512, 65_513, 40 << 20):
            with self.subTest(size=size):
                source, back = self.source(size), self.folder / "back"
                expected = {"bytes": size, "crc32": zlib.crc32(source.read_bytes())}
                self.assertEqual(self.vm.upload(source, "/data/f"), expected)
                self.assertEqual(self.vm.download("/data/f", back), expected)
                self.assertEqual(back.read_bytes(), source.read_bytes())
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["back", "source"])
        self.assertEqual(self.result(self.vm, "exec", shell("ls -A /data | grep -v system"))["stdout"].split(), ["f", "lost+found"])

    def test_file_objects_serve_as_well_and_progress_is_told(self) -> None:
        data, told = os.urandom(700_000), []
        self.vm.upload(io.BytesIO(data), "/data/f", mode=0o640, progress=lambda *far: told.append(far))
        self.assertEqual(told[-1], (700_000, None))
        sink = io.BytesIO()
        self.vm.download("/data/f", sink, progress=lambda *far: told.append(far))
        self.assertEqual((sink.getvalue(), told[-1]), (data, (700_000, 700_000)))
        self.assertEqual(self.result(self.vm, "exec", shell("stat -c %a /data/f"))["stdout"], "640\n")

    def test_transfer_is_resumed_where_it_stopped(self) -> None:
        data = os.urandom(1_000_000)
        source, back = self.folder / "source", self.folder / "back"
        source.write_bytes(data)
        self.vm.upload(io.BytesIO(data[:400_000]), "/data/f", offset=0)
        rest = self.vm.upload(source, "/data/f", offset=400_000)
        self.assertEqual(rest, {"bytes": 600_000, "crc32": zlib.crc32(data[400_000:])})
        back.write_bytes(data[:123_456])
        rest = self.vm.download("/data/f", back, offset=123_456)
        self.assertEqual((rest["bytes"], back.read_bytes()), (1_000_000 - 123_456, data))
        with self.assertRaises(CommandError) as caught:
            self.vm.upload(source, "/data/f", offset=2_000_000)
        self.assertEqual(caught.exception.code, "bad_params")

    def test_interrupted_upload_leaves_the_old_file_and_nothing_else(self) -> None:
        self.vm.upload(io.BytesIO(b"old"), "/data/f")

        def stop(done: int, total: Any) -> None:
            raise RuntimeError("enough")

        with self.assertRaisesRegex(RuntimeError, "enough"):
            self.vm.upload(self.source(4 << 20), "/data/f", progress=stop)
        left = lambda: self.result(self.vm, "exec", shell("cat /data/f; ls -A /data | grep -v system"))["stdout"]
        self.assertTrue(eventually(lambda: left() == "oldf\nlost+found\n"), left())
        with self.assertRaisesRegex(RuntimeError, "enough"):
            self.vm.download("/data/f", self.folder / "back", progress=stop)
        self.assertFalse((self.folder / "back").exists())

    def test_interrupted_upload_in_place_keeps_what_arrived(self) -> None:
        def stop(done: int, total: Any) -> None:
            if done >= 1 << 20:
                raise RuntimeError("enough")

        source = self.source(4 << 20)
        with self.assertRaisesRegex(RuntimeError, "enough"):
            self.vm.upload(source, "/data/f", offset=0, progress=stop)
        size = lambda: self.result(self.vm, "read_file", {"path": "/data/f", "max_bytes": 0})["size"]
        # Frames that were already sent need a moment to arrive.
        time.sleep(0.5)
        arrived = size()
        self.assertLessEqual(arrived, 2 << 20)
        self.vm.upload(source, "/data/f", offset=arrived)
        self.assertEqual(self.vm.download("/data/f", io.BytesIO())["crc32"], zlib.crc32(source.read_bytes()))

    def test_failures_have_the_guests_codes_and_leave_nothing(self) -> None:
        source = self.source(300 << 20)
        for call, code in [
            (lambda: self.vm.upload(source, "/data/f"), "no_space"),
            (lambda: self.vm.upload(source, "/data"), "io_error"),
            (lambda: self.vm.upload(source, "/none/f"), "file_not_found"),
            (lambda: self.vm.download("/none", self.folder / "back"), "file_not_found"),
            (lambda: self.vm.download("/data", self.folder / "back"), "io_error"),
            (lambda: self.vm.download("/proc/version", self.folder), "host_error"),
            (lambda: self.vm.upload(self.folder / "none", "/data/f"), "host_error"),
        ]:
            with self.subTest(code), self.assertRaises(MicroVMError) as caught:
                call()
            self.assertEqual(caught.exception.code, code)
        # The last one failed on this host.
        self.assertIsInstance(caught.exception.__cause__, FileNotFoundError)
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["source"])
        ls = lambda: self.result(self.vm, "exec", shell("ls -A /data | grep -v system"))["stdout"].split()
        self.assertTrue(eventually(lambda: ls() == ["lost+found"]), ls())

    def mode(self, path: str) -> str:
        return str(self.result(self.vm, "exec", shell("stat -c '%F %a %u' " + path))["stdout"]).strip()

    def test_new_files_get_the_modes_of_their_sources_and_old_ones_keep_theirs(self) -> None:
        script, key, back = self.folder / "script", self.folder / "key", self.folder / "back"
        script.write_text("#!/bin/sh\necho ran\n")
        script.chmod(0o755)
        key.write_text("secret")
        key.chmod(0o600)
        self.vm.upload(script, "/data/script")
        self.assertEqual(self.result(self.vm, "exec", {"program": "/data/script"})["stdout"], "ran\n")
        self.vm.upload(key, "/data/key")
        self.assertEqual(self.mode("/data/key"), "regular file 600 0")
        self.result(self.vm, "exec", shell("chown 1000 /data/key; chmod 640 /data/key"))
        self.vm.upload(script, "/data/key")
        self.assertEqual(self.mode("/data/key"), "regular file 640 1000")
        self.vm.upload(io.BytesIO(b"x"), "/data/key", mode=0o4711)
        self.assertEqual(self.mode("/data/key"), "regular file 4711 1000")
        self.vm.upload(io.BytesIO(b"x"), "/data/plain")
        self.assertEqual(self.mode("/data/plain"), "regular file 644 0")
        self.vm.download("/data/script", back)
        self.assertEqual(back.stat().st_mode & 0o777, 0o755)
        self.vm.download("/data/script", key)
        self.assertEqual((key.stat().st_mode & 0o777, key.read_text()), (0o600, script.read_text()))

    def test_links_are_followed_and_special_files_written_where_they_stand(self) -> None:
        self.result(self.vm, "exec", shell("echo old >/data/real; chmod 600 /data/real; ln -s real /data/link; mkfifo /data/fifo; cat /data/fifo >/data/got &"))
        self.vm.upload(io.BytesIO(b"new"), "/data/link")
        self.assertEqual(self.mode("/data/link"), "symbolic link 755 0")
        self.assertEqual((self.vm.download("/data/real", io.BytesIO())["bytes"], self.mode("/data/real")), (3, "regular file 600 0"))
        self.vm.upload(io.BytesIO(b"through"), "/data/fifo")
        got = lambda: self.result(self.vm, "exec", shell("cat /data/got"))["stdout"]
        self.assertTrue(eventually(lambda: got() == "through"), got())
        self.vm.upload(io.BytesIO(b"x"), "/dev/null", mode=0o600)
        self.result(self.vm, "write_file", {"path": "/dev/null", "data": "x", "mode": 0o600})
        self.assertTrue(self.mode("/dev/null").startswith("character special file 666"), self.mode("/dev/null"))
        self.result(self.vm, "exec", shell("touch /data/mounted /data/other; mount --bind /data/other /data/mounted"))
        self.vm.upload(io.BytesIO(b"in place"), "/data/mounted")
        self.assertEqual(self.result(self.vm, "read_file", {"path": "/data/other"})["data"], "in place")
        self.result(self.vm, "exec", shell("umount /data/mounted"))
        # download() treats links and FIFOs on the host in the same way.
        real, link, fifo = self.folder / "real", self.folder / "link", self.folder / "fifo"
        real.write_text("old")
        link.symlink_to("real")
        self.vm.download("/data/real", link)
        self.assertTrue(link.is_symlink() and real.read_text() == "new")
        os.mkfifo(str(fifo))
        heard: List[bytes] = []
        reader = threading.Thread(target=lambda: heard.append(fifo.read_bytes()))
        reader.start()
        self.vm.download("/data/real", fifo)
        reader.join(20)
        self.assertEqual((heard, fifo.is_fifo()), ([b"new"], True))
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["fifo", "link", "real"])
        if os.geteuid() == 0:
            device = self.folder / "null"
            os.mknod(str(device), 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            self.vm.download("/data/real", device)
            self.assertTrue(device.is_char_device())

    def test_folders_are_refused_with_the_way_out(self) -> None:
        for call in (
            lambda: self.vm.upload(self.folder, "/data/x"),
            lambda: self.vm.upload(io.BytesIO(b""), "/data"),
            lambda: self.vm.download("/data", self.folder / "x"),
        ):
            with self.assertRaisesRegex(MicroVMError, "directory.*tar"):
                call()
        with self.assertRaisesRegex(MicroVMError, "directory; give the path of a file"):
            self.vm.download("/proc/version", self.folder)

    def test_what_has_no_end_holds_nobody_and_can_be_given_up(self) -> None:
        self.result(self.vm, "exec", shell("mkfifo -m 666 /tmp/fifo", uid=1000))
        self.assertEqual(self.failure(self.vm, "read_file", {"path": "/tmp/fifo"}), "not_a_file")
        with self.assertRaises(CommandError) as refused:
            self.vm.download("/tmp/fifo", self.folder / "x")
        self.assertEqual(refused.exception.code, "not_a_file")
        self.assertIn("Linux", self.result(self.vm, "read_file", {"path": "/proc/version"})["data"])
        self.assertEqual(len(self.result(self.vm, "read_file", {"path": "/dev/urandom", "max_bytes": 100})), 4)
        self.assertIn("Linux version", self.result(self.vm, "read_file", {"path": "/proc/kmsg"})["data"])
        # Nothing is left in it to read.
        self.vm.send_command("read_file", {"path": "/proc/kmsg"}, timeout=0.3)
        terminal = self.vm.stream("sleep", ["1000"], pty=True)
        name = "/proc/{}/fd/0".format(terminal.pid)
        for _ in range(150):
            self.assertIsNone(self.vm.send_command("read_file", {"path": name}, timeout=0.02))
            self.assertEqual(self.vm.last_error.code, "channel_timeout")
        self.assertIsNone(self.vm.send_command("write_file", {"path": "/tmp/fifo", "data": "x"}, timeout=0.3))
        for call in (
            lambda: self.vm.download(name, self.folder / "x", timeout=0.5),
            lambda: self.vm.upload(io.BytesIO(b"x"), "/tmp/fifo", timeout=0.5),
        ):
            with self.assertRaises(ChannelError) as caught:
                call()
            self.assertEqual(caught.exception.code, "channel_timeout")
        self.assertEqual(self.result(self.vm, "ping"), "pong")
        terminal.kill()
        self.assertTrue(self.vm.suspend(), self.vm.last_error)
        self.assertTrue(self.vm.resume(), self.vm.last_error)
        self.assertEqual(self.result(self.vm, "ping"), "pong")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_holes_stay_holes_and_more_than_a_vm_can_hold_is_refused(self) -> None:
        self.result(self.vm, "exec", shell("truncate -s 40M /data/holes; echo end >>/data/holes; truncate -s 200G /data/huge"))
        holes = self.folder / "holes"
        done = self.vm.download("/data/holes", holes)
        self.assertEqual((done["bytes"], holes.stat().st_size), ((40 << 20) + 4, (40 << 20) + 4))
        self.assertLess(holes.stat().st_blocks * 512, 1 << 20)
        self.assertEqual(zlib.crc32(holes.read_bytes()), done["crc32"])
        self.vm.upload(holes, "/data/back")
        blocks, size = self.result(self.vm, "exec", shell("stat -c '%b %s' /data/back"))["stdout"].split()
        self.assertEqual(int(size), (40 << 20) + 4)
        self.assertLess(int(blocks) * 512, 1 << 20)
        self.assertEqual(self.vm.download("/data/back", io.BytesIO())["crc32"], done["crc32"])
        for path, options in (("/data/huge", {}), ("/data/holes", {"max_bytes": 1 << 20}), ("/dev/zero", {"max_bytes": 1 << 20})):
            with self.subTest(path), self.assertRaises(CommandError) as caught:
                self.vm.download(path, self.folder / "huge", **options)
            self.assertEqual(caught.exception.code, "too_large")
            self.assertIn("max_bytes", str(caught.exception))
        self.assertEqual([p.name for p in self.folder.iterdir()], ["holes"])

    def test_write_file_on_a_full_disk_keeps_the_old_file(self) -> None:
        self.result(self.vm, "exec", shell("echo old >/data/f; echo old >/data/log; dd if=/dev/zero of=/data/fill bs=64k 2>/dev/null; true"))
        more = {"data": "x" * (4 << 20)}
        self.assertEqual(self.failure(self.vm, "write_file", dict(more, path="/data/f")), "no_space")
        self.assertEqual(self.failure(self.vm, "write_file", dict(more, path="/data/log", append=True)), "no_space")
        self.assertEqual(self.failure(self.vm, "write_file", dict(more, path="/data/new")), "no_space")
        for path in ("/data/f", "/data/log"):
            self.assertEqual(self.result(self.vm, "read_file", {"path": path})["data"], "old\n")
        self.assertEqual(self.result(self.vm, "exec", shell("ls -A /data | grep -v system"))["stdout"].split(), ["f", "fill", "log", "lost+found"])
        self.result(self.vm, "write_file", {"path": "/proc/sys/vm/swappiness", "data": "37"})
        self.assertEqual(self.result(self.vm, "read_file", {"path": "/proc/sys/vm/swappiness"})["data"], "37\n")

    def test_transfers_take_constant_memory(self) -> None:
        source = self.source(128 << 20)
        self.vm.upload(io.BytesIO(b"x"), "/data/f")
        before, most = rss_mib(), [0]

        def watch(done: int, total: Any) -> None:
            most[0] = max(most[0], rss_mib())

        self.vm.upload(source, "/data/f", progress=watch)
        self.vm.download("/data/f", self.folder / "back", progress=watch)
        self.assertLessEqual(most[0] - before, 16)


class Outcomes(VMTestCase):
    def test_command_that_times_out_says_whether_it_was_sent(self) -> None:
        vm = self.running()
        self.assertIsNone(vm.send_command("exec", shell("sleep 5"), timeout=0.2))
        self.assertEqual((vm.last_error.code, vm.last_error.details), ("channel_timeout", {"sent": True}))
        self.assertIn("unknown", str(vm.last_error))
        self.assertIsNone(vm.send_command("write_file", {"path": "/tmp/x", "data": "x" * (17 << 20)}))
        self.assertEqual(vm.last_error.details, {"sent": False})

    def test_cancelled_command_dies_in_the_guest(self) -> None:
        vm = self.running()
        self.assertIsNone(vm.send_command("exec", shell("sleep 98765"), timeout=0.2))
        count = lambda: self.result(vm, "exec", shell("ps -o args | grep -c 'sleep 9876[5]'"))["stdout"].strip()
        self.assertTrue(eventually(lambda: count() == "0"), count())


class Broker(VMTestCase):
    config = {"command_timeout_s": 4.0}

    def client(self, vm: Any) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.settimeout(20)
        client.connect(vm.get_info()["socket_path"])
        return client

    @staticmethod
    def say(client: socket.socket, message: Any) -> None:
        body = json.dumps(message).encode()
        client.sendall(struct.pack(">I", len(body)) + body)

    @staticmethod
    def hear(client: socket.socket) -> Any:
        def exactly(length: int) -> bytes:
            body = b""
            while len(body) < length:
                piece = client.recv(length - len(body))
                if not piece:
                    raise EOFError("the broker closed the connection")
                body += piece
            return body

        (length,) = struct.unpack(">I", exactly(4))
        return json.loads(exactly(length))

    def test_plain_client_with_socket_and_json_pings_and_commands(self) -> None:
        client = self.client(self.running())
        self.say(client, {"type": "ping"})
        self.assertEqual(self.hear(client), {"type": "pong"})
        self.say(client, {"type": "command", "action": "exec", "data": {"program": "echo", "args": ["x"]}})
        self.assertEqual(self.hear(client)["result"]["stdout"], "x\n")
        self.say(client, {"type": "command", "command": "stream", "params": {"program": "ls"}})
        self.assertEqual(self.hear(client)["error"]["code"], "bad_params")

    def test_client_that_closed_its_own_direction_gets_its_answers(self) -> None:
        client = self.client(self.running())
        for number in range(3):
            self.say(client, {"type": "ping", "id": number})
        client.shutdown(socket.SHUT_WR)
        self.assertEqual([self.hear(client)["id"] for _ in range(3)], [0, 1, 2])
        self.assertEqual(client.recv(1), b"")

    def test_paused_vm_keeps_messages_until_it_resumes_or_they_time_out(self) -> None:
        vm = self.running()
        client, patient = self.client(vm), self.client(vm)
        self.assertTrue(vm.pause())
        append = {"path": "/tmp/log", "data": "x", "append": True}
        self.say(client, {"type": "command", "command": "write_file", "params": append})
        time.sleep(1)
        self.say(patient, {"type": "ping", "id": 1})
        error = self.hear(client)["error"]
        self.assertEqual((error["code"], error["details"]), ("channel_timeout", {"sent": True}))
        self.assertTrue(vm.resume())
        self.assertEqual(self.hear(patient), {"type": "pong", "id": 1})
        self.say(client, {"type": "command", "command": "write_file", "params": append})
        self.assertEqual(self.hear(client)["status"], "ok")
        # The command that timed out may have run or may have been cancelled before.
        self.assertIn(self.result(vm, "read_file", {"path": "/tmp/log"})["data"], ("x", "xx"))

    def test_client_that_does_not_read_hurts_nobody(self) -> None:
        vm = self.running()
        self.result(vm, "write_file", {"path": "/tmp/big", "data": "x" * (4 << 20)})
        deaf = [self.client(vm) for _ in range(4)]
        for client in deaf:
            for _ in range(3):
                self.say(client, {"type": "command", "command": "read_file", "params": {"path": "/tmp/big", "max_bytes": 4 << 20}})
        other = self.client(vm)
        for _ in range(50):
            self.say(other, {"type": "ping"})
            self.assertEqual(self.hear(other), {"type": "pong"})
        self.assertEqual(len(self.hear(deaf[0])["result"]["data"]), 4 << 20)

    def test_client_that_hangs_up_ends_its_command(self) -> None:
        vm = self.running()
        client = self.client(vm)
        self.say(client, {"type": "command", "command": "exec", "params": shell("sleep 98765", timeout=60)})
        count = lambda: self.result(vm, "exec", shell("ps -o args | grep -c 'sleep 9876[5]'"))["stdout"].strip()
        self.assertTrue(eventually(lambda: count() != "0"))
        client.close()
        self.assertTrue(eventually(lambda: count() == "0"), count())

    def test_internal_actions_are_refused_everywhere_and_the_vm_goes_on(self) -> None:
        vm = self.running()
        client = self.client(vm)
        adopt = {"vm_id": "other", "hostname": "other", "unix_time_ns": 0}
        for name, params in [("freeze", {}), ("freeze", {"x": "y" * 5000}), ("adopt", adopt)]:
            with self.subTest(name):
                self.assertEqual(self.failure(vm, name, params), "reserved_action")
                for form in ({"command": name, "params": params}, {"action": name, "data": params}):
                    self.say(client, dict(form, type="command"))
                    self.assertEqual(self.hear(client)["error"]["code"], "reserved_action")
                self.assertEqual(self.failure(vm, "execute", {"action": name, "params": params}), "reserved_action")
                with self.assertRaises(CommandError) as caught:
                    vm.stream(name)
                self.assertEqual(caught.exception.code, "program_not_found")
        for name in ("stream", "upload", "download"):
            self.assertEqual(self.failure(vm, name, {"path": "/tmp/x"}), "bad_params")
        self.assertNotIn("freeze", self.result(vm, "list_actions")["actions"])
        self.assertEqual(self.result(vm, "system_info")["vm_id"], vm.vm_id)
        vm.snapshot("after-internal")
        self.addCleanup(self.manager.delete_template, "after-internal")
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertEqual(vm.get_health_metrics().health_status, "healthy")

    def test_silent_clients_give_way_to_new_ones_and_one_that_asked_stays(self) -> None:
        vm = self.running()
        steady = self.client(vm)
        self.say(steady, {"type": "ping"})
        self.hear(steady)
        silent = [self.client(vm) for _ in range(255)]
        silent[0].sendall(b"\0\0")
        time.sleep(1.2)
        for _ in range(20):
            client = self.client(vm)
            self.say(client, {"type": "ping"})
            self.assertEqual(self.hear(client), {"type": "pong"})
        self.assertEqual(silent[1].recv(1), b"")
        self.say(steady, {"type": "ping"})
        self.assertEqual(self.hear(steady), {"type": "pong"})

    def test_clients_of_every_number_are_served(self) -> None:
        vm = self.running()
        clients = [self.client(vm) for _ in range(256)]
        for number, client in enumerate(clients):
            self.say(client, {"type": "ping", "id": number})
        self.assertEqual([self.hear(client)["id"] for client in clients], list(range(256)))


class Traffic(VMTestCase):
    config = {"command_timeout_s": 120.0}

    def test_channels_of_four_processes_get_every_answer_once_in_order(self) -> None:
        vm = self.running(resource_limits=limits(memory_mb=256))
        messages = os.environ.get("MICROVM_CHANNEL_MESSAGES", "1280")
        call = [sys.executable, str(ROOT / "tests" / "vm" / "channel_traffic.py"), vm.get_info()["socket_path"], messages]
        started = [subprocess.Popen(call + [str(n)], stdout=subprocess.PIPE, universal_newlines=True) for n in range(4)]
        outputs = [process.communicate()[0] for process in started]
        self.assertEqual([process.returncode for process in started], [0] * 4, outputs)
        self.assertEqual(sum(int(output.split()[0]) for output in outputs), int(messages) // 64 * 64)


class Interrupts(VMTestCase):
    def test_interrupt_is_seen_in_each_blocking_call(self) -> None:
        vm = self.running()
        stream = vm.stream("cat")
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, previous)
        deaf = vm.stream("sleep", ["1000"])
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        fifo = folder.name + "/fifo"
        os.mkfifo(fifo)
        for name, call in [
            ("next", lambda: next(stream)),
            ("wait", lambda: stream.wait()),
            ("write", lambda: deaf.write(bytes(4 << 20))),
            ("upload", lambda: vm.upload("/dev/zero", "/data/zero")),
            ("download", lambda: vm.download("/dev/zero", io.BytesIO(), max_bytes=1 << 40)),
            ("upload from a FIFO", lambda: vm.upload(fifo, "/data/fifo")),
            ("download to a FIFO", lambda: vm.download("/proc/version", fifo)),
        ]:
            with self.subTest(name):
                timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()
                begun = time.monotonic()
                with self.assertRaises(KeyboardInterrupt):
                    call()
                self.assertLess(time.monotonic() - begun, 10.0)
                timer.join()
        self.assertTrue(stream.write(b"still here"))
        self.assertEqual(next(stream), ("stdout", b"still here"))

    def test_interrupted_wait_leaves_the_program_running_and_leaving_its_block_ends_it(self) -> None:
        vm = self.running()
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, previous)
        count = lambda: self.result(vm, "exec", shell("ps -o args | grep -c 'sleep 9876[5]'"))["stdout"].strip()
        with self.assertRaises(KeyboardInterrupt):
            with vm.stream("sleep", ["98765"]) as stream:
                for call in (stream.wait, lambda: next(stream), lambda: list(stream)):
                    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
                    timer.start()
                    with self.assertRaises(KeyboardInterrupt):
                        call()
                    timer.join()
                    self.assertEqual((count(), stream.exit_code), ("1", None))
                raise KeyboardInterrupt
        self.assertEqual(stream.wait(10), -9)
        self.assertTrue(eventually(lambda: count() == "0"), count())


if __name__ == "__main__":
    unittest.main()
