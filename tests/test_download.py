import hashlib
import time

import pytest

from wn21k_zoo import download, registry
from wn21k_zoo.checkpoints import DEFAULT_CHECKPOINT, HubSource, PackageSource
from wn21k_zoo.errors import ChecksumError, DownloadError, MissingExtraError, WeightsNotFoundError

EMBEDDED = registry.get_checkpoint("efficientnet_lite0.embedded_in1k")
DEFAULT = registry.get_checkpoint(DEFAULT_CHECKPOINT)


def test_embedded_file_is_the_published_one():
    path = download.find_local(EMBEDDED)
    content = download.read_verified(path, EMBEDDED.sha256).read()
    assert len(content) == EMBEDDED.num_bytes
    assert hashlib.sha256(content).hexdigest() == EMBEDDED.sha256


def test_changed_file_is_refused(tmp_path):
    content = bytearray(download.find_local(EMBEDDED).read_bytes())
    content[1000] ^= 1
    (tmp_path / "changed.pth").write_bytes(content)
    with pytest.raises(ChecksumError, match=f"expected {EMBEDDED.sha256}, got [0-9a-f]{{64}}"):
        download.read_verified(tmp_path / "changed.pth", EMBEDDED.sha256)
    with pytest.raises(WeightsNotFoundError):
        download.read_verified(tmp_path, EMBEDDED.sha256)


def test_missing_package_names_its_extra():
    source = PackageSource(package="no_such_package_here", path="x.pth", extra="embedded")
    with pytest.raises(MissingExtraError, match=r"wn21k-zoo\[embedded\]"):
        download.require_package(source)


def test_unreachable_is_known_at_once():
    begin = time.monotonic()
    assert not download.is_reachable(DEFAULT)
    assert not download.is_reachable(EMBEDDED)
    assert time.monotonic() - begin < 2


def test_a_server_that_never_answers_costs_less_than_a_second(monkeypatch):
    monkeypatch.setattr(download, "_probe", lambda *_: time.sleep(3))  # a look-up of a name that hangs
    begin = time.monotonic()
    assert not download.is_reachable(DEFAULT)
    assert time.monotonic() - begin < 1


def test_no_network_is_one_typed_error():
    with pytest.raises(DownloadError, match="does not answer"):
        download.fetch_from_hub(HubSource(repo_id="timm/convnext_tiny.in12k"))
