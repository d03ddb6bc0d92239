"""A stand-in for a dataset repository on the Hub: serves a folder to huggingface_hub's file system."""

import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub_server import serving


@contextmanager
def serve_repository(folder, repo, token):
    """Serve ``folder`` as the gated dataset ``repo``; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, body, status=200, headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def entry(self, path):
            if path.is_dir():
                return {"type": "directory", "path": path.relative_to(folder).as_posix(), "oid": "d"}
            data = path.read_bytes()
            return {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": len(data),
                "oid": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
                "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
            }

        def handle_any(self):
            path = unquote(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length", 0))
            asked = json.loads(self.rfile.read(length)) if length and self.command == "POST" else {}
            api = f"/api/datasets/{repo}"
            if self.headers.get("Authorization") != f"Bearer {token}":
                gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this dataset is restricted."}
                self.answer(b"", 401, gated)
            elif path in (api, f"{api}/revision/main"):
                self.answer(json.dumps({"id": repo, "sha": "a" * 40, "siblings": [], "tags": []}).encode())
            elif path.startswith(f"{api}/tree/main"):
                below = folder / path.removeprefix(f"{api}/tree/main").strip("/")
                files = [self.entry(path) for path in sorted(below.rglob("*"))]
                self.answer(json.dumps(files).encode() if below.exists() else b"[]", 200 if below.exists() else 404)
            elif path == f"{api}/paths-info/main":
                paths = [folder / name for name in asked["paths"]]
                self.answer(json.dumps([self.entry(one) for one in paths if one.exists() and one != folder]).encode())
            elif path.startswith(f"/datasets/{repo}/resolve/main/"):
                self.send_file(folder / path.removeprefix(f"/datasets/{repo}/resolve/main/"))
            else:
                self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

        do_GET = do_POST = do_HEAD = handle_any  # noqa: N815

        def send_file(self, path):
            if not path.is_file():
                self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
                return
            data, status = path.read_bytes(), 200
            headers = {"ETag": '"e"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(data), len(data))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                data, status = data[int(first) : end], 206
            self.answer(data, status, headers)

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as endpoint:
        yield endpoint
