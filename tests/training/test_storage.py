import dataclasses
import json
import multiprocessing
import os
import re
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from filelock import FileLock
from hub_server import serving

from wn21k_zoo.errors import DataError, InvalidArgumentError
from wn21k_zoo.exclusive import exclusive
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training import storage
from wn21k_zoo.training.data import Loader, Stage, TorchDataset, is_class_folder, open_dataset
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.shards import read_info

from .archives import WNIDS, flat_files, jpeg, make_classes, tar_bytes, write_folder
from .loading import Noisy, batches, loader, same
from .staging import index_all, no_locks, stage_all


def test_remote_shards_are_staged_once_verified_and_kept_below_the_limit(shards, tmp_path):
    place = f"file://{shards}"  # local files through fsspec: nothing is read in place
    # Two of the shards fit: one remains if a worker ends after making room for the next, before that has its name.
    dataset = open_dataset(place, stage=Stage(tmp_path / "stage", limit=100_000))
    same(batches(loader(shards)), batches(Loader(dataset, batch_size=8, augmentation=Noisy(), window=3, workers=2)))
    staged = list((tmp_path / "stage").rglob("*.tar"))
    if os.name != "nt":  # where files that a worker has open cannot be removed
        assert 0 < sum(path.stat().st_size for path in staged) <= 100_000
        assert len(staged) < 7


def test_there_is_room_before_a_shard_gets_its_name(tmp_path, monkeypatch):
    stage, seen = Stage(tmp_path, limit=100), []

    def look(source, target):
        seen.append(sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) + source.stat().st_size)
        source.replace(target)

    monkeypatch.setattr(storage, "replace", look)
    for number in range(4):
        stage.get(f"{number}.tar", lambda path: path.write_bytes(bytes(40)))
    assert seen == [40, 80, 80, 80]


def test_a_limit_below_the_size_of_the_data_is_said(shards, monkeypatch, caplog):
    open_dataset(f"file://{shards}")
    assert not caplog.text
    monkeypatch.setenv("WN21K_DATA_CACHE_GB", "0.00001")
    assert open_dataset(f"file://{shards}").stage.limit == 10_000
    assert "raise WN21K_DATA_CACHE_GB" in caplog.text
    for wrong in ("much", "0", "nan", "inf"):
        monkeypatch.setenv("WN21K_DATA_CACHE_GB", wrong)
        with pytest.raises(InvalidArgumentError, match="must be"):
            open_dataset(f"file://{shards}")


