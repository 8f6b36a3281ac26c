"""What programs find in a guest: users, folders, devices, limits, and the applets that people use."""

import base64
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..support import VMTestCase, disks_of, eventually, limits, make_rootfs, shell


class GuestTestCase(VMTestCase):
    config = {"start_timeout_s": 120}

    def said(self, vm: Any, script: str, **more: Any) -> str:
        """What a shell script that succeeds writes."""
        result = self.result(vm, "exec", shell(script, **more))
        self.assertEqual(result["exit_code"], 0, result)
        return str(result["stdout"]).strip()


class Users(GuestTestCase):
    def test_uid_with_many_file_handles_gets_them(self) -> None:
        for files in (4096, 4097, 65536):
            vm = self.running(resource_limits=limits(max_file_handles=files))
            self.assertEqual(self.said(vm, "ulimit -n; ulimit -Hn", uid=1000).split(), [str(files)] * 2)
            self.assertEqual(self.said(vm, "ulimit -n"), str(files))
            vm.stop()

    def test_uid_has_a_name_a_home_and_a_place_on_the_disk(self) -> None:
        vm = self.running()
        said = self.said(vm, 'echo $HOME $USER $LOGNAME $SHELL $LANG; id -un; id -gn; cd && pwd && touch ~/f && echo x >/data/own', uid=1000)
        self.assertEqual(said.split(), "/home/user1000 user1000 user1000 /bin/sh C.UTF-8 user1000 user1000 /home/user1000".split())
        self.assertEqual(self.said(vm, "id -un; stat -c %a /home/user1000; df /home | tail -n1 | cut -d' ' -f1", uid=7).split()[:2], ["user7", "700"])
        self.assertEqual(self.said(vm, "grep -c :1000: /etc/passwd; echo $HOME $USER; cd && touch f", uid=1000).split()[0], "1")
        # A user can neither read nor remove files of other users.
        self.result(vm, "exec", shell("echo r >/data/roots; chmod 600 /data/roots"))
        self.assertNotEqual(self.result(vm, "exec", shell("rm -f /data/roots", uid=1000))["exit_code"], 0)
        self.assertNotEqual(self.result(vm, "exec", shell("ls /home/user1000", uid=7))["exit_code"], 0)
        self.assertEqual(self.failure(vm, "exec", {"program": "true", "uid": 4294967295}), "bad_params")

    def test_uid_cannot_add_an_action_that_root_would_run(self) -> None:
        vm = self.running()
        action = "mkdir /data/actions.d; printf '#!/bin/sh\\necho 1' >/data/actions.d/mine; chmod 755 /data/actions.d/mine"
        self.said(vm, action, uid=1000)
        self.assertEqual(self.failure(vm, "mine"), "unknown_action")
        self.said(vm, "rm -r /data/actions.d; " + action)
        self.assertEqual(self.result(vm, "mine"), 1)

    def test_root_has_a_name_and_a_home_on_the_disk(self) -> None:
        vm = self.running()
        said = self.said(vm, "echo $HOME $USER $LANG; cd && pwd && stat -c %a . && touch f; ls -A /data")
        self.assertEqual(said.split()[:5], ["/root", "root", "C.UTF-8", "/root", "700"])
        free = "df -k /data | tail -n1 | awk '{print $4}'"
        before = int(self.said(vm, free))
        self.said(vm, "head -c 4194304 /dev/zero >~/f; head -c 4194304 /dev/zero >/var/tmp/f; sync")
        self.assertLessEqual(int(self.said(vm, free)), before - 8000)

    def test_program_blocks_and_ignores_no_signal(self) -> None:
        # Not by a shell, which ignores SIGQUIT itself.
        grep = {"program": "grep", "args": ["-E", "Sig(Blk|Ign)", "/proc/self/status"]}
        said = self.result(self.running(), "exec", grep)["stdout"]
        self.assertEqual(said.split(), ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16])

    def test_terminal_has_a_type(self) -> None:
        vm = self.running()
        with vm.stream("/bin/sh", ["-c", "echo $TERM; tty"], pty=True) as stream:
            said = b"".join(data for _, data in stream).decode().split()
        self.assertEqual(said, ["xterm", "/dev/pts/0"])
        self.assertEqual(self.said(vm, "echo ${TERM:-none}"), "none")

    def test_erofs_image_is_the_root_entry_by_entry_and_stays_as_it_is(self) -> None:
        stat = "cd {}; busybox find . | busybox sort | while read -r f; do busybox stat -c '%n %f %h %u %g %Y' \"$f\"; "
        stat += "busybox readlink \"$f\" || ! test -f \"$f\" || busybox md5sum \"$f\"; done"
        listed = []

        def fill(tree: Path) -> None:
            (tree / "srv" / ("n" * 200)).mkdir(parents=True)
            (tree / "srv" / "\u00e9 b").write_text("odd")
            for size in (0, 1, 4095, 4096, 4097, 300001):
                (tree / "srv" / str(size)).write_bytes(bytes(range(251)) * (size // 251) + b"x" * (size % 251))
            (tree / "srv" / "1").chmod(0o4751)
            (tree / "srv" / "link").symlink_to("/" + "t" * 4000)
            os.link(str(tree / "srv" / "4097"), str(tree / "srv" / "hard"))
            if os.geteuid() == 0:
                os.chown(str(tree / "srv" / "0"), 4000000000, 70000)
            os.utime(str(tree / "srv"), (1, 1000000000))
            listed.append(subprocess.check_output(["sh", "-c", stat.format("srv")], cwd=str(tree)).decode())

        with tempfile.TemporaryDirectory() as folder:
            image = make_rootfs(Path(folder) / "image", "erofs", fill)
            before = image.read_bytes()
            vm = self.running(rootfs_path=str(image))
            self.assertEqual(self.result(vm, "exec", shell(stat.format("/srv")))["stdout"], listed[0])
            self.assertEqual(self.said(vm, "echo new >/etc/made-by; cat /etc/made-by"), "new")
            self.assertTrue(image.read_bytes() == before)

    def test_image_keeps_its_own_users(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            image = make_rootfs(Path(folder) / "image")
            vm = self.running(rootfs_path=str(image))
            self.result(vm, "write_file", {"path": "/etc/passwd", "data": "app:x:1000:50::/srv/app:/bin/false"})
            self.result(vm, "exec", shell("busybox mkdir -p /srv/app; busybox chown 1000:50 /srv/app"))
            self.assertEqual(self.said(vm, "echo $USER $HOME; busybox id -u; busybox id -g", uid=1000).split(), ["app", "/srv/app", "1000", "50"])
            self.assertEqual(self.said(vm, "echo $USER $HOME; touch ~/f", uid=5).split(), ["user5", "/home/user5"])
            passwd = self.result(vm, "read_file", {"path": "/etc/passwd"})["data"]
            self.assertEqual(passwd, "app:x:1000:50::/srv/app:/bin/false\nuser5:x:5:5::/home/user5:/bin/sh\n")


class Environment(GuestTestCase):
    def test_devices_mounts_links_hosts_and_sysctls(self) -> None:
        vm = self.running()
        rows = {
            "cat <(echo 1)": "1",
            "echo 2 | cat /dev/stdin": "2",
            "echo 3 >/dev/stdout": "3",
            "echo 4 2>&1 >/dev/stderr": "4",
            "ls /dev/fd | head -n1": "0",
            "stat -f -c %T /dev/mqueue /dev/shm /dev/pts /sys/fs/cgroup /tmp /run | tr '\\n' ' '": "UNKNOWN tmpfs devpts UNKNOWN tmpfs tmpfs",
            "ulimit -c; ulimit -s; ulimit -Hs; ulimit -l": "0\n8192\nunlimited\n8192",
            "grep -o 'mqueue mqueue' /proc/mounts": "mqueue mqueue",
            "grep localhost /etc/hosts | tr '\\n' ' '": "127.0.0.1 localhost ::1 localhost ip6-localhost ip6-loopback",
            "ping -c1 -W5 -q localhost >/dev/null && ping6 -c1 -W5 -q ::1 >/dev/null && echo up": "up",
            "cat /proc/sys/net/ipv4/ping_group_range": "0\t2147483647",
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/fs/protected_symlinks | tr '\\n' ' '": "0 1",
            "stat -c %a /tmp /var/tmp /run/lock /dev/shm /data | tr '\\n' ' '": "1777 1777 1777 1777 1777",
            "for l in /etc/mtab /var/run /var/lock /usr/bin; do readlink $l; done | tr '\\n' ' '": "../proc/self/mounts ../run ../run/lock ../bin",
            "test -f /etc/resolv.conf && test -f /etc/nsswitch.conf && test -d /var/log && test -d /home && echo there": "there",
            "printf '#!/usr/bin/env sh\\necho env' >/tmp/s && chmod +x /tmp/s && /tmp/s": "env",
            "test $(hostname) = $(cat /etc/hostname) && grep -q $(hostname) /etc/hosts && echo named": "named",
        }
        for script, expected in rows.items():
            with self.subTest(script):
                self.assertEqual(self.said(vm, script), expected)
        # An ordinary user may listen on a low port.
        script = "(echo hi | nc -l -p 80 -w 10 >/tmp/got) & for i in 1 2 3 4 5 6 7 8 9; do nc -w 5 127.0.0.1 80 </dev/null && break; sleep 0.2; done"
        self.assertIn("hi", self.said(vm, script, uid=1000))


class Applets(GuestTestCase):
    def test_wget_with_a_timeout_fetches_and_gives_up(self) -> None:
        vm = self.running()
        self.said(vm, "mkdir -p /data/www && echo page >/data/www/index.html && httpd -h /data/www -p 127.0.0.1:8080")
        self.assertEqual(self.said(vm, "wget -T 5 -q -O - http://localhost:8080/"), "page")
        # The listener accepts nothing, so the connection is established and no answer comes.
        silent = "(sleep 20 | nc -l -p 8081) >/dev/null 2>&1 & sleep 0.5; wget -T 1 -O - http://127.0.0.1:8081/"
        result = self.result(vm, "exec", shell(silent))
        self.assertEqual(result["exit_code"], 1, result)
        self.assertIn("timed out", result["stderr"])
        # busybox's wget checks no certificate, so it must refuse https; process_request checks them.
        self.assertIn("not an http or ftp url", self.result(vm, "exec", shell("wget -T 5 https://localhost/"))["stderr"])

    def test_applets_that_people_use_work(self) -> None:
        vm = self.running()
        rows = {
            "echo $((6 * 7)); set -o pipefail; f() { local x=$1; echo ${x%.*}; }; f a.b": "42\na",
            "cd /tmp && mkdir -p t/u && echo hi >t/u/f && tar czf t.tgz t && rm -r t && tar xzf t.tgz && cat t/u/f": "hi",
            "echo zip | gzip | gunzip; echo bz | bzip2 | bunzip2; echo x | xz -c 2>/dev/null | unxz 2>/dev/null; true": "zip\nbz",
            "printf 'b 2\\na 1\\n' | sort | awk '{s += $2} END {print s, $1}'": "3 b",
            "echo abc | sed 's/b/-/' | tr c d | cut -c1-3 | grep -E '^a' | rev": "d-a",
            "find /tmp/t -type f -name f -exec cat {} \\; | xargs -n1 echo got": "got hi",
            "ps -o pid,comm | grep -c ' init'; top -b -n1 | head -n1 | grep -c ^Mem:; pgrep init | head -n1": "1\n1\n1",
            "timeout 1 sleep 9; echo $?": "143",
            "date -u -d @0 +%Y-%m-%d; seq 3 | tac | tr '\\n' ' '; printf '%05.1f\\n' 2.5": "1970-01-01\n3 2 1 002.5",
            "printf abc | sha256sum | cut -c1-8; printf abc | md5sum | cut -c1-8; printf abc | base64": "ba7816bf\n90015098\nYWJj",
            "printf 'a\\nb\\n' >/tmp/1; printf 'a\\nc\\n' >/tmp/2; diff /tmp/1 /tmp/2 | grep -c '^[-+][bc]'; cmp -s /tmp/1 /tmp/2; echo $?": "2\n1",
            "dd if=/dev/zero of=/tmp/z bs=1k count=4 2>/dev/null; stat -c %s /tmp/z; du -k /tmp/z | cut -f1; truncate -s 9 /tmp/z; wc -c </tmp/z": "4096\n4\n9",
            "vi --help 2>&1 | grep -c Usage; less --help 2>&1 | grep -c Usage; which stty fstrim vi nc reboot | wc -l": "1\n1\n5",
            "ip addr show lo | grep -c 'inet 127.0.0.1'; ip route >/dev/null; free -m | grep -c Mem; df -h /data | wc -l": "1\n1\n2",
            "env | grep -c ^PATH=; nproc; uname -s; whoami; id -u; hostname >/dev/null; uptime | grep -c load": "1\n1\nLinux\nroot\n0\n1",
            "mount -t tmpfs t /mnt && mountpoint -q /mnt && umount /mnt && echo mounted": "mounted",
            "unshare -m true && setsid true && flock /tmp/l true && nohup true 2>/dev/null && nice true && echo run": "run",
            "split -l1 /tmp/1 /tmp/s. && ls /tmp/s.a? | wc -l; printf '\\101' | od -An -tx1 | tr -d ' '; hexdump -C /tmp/1 | wc -l": "2\n41\n2",
        }
        for script, expected in rows.items():
            with self.subTest(script):
                self.assertEqual(self.said(vm, script), expected)
        with vm.stream("/bin/sh", ["-c", "stty size; stty -echo; stty | grep -c -- -echo"], pty=True, rows=33, columns=99) as stream:
            self.assertEqual(b"".join(data for _, data in stream).decode().split(), ["33", "99", "1"])


class Discard(GuestTestCase):
    def test_fstrim_gives_the_disk_back_to_the_host(self) -> None:
        vm = self.running()
        disks = disks_of(vm.vm_id)
        self.assertEqual(len(disks), 1, disks)
        held = lambda: os.stat(str(disks[0])).st_blocks * 512
        before = held()
        self.said(vm, "head -c 33554432 /dev/urandom >/data/f; sync")
        self.assertGreater(held(), before + (30 << 20))
        self.said(vm, "rm /data/f; sync; fstrim /data")
        self.assertTrue(eventually(lambda: held() < before + (4 << 20)), held() - before)
        self.said(vm, "echo kept >/data/g; sync; echo 3 >/proc/sys/vm/drop_caches; cat /data/g; df /data")


# Each needs more memory or time than a small VM has for one page.
PAGES = {
    "nested links": "<a href=x><object>" * 1000 + "w" * 100000,
    "nested links, long": "<a href=x><object>" * 1000 + "word " * 700000,
    "nested tables": "<table><tr><td>" * 100000,
    "formatting": "".join("<font color={}>".format(i) for i in range(20000)) + "<p>" * 20000,
    "options": "<select>" + "<option>" * 400000,
    "links": "<a href=/x>y</a>" * 250000,
    "templates": "<template>" * 100000,
}


class Documents(GuestTestCase):
    def test_pages_made_to_be_expensive_end_their_request_alone(self) -> None:
        vm = self.running()
        for name, html in PAGES.items():
            with self.subTest(name):
                answer = vm.send_command("render_page", {"html": html, "url": "http://a/"}, timeout=90)
                self.assertIsNotNone(answer, vm.last_error)
                if answer["status"] == "error":
                    self.assertIn(answer["error"]["code"], ("too_large", "timeout"), answer)
                self.assertEqual(self.said(vm, "echo alive; ls /sys/fs/cgroup/tools | grep -c ^[0-9] || true").split()[0], "alive")
        page = self.result(vm, "render_page", {"html": "<title>T</title><p>a"})
        self.assertEqual((page["title"], page["text"], page["sanitized_html"]), ("T", "a", "<p>a</p>"))

    def test_many_pages_at_once_end_no_program_of_the_user(self) -> None:
        vm = self.running()
        self.said(vm, "sleep 987 </dev/null >/dev/null 2>&1 &")
        html = "<b>" * 3000 + "<p>" * 3000
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: vm.send_command("render_page", {"html": html}, timeout=90), range(8)))
        for answer in answers:
            self.assertIsNotNone(answer, vm.last_error)
            if answer["status"] == "error":
                self.assertIn(answer["error"]["code"], ("too_large", "timeout"), answer)
        self.said(vm, "pgrep -f 'sleep 987'")

    def test_page_program_is_nobodys_and_ends_with_its_caller(self) -> None:
        vm = self.running()
        # It stands still once it was seen, however fast this host is.
        each = "kill -STOP $p; echo $(stat -c %u /proc/$p) $(cat /proc/$p/oom_score_adj)"
        tools = "for p in $(cat /sys/fs/cgroup/tools/*/cgroup.procs 2>/dev/null); do {}; done".format(each)
        html = "<div>" * 400000
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(vm.send_command, "render_page", {"html": html}, 5.0)
            self.assertTrue(eventually(lambda: self.said(vm, tools) == "65534 1000"))
            self.assertIsNone(answer.result())
        self.assertTrue(eventually(lambda: self.said(vm, tools) == ""))

    def test_page_works_where_an_image_is_the_root(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            vm = self.running(rootfs_path=str(make_rootfs(Path(folder) / "image")))
            self.assertEqual(self.result(vm, "render_page", {"html": "<p>a"})["text"], "a")

    def test_eight_mebibytes_of_zeros_can_be_read_where_there_is_memory(self) -> None:
        vm = self.running(resource_limits=limits(memory_mb=512))
        self.said(vm, "head -c 8388608 /dev/zero >/data/zeros; tr '\\0' '\"' </data/zeros >/data/quotes; printf '\"a\",\"b\"\\n\\n\\n' >/data/text")
        for name, byte in (("zeros", b"\0"), ("quotes", b'"')):
            read = self.result(vm, "read_file", {"path": "/data/" + name, "max_bytes": 8 << 20})
            self.assertEqual((base64.b64decode(read["data_base64"]) == byte * (8 << 20), read["eof"]), (True, True))
        # Ordinary text stays text, and max_output_bytes counts raw bytes.
        self.assertEqual(self.result(vm, "read_file", {"path": "/data/text"})["data"], '"a","b"\n\n\n')
        said = self.result(vm, "exec", {"program": "cat", "args": ["/data/zeros"], "max_output_bytes": 1 << 20})
        self.assertEqual((said["stdout"] == "\0" * (1 << 20), said["stdout_truncated"]), (True, True))
        self.assertEqual(self.failure(vm, "exec", {"program": "cat", "args": ["/data/zeros"], "max_output_bytes": 4 << 20}), "too_large")

    def test_large_answers_and_requests_do_not_end_a_small_vm(self) -> None:
        vm = self.running(resource_limits=limits(memory_mb=64))
        self.said(vm, "head -c 8388608 /dev/zero >/data/zeros; head -c 8388608 /dev/urandom >/data/noise")
        asked = [("read_file", {"path": path, "max_bytes": 8 << 20}) for path in ("/data/zeros", "/data/noise")]
        asked += [("exec", {"program": "cat", "args": [path], "max_output_bytes": 4 << 20}) for path in ("/data/zeros", "/data/noise")]
        asked += [("write_file", {"path": "/data/f", "data": "x" * (12 << 20)}), ("no_such", {"values": [[]] * (2 << 20)})]
        with ThreadPoolExecutor(3) as threads:
            for answer in threads.map(lambda each: vm.send_command(each[0], each[1], timeout=90), asked * 2):
                self.assertIsNotNone(answer, vm.last_error)
                if answer["status"] == "error":
                    self.assertEqual(answer["error"]["code"], "too_large", answer)
        self.assertEqual(self.said(vm, "echo alive"), "alive")
