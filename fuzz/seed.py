"""Write the corpus that is kept in git: a few inputs of each kind, from which the fuzzer finds the others."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
GOLDEN = Path(__file__).resolve().parent.parent / "src/crates/protocol/golden/generation-1.txt"


def document(value: object) -> bytes:
    body = json.dumps(value).encode()
    return struct.pack(">I", len(body)) + body


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    plain = struct.pack(">BBI", kind, flags, number) + payload
    return struct.pack(">H", len(plain)) + plain


def ethernet(kind: int, content: bytes) -> bytes:
    whole = bytes.fromhex("020000000001 020000000002") + struct.pack(">H", kind) + content
    return struct.pack(">I", len(whole)) + whole


def packet(protocol: int, to: str, content: bytes) -> bytes:
    # The target fills in the checksums.
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(content), 0, 0, 64, protocol, 0)
    return ethernet(0x0800, head + bytes([10, 173, 0, 2]) + bytes(map(int, to.split("."))) + content)


def segment(flags: int, payload: bytes = b"") -> bytes:
    return packet(6, "192.0.2.1", struct.pack(">HHIIBBHHH", 4000, 80, 1, 1, 0x50, flags, 1000, 0, 0) + payload)


def datagram(to: str, port: int, payload: bytes) -> bytes:
    return packet(17, to, struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload)


def layer(format: int, *entries: "tuple[str, bytes, str, dict[str, str]]") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, kind, link, records in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.pax_headers = kind, link, records
            entry.size = 5 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"hello"))
    return file.getvalue()[:10240]


def layers(*stack: bytes) -> bytes:
    return bytes([len(stack) - 1]) + b"".join(struct.pack("<H", len(layer)) + layer for layer in stack)


FILE, FOLDER, LINK, SYMLINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
LOWER = layer(tarfile.PAX_FORMAT, ("d", FOLDER, "", {}), ("d/f", FILE, "", {"SCHILY.xattr.user.a": "b"}), ("h", LINK, "d/f", {}))
UPPER = layer(tarfile.GNU_FORMAT, ("d/.wh..wh..opq", FILE, "", {}), (".wh.h", FILE, "", {}), ("n" * 200, SYMLINK, "t" * 200, {}))
SPARSE = layer(
    tarfile.PAX_FORMAT, ("s", FILE, "", {"GNU.sparse.size": "9000", "GNU.sparse.map": "4096,5", "GNU.sparse.name": "x", "mtime": "-1.5"})
)
ARP = ethernet(0x0806, bytes.fromhex("0001080006040001 020000000002 0aad0002 000000000000 0aad0001"))
QUESTION = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"\1a\4test\0\0\1\0\1"
RECORDED = {line.split()[1]: bytes.fromhex(line.split()[2]) for line in GOLDEN.read_text().splitlines()}
FRAMES = b"".join(frame(kind, 1 if kind in (1, 2, 5) else 0, 1, b"\x01{}") for kind in range(1, 11))
SEEDS = {
    "frames": {"every-kind": FRAMES + b"\x07", "identity": b"TWMVCFG1\0\0\0\2{}\x20"},
    "handshake": {
        "hello": RECORDED["HELLO"],
        "hello-accept": RECORDED["HELLO"] + RECORDED["ACCEPT"],
        "offer": RECORDED["OFFER"][2:],
        "future": b"\0\x08\1TWMV\x7e\x7f\0",
    },
    "calls": {"steps": bytes(range(256)) * 4, "requests": b"\0\0\0\0\1\0" * 40 + b"\x0a" * 100},
    "clients": {
        "stream": frame(1, 1, 1, b'{"action":"stream","params":{"program":"ls"},"stream":true}') + frame(5, 0, 1, b"\0input") + frame(5, 1, 1, b"\0")
        + frame(6, 0, 1, b"\1\0\0\1\0") + frame(7, 0, 1, b'{"control":"resize","rows":1,"columns":2}') + frame(3, 0, 1, b""),
        "connect": frame(1, 1, 1, b'{"action":"connect","params":{"port":80},"stream":true}') + frame(5, 0, 1, b"\0GET /") + frame(5, 1, 1, b"\0")
        + frame(1, 1, 2, b'{"operation":"ports"}') + frame(6, 0, 1, b"\1\0\0\1\0"),
        "operations": frame(1, 1, 1, b'{"operation":"info"}') + frame(1, 1, 2, b'{"operation":"snapshot","name":"a"}') + frame(9, 0, 7, b""),
        "pieces": frame(1, 0, 1, b'{"operation":') + frame(1, 1, 1, b'"stop"}') + frame(1, 0, 2, b"x") + frame(3, 0, 2, b""),
    },
    "documents": {
        "attach": document({"type": "attach", "version": 1}) + frame(9, 0, 1, b""),
        "ping": document({"type": "ping", "id": 1}),
        "command": document({"type": "command", "command": "exec", "params": {"program": "ls"}}),
        "legacy": document({"type": "command", "action": "render_page", "data": {}}) + document([1, None, 1e9]),
        "not-json": struct.pack(">I", 3) + b"{x}" + document({}),
        "too-long": b"\xff\xff\xff\xff{",
        "answer": b'{"status":"error","error":{"code":"busy","message":"m"}}',
        "connection": b'{"started":"connection","address":"[::1]:80"}',
        "outcome": b'{"guest":"failed","stage":"s","message":"m"}',
    },
    "layers": {
        "stack": layers(LOWER, UPPER),
        "sparse": layers(SPARSE, LOWER),
        "gzip": layers(gzip.compress(LOWER, mtime=0), UPPER),
    },
    "usernet": {
        "arp": ARP,
        "tcp": segment(2) + segment(16, b"GET /") + segment(17) + segment(4),
        "udp": datagram("192.0.2.1", 7, b"hello") + datagram("169.254.169.254", 80, b""),
        "dns": datagram("10.173.0.1", 53, QUESTION) + datagram("10.173.0.1", 53, QUESTION.replace(b"test", b"evil")),
        "echo": packet(1, "10.173.0.1", bytes.fromhex("0800000000070001") + b"x" * 56) + packet(1, "192.0.2.1", bytes.fromhex("0800000000070001")),
        "sessions": packet(6, "10.173.0.1", struct.pack(">HHIIBBHHH", 4000, 53, 1, 0, 0x50, 2, 1000, 0, 0)),
    },
}


def main() -> None:
    for target, seeds in SEEDS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in seeds.items():
            (folder / "seed-{}".format(name)).write_bytes(content)


main()
