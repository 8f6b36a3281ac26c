"""The internet, in a network namespace of its own: ``unshare --net python3 internet.py FOLDER``, ordered about over stdin. The
folder holds ``web.pem``, the key and certificate of web.test.

An order is a line of JSON with ``do``; the answer is another. What was asked for and what was seen on the wire is kept
until ``reset``.
"""

import base64
import http.server
import json
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

WIRE = "in0"
GATEWAY = "203.0.113.1/24"
WEB, OTHER_WEB, DNS = "198.51.100.1", "198.51.100.2", "198.51.100.53"
# An address in a private network that the host can reach.
PRIVATE = "10.11.12.13"
# 8.8.8.8 and 8.8.4.4 are in the description's example; the rest is what no VM may reach, wherever it is.
ADDRESSES = (WEB, OTHER_WEB, DNS, PRIVATE, "8.8.8.8", "8.8.4.4", "169.254.169.254", "100.100.100.200", "168.63.129.16")
SINK_PORT, SOURCE_PORT, SILENT_PORT = 5001, 5002, 5003
A, AAAA, TXT = 1, 28, 16

NAMES: Dict[str, List[str]] = {
    "web.test": [WEB],
    "a.sub.test": [WEB],
    "other.test": [OTHER_WEB],
    "many.test": [WEB, OTHER_WEB],
    "long.test": [WEB],
    "metadata.test": ["169.254.169.254"],
    "private.test": [PRIVATE],
    "rebound.test": [PRIVATE, WEB],
}
ALIASES = {"www.web.test": "web.test"}
# N.flood.test has addresses that no other name has.
FLOOD = ".flood.test"
FLOOD_ADDRESSES = 25
TTL = 5


