"""The fault table: what a bad network, server, disk or neighbour may do to a download, and what comes of it."""

import hashlib
import itertools
import os
import signal
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import hub_server

from wn21k_zoo import cache, download, hub, transfer
from wn21k_zoo.checkpoints import Checkpoint, HubSource, URLSource
from wn21k_zoo.errors import (
    AccessDeniedError,
    AuthenticationError,
    CacheError,
    ChecksumError,
    DownloadError,
    OfflineError,
    RemoteNotFoundError,
)

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


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty cache, and short waits."""
    monkeypatch.setenv("WN21K_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(hub, "BACKOFF_SECONDS", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    """hub_server as the Hub of this process."""
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
    assert download.find_local(checkpoint) == fetched.path

    requests, state = len(seen), sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    again = download.fetch(checkpoint)
    assert (again.path, again.downloaded) == (fetched.path, False)
    assert len(seen) == requests
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == state


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_cut_goes_on(kind, share, root, serve):
    for _ in range(20):
        endpoint, seen = serve(files_of(kind), faults=[{"cut": share}])
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
    assert list(cache.entries(root)) == []


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
    assert list(cache.entries(root)) == []
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
    assert seen.body_bytes < 40_000_000  # two tries, neither to its end
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


@pytest.mark.parametrize(("method", "kind"), [("GET", "plain"), ("GET", "hub"), ("HEAD", "hub")])
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
    assert hub.retry_seconds("86400", 1) == 60
    assert hub.retry_seconds("7", 1) == 7


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_stall_ends(kind, root, serve, monkeypatch):
    """With the real waits it takes 22 s: the marked test below."""
    monkeypatch.setattr(transfer, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(transfer.Patience, "__init__", patience_of(2.5))
    endpoint, _ = serve(files_of(kind), faults=[{"stall": 0.3, "always": True}])
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=r"stall|No data"):
        download.fetch(checkpoint_of(kind, endpoint))
    assert time.monotonic() - begin < 10
    assert list(cache.entries(root)) == []


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stall_ends_within_30_seconds(kind, root, serve):
    endpoint, _ = serve(files_of(kind), faults=[{"stall": 0.3, "always": True}])
    begin = time.monotonic()
    with pytest.raises(DownloadError):
        download.fetch(checkpoint_of(kind, endpoint))
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
        assert list(cache.entries(root)) == []
        time.sleep(0.2)  # what is on its way to a dead client is still counted
        sent = seen.body_bytes
        second = start(kind, endpoint, root, **trust)
        assert second.communicate(timeout=30)[0] == f"fetched {SHA256}\n"
        assert seen.body_bytes - sent <= 0.45 * len(BODY)
        untrusted = start(kind, endpoint, tmp_path / "other")
        assert untrusted.communicate(timeout=30)[0].startswith("DownloadError")


@pytest.mark.parametrize("kind", KINDS)
def test_eight_processes_download_once(kind, root):
    with hub_server(files_of(kind), bytes_per_second=2_000_000) as (endpoint, seen):
        processes = [start(kind, endpoint, root) for _ in range(8)]
        answers = [process.communicate(timeout=50)[0].split() for process in processes]
    assert [answer[1] for answer in answers] == [SHA256] * 8
    assert sum(answer[0] == "fetched" for answer in answers) == 1
    assert seen.body_bytes == len(BODY)


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
    old, young = root / "hub" / "a" / "old.part", root / "hub" / "a" / "young.part"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    download.fetch(checkpoint_of("plain", endpoint))
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_space_is_known_before_the_first_byte(kind, root, serve):
    endpoint, seen = serve(files_of(kind))
    too_large = 10**18
    with pytest.raises(CacheError, match="MB are needed"):
        download.fetch(checkpoint_of(kind, endpoint, sha256=SHA256, num_bytes=too_large))
    assert seen.body_bytes == 0


def test_a_full_disk_is_a_typed_error(root, serve):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    endpoint, _ = serve(files_of("plain"))
    source = checkpoint_of("plain", endpoint).sources[0]
    place = root / cache.relative_path(source, source.filename)
    version = transfer.Expected(sha256_prefix=source.sha256_prefix).version
    place.parent.mkdir(parents=True)
    place.with_name(f"{place.name}.{version}.part").symlink_to("/dev/full")
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
            monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
        before = seen.body_bytes
        with pytest.raises(CacheError, match="cannot be"):
            download.fetch(cache_less)
        assert seen.body_bytes == before
    finally:
        for folder in (root, *root.rglob("*")):
            folder.chmod(0o755 if folder.is_dir() else 0o644)


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
    monkeypatch.setenv("WN21K_MIRROR", "http://127.0.0.1:9")  # gone: the origin has it
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


def test_of_the_hubs_own_cache_only_what_has_a_hash_is_used(root, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hub" / "models--org--name"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    blob = repository / "blobs" / "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # a small file, by its Git hash
    blob.write_bytes(b"{}")
    (repository / "snapshots/abc/config.json").symlink_to(blob)
    source = HubSource(repo_id=REPO)
    assert download.fetch_file(source, ("config.json",)).path.read_bytes() == b"{}"
    (repository / "snapshots" / "abc" / NAME).write_bytes(BODY)  # no link, so that nobody says what it should be
    with pytest.raises(OfflineError):
        download.fetch_file(source, (NAME,))
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
    assert isinstance(download.fetch(both).source, URLSource)
    cache.remove(download.find_local(both), root)
    wrong = type(checkpoint)(**{**vars(checkpoint), "sources": (hub_source, URLSource(url=f"{endpoint}/none.pth"))})
    with pytest.raises(RemoteNotFoundError, match="Nor from"):
        download.fetch(wrong)


def test_threads_of_one_process_share_a_download(root, serve):
    endpoint, seen = serve(files_of("hub"), bytes_per_second=5_000_000)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(download.fetch, itertools.repeat(checkpoint_of("hub", endpoint), 4)))
    assert [fetched.sha256 for fetched in results] == [SHA256] * 4
    assert seen.body_bytes == len(BODY)
