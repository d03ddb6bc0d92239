import contextlib
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hub_server import serving
from PIL import Image

from wn21k_zoo import urls
from wn21k_zoo.errors import ImageTooLargeError, ImageURLError
from wn21k_zoo.images import load_image


@pytest.fixture
def server():
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/image.png":
                body, status, extra = picture.getvalue(), 200, {}
            elif self.path == "/loop":
                body, status, extra = b"", 302, {"location": "/loop"}
            elif self.path == "/once":
                body, status, extra = b"", 302, {"location": "/image.png"}
            elif self.path == "/inside":
                body, status, extra = b"", 302, {"location": "http://127.0.0.2/"}
            elif self.path == "/file":
                body, status, extra = b"", 302, {"location": "file:///etc/passwd"}
            elif self.path == "/large":
                body, status, extra = b"x" * 2000, 200, {}
            elif self.path == "/short":
                body, status, extra = b"x" * 20, 200, {"content-length": "100"}
            elif self.path == "/gzip":
                body, status, extra = b"x" * 20, 200, {"content-encoding": "gzip"}
            elif self.path == "/slow":
                with contextlib.suppress(OSError):
                    for _ in range(8):  # the headers, byte by byte
                        self.wfile.write(b"H")
                        time.sleep(0.2)
                return
            else:
                body, status, extra = b"", 404, {}
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            if self.path not in ("/large", "/short"):  # these do not announce their size
                self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with serving(HTTPServer(("127.0.0.1", 0), Handler)) as endpoint:
        yield endpoint


@pytest.fixture
def public(server, monkeypatch):
    """The server, treated as a public one."""
    monkeypatch.setattr(urls, "_is_public", lambda address: address == "127.0.0.1")
    return server


def test_image_and_redirect(public):
    for path in ("/image.png", "/once"):
        assert load_image(public + path, allow_url=True).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/loop", "redirects more than 5"),
        ("/inside", r"127\.0\.0\.2, which is not a public"),
        ("/file", "only http and https"),
        ("/none", "HTTP 404"),
    ],
)
def test_refused(public, path, words):
    with pytest.raises(ImageURLError, match=words):
        urls.fetch_url(public + path)


def test_limits(public, monkeypatch):
    monkeypatch.setattr(urls, "MAX_BYTES", 1000)
    with pytest.raises(ImageTooLargeError):
        urls.fetch_url(public + "/large")
    monkeypatch.setattr(urls, "MAX_SECONDS", 0.5)
    with pytest.raises(ImageURLError, match="took more"):
        urls.fetch_url(public + "/slow")
    for thread in threading.enumerate():
        if thread.name == "wn21k-url":
            thread.join(0.5)  # the server would hold it for longer
            assert not thread.is_alive()


def test_nothing_is_fetched_where_the_network_is_switched_off(public, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ImageURLError, match="switched off"):
        load_image(public + "/image.png", allow_url=True)


@pytest.mark.parametrize("path", ["/short", "/gzip"])
def test_damaged_answers_are_one_typed_error(public, path):
    with pytest.raises(ImageURLError, match="could not be fetched"):
        urls.fetch_url(public + path)


def test_private_server_is_not_asked(server):
    with pytest.raises(ImageURLError, match="not a public address"):
        urls.fetch_url(server + "/image.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x", "http://[::1]/", "https://10.0.0.1/", "http://169.254.169.254/", "http://192.168.1.1/",
        "http://[::ffff:10.0.0.1]/", "http://0/", "http://[fe80::1]/", "http://100.64.0.1/",
        "http://[64:ff9b::a00:1]/", "http://[2002:7f00:1::1]/", "http://[::127.0.0.1]/",
        "http://[::ffff:0:127.0.0.1]/", "http://[fec0::1]/", "http://[3fff::1]/", "http://[5f00::1]/", "http://192.88.99.1/",
        "http://192.0.0.192/",
    ],
)  # fmt: skip
def test_private_addresses(url):
    with pytest.raises(ImageURLError, match="not a public address"):
        urls.fetch_url(url)


def test_a_name_that_changes_its_address_is_caught_when_connected(server, monkeypatch):
    port = int(server.rsplit(":", 1)[1])
    real, asked = socket.getaddrinfo, []

    def changing(host, *arguments, **options):
        asked.append(host)
        if len(asked) == 1:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", port))]
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    with pytest.raises(ImageURLError, match=r"127\.0\.0\.1, which is not a public address"):
        urls.fetch_url(f"http://rebinding.example:{port}/image.png")
    assert len(asked) == 2


@pytest.mark.parametrize("url", ["http://", "https://no such host/", "ftp://example.org/x", "gopher:x"])
def test_bad_urls(url):
    with pytest.raises(ImageURLError):
        urls.fetch_url(url)
