"""The commands download, verify, cache, lock and convert, against a local server."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import EMBEDDED, run_in_terminal, start_interruptible
from filelock import FileLock
from hub_server import COMMIT, hub_server
from typer.testing import CliRunner

from wn21k_zoo import cache, locking, registry
from wn21k_zoo.checkpoints import URLSource, apply_lock
from wn21k_zoo.cli.app import app
from wn21k_zoo.convert import convert_file

NAME = "mobilenetv3_large_100.miil_in21k"
OTHER = "tresnet_m.miil_in21k"
BODY = hashlib.shake_256(b"cli").digest(2_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
FILES = {f"timm/{NAME}/resolve/main/model.safetensors": BODY}


@pytest.fixture
def run(tmp_path):
    def run(*arguments, endpoint="http://127.0.0.1:9", **variables):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "WN21K_CACHE": str(tmp_path / "cache"), **variables}
        return subprocess.run(
            [sys.executable, "-m", "wn21k_zoo", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )

    return run


def call(*arguments):
    """Run in this process, where neither a server nor a terminal matters."""
    return CliRunner().invoke(app, arguments)


def rows(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_download_verify_list_prune(run, tmp_path):
    with hub_server(FILES) as (endpoint, _):
        done = run("download", NAME, EMBEDDED, endpoint=endpoint)
        assert done.returncode == 0, done.stderr
        first, second = rows(done)
        assert (first["status"], first["sha256"], first["checked_against"]) == ("downloaded", SHA256, "the Hub")
        assert (second["name"], second["status"]) == (EMBEDDED, "was here")
        assert Path(first["file"]).read_bytes() == BODY
        assert rows(run("download", NAME, "--offline"))[0]["status"] == "was here"

    assert [row["status"] for row in rows(run("verify"))] == ["ok"]
    assert [row["status"] for row in rows(run("verify", NAME, EMBEDDED))] == ["ok", "ok"]
    listed = run("cache", "list")
    assert rows(listed)[0]["file"] == first["file"]
    assert "1 files, 2.0 MB" in listed.stderr

    Path(first["file"]).write_bytes(BODY[:-1] + b"!")
    for arguments in (("verify",), ("verify", NAME)):
        done = run(*arguments)
        assert done.returncode == 1
        assert rows(done)[0]["status"] == "damaged"
    assert run("verify", OTHER).returncode == 1

    part = Path(first["file"]).with_name(f"model.safetensors.{'0' * 16}.part")
    part.write_bytes(b"x")
    os.utime(part, (time.time() - 3 * 24 * 3600,) * 2)
    with FileLock(part.with_name("model.safetensors.lock")):
        done = run("cache", "prune", "--all")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("stays: another process is fetching it") == 2
    assert str(part) in run("cache", "prune", "--dry-run").stdout
    assert part.exists()
    assert run("cache", "prune").returncode == 0
    assert not part.exists()
    assert Path(first["file"]).exists()
    assert run("cache", "prune", "--older-than", "1").stdout == ""
    done = run("cache", "prune", NAME)
    assert done.stdout.strip() == first["file"]
    assert "2.0 MB are freed" in done.stderr
    assert not (tmp_path / "cache" / "hub").exists()
    assert run("verify").returncode == 0


def test_prune_removes_nothing_that_is_not_ours(tmp_path):
    old = time.time() - 3 * 24 * 3600
    for name in ("thesis.txt", "thesis.part", "hub/models--a--b/blobs/0", "hub/x.part", "hub/a.csv", "hub/a.csv.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (old, old))
    before = sorted(tmp_path.rglob("*"))
    done = call("cache", "prune", "--all", "--cache-dir", str(tmp_path))
    assert (done.exit_code, done.stdout) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_no_repository_can_have(run):
    bad = [f"hf-hub:{name}" for name in ("a/b--c", "a/b.", "-a/b", "a", "a/b/c", "a/b.git")]
    with hub_server(FILES) as (endpoint, _):
        done = run("download", *bad, NAME, endpoint=endpoint)
    assert done.returncode == 3
    assert [row["name"] for row in rows(done)] == [NAME]
    assert done.stderr.count("write hf-hub:ORG/NAME") == len(bad)
    assert f"{len(bad)} could not be fetched" in done.stderr


@pytest.mark.slow
def test_one_bad_name_does_not_stop_the_rest(run):
    with hub_server(FILES) as (endpoint, _):
        done = run("download", "mobilenetv3_large_100.miil_in21", NAME, endpoint=endpoint)
    assert done.returncode == 3
    assert f"Did you mean {NAME}" in done.stderr
    assert rows(done)[0]["name"] == NAME
    done = call("download", "nonsense")
    assert (done.exit_code, done.stdout) == (1, "")
    done = call("download")
    assert done.exit_code == 2
    assert "--all" in done.stderr


@pytest.mark.slow
def test_all_of_them_where_nothing_can_be_reached(run):
    begin = time.monotonic()
    done = run("download", "--all", HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert done.returncode == 3  # the embedded one is available
    assert [row["name"] for row in rows(done)] == [EMBEDDED]
    assert done.stderr.count("\n") == 13
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 45


def test_offline_says_what_to_do(run, tmp_path):
    done = run("--offline", "download", NAME)
    assert done.returncode == 1
    assert f"wn21k download {NAME}" in done.stderr
    assert re.search(rf"is not at {re.escape(str(tmp_path / 'cache'))}/\S+_miil-d71cc17b\.pth, and", done.stderr)
    done = run("lock", "--offline")
    assert done.returncode == 1
    assert "switched off" in done.stderr


def test_what_is_copied_from_elsewhere_is_found(run, tmp_path):
    """Follows the advice of the message above."""
    with hub_server(FILES) as (endpoint, _):
        assert run("download", NAME, "--cache-dir", tmp_path / "stick", endpoint=endpoint).returncode == 0
    (tmp_path / "stick").rename(tmp_path / "cache")
    assert rows(run("download", NAME, "--offline"))[0]["status"] == "was here"


def test_a_repository_by_its_name(run):
    files = {"me/mine/resolve/main/config.json": b"{}", "me/mine/resolve/main/pytorch_model.bin": BODY}
    with hub_server(files) as (endpoint, _):
        done = run("download", "hf-hub:me/mine", endpoint=endpoint)
    assert [Path(row["file"]).name for row in rows(done)] == ["config.json", "pytorch_model.bin"]
    done = run("cache", "prune", "hf-hub:me/mine")
    assert [Path(path).name for path in done.stdout.splitlines()] == ["config.json", "pytorch_model.bin"]
    assert done.returncode == 0
    assert "not a Hub repository" in run("cache", "prune", "hf-hub:mine").stderr


def test_a_progress_bar_on_a_terminal_only(tmp_path):
    with hub_server(FILES) as (endpoint, _):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "WN21K_CACHE": str(tmp_path)}
        done, terminal = run_in_terminal([sys.executable, "-m", "wn21k_zoo", "download", NAME], environment)
    assert "100%" in terminal
    assert json.loads(done.stdout)["sha256"] == SHA256


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal there")
@pytest.mark.slow
def test_interrupted_it_says_so_and_goes_on_later(tmp_path):
    environment = {**os.environ, "WN21K_CACHE": str(tmp_path)}
    with hub_server(FILES, bytes_per_second=1_000_000) as (endpoint, seen):
        command = [sys.executable, "-m", "wn21k_zoo", "download", NAME]
        environment["HF_ENDPOINT"] = endpoint
        process = start_interruptible(command, env=environment)
        while not any(path.stat().st_size > 500_000 for path in tmp_path.rglob("*.part")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.communicate(timeout=20)[1]
        assert process.returncode == 130
        before = seen.body_bytes
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["sha256"] == SHA256
    # A quarter was there; bytes in flight when the first process ended may be counted only now.
    assert seen.body_bytes - before < 0.9 * len(BODY)


def test_lock_writes_what_the_sources_say_and_keeps_the_rest(run, tmp_path):
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"hf-hub:timm/other": {"num_bytes": 1}}))
    with hub_server(FILES) as (endpoint, _):
        proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        done = run("lock", NAME, "--output", lock, endpoint=endpoint, **proxy)
    assert done.returncode == 3, done.stderr  # the plain servers cannot be reached
    content = json.loads(lock.read_text())
    assert content[f"hf-hub:timm/{NAME}"] == {"revision": COMMIT, "num_bytes": len(BODY), "sha256": SHA256}
    assert content["hf-hub:timm/other"] == {"num_bytes": 1}
    before = lock.read_bytes()
    assert "nothing to write" in run("lock", "efficientnet_lite0.embedded_in1k", "--output", lock).stderr
    assert lock.read_bytes() == before
    lock.write_text("[]")
    assert "not a lock file" in run("lock", NAME, "--output", lock).stderr


def test_a_plain_server_is_locked_by_hashing_its_file(monkeypatch):
    record = registry.get_checkpoint(NAME)
    name = f"weights-{SHA256[:8]}.pth"  # named by its hash, so a mirror may serve it to a download
    with hub_server({name: BODY}, hashes=False) as (endpoint, _), hub_server({}) as (mirror, asked):
        monkeypatch.setenv("WN21K_MIRROR", mirror)
        source = URLSource(url=f"{endpoint}/{name}")
        mine = type(record)(**{**vars(record), "sources": (source,)})
        lock, failed = locking.lock_sources([mine], {}, lambda *_: None)
        assert (lock[source.key]["sha256"], failed, asked) == (SHA256, 0, [])
    with hub_server({"weights.pth": BODY}, hashes=False) as (endpoint, _):
        source = URLSource(url=f"{endpoint}/weights.pth")
        mine = type(record)(**{**vars(record), "sources": (source,)})
        with pytest.warns(UserWarning, match="Nobody states"):
            lock, failed = locking.lock_sources([mine], {}, lambda *_: None)
    assert (lock, failed) == ({source.key: {"num_bytes": len(BODY), "sha256": SHA256}}, 0)
    (locked,) = apply_lock((mine,), lock)
    assert (locked.sha256, locked.num_bytes) == (SHA256, len(BODY))


@pytest.mark.slow
def test_convert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = timm.create_model("mobilenetv3_large_100", num_classes=11_221).state_dict()
    torch.save({"state_dict": entries}, "in.pth")
    done = call("convert", "in.pth", "-o", "out.safetensors")
    assert done.exit_code == 0, done.stderr
    assert "mobilenetv3_large_100 with 11,221 outputs" in done.stderr
    found = convert_file("out.safetensors").state_dict
    assert torch.equal(found["conv_stem.weight"], entries["conv_stem.weight"])
    for arguments, code, words in (
        (("in.pth", "-o", "out.safetensors"), 2, "--force"),
        (("in.pth", "-o", "out.bin"), 2, ".safetensors"),
        (("none.pth", "-o", "new.safetensors"), 1, "not there"),
        ((".", "-o", "new.safetensors"), 1, "a folder"),
        (("in.pth", "-o", "new.safetensors", "--architecture", "resnet5"), 1, "Did you mean resnet50"),
        (("in.pth", "-o", "new.safetensors", "--architecture", "resnet50"), 1, "missing"),
        (("in.pth", "-o", "no/such/new.safetensors"), 1, "cannot be written"),
    ):
        done = call("convert", *arguments)
        assert (done.exit_code, done.stdout) == (code, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert call("convert", "in.pth", "-o", "out.safetensors", "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


def test_verify_tells_of_the_others_beside_a_wrong_name(tmp_path):
    done = call("verify", EMBEDDED, "nosuch", EMBEDDED, "--cache-dir", str(tmp_path))
    assert done.exit_code == 1
    assert [row["status"] for row in rows(done)] == ["ok", "ok"]
    assert "No model is called 'nosuch'" in done.stderr
    assert (call("verify", "nosuch").exit_code, call("verify", "nosuch").stdout) == (1, "")


def test_verify_and_list_see_what_was_put_there_by_hand_and_what_is_gone(tmp_path, monkeypatch):
    record = registry.get_checkpoint(NAME)
    sources = [source for source in record.sources if isinstance(source, URLSource)]
    assert [bool(source.sha256_prefix) for source in sources] == [True, False]
    by_name, by_nobody = (tmp_path / cache.relative_path(source, source.filename) for source in sources)
    gone = tmp_path / "url" / "example.org" / "gone.pth"
    for path in (by_name, by_nobody, gone):
        path.parent.mkdir(parents=True, exist_ok=True)
    by_name.write_bytes(b"other bytes")
    by_nobody.write_bytes(b"any bytes")
    cache.receipt_path(by_nobody).write_text("damaged")
    receipt = cache.Receipt(
        source="url", filename="gone.pth", revision=None, num_bytes=3, sha256=SHA256, checked_against=None
    )
    cache.write_receipt(gone, receipt)
    place = ("--cache-dir", str(tmp_path))

    done = call("verify", *place)
    assert done.exit_code == 1
    assert {row["file"]: row["status"] for row in rows(done)} == {
        str(by_name): "damaged",
        str(by_nobody): "unknown",
        str(gone): "missing",
    }
    assert all(row["problem"] for row in rows(done))
    named = rows(call("verify", NAME, *place))
    assert [(row["file"], row["status"]) for row in named] == [(str(by_name), "damaged")]
    assert "sha256 expected" in named[0]["problem"]

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.on_disk.sha256_of", refused)
        for names in ((), (NAME,)):
            assert "unreadable" in [row["status"] for row in rows(call("verify", *names, *place))]
    by_name.unlink()
    named = rows(call("verify", NAME, *place))
    assert [(row["file"], row["status"]) for row in named] == [(str(by_nobody), "unknown")]
    by_name.write_bytes(b"other bytes")
    assert {row["file"] for row in rows(call("cache", "list", *place))} == {str(by_name), str(by_nobody)}
    assert len(call("cache", "prune", "--all", *place).stdout.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []
    done = call("verify", *place)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "nothing in the cache" in done.stderr


@pytest.mark.parametrize("command", [("verify",), ("cache", "list"), ("cache", "prune")])
def test_a_cache_folder_that_is_none_is_named(command, tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in (("file", "is a file; name a folder"), ("nosuch", "There is no folder")):
        done = call(*command, "--cache-dir", str(tmp_path / name))
        assert (done.exit_code, done.stdout) == (1, "")
        assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert call("verify", EMBEDDED, "--cache-dir", str(tmp_path / "nosuch")).exit_code == 0  # it is in a package
