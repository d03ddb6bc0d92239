"""A small server of the Hub's resolve protocol, as far as downloads need it, that can fail in many ways.

A fault is a dict; each GET of a body uses up one, in order, and the last one stays if ``always`` is set. Its keys:
``status`` (with ``headers``), ``cut`` (share of the bytes sent before the connection breaks), ``stall`` (share sent
before nothing more comes), ``flip`` (one byte is changed), ``on: 'HEAD'`` (applies to HEAD requests, not GETs).
"""

import hashlib
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 64 * 1024


class Seen(list):
    """'METHOD path' of each request, with request headers and the number of body bytes sent."""

    def __init__(self):
        super().__init__()
        self.headers = []
        self.body_bytes = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        server = self.server
        with server.mutex:
            server.seen.append(f"{self.command} {self.path}")
            server.seen.headers.append(dict(self.headers.items()))
        path = re.sub(r"/resolve/[^/]+/", "/resolve/main/", unquote(self.path.lstrip("/")))
        content = server.files.get(path.removeprefix("cdn/"))
        fault = self.next_fault()
        status = fault.get("status") or server.status or (None if content is not None else 404)
        if status:
            self.send_response(status)
            headers = {"x-error-code": "EntryNotFound"} if status == 404 else {}
            for name, value in {"content-length": "0", **headers, **fault.get("headers", {})}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        if server.cdn and not path.startswith("cdn/"):
            self.redirect(path, content)
            return
        self.send_body(content, fault)

    def next_fault(self):
        with self.server.mutex:
            faults = self.server.faults
            for index, fault in enumerate(faults):
                if fault.get("on", "GET") == self.command:
                    return fault if fault.get("always") else faults.pop(index)
        return {}

    def etag(self, content):
        sha256 = hashlib.sha256(content).hexdigest()
        return f'"cdn-{sha256[:8]}"' if self.path.startswith("/cdn/") else f'"{sha256}"'

    def describe(self, content, prefix=""):
        if self.server.hashes:
            self.send_header(f"{prefix}etag", self.etag(content))
            self.send_header("x-repo-commit", COMMIT)

    def redirect(self, path, content):
        self.send_response(302)
        self.describe(content, "x-linked-")
        self.send_header("x-linked-size", str(len(content)))
        self.send_header("location", f"http://localhost:{self.server.server_port}/cdn/{path}")
        self.send_header("content-length", "0")
        self.end_headers()

    def send_body(self, content, fault):
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.server.hashes and self.headers.get("If-Range") == self.etag(content)
        if wanted and self.server.ranges and ("If-Range" not in self.headers or same):
            start = int(wanted[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("content-range", f"bytes */{len(content)}")
                self.send_header("content-length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("content-length", str(len(content) - start))
        self.describe(content)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.get("flip"):
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        body = content[start:]
        end = int(len(body) * fault.get("cut", fault.get("stall", 1.0)))
        for begin in range(0, end, CHUNK):
            piece = body[begin : min(begin + CHUNK, end)]
            with self.server.mutex:  # before the client can receive it
                self.server.seen.body_bytes += len(piece)
            try:
                self.wfile.write(piece)
            except (ConnectionError, OSError):
                self.close_connection = True
                return
            if self.server.bytes_per_second:
                time.sleep(len(piece) / self.server.bytes_per_second)
        if "stall" in fault:
            self.server.stopping.wait(60)
        if "cut" in fault or "stall" in fault:
            self.close_connection = True
            self.connection.close()

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_):  # killed clients are expected
        pass


@contextmanager
def serving(server):
    """Run a server in a thread; yields its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_server(
    files, status=None, *, faults=(), cdn=False, hashes=True, ranges=True, bytes_per_second=None, ssl_context=None
):
    """Serve {'ORG/NAME/resolve/main/FILE': bytes}; yields (endpoint, :class:`Seen`).

    Args:
        files: The files; every revision has the same ones.
        status: Status for every request.
        faults: Faults, as described above.
        cdn: Redirect to another host, which has ETags of its own, as the Hub does for large files.
        hashes: Send ETags and commits.
        ranges: Understand Range requests.
        bytes_per_second: Throttle.
        ssl_context: Speak HTTPS.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.files, server.status, server.faults = files, status, list(faults)
    server.cdn, server.hashes, server.ranges, server.bytes_per_second = cdn, hashes, ranges, bytes_per_second
    server.seen, server.mutex, server.stopping = Seen(), threading.Lock(), threading.Event()
    if ssl_context is not None:
        server.socket = ssl_context.wrap_socket(server.socket, server_side=True)
    with serving(server) as endpoint:
        try:
            yield endpoint.replace("http", "https") if ssl_context else endpoint, server.seen
        finally:
            server.stopping.set()