def test_files_are_looked_through_in_one_process(shards, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=index_all, args=(shards, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    built = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built) == [0, 0, 7]


def test_a_shard_that_is_damaged_where_it_lies_is_not_used(damaged, tmp_path):
    folder, names = damaged
    dataset = open_dataset(f"file://{folder}", stage=Stage(tmp_path / "stage"))
    with pytest.raises(DataError, match=r"has sha256 .* expected"):
        batches(Loader(dataset, batch_size=8, augmentation=Noisy(), window=7))
    staged = {path.name for path in (tmp_path / "stage").rglob("*.tar")}
    assert not staged & {shard for shard, _ in names}


class OfTheWebError(Exception):
    """Like the errors of aiohttp, which are not OSErrors."""


def test_what_a_storage_raises_names_the_shard(tmp_path):
    def cut(target):
        target.write_bytes(b"half")
        raise OfTheWebError("503, Service Unavailable")

    with pytest.raises(DataError, match=r"train-00000\.tar cannot be staged: OfTheWebError: 503"):
        Stage(tmp_path).get("a/train-00000.tar", cut)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["train-00000.tar.lock"]


def test_a_cache_that_cannot_be_written_is_named(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WN21K_DATA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file.index cannot be created: .*; set WN21K_DATA_CACHE"):
        open_dataset(shards, label_space="winter21")
    dataset = open_dataset(f"file://{shards}")
    with pytest.raises(DataError, match="set WN21K_DATA_CACHE"):
        dataset.open(0)

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with pytest.raises(DataError, match=r"cannot be locked .*No locks available"):
        Stage(tmp_path / "stage").get("a.tar", lambda _: None)


def test_a_home_folder_is_found(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    monkeypatch.setenv("USERPROFILE", str(shards.parent))
    assert open_dataset(f"~/{shards.name}").storage == open_dataset(shards).storage
    monkeypatch.chdir(shards.parent)
    assert open_dataset(shards.name).storage == open_dataset(shards).storage
    for opened in (is_class_folder, open_dataset):
        with pytest.raises(DataError, match="home"):
            opened("~nobody-of-that-name/x")


def test_several_processes_stage_each_shard_once(shards, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=stage_all, args=(f"file://{shards}", tmp_path / "stage", results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["../train-00000.tar", "/tmp/train-00000.tar", "a/train-00000.tar", "evil.pth"])  # noqa: S108
def test_a_data_set_names_no_file_outside_of_its_folder(shards, tmp_path, name):
    whole = json.loads((shards / "_info.json").read_text())
    whole["splits"]["train"]["filenames"][0] = name
    (tmp_path / "_info.json").write_text(json.dumps(whole))
    for place in (tmp_path, f"file://{tmp_path}"):
        with pytest.raises(DataError, match="is not the name of a shard"):
            open_dataset(place)


@pytest.mark.parametrize("target", [-5, 10**6])
def test_a_damaged_index_gives_no_other_classes(shards, tmp_path, target):
    shutil.copytree(shards, tmp_path / "copy")
    path = tmp_path / "copy" / "__index__" / "train-00000.npy"
    index = np.load(path)
    for changed in (index[:-1], index):
        np.save(path, changed)
        index["target"][0] = target
        with pytest.raises(DataError, match=r"does not fit its shard|outside the label space"):
            open_dataset(tmp_path / "copy", label_space="winter21", stage=Stage(tmp_path / "stage"))


@pytest.mark.parametrize("name", ["../evil.pth", "a/../../evil.pth", "a/../b/evil.pth", "/evil.pth"])
def test_nothing_is_written_outside_of_the_stage(tmp_path, name):
    stage = Stage(tmp_path / "stage")
    with pytest.raises(DataError, match="leads outside the data set"):
        stage.get(name, lambda target: target.write_bytes(b""))
    assert not list(tmp_path.iterdir())


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_shards_on_a_web_server(shards, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(shards)))
    with serving(server) as endpoint:
        dataset = open_dataset(endpoint, stage=Stage(tmp_path / "stage"))
        same(batches(loader(shards)), batches(Loader(dataset, batch_size=8, augmentation=Noisy(), window=3)))


@pytest.mark.parametrize(
    ("text", "told"), [("", ""), ("7\nnode1\n", " (That is process 7 on node1; if it is gone, remove ")]
)
def test_who_holds_a_lock_is_told_where_it_is_written_down(tmp_path, text, told):
    busy = exclusive(tmp_path / "lock", DataError, "", busy="Another run is writing.")
    with FileLock(tmp_path / "lock"):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(DataError, match=re.escape(f"Another run is writing.{told}")):
            busy.__enter__()


def test_who_holds_a_lock_that_is_waited_for_is_told(tmp_path, caplog):
    held = FileLock(tmp_path / "lock")
    held.acquire()
    (tmp_path / "lock").write_text("7\nnode1\n")
    with exclusive(tmp_path / "lock", DataError, "", waiting=held.release):
        assert "(That is process 7 on node1; if it is gone, remove " in caplog.text


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    stage = Stage(tmp_path, limit=250)

    def get(name):
        return stage.get(name, lambda target: target.write_bytes(bytes(100)))

    for number, name in enumerate(("a.tar", "b.tar")):
        os.utime(get(name), (number, number))
    get("a.tar")  # used now
    get("c.tar")
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["a.tar", "c.tar"]


def test_shards_of_other_classes_under_the_same_name_are_refused(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    info = json.loads((tmp_path / "copy" / "_info.json").read_text())
    text = json.dumps(info)
    digest = read_info(shards).label_digest
    assert digest in text
    (tmp_path / "copy" / "_info.json").write_text(text.replace(digest, "0" * len(digest)))
    with pytest.raises(DataError, match="was prepared with other classes named"):
        open_dataset(tmp_path / "copy")


def test_an_index_of_a_file_that_has_changed_is_made_anew(tmp_path):
    folder = tmp_path / "wds"
    folder.mkdir()
    for images in (3, 5):
        files = {}
        for number in range(images):
            files |= {f"{WNIDS[0]}_{number}.jpg": jpeg(number), f"{WNIDS[0]}_{number}.cls": b"0"}
        (folder / "train-0000.tar").write_bytes(tar_bytes(files))
        assert len(open_dataset(folder)) == images


@pytest.mark.parametrize("prepared", [True, False])
def test_what_replaces_a_data_set_at_its_url_is_staged_anew(tmp_path, prepared):
    stage, folder, classes = Stage(tmp_path / "stage"), tmp_path / "remote", make_classes(4)
    options = PrepareOptions(min_images=0, val_per_class=0, size=32)
    for wnids in (WNIDS, WNIDS[::-1]):
        shutil.rmtree(folder, ignore_errors=True)
        if prepared:
            source = write_folder(tmp_path / "source", flat_files({wnid: classes[wnid] for wnid in WNIDS}))
            space = LabelSpace("mine", wnids)
            prepare(source, folder, dataclasses.replace(options, label_space=space), workers=1)
        else:
            files = {name: data for wnid in wnids for name, data in classes[wnid].items()}
            write_folder(folder, {"train-0000.tar": tar_bytes(files)})
        found, expected = (TorchDataset(open_dataset(place, stage=stage)) for place in (f"file://{folder}", folder))
        assert [np.array(image).tobytes() for image, _ in found] == [np.array(image).tobytes() for image, _ in expected]
        assert found.targets.tolist() == expected.targets.tolist()


def test_a_staged_shard_that_was_cut_is_fetched_again(shards, tmp_path):
    dataset = open_dataset(f"file://{shards}", stage=Stage(tmp_path / "stage"))
    path, _ = dataset.local(0)
    whole = path.read_bytes()
    os.truncate(path, 1000)
    assert dataset.local(0)[0].read_bytes() == whole


def test_mapped_shards_are_verified_where_they_are_staged(damaged, tmp_path):
    folder, _ = damaged
    dataset = open_dataset(f"file://{folder}", label_space="winter21", stage=Stage(tmp_path / "stage"))
    with pytest.raises(DataError, match=r"has sha256 .* expected"):
        batches(Loader(dataset, batch_size=8, augmentation=Noisy(), window=7))


def test_the_shards_of_the_next_epoch_are_staged_once(shards, tmp_path):
    dataset = open_dataset(f"file://{shards}", stage=Stage(tmp_path / "stage"))
    one = Loader(dataset, batch_size=2, augmentation=Noisy(), window=7)  # the whole epoch fits in the last window
    threads = set()
    for _ in one:
        threads.add(one._batches.dataset._ahead)
        one._batches.dataset._ahead.join()
    assert len(threads) == 1