class Seen:
    """What happened since the last reset."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self.frames: List[bytes] = []
            self.names: List[str] = []
            self.questions: List[str] = []
            self.clients: List[str] = []
            self.received = 0

    def note(self, field: str, item: Any) -> None:
        with self.lock:
            getattr(self, field).append(item)


SEEN = Seen()


class Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        SEEN.note("clients", self.client_address[0])
        if self.path == "/redirect":
            self.answer(302, b"", Location="/page")
        elif self.path == "/page":
            self.answer(200, b"<title>Far</title><a href='next'>go</a><script>evil()</script>", Content_Type="text/html")
        elif self.path == "/binary":
            self.answer(200, bytes(range(256)))
        elif self.path == "/zeros":
            self.answer(200, bytes(9 << 20))
        elif self.path == "/missing":
            self.answer(404, b"no such page")
        elif self.path == "/slow":
            time.sleep(5)
            self.answer(200, b"late")
        else:
            self.answer(200, b"hello from " + self.server.server_address[0].encode() + self.path.encode())

    def do_POST(self) -> None:
        SEEN.note("clients", self.client_address[0])
        self.answer(200, b"got " + self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *arguments: Any) -> None:
        pass


class Server(http.server.HTTPServer):
    allow_reuse_address = True

    def server_bind(self) -> None:
        # HTTPServer's own asks for the address's name, which nobody answers here.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        # A thread for each: ThreadingHTTPServer with what 3.8 knows.
        threading.Thread(target=self.serve_one, args=(request, client_address), daemon=True).start()

    def serve_one(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass
        finally:
            self.shutdown_request(request)


def thread(target: Any, *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def serve_web() -> None:
    for address in (WEB, OTHER_WEB, PRIVATE, "169.254.169.254", "100.100.100.200"):
        thread(Server((address, 80), Web).serve_forever)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(Path(sys.argv[1]) / "web.pem"))
    secure = Server((WEB, 443), Web)
    secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
    thread(secure.serve_forever)


def listen(port: int, serve: Any) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(64)
    while True:
        thread(serve, listener.accept()[0])


def sink(connection: socket.socket) -> None:
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            return
        if not data:
            return connection.close()
        with SEEN.lock:
            SEEN.received += len(data)


def source(connection: socket.socket) -> None:
    block = bytes(1 << 16)
    try:
        while True:
            connection.sendall(block)
    except OSError:
        connection.close()


def silent(connection: socket.socket) -> None:
    time.sleep(60)
    connection.close()


def parse_question(message: bytes) -> Tuple[str, int, bytes]:
    labels, at = [], 12
    while message[at]:
        labels.append(message[at + 1 : at + 1 + message[at]].decode())
        at += 1 + message[at]
    kind = struct.unpack("!H", message[at + 1 : at + 3])[0]
    return ".".join(labels).lower(), kind, message[12 : at + 5]


def encode_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def record(owner: str, kind: int, data: bytes) -> bytes:
    return encode_name(owner) + struct.pack("!HHIH", kind, 1, TTL, len(data)) + data


def answer_question(message: bytes, over_tcp: bool) -> bytes:
    name, kind, question = parse_question(message)
    SEEN.note("names", "{} {}".format(name, kind))
    SEEN.note("questions", message.hex())
    records, known = [], name in NAMES or name in ALIASES or name.endswith(FLOOD)
    target = name
    if name in ALIASES:
        target = ALIASES[name]
        records.append(record(name, 5, encode_name(target)))
    if kind == A:
        records += [record(target, A, socket.inet_aton(address)) for address in NAMES.get(target, [])]
    if kind == A and name.endswith(FLOOD):
        first = (20 << 24) + int(name[: -len(FLOOD)]) * FLOOD_ADDRESSES
        records += [record(name, A, struct.pack("!I", first + n)) for n in range(FLOOD_ADDRESSES)]
    if kind == AAAA and known:
        records.append(record(target, AAAA, socket.inet_pton(socket.AF_INET6, "2001:db8::1")))
    # The answer for long.test is truncated over UDP and complete over TCP.
    cut = name == "long.test" and not over_tcp
    flags = 0x8180 | (0x0200 if cut else 0) | (0 if known else 3)
    head = struct.pack("!HHHHHH", struct.unpack("!H", message[:2])[0], flags, 1, 0 if cut else len(records), 0, 0)
    return head + question + (b"" if cut else b"".join(records))


def serve_dns_udp(address: str) -> None:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, 53))
    while True:
        message, peer = udp.recvfrom(65535)
        udp.sendto(answer_question(message, False), peer)


def serve_dns_tcp(connection: socket.socket) -> None:
    stream = connection.makefile("rwb")
    while True:
        head = stream.read(2)
        if len(head) < 2:
            return
        answer = answer_question(stream.read(struct.unpack("!H", head)[0]), True)
        stream.write(struct.pack("!H", len(answer)) + answer)
        stream.flush()


def capture() -> None:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    wire.bind((WIRE, 0))
    while True:
        try:
            frame, (_, _, kind, _, _) = wire.recvfrom(65535)
        except OSError:
            return  # The wire was taken down.
        if kind != socket.PACKET_OUTGOING:
            SEEN.note("frames", frame[:2048])


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def set_up() -> None:
    run("ip", "link", "set", "lo", "up")
    Path("/proc/sys/net/ipv6/conf/{}/disable_ipv6".format(WIRE)).write_text("1")
    run("ip", "address", "add", GATEWAY, "dev", WIRE)
    run("ip", "link", "set", WIRE, "up")
    for address in ADDRESSES:
        run("ip", "address", "add", address + "/32", "dev", "lo")
    # Whatever comes is answered, even to addresses that only a broken NAT would send from.
    run("ip", "route", "add", "default", "dev", WIRE)
    serve_web()
    for port, serve in ((SINK_PORT, sink), (SOURCE_PORT, source), (SILENT_PORT, silent), (53, serve_dns_tcp)):
        thread(listen, port, serve)
    for address in (DNS, "8.8.8.8", "8.8.4.4"):
        thread(serve_dns_udp, address)
    thread(capture)


def send(by: str, address: str, port: int, payload: str) -> None:
    """A datagram to an address that is said to be behind one of the host's."""
    run("ip", "route", "replace", address + "/32", "via", by)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(bytes.fromhex(payload), (address, port))
    run("ip", "route", "delete", address + "/32")


def obey(order: Dict[str, Any]) -> Any:
    if order["do"] == "set up":
        return set_up()
    if order["do"] == "reset":
        return SEEN.reset()
    if order["do"] == "send":
        return send(order["to"], *order["datagram"])
    if order["do"] == "names":
        NAMES.update(order["names"])
        return None
    with SEEN.lock:
        if order["do"] == "frames":
            return [base64.b64encode(frame).decode() for frame in SEEN.frames]
        if order["do"] == "received":
            return SEEN.received, time.monotonic()
        return {"names": SEEN.names, "questions": SEEN.questions, "clients": SEEN.clients}


def main() -> None:
    # In its namespace by now: the wire can be put there.
    print("here", flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
