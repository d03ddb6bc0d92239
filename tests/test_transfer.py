"""What a bad network, server, disk or concurrent process may do to a download, and what must come of it."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import urllib3
from filelock import FileLock
from hub_server import hub_server, serving
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars

from wn21k_zoo import cache, download, hub, registry, transfer
from wn21k_zoo.checkpoints import CHECKPOINTS, Checkpoint, HubSource, URLSource
from wn21k_zoo.errors import (
    AccessDeniedError,
    AuthenticationError,
    CacheError,
    ChecksumError,
    DownloadError,
    InvalidArgumentError,
    OfflineError,
    RemoteNotFoundError,
)
from wn21k_zoo.on_disk import cached_files, find_local

BODY = hashlib.shake_256(b"weights").digest(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
REPO, NAME = "org/name", "model.safetensors"
KINDS = ("hub", "plain")


def files_of(kind):
    return {f"{REPO}/resolve/main/{NAME}" if kind == "hub" else f"files/model-{SHA256[:8]}.pth": BODY}


def checkpoint_of(kind, endpoint, **changes):
    if kind == "hub":
        source = HubSource(repo_id=REPO, filenames=(NAME,), **changes)
    else:
        source = URLSource(url=f"{endpoint}/files/model-{SHA256[:8]}.pth", **changes)
    return Checkpoint(
        name="tiny.weights", architecture="resnet18", label_space="imagenet1k", head="softmax", resize="squash",
        input_size=(3, 224, 224), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop_pct=1.0,
        sources=(source,),
    )  # fmt: skip


def plain_checkpoint(url):
    """A checkpoint whose file has no known hash."""
    checkpoint = checkpoint_of("plain", "")
    return type(checkpoint)(**{**vars(checkpoint), "sources": (URLSource(url=url),)})


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty cache and short waits."""
    monkeypatch.setenv("WN21K_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(hub, "BACKOFF_SECONDS", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    """Start hub_server as the Hub of this process."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    def start(*args, **kwargs):
        server = hub_server(*args, **kwargs)
        endpoint, seen = server.__enter__()
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        servers.append(server)
        return endpoint, seen

    servers = []
    assert huggingface_hub
    yield start
    for server in servers:
        server.__exit__(None, None, None)


def leftovers(root):
    return [path for path in root.rglob("*") if path.name.endswith(".part")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_a_hit_and_what_is_written_about_it(kind, root, serve):
    endpoint, seen = serve(files_of(kind))
    checkpoint = checkpoint_of(kind, endpoint)
    fetched = download.fetch(checkpoint)
    assert (fetched.path.read_bytes(), fetched.sha256, fetched.downloaded) == (BODY, SHA256, True)
    assert fetched.checked_against == ("the Hub" if kind == "hub" else "the file's name")
    receipt = cache.read_receipt(fetched.path)
    assert (receipt.sha256, receipt.num_bytes) == (SHA256, len(BODY))
    assert find_local(checkpoint) == fetched.path

    requests, state = len(seen), sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    again = download.fetch(checkpoint)
    assert (again.path, again.downloaded) == (fetched.path, False)
    assert len(seen) == requests
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == state


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_download_is_announced_unless_the_hubs_library_was_told_to_show_nothing(
    quiet, terminal, root, serve, monkeypatch, capsys
):
    endpoint, _ = serve(files_of("plain"), faults=[{"status": 503}])
    monkeypatch.setattr(download, "on_terminal", lambda: terminal)
    (disable_progress_bars if quiet else enable_progress_bars)()  # the former as predict --quiet does
    try:
        download.fetch(checkpoint_of("plain", endpoint))
    finally:
        enable_progress_bars()
    shown = capsys.readouterr().err
    assert shown.count("fetching") == (not quiet and not terminal)
    assert ("━" in shown) == (not quiet and terminal)
    if "fetching" in shown:  # e.g. in a notebook
        assert shown.count("\n") == 1
        assert f", {len(BODY) / 1e6:,.1f} MB" in shown


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize(("kind", "cdn"), [("hub", False), ("hub", True), ("plain", False)])
def test_a_stream_that_is_cut_goes_on(kind, cdn, share, root, serve):
    for _ in range(4):
        faults = [{}, {"cut": share}] if cdn else [{"cut": share}]  # the first one is used up by the redirect
        endpoint, seen = serve(files_of(kind), faults=faults, cdn=cdn)
        fetched = download.fetch(checkpoint_of(kind, endpoint))
        assert fetched.sha256 == SHA256
        assert seen.body_bytes == len(BODY)  # nothing was sent twice
        cache.remove(fetched.path, root)
        assert not leftovers(root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_always_cut_at_once_is_given_up(kind, root, serve):
    endpoint, _ = serve(files_of(kind), faults=[{"cut": 0.0, "always": True}])
    with pytest.raises(DownloadError):
        download.fetch(checkpoint_of(kind, endpoint))
    assert list(cache.receipts(root)) == []


def test_where_no_hash_is_known_it_goes_on_with_the_same_version_only(root, serve):
    files = {"files/plain.pth": BODY}
    endpoint, seen = serve(files, faults=[{"cut": 0.5}])
    with pytest.warns(download.UnverifiedWeightsWarning):
        assert download.fetch(plain_checkpoint(f"{endpoint}/files/plain.pth")).sha256 == SHA256
    assert seen.body_bytes == len(BODY)
    assert seen.headers[-1]["If-Range"] == f'"{SHA256}"'

    part = root / "part"
    part.write_bytes(bytes(1000))  # left by an earlier version
    expected = transfer.Expected(num_bytes=len(BODY), etag='"former"')
    part.rename(root / f"new.{expected.version}.part")
    assert transfer.transfer(f"{endpoint}/files/plain.pth", root / "new", expected) == SHA256


@pytest.mark.parametrize("fault", [{}, {"status": 416}])  # with the size in Content-Range, and without
def test_a_part_that_is_whole_is_not_fetched_again(fault, root, serve):
    endpoint, seen = serve(files_of("plain"), faults=[fault])
    checkpoint = checkpoint_of("plain", endpoint)
    (source,) = checkpoint.sources
    place = root / cache.relative_path(source, source.filename)
    version = transfer.Expected(sha256_prefix=source.sha256_prefix).version
    place.parent.mkdir(parents=True)
    part = place.with_name(f"{place.name}.{version}.part")
    part.write_bytes(BODY)
    assert download.fetch(checkpoint).path.read_bytes() == BODY
    assert (seen.body_bytes, len(seen)) == (0, 1)
    cache.remove(place, root)

    place.parent.mkdir(parents=True)
    part.write_bytes(BODY + b"too much")
    assert download.fetch(checkpoint).sha256 == SHA256
    assert seen.body_bytes == len(BODY)


def test_a_server_without_ranges_starts_again(root, serve):
    endpoint, _ = serve(files_of("plain"), faults=[{"cut": 0.5}], ranges=False)
    assert download.fetch(checkpoint_of("plain", endpoint)).sha256 == SHA256


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_costs_one_new_download(kind, root, serve):
    endpoint, seen = serve(files_of(kind), faults=[{"flip": True}])
    assert download.fetch(checkpoint_of(kind, endpoint)).sha256 == SHA256
    assert sum(request.startswith("GET") for request in seen) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_that_is_always_flipped_is_a_typed_error(kind, root, serve):
    endpoint, seen = serve(files_of(kind), faults=[{"flip": True, "always": True}])
    with pytest.raises(ChecksumError, match=f"expected {SHA256[:8]}.*got [0-9a-f]{{64}}"):
        download.fetch(checkpoint_of(kind, endpoint))
    assert sum(request.startswith("GET") for request in seen) == 2
    assert list(cache.receipts(root)) == []
    assert not leftovers(root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_flipped_in_the_cache_costs_one_new_download(kind, root, serve, monkeypatch):
    endpoint, seen = serve(files_of(kind))
    checkpoint = checkpoint_of(kind, endpoint)
    path = download.fetch(checkpoint).path
    damaged = bytearray(BODY)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    seen.clear()
    assert download.fetch(checkpoint).path.read_bytes() == BODY
    assert sum(request.startswith("GET") for request in seen) == 1

    path.write_bytes(damaged)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match=f"damaged: sha256 expected {SHA256}, got"):
        download.fetch(checkpoint)


def test_a_file_of_another_size_is_refused_before_it_is_read(root, serve):
    endpoint, seen = serve({f"{REPO}/resolve/main/{NAME}": BODY + bytes(40_000_000)})
    with pytest.raises(ChecksumError, match=r"3,000,000 bytes expected, got 43,000,000"):
        download.fetch(checkpoint_of("hub", endpoint, sha256=SHA256, num_bytes=len(BODY)))
    assert seen.body_bytes < 40_000_000  # two tries, neither complete
    assert not leftovers(root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_error_that_passes_is_waited_for(kind, status, method, root, serve):
    if (kind, method) == ("plain", "HEAD"):
        pytest.skip("no HEAD is sent where the name states a hash")
    fault = {"status": status, "on": method, "headers": {"retry-after": "0"}}
    endpoint, _ = serve(files_of(kind), faults=[fault, fault])
    assert download.fetch(checkpoint_of(kind, endpoint)).sha256 == SHA256


@pytest.mark.parametrize(
    ("method", "kind"),
    [("GET", "plain"), *(pytest.param(each, "hub", marks=pytest.mark.slow) for each in ("GET", "HEAD"))],
)
def test_retry_after_is_honoured(kind, method, root, serve):
    fault = {"status": 429, "on": method, "headers": {"retry-after": "1"}}
    endpoint, _ = serve(files_of(kind), faults=[fault])
    begin = time.monotonic()
    assert download.fetch(checkpoint_of(kind, endpoint)).sha256 == SHA256
    assert time.monotonic() - begin >= 1


def test_retry_after_has_a_bound():
    from urllib3 import HTTPResponse

    answer = HTTPResponse(headers={"Retry-After": "86400"}, status=429)
    session = transfer.new_session()
    assert session.get_adapter("https://host").max_retries.get_retry_after(answer) == 60
    assert transfer.asked_wait("7") == 7


@pytest.mark.parametrize(
    ("method", "kind"),
    [("GET", "plain"), *(pytest.param(each, "hub", marks=pytest.mark.slow) for each in ("GET", "HEAD"))],
)
def test_a_retry_after_that_is_no_number_of_seconds_is_passed_over(method, kind, root, serve):
    fault = {"status": 429, "on": method, "headers": {"retry-after": "1.5"}}
    endpoint, _ = serve(files_of(kind), faults=[fault] * 4)
    assert download.fetch(checkpoint_of(kind, endpoint)).sha256 == SHA256


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, AuthenticationError, "log in"),
        (403, AccessDeniedError, "accept its terms"),
        (404, RemoteNotFoundError, "name|revision"),
    ],
)
def test_refusals_are_distinct_and_immediate(kind, status, error, words, root, serve):
    endpoint, seen = serve(files_of(kind), status=status)
    begin = time.monotonic()
    with pytest.raises(error, match=words):
        download.fetch(checkpoint_of(kind, endpoint))
    assert time.monotonic() - begin < 2
    assert len(seen) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_error_that_stays_is_a_typed_error(kind, root, serve):
    endpoint, _ = serve(files_of(kind), status=503)
    with pytest.raises(DownloadError, match="HTTP 503"):
        download.fetch(checkpoint_of(kind, endpoint))


@pytest.mark.parametrize("kind", [pytest.param("hub", marks=pytest.mark.slow), "plain"])
def test_a_stall_ends(kind, root, serve, monkeypatch):
    """With the real waits, this takes 22 s: see the marked test below."""
    monkeypatch.setattr(transfer, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(transfer.Patience, "__init__", patience_of(2.5))
    endpoint, _ = serve(files_of(kind), faults=[{"stall": 0.3, "always": True}])
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=r"stall|No data"):
        download.fetch(checkpoint_of(kind, endpoint))
    assert time.monotonic() - begin < 10
    assert list(cache.receipts(root)) == []


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_stall_ends_within_30_seconds(root, serve):
    endpoint, _ = serve(files_of("hub"), faults=[{"stall": 0.3, "always": True}])
    begin = time.monotonic()
    with pytest.raises(DownloadError):
        download.fetch(checkpoint_of("hub", endpoint))
    assert time.monotonic() - begin < 30


def patience_of(seconds):
    def init(self, seconds=seconds):
        self.seconds, self.spent = seconds, 0.0

    return init


def test_a_dead_port_is_known_at_once(root):
    begin = time.monotonic()
    with pytest.raises(DownloadError, match="reached"):
        download.fetch(checkpoint_of("plain", "http://127.0.0.1:9"))
    with pytest.raises(DownloadError, match="answer"):
        download.fetch(checkpoint_of("hub", ""))
    assert time.monotonic() - begin < 3


def test_a_tls_connection_that_breaks_is_tried_again(root):
    accepted = []

    def accept():
        while len(accepted) < 2:
            connection, _ = listener.accept()
            accepted.append(connection)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with pytest.raises(DownloadError, match="check the network"):
            download.fetch(checkpoint_of("plain", f"https://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join(5)
    assert len(accepted) == 2


@pytest.mark.parametrize(
    ("fault", "interrupted"),
    [(ssl.SSLError(1, "bad record mac"), True), (ssl.SSLCertVerificationError(1, "self-signed"), False)],
)
@pytest.mark.parametrize("wrap", [requests.exceptions.SSLError, urllib3.exceptions.SSLError])
def test_only_a_certificate_is_called_a_certificate(fault, interrupted, wrap):
    with pytest.raises(DownloadError) as caught, transfer._typed_errors("https://host/file", transfer.Patience()):
        raise wrap(fault)
    assert isinstance(caught.value, transfer.BrokenOffError) == interrupted
    assert ("certificate" in str(caught.value)) != interrupted


FETCH = """
import sys
sys.path.insert(0, {tests!r})
from test_transfer import checkpoint_of
from wn21k_zoo import download
try:
    fetched = download.fetch(checkpoint_of({kind!r}, {endpoint!r}))
    print("fetched" if fetched.downloaded else "found", fetched.sha256)
except Exception as error:
    print(type(error).__name__, error)
"""


def start(kind, endpoint, root, **variables):
    code = FETCH.format(tests=str(Path(__file__).parent), kind=kind, endpoint=endpoint)
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "WN21K_CACHE": str(root), **variables}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_part(root, num_bytes, process):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_size >= num_bytes for path in leftovers(root)):
            return
        time.sleep(0.01)
    raise AssertionError("the download did not get that far")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_60_percent_over_https_it_goes_on(kind, root, tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trust = {name: str(tmp_path / "ca.pem") for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")}
    with hub_server(files_of(kind), bytes_per_second=2_000_000, ssl_context=context) as (endpoint, seen):
        first = start(kind, endpoint, root, **trust)
        wait_for_part(root, 0.6 * len(BODY), first)
        first.kill()
        first.communicate()
        assert list(cache.receipts(root)) == []
        time.sleep(0.2)  # bytes in flight to the dead client are still counted
        sent = seen.body_bytes
        second = start(kind, endpoint, root, **trust)
        assert second.communicate(timeout=30)[0] == f"fetched {SHA256}\n"
        assert seen.body_bytes - sent <= 0.45 * len(BODY)
        untrusted = start(kind, endpoint, tmp_path / "other")
        said = untrusted.communicate(timeout=30)[0]
        assert said.startswith("DownloadError")
        assert "certificate cannot be verified" in said
        assert "SSL_CERT_FILE" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_processes_download_once(kind, root):
    with hub_server(files_of(kind), bytes_per_second=2_000_000) as (endpoint, seen):
        processes = [start(kind, endpoint, root) for _ in range(8)]
        answers = [process.communicate(timeout=50)[0].split() for process in processes]
    assert [answer[1] for answer in answers] == [SHA256] * 8
    assert sum(answer[0] == "fetched" for answer in answers) == 1
    assert seen.body_bytes == len(BODY)


@pytest.mark.slow
def test_the_others_go_on_when_the_lock_holder_is_killed(root):
    with hub_server(files_of("hub"), bytes_per_second=1_000_000) as (endpoint, _):
        holder = start("hub", endpoint, root)
        wait_for_part(root, 0.3 * len(BODY), holder)
        waiting = [start("hub", endpoint, root) for _ in range(2)]
        time.sleep(2)
        before = max(path.stat().st_size for path in leftovers(root))
        holder.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        while not any(path.stat().st_size > before + 500_000 for path in leftovers(root)):
            done = [process for process in waiting if process.poll() is not None]
            assert time.monotonic() - killed < 5
            if done:
                break
            time.sleep(0.05)
        assert all(process.communicate(timeout=30)[0].endswith(f"{SHA256}\n") for process in waiting)
        holder.communicate()


def test_leftovers_older_than_a_day_are_removed(root, serve):
    endpoint, _ = serve(files_of("plain"))
    old, young, busy = (root / "hub" / "a" / f"{name}.{'0' * 16}.part" for name in ("old", "young", "busy"))
    old.parent.mkdir(parents=True)
    foreign = root / "mine.part", root / "hub" / "a" / "mine.part", root / "notes" / old.name
    foreign[-1].parent.mkdir()
    for path in (old, young, busy, *foreign):
        path.write_bytes(b"x")
        if path != young:
            os.utime(path, (time.time() - 25 * 3600,) * 2)
    with FileLock(busy.with_name("busy.lock")), ThreadPoolExecutor(1) as pool:
        pool.submit(download.fetch, checkpoint_of("plain", endpoint)).result()
    assert not old.exists()
    assert all(path.exists() for path in (young, busy, *foreign))


def test_a_part_that_is_older_than_a_day_is_resumed(root, serve):
    endpoint, seen = serve(files_of("plain"))
    checkpoint = checkpoint_of("plain", endpoint)
    place = root / cache.relative_path(checkpoint.sources[0], checkpoint.sources[0].filename)
    version = transfer.Expected(sha256_prefix=SHA256[:8]).version
    place.parent.mkdir(parents=True)
    part = place.with_name(f"{place.name}.{version}.part")
    part.write_bytes(BODY[: len(BODY) // 2])
    os.utime(part, (time.time() - 25 * 3600,) * 2)
    assert download.fetch(checkpoint).sha256 == SHA256
    assert seen.body_bytes == len(BODY) - len(BODY) // 2


def test_a_leftover_that_cannot_be_removed_stops_nothing(root, serve, monkeypatch):
    endpoint, _ = serve(files_of("plain"))
    theirs = root / "hub" / "a" / f"theirs.{'0' * 16}.part"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x")
    os.utime(theirs, (time.time() - 25 * 3600,) * 2)
    unlink = Path.unlink

    def refuse(self, *args, **kwargs):
        if self == theirs:
            raise PermissionError(1, "Operation not permitted")
        unlink(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert download.fetch(checkpoint_of("plain", endpoint)).sha256 == SHA256
    with pytest.raises(CacheError, match="cannot be removed"):
        cache.remove(theirs, root)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_only_what_we_wrote_is_listed(root, serve):
    endpoint, _ = serve(files_of("hub"))
    path = download.fetch(checkpoint_of("hub", endpoint)).path
    for name in (
        "thesis.txt",
        "url/thesis.txt",
        "hub/models--org--name/blobs/0",
        "hub/data/a.csv",
        "hub/data/a.csv.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    shutil.copytree(path.parent, root / "backup" / "hub")
    (path.parent / f"folder.{'0' * 16}.part").mkdir()
    (path.parent / f"link.{'0' * 16}.part").symlink_to(root / "thesis.txt")
    assert [found for found, _ in cache.receipts(root)] == [path]
    assert list(cache.leftovers(root, older_than=-1)) == []


def test_what_is_being_fetched_is_not_removed(root, serve):
    endpoint, _ = serve(files_of("hub"))
    path = download.fetch(checkpoint_of("hub", endpoint)).path
    part = path.with_name(f"{path.name}.{'0' * 16}.part")
    part.write_bytes(b"x")
    with FileLock(cache.lock_path(path)), ThreadPoolExecutor(1) as pool:
        assert list(pool.map(cache.remove, (path, part), (root, root))) == [None, None]
        assert cache.lock_path(path).exists()
    assert (cache.remove(part, root), cache.remove(path, root)) == (1, len(BODY))
    assert cache.remove(path, root) == 0
    assert list(root.iterdir()) == []


def test_redirects_without_end_are_a_typed_error(root, serve):
    endpoint, seen = serve(files_of("plain"), faults=[{"status": 302, "headers": {"location": "/x"}, "always": True}])
    with pytest.raises(DownloadError, match="redirects more than 5 times"):
        download.fetch(checkpoint_of("plain", endpoint))
    assert len(seen) == 6


@pytest.mark.parametrize("what", ["sha256_of", "difference"])
def test_a_part_that_somebody_removes_is_a_typed_error(what, root, serve, monkeypatch):
    def vanish(*_):
        raise FileNotFoundError(2, "No such file or directory")

    endpoint, _ = serve(files_of("plain"))
    monkeypatch.setattr(transfer, what, vanish)
    with pytest.raises(CacheError, match="No such file"):
        download.fetch(checkpoint_of("plain", endpoint))


@pytest.mark.skipif(os.name == "nt", reason="any name has a home there")
def test_the_home_folder_of_nobody(monkeypatch):
    monkeypatch.setenv("WN21K_CACHE", "~nosuch/x")
    with pytest.raises(CacheError, match="WN21K_CACHE"):
        cache.cache_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_space_is_known_before_the_first_byte(kind, root, serve):
    endpoint, seen = serve(files_of(kind))
    too_large = 10**18
    with pytest.raises(CacheError, match="MB are needed"):
        download.fetch(checkpoint_of(kind, endpoint, sha256=SHA256, num_bytes=too_large))
    assert seen.body_bytes == 0


def test_a_full_disk_is_a_typed_error(root, serve, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    endpoint, _ = serve(files_of("plain"))
    monkeypatch.setattr(transfer, "_no_link", lambda path, flags: os.open("/dev/full", flags & ~os.O_CREAT))
    with pytest.raises(CacheError, match="full"):
        download.fetch(checkpoint_of("plain", endpoint))
    assert not leftovers(root)


def test_a_cache_that_cannot_be_written(root, serve, monkeypatch, tmp_path):
    endpoint, seen = serve(files_of("hub"))
    checkpoint = checkpoint_of("hub", endpoint)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="WN21K_CACHE"):
        download.fetch(checkpoint, cache_dir=tmp_path / "file")
    assert seen.body_bytes == 0
    if not hasattr(os, "geteuid"):
        pytest.skip("needs POSIX permissions")
    path = download.fetch(checkpoint).path
    for folder in (root, *root.rglob("*")):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    try:
        assert download.fetch(checkpoint).path == path  # a hit writes nothing
        cache_less = checkpoint_of("hub", endpoint, revision="other")
        if os.geteuid() == 0:
            monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        before = seen.body_bytes
        with pytest.raises(CacheError, match="cannot be"):
            download.fetch(cache_less)
        assert seen.body_bytes == before
    finally:
        for folder in (root, *root.rglob("*")):
            folder.chmod(0o755 if folder.is_dir() else 0o644)


def test_a_cache_that_another_user_does_not_share_is_an_error_of_ours(root, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    monkeypatch.setattr(Path, "rglob", lambda path, _: refused(path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CacheError, match="ask its owner"):
        download.fetch(plain_checkpoint("https://host.invalid/model.pth"))
    checkpoint = checkpoint_of("plain", "https://host.invalid")
    for look in (download.fetch, find_local, lambda _: [*cache.leftovers(root)]):
        with pytest.raises(CacheError, match=r"cannot be read \(Permission denied\); ask its owner .*WN21K_CACHE"):
            look(checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_offline_opens_no_socket(kind, root, monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"model[.-].*wn21k download tiny.weights") as caught:
        download.fetch(checkpoint_of(kind, "https://host.invalid"))
    assert str(root) in str(caught.value)
    with pytest.raises(OfflineError, match="hf-hub:org/name"):
        download.fetch_file(HubSource(repo_id=REPO), ("config.json",))


def test_what_somebody_put_into_the_cache_is_used_if_its_name_states_its_hash(root, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = checkpoint_of("plain", "https://host.invalid")
    (source,) = checkpoint.sources
    place = root / cache.relative_path(source, source.filename)
    place.parent.mkdir(parents=True)
    place.write_bytes(BODY)
    fetched = download.fetch(checkpoint)
    assert (fetched.path, fetched.checked_against) == (place, "the file's name")
    assert find_local(checkpoint) == place
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, how: (path, how) != (place, os.R_OK))
        assert find_local(checkpoint) is None  # another user's
    place.write_bytes(BODY[:-1])
    with pytest.raises(OfflineError, match=r"is not at .* is damaged: sha256 expected"):
        download.fetch(checkpoint)

    nameless = plain_checkpoint("https://host.invalid/weights.pth")
    place = root / cache.relative_path(nameless.sources[0], "weights.pth")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(BODY)
    with pytest.raises(OfflineError, match=r"weights\.pth is not used, as nothing states its hash.*: wn21k download"):
        download.fetch(nameless)
    assert find_local(nameless) is None


WITH_HASH = {
    one.name: [source for source in one.sources if getattr(source, "sha256_prefix", None)] for one in CHECKPOINTS
}


@pytest.mark.parametrize("name", [name for name, sources in WITH_HASH.items() if sources])
def test_where_a_file_can_be_put_by_hand_is_told(name, root, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint, named = registry.get_checkpoint(name), WITH_HASH[name]
    with pytest.raises(OfflineError) as caught:
        download.fetch(checkpoint)
    assert f"is not at {root / cache.relative_path(named[0], named[0].filename)}, and" in str(caught.value)


def test_a_mirror_is_asked_first_and_not_believed(root, serve, monkeypatch):
    origin, origin_seen = serve(files_of("hub"))
    place = "mirror/hub/org--name/model.safetensors"
    with hub_server({place: BODY}, hashes=False) as (mirror, seen):
        monkeypatch.setenv("WN21K_MIRROR", f"{mirror}/mirror/")
        fetched = download.fetch(checkpoint_of("hub", origin))
        assert seen == [f"GET /{place}"]
        assert origin_seen.body_bytes == 0
        assert not any("Authorization" in headers for headers in seen.headers)
        cache.remove(fetched.path, root)
    with hub_server({place: BODY[:-1] + b"!"}, hashes=False) as (mirror, _):
        monkeypatch.setenv("WN21K_MIRROR", f"{mirror}/mirror")
        cache.remove(download.fetch(checkpoint_of("hub", origin)).path, root)
        assert origin_seen.body_bytes == len(BODY)
    monkeypatch.setenv("WN21K_MIRROR", "http://127.0.0.1:9")  # down, so the origin is used
    assert download.fetch(checkpoint_of("hub", origin)).sha256 == SHA256


def test_a_copy_of_the_cache_is_a_mirror_where_the_hub_is_out_of_reach(root, serve, monkeypatch, tmp_path):
    endpoint, _ = serve(files_of("hub"))
    download.fetch(checkpoint_of("hub", endpoint), cache_dir=tmp_path / "copy")
    copy = {
        str(p.relative_to(tmp_path / "copy")): p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()
    }
    dead, _ = serve({}, status=500)
    with hub_server(copy, hashes=False) as (mirror, _):
        monkeypatch.setenv("WN21K_MIRROR", mirror)
        fetched = download.fetch(checkpoint_of("hub", dead))
    assert (fetched.sha256, fetched.checked_against) == (SHA256, "the mirror")


@pytest.mark.parametrize("status", [500, None])  # a server error; a dead port
def test_a_mirror_stands_in_for_a_plain_server_that_is_out_of_reach(status, root, serve, monkeypatch):
    endpoint, _ = serve({}, status=status) if status else ("http://127.0.0.1:9", None)
    checkpoint = plain_checkpoint(f"{endpoint}/files/plain.pth")
    place = cache.relative_path(checkpoint.sources[0], "plain.pth").as_posix()
    receipt = {
        "source": "x", "filename": "plain.pth", "revision": None, "num_bytes": len(BODY), "sha256": SHA256,
        "checked_against": None,
    }  # fmt: skip
    with hub_server({place: BODY, f"{place}.json": json.dumps(receipt).encode()}, hashes=False) as (mirror, _):
        monkeypatch.setenv("WN21K_MIRROR", mirror)
        fetched = download.fetch(checkpoint)
    assert (fetched.sha256, fetched.checked_against) == (SHA256, "the mirror")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_no_mirror_stands_in_for_an_origin_that_refuses(kind, status, root, serve, monkeypatch):
    endpoint, _ = serve({}, status=status)
    checkpoint = checkpoint_of("hub", "") if kind == "hub" else plain_checkpoint(f"{endpoint}/files/plain.pth")
    with hub_server({}) as (mirror, seen):
        monkeypatch.setenv("WN21K_MIRROR", mirror)
        with pytest.raises(DownloadError, match=f"HTTP {status}"):
            download.fetch(checkpoint)
    assert seen == []


@pytest.fixture
def endless():
    """A server that sends everybody 10 MB without announcing the size."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"{" * 100_000)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as endpoint:
        yield endpoint


def test_what_does_not_end_is_left(endless, tmp_path):
    expected = transfer.Expected(num_bytes=1000, sha256=SHA256)
    with pytest.raises(ChecksumError, match="over 1,000 bytes"):
        transfer.transfer(f"{endless}/x", tmp_path / "x", expected)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    with pytest.raises(DownloadError, match="over 65,536 bytes"):
        transfer.read_text(f"{endless}/x", transfer.Patience())


def test_a_mirror_has_no_query(root, monkeypatch):
    monkeypatch.setenv("WN21K_MIRROR", "http://127.0.0.1:9/m?token=secret")
    with pytest.raises(InvalidArgumentError, match="WN21K_MIRROR has a query") as error:
        download.fetch(checkpoint_of("hub", ""))
    assert "secret" not in str(error.value)


def test_a_mirror_is_not_asked_for_what_cannot_be_checked(root, serve, monkeypatch):
    endpoint, _ = serve({"files/plain.pth": BODY}, hashes=False)
    checkpoint = plain_checkpoint(f"{endpoint}/files/plain.pth")
    place = cache.relative_path(checkpoint.sources[0], "plain.pth").as_posix()
    with hub_server({place: BODY[::-1]}) as (mirror, seen):
        monkeypatch.setenv("WN21K_MIRROR", mirror)
        with pytest.warns(download.UnverifiedWeightsWarning):
            assert download.fetch(checkpoint).sha256 == SHA256
    assert seen == []


@pytest.mark.parametrize(
    "change", [{"num_bytes": "7"}, {"num_bytes": -1}, {"sha256": "x"}, {"sha256": None}, {"source": 1}, {"revision": 1}]
)
def test_a_receipt_of_the_wrong_types_is_none(change):
    right = {
        "source": "x",
        "filename": "f",
        "revision": None,
        "num_bytes": 7,
        "sha256": SHA256,
        "checked_against": None,
    }
    assert cache.receipt_from_json(json.dumps(right)).num_bytes == 7
    for text in (json.dumps({**right, **change}), "[" * 100_000):
        with pytest.raises(ValueError, match=r"not a receipt|brackets"):
            cache.receipt_from_json(text)


@pytest.mark.parametrize("cdn", [False, True])
def test_netrc_is_not_consulted(cdn, root, serve, monkeypatch, tmp_path):
    hosts = ("127.0.0.1", "localhost")
    (tmp_path / "netrc").write_text("".join(f"machine {host} login me password secret\n" for host in hosts))
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    endpoint, seen = serve(files_of("hub"), cdn=cdn)
    checkpoint = checkpoint_of("hub", endpoint)
    assert hub.answers(checkpoint.sources[0], 5)
    assert download.fetch(checkpoint).sha256 == SHA256
    for request, headers in zip(seen, seen.headers, strict=True):
        sent = {name.lower(): value for name, value in headers.items()}.get("authorization")
        assert sent == (None if request.startswith("GET /cdn/") else "Bearer hf_secret"), request


def test_a_password_in_an_address_is_sent():
    session = transfer.new_session()
    asked = session.prepare_request(requests.Request("GET", "https://me:secret@mirror.invalid/file"))
    assert asked.headers["Authorization"] == "Basic bWU6c2VjcmV0"


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(root, serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    endpoint, seen = serve(files_of("hub"), cdn=True)
    assert download.fetch(checkpoint_of("hub", endpoint)).sha256 == SHA256
    sent = dict(zip(seen, seen.headers, strict=True))
    for request, headers in sent.items():
        has_token = "hf_secret" in str(headers)
        assert has_token == (not request.startswith("GET /cdn/")), request


def test_a_proxy_is_used(root, monkeypatch):
    with hub_server({"http://somewhere.invalid/" + path: BODY for path in files_of("plain")}) as (proxy, seen):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        fetched = download.fetch(checkpoint_of("plain", "http://somewhere.invalid"))
    assert fetched.sha256 == SHA256
    assert seen[0].startswith("GET http://somewhere.invalid/")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "advice"), [(407, "USER:PASSWORD@ before its host"), (403, "check HTTPS_PROXY")])
def test_a_proxy_that_refuses_is_named(kind, status, advice, root, serve, monkeypatch):
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(status, "Proxy Says No")

        def log_message(self, *_):
            pass

    serve({})
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "https://hub.invalid/{repo_id}/resolve/{revision}/{filename}",
    )
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Proxy)) as proxy:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        close_session()  # which has read the variables
        try:
            with pytest.raises(DownloadError, match=rf"the proxy refuses \({status} Proxy Says No\); .*{advice}"):
                download.fetch(checkpoint_of(kind, "https://plain.invalid"))
        finally:
            close_session()


@pytest.mark.parametrize("kind", KINDS)
def test_a_socks_proxy_without_its_library_is_told(kind, root, serve, monkeypatch):
    endpoint, _ = serve(files_of(kind))
    close_session()  # which has read the variables
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:9")
    with pytest.raises(DownloadError, match="needs two more libraries: pip install"):
        download.fetch(checkpoint_of(kind, endpoint))


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_file_in_the_hubs_own_cache_is_used_in_place(root, serve, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "blobs" / SHA256).write_bytes(BODY)
    (repository / "refs" / "main").write_text("abc")
    link = repository / "snapshots" / "abc" / NAME
    link.symlink_to(repository / "blobs" / SHA256)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = checkpoint_of("hub", "")
    fetched = download.fetch(checkpoint)
    assert (fetched.path, fetched.downloaded) == (link, False)
    assert not root.exists()

    (repository / "blobs" / SHA256).write_bytes(BODY[:-1] + b"!")
    with pytest.raises(OfflineError, match="damaged"):
        download.fetch(checkpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    endpoint, _ = serve(files_of("hub"))
    assert download.fetch(checkpoint_of("hub", endpoint)).path.is_relative_to(root)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_of_the_hubs_own_cache_only_what_has_a_hash_is_used(root, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hub" / "models--org--name"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    blob = repository / "blobs" / "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # a small file, named by its Git hash
    blob.write_bytes(b"{}")
    (repository / "snapshots/abc/config.json").symlink_to(blob)
    source = HubSource(repo_id=REPO)
    assert download.fetch_file(source, ("config.json",)).path.read_bytes() == b"{}"
    (repository / "snapshots" / "abc" / NAME).write_bytes(BODY)  # not a link, so its hash is unknown
    with pytest.raises(OfflineError):
        download.fetch_file(source, (NAME,))
    assert find_local(checkpoint_of("hub", "")) is None
    (repository / "snapshots/abc" / NAME).rename(repository / "snapshots/abc/pytorch_model.bin")
    locked = HubSource(repo_id=REPO, sha256=SHA256, num_bytes=len(BODY))  # which says nothing of the other file
    checkpoint = checkpoint_of("hub", "")
    assert find_local(type(checkpoint)(**{**vars(checkpoint), "sources": (locked,)})) is None
    blob.write_bytes(b"[]")
    with pytest.raises(OfflineError):
        download.fetch_file(source, ("config.json",))


def test_without_any_hash_it_warns_and_holds_on_to_the_first(root, serve):
    source = URLSource(url="")
    endpoint, _ = serve({"files/plain.pth": BODY}, faults=[{"cut": 0.5}], hashes=False)
    source = URLSource(url=f"{endpoint}/files/plain.pth")
    checkpoint = checkpoint_of("plain", endpoint)
    checkpoint = type(checkpoint)(**{**vars(checkpoint), "sources": (source,)})
    with pytest.warns(download.UnverifiedWeightsWarning, match=SHA256):
        fetched = download.fetch(checkpoint)
    assert fetched.checked_against is None
    assert not download.fetch(checkpoint).downloaded  # and no second warning


@pytest.mark.parametrize(
    ("body", "what"), [(b"\xef\xbb\xbf\n <!DOCTYPE html><title>Log in</title>", "a web page"), (b"", "nothing")]
)
def test_a_login_page_is_not_taken_for_a_file_whose_hash_nobody_states(body, what, root, serve):
    files = {"files/plain.pth": body}
    endpoint, _ = serve(files)
    with pytest.raises(DownloadError, match=rf"plain\.pth sends {what} in place of the file: a login page"):
        download.fetch(plain_checkpoint(f"{endpoint}/files/plain.pth"))
    assert not leftovers(root)
    files["files/plain.pth"] = BODY
    with pytest.warns(download.UnverifiedWeightsWarning):
        assert download.fetch(plain_checkpoint(f"{endpoint}/files/plain.pth")).sha256 == SHA256


def test_an_answer_that_is_no_file_is_refused(root, serve):
    endpoint, _ = serve(files_of("plain"), faults=[{"status": 302}, {"status": 204}])
    for status in (302, 204):
        with pytest.raises(DownloadError, match=f"answers HTTP {status}; which is no file"):
            download.fetch(checkpoint_of("plain", endpoint))


def test_what_nobody_states_a_hash_of_must_not_change(root, serve):
    files = {"files/plain.pth": BODY}
    endpoint, _ = serve(files)
    checkpoint = plain_checkpoint(f"{endpoint}/files/plain.pth")
    with pytest.warns(download.UnverifiedWeightsWarning):
        path = download.fetch(checkpoint).path
    for content in (b"something else", BODY[::-1]):
        path.write_bytes(b"damaged")
        files["files/plain.pth"] = content
        with pytest.raises(ChecksumError, match=r"expected.*wn21k cache prune tiny\.weights$"):
            download.fetch(checkpoint)
        assert not leftovers(root)
    files["files/plain.pth"] = BODY
    fetched = download.fetch(checkpoint)  # and no second warning
    assert (fetched.sha256, fetched.checked_against) == (SHA256, "the first download")

    path.unlink()
    files["files/plain.pth"] = b"a new version"
    with pytest.raises(ChecksumError, match="first download"):
        download.fetch(checkpoint)
    for place in cached_files(checkpoint.sources):  # as wn21k cache prune does
        cache.remove(place, root)
    with pytest.warns(download.UnverifiedWeightsWarning):
        assert download.fetch(checkpoint).path.read_bytes() == b"a new version"


def test_small_files_of_the_hub_are_checked_by_their_git_hash(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    right = transfer.Expected(git_sha1="9e26dfeeb6e641a33dae4961196235bdb965b21b")  # git hash-object
    assert transfer.difference(tmp_path / "config.json", "", right) is None
    assert "Git sha1" in transfer.difference(tmp_path / "config.json", "", transfer.Expected(git_sha1="0" * 40))


def test_the_next_source_is_tried(root, serve):
    endpoint, _ = serve(files_of("plain"))
    hub_source = checkpoint_of("hub", endpoint).sources[0]
    checkpoint = checkpoint_of("plain", endpoint)
    both = type(checkpoint)(**{**vars(checkpoint), "sources": (hub_source, *checkpoint.sources)})
    assert "url" in download.fetch(both).path.parts
    cache.remove(find_local(both), root)
    wrong = type(checkpoint)(**{**vars(checkpoint), "sources": (hub_source, URLSource(url=f"{endpoint}/none.pth"))})
    with pytest.raises(RemoteNotFoundError, match="Also tried"):
        download.fetch(wrong)


def test_threads_of_one_process_share_a_download(root, serve):
    endpoint, seen = serve(files_of("hub"), bytes_per_second=5_000_000)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(download.fetch, itertools.repeat(checkpoint_of("hub", endpoint), 4)))
    assert [fetched.sha256 for fetched in results] == [SHA256] * 4
    assert seen.body_bytes == len(BODY)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.parametrize("content", ["", "precious"])
def test_a_partial_download_that_is_a_link_is_not_followed(tmp_path, content):
    victim, expected = tmp_path / "victim", transfer.Expected(sha256=hashlib.sha256(b"body").hexdigest())
    victim.write_text(content)
    part = tmp_path / f"f.pth.{expected.version}{cache.PART_SUFFIX}"
    part.symlink_to(victim)
    with hub_server({"f.pth": b"body"}) as (endpoint, _):
        transfer.transfer(f"{endpoint}/f.pth", tmp_path / "f.pth", expected)
    assert victim.read_text() == content
    assert (tmp_path / "f.pth").read_bytes() == b"body"
    assert not (tmp_path / "f.pth").is_symlink()


def test_numbers_of_bytes():
    assert transfer.number_of_bytes("12") == 12
    assert [transfer.number_of_bytes(text) for text in (None, "", "-1", "\xb2", "9" * 5000, "1.5")] == [None] * 6
