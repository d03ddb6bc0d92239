import time

import pytest

from wn21k_zoo import download, hub, registry
from wn21k_zoo.checkpoints import DEFAULT_CHECKPOINT, EMBEDDED_CHECKPOINT, PackageSource
from wn21k_zoo.errors import ChecksumError, MissingExtraError
from wn21k_zoo.on_disk import find_local

EMBEDDED = registry.get_checkpoint(EMBEDDED_CHECKPOINT)
DEFAULT = registry.get_checkpoint(DEFAULT_CHECKPOINT)


def with_source(source):
    return type(EMBEDDED)(**{**vars(EMBEDDED), "sources": (source,)})


def package(folder, monkeypatch, name, content):
    (folder / name).mkdir()
    (folder / name / "weights.pth").write_bytes(content)
    monkeypatch.syspath_prepend(folder)
    return PackageSource(package=name, path="weights.pth", extra="embedded", sha256=EMBEDDED.sha256, num_bytes=1)


def test_embedded_file_is_the_published_one():
    fetched = download.fetch(EMBEDDED)
    assert (fetched.sha256, fetched.num_bytes) == (EMBEDDED.sha256, EMBEDDED.num_bytes)
    assert fetched.path == find_local(EMBEDDED)
    assert not fetched.downloaded


def test_changed_file_is_refused(tmp_path, monkeypatch):
    content = bytearray(find_local(EMBEDDED).read_bytes())
    content[1000] ^= 1
    source = package(tmp_path, monkeypatch, "a_changed_package", content)
    with pytest.raises(ChecksumError, match=f"expected {EMBEDDED.sha256}, got [0-9a-f]{{64}}"):
        download.fetch(with_source(source))


def test_missing_package_names_its_extra():
    source = PackageSource(package="no_such_package", path="x.pth", extra="embedded", sha256="0" * 64, num_bytes=1)
    with pytest.raises(MissingExtraError, match=r"wn21k-zoo\[embedded\]"):
        download.fetch(with_source(source))


def test_unreachable_is_known_at_once():
    begin = time.monotonic()
    assert not download.is_reachable(DEFAULT)
    assert not download.is_reachable(EMBEDDED)
    assert time.monotonic() - begin < 2


def test_a_server_that_never_answers_costs_less_than_a_second(monkeypatch):
    monkeypatch.setattr(hub, "_probe", lambda *_: time.sleep(3))  # a DNS lookup that hangs
    begin = time.monotonic()
    assert not download.is_reachable(DEFAULT)
    assert time.monotonic() - begin < 1
