"""A small server that speaks as much of the Hub's resolve protocol as a download needs."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def hub_server(files, status=None):
    """Serve {'ORG/NAME/resolve/main/FILE': bytes}; yields (endpoint, list of 'METHOD path' seen)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, with_body):
            seen.append(f"{self.command} {self.path}")
            content = files.get(self.path.lstrip("/"))
            if status or content is None:
                self.send_response(status or 404)
                self.send_header("content-length", "0")
                self.send_header("x-error-code", "EntryNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("x-repo-commit", "0123456789abcdef0123456789abcdef01234567")
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
