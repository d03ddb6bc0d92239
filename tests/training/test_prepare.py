import csv
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wn21k_zoo.errors import (
    BadImagesError,
    DataError,
    DataOutputError,
    DataSourceError,
    DiskSpaceError,
    InvalidArgumentError,
    MissingExtraError,
)
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training import dry_run
from wn21k_zoo.training.classes import _keys_of, decide
from wn21k_zoo.training.dataset import open_dataset
from wn21k_zoo.training.dry_run import count
from wn21k_zoo.training.folder import is_class_folder
from wn21k_zoo.training.gather import _shard_of_each
from wn21k_zoo.training.inspect import describe, verify_shards
from wn21k_zoo.training.options import disk_full_as_error
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.shards import BLOCK, MANIFEST_FILE, encode_record, index_path, read_index, read_info
from wn21k_zoo.training.sources import ClassSource
from wn21k_zoo.training.tasks import _quota

from .archives import (
    LAYOUTS,
    OUTSIDE,
    WNIDS,
    jpeg,
    make_classes,
    nested_tar,
    split_files,
    tar_bytes,
    write_folder,
    write_layout,
)
from .staging import no_locks

OPTIONS = PrepareOptions(min_images=10, val_per_class=3, size=32, shard_size=7)
# The same on the command line.
COMMAND = [sys.executable, "-m", "wn21k_zoo", "data", "prepare"]
COMMAND += ["--min-images", "10", "--val-per-class", "3", "--size", "32", "--shard-size", "7"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest(folder):
    return pq.read_table(folder / MANIFEST_FILE).to_pylist()


def prepared(tmp_path, classes, options=OPTIONS, **run):
    source = tmp_path / "source.tar"
    source.write_bytes(nested_tar(classes))
    prepare(source, tmp_path / "out", options, workers=1, **run)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("reference"), make_classes())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes(tmp_path, layout, reference):
    source = write_layout(layout, tmp_path / layout, make_classes())
    prepare(source, tmp_path / "out", OPTIONS, workers=1)
    assert contents(tmp_path / "out") == contents(reference)


def test_what_is_stored_is_what_was_published(reference):
    space = LabelSpace.load("fall11")
    classes = make_classes()
    rows = {row["name"]: row for row in manifest(reference)}
    assert len(rows) == sum(map(len, classes.values()))
    seen = 0
    for shards in read_info(reference).splits.values():
        for shard in shards:
            with tarfile.open(reference / shard.name) as archive:
                for member in archive:
                    key, _, kind = member.name.partition(".")
                    data, row = archive.extractfile(member).read(), rows[f"{key}.JPEG"]
                    original = classes[row["synset"]][row["name"]]
                    assert row["shard"] == shard.name
                    if kind == "jpg":
                        seen += 1
                        pixels = cv2.imdecode(np.frombuffer(original, np.uint8), cv2.IMREAD_COLOR)
                        assert (row["height"], row["width"]) == pixels.shape[:2]
                        if max(pixels.shape) >= 32:
                            pixels = cv2.resize(pixels, (32, 32))
                            expected = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                        else:
                            expected = original
                        assert data == expected
                        assert row["sha256"] == hashlib.sha256(data).hexdigest()
                        assert row["action"] == ("copied" if expected is original else "resized")
                    elif kind == "cls":
                        assert space.wnids[int(data)] == row["synset"]
                    else:
                        assert json.loads(data)["synset"] == row["synset"]
    assert seen == 24


def test_validation_is_the_first_names_in_byte_order_and_the_rest_is_told(reference):
    rows = manifest(reference)
    for wnid in WNIDS[:2]:
        names = sorted(row["name"] for row in rows if row["synset"] == wnid)
        assert {row["name"] for row in rows if row["synset"] == wnid and row["split"] == "validation"} == set(names[:3])
        assert names[1].endswith("_1.JPEG")
        assert names[2].endswith("_10.JPEG")
    reasons = {row["synset"]: row["reason"] for row in rows}
    assert reasons == {
        WNIDS[0]: None,
        WNIDS[1]: None,
        WNIDS[2]: "too few images",
        OUTSIDE: "outside the label space",
    }
    with (reference / "classes.csv").open() as file:
        lines = {line["synset"]: line for line in csv.DictReader(file)}
    assert lines[WNIDS[0]] == {
        "synset": WNIDS[0], "decision": "kept", "images": "12", "train": "9", "validation": "3", "bad": "0",
    }  # fmt: skip
    summary = (reference / "SUMMARY.md").read_text()
    assert "| classes | 2 | 11,221 | -11,219 |" in summary
    assert "outside the label space: 1 classes, 12 images" in summary


def test_the_index_points_at_the_images(reference):
    space = LabelSpace.load("fall11")
    info = read_info(reference)
    assert {split: [shard.num_samples for shard in shards] for split, shards in info.splits.items()} == {
        "train": [7, 7, 4],
        "validation": [6],
    }
    for shard in info.splits["train"]:
        whole = (reference / shard.name).read_bytes()
        assert hashlib.sha256(whole).hexdigest() == shard.sha256
        for entry in read_index(index_path(reference / shard.name), shard.num_samples):
            image = whole[entry["offset"] : entry["offset"] + entry["size"]]
            assert Image.open(io.BytesIO(image)).format == "JPEG"
            assert space.wnids[entry["target"]] in WNIDS


def test_classes_are_mixed(tmp_path):
    classes = {wnid: {f"{wnid}_{index}.JPEG": jpeg(index, 16, 16) for index in range(40)} for wnid in WNIDS}
    out = prepared(tmp_path, classes, PrepareOptions(min_images=0, val_per_class=0, size=32, shard_size=30))
    for shard in read_info(out).splits["train"]:
        counts = np.unique(read_index(index_path(out / shard.name))["target"], return_counts=True)[1]
        assert len(counts) == 3
        assert counts.min() >= 3


@pytest.mark.parametrize("workers", [2])
def test_the_number_of_workers_changes_nothing(tmp_path, workers, reference):
    source = write_layout("nested.tar.gz", tmp_path / "nested.tar.gz", make_classes())
    prepare(source, tmp_path / "out", OPTIONS, workers=workers)
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_a_killed_worker_loses_nothing(tmp_path, reference):
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("ray")
    source = write_layout("nested.tar", tmp_path / "nested.tar", make_classes())
    command = [*COMMAND, str(source), str(tmp_path / "out"), "--engine", "ray", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = False
    while process.poll() is None and not killed:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "ray::prepare_class" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    killed = True
                    break
            except psutil.Error:
                continue
        time.sleep(0.002)
    _, messages = process.communicate(timeout=100)
    assert process.returncode == 0, messages
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, reference):
    source = write_layout("nested.tar.gz", tmp_path / "nested.tar.gz", make_classes())
    command = [*COMMAND, str(source), str(tmp_path / "out"), "--workers", "1"]
    watched = tmp_path / "out" / ".work"
    for seen in (1, 2, 3):  # killed after so many finished classes, then in the second pass
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(watched.glob("classes/*.parquet"))) < seen:
            time.sleep(0.001)
        process.kill()
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(reference)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "# Prepared data set" in again.stdout


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", range(14))
def test_stopped_after_any_task_it_goes_on_where_it_was(tmp_path, stop_at, reference):
    source = write_layout("nested.tar", tmp_path / "nested.tar", make_classes())
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) > stop_at:
            raise StoppedError

    try:
        prepare(source, tmp_path / "out", OPTIONS, workers=1, progress=stop)
    except StoppedError:
        assert not (tmp_path / "out" / "_info.json").exists() or seen[-1].stage == "manifest"
        later = []
        prepare(source, tmp_path / "out", OPTIONS, workers=1, progress=later.append)
        done = [progress for progress in seen if progress.stage == "classes"]
        again = [progress for progress in later if progress.stage == "classes"]
        if len(done) > 1 and again:
            assert len(again) <= 6 - len(done)
    assert contents(tmp_path / "out") == contents(reference)


def test_shards_of_a_class_that_is_another_now_are_made_anew(tmp_path):
    def stop_at_manifest(progress):
        if progress.stage == "manifest":
            raise StoppedError

    def stop_after_a_class(progress):
        if progress.stage == "classes" and progress.images:
            raise StoppedError

    others = make_classes()
    others[WNIDS[0]] = {name: jpeg(50 + number) for number, name in enumerate(others[WNIDS[0]])}
    for classes, stop in ((make_classes(), stop_at_manifest), (others, stop_after_a_class)):
        source = write_layout("nested.tar", tmp_path / "nested.tar", classes)
        with pytest.raises(StoppedError):
            prepare(source, tmp_path / "out", OPTIONS, workers=1, progress=stop)
    prepare(source, tmp_path / "out", OPTIONS, workers=1)
    prepare(source, tmp_path / "anew", OPTIONS, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_container_has_the_processors_that_it_is_given(tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _quota(tmp_path) == cores


def test_threads_of_opencv_are_left_as_they_were(tmp_path):
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        prepared(tmp_path, make_classes())
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_without_resume_nothing_of_the_former_run_is_left(tmp_path, reference):
    source = write_layout("nested.tar", tmp_path / "nested.tar", make_classes())

    def stop(progress):
        if progress.stage == "manifest":
            raise StoppedError

    smaller = dataclasses.replace(OPTIONS, shard_size=2)
    with pytest.raises(StoppedError):
        prepare(source, tmp_path / "out", smaller, workers=1, progress=stop)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 12
    with pytest.raises(DataOutputError, match="shard_size 2 then and 7 now"):
        prepare(source, tmp_path / "out", OPTIONS, workers=1)
    prepare(source, tmp_path / "out", OPTIONS, workers=1, resume=False)
    assert contents(tmp_path / "out") == contents(reference)


def test_odd_images_are_handled_and_counted(tmp_path):
    wnid = WNIDS[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    good, late = jpeg(1, 40, 30), jpeg(5, 30, 16, exif=exif)
    odd = {
        f"{wnid}_cmyk_small.JPEG": jpeg(2, 20, 20, mode="CMYK"),
        f"{wnid}_cmyk_large.JPEG": jpeg(3, 60, 50, mode="CMYK"),
        f"{wnid}_png.JPEG": jpeg(4, 20, 10, format="PNG"),
        f"{wnid}_rotated.JPEG": jpeg(5, 30, 16, exif=exif),
        f"{wnid}_rotated_late.JPEG": late[:2] + b"\xff\xfe\x13\x8a" + bytes(5000) + late[2:],  # a comment
        f"{wnid}_grey.JPEG": jpeg(6, 20, 10, mode="L"),
        f"{wnid}_empty.JPEG": b"",
        f"{wnid}_text.JPEG": b"this is no image",
        f"{wnid}_truncated.JPEG": good[:-30],
        f"{wnid}_good.JPEG": good,
        "odd name, for a key.jpg": good,
        "na\udcffme.jpg": good,
        "notes.txt": b"not counted",
        ".hidden.jpg": good,
    }
    with pytest.raises(BadImagesError, match=r"3 of 12 images cannot be used \(1 .*--max-bad"):
        prepared(tmp_path, {wnid: odd}, PrepareOptions(min_images=0, val_per_class=1, size=32))
    out = prepared(tmp_path, {wnid: odd}, PrepareOptions(min_images=0, val_per_class=1, size=32), max_bad=0.3)
    rows = {row["name"].removeprefix(f"{wnid}_").partition(".")[0]: row for row in manifest(out)}
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == {
        "empty": "empty file",
        "text": "not an image",
        "truncated": "truncated",
    }
    assert rows["cmyk_small"]["action"] == "re-encoded"
    assert rows["cmyk_large"]["mode"] == "CMYK"
    assert (rows["png"]["format"], rows["png"]["action"]) == ("PNG", "re-encoded")
    for name in ("rotated", "rotated_late"):
        assert (rows[name]["width"], rows[name]["height"], rows[name]["orientation"]) == (16, 30, 6)
        assert rows[name]["action"] == "re-encoded"
    assert (rows["grey"]["mode"], rows["grey"]["action"]) == ("L", "copied")
    assert rows["odd name, for a key"]["key"] == f"{wnid}-000011"
    assert rows[r"na\xffme"]["key"] == f"{wnid}-000010"
    told = (out / "SUMMARY.md").read_text()
    for line in (
        "truncated: 1 images",
        "colours CMYK: 2 images",
        "PNG by its content: 1 images",
        "rotated by EXIF: 2 images",
    ):
        assert f"- {line}\n" in told
    for shard in sum(read_info(out).splits.values(), ()):
        whole = (out / shard.name).read_bytes()
        for entry in read_index(index_path(out / shard.name)):
            with Image.open(io.BytesIO(whole[entry["offset"] : entry["offset"] + entry["size"]])) as image:
                assert image.format == "JPEG"
                assert image.mode in ("RGB", "L")
                assert image.getexif().get(0x0112, 1) == 1


def test_members_that_leave_their_folder_and_links_are_refused(tmp_path):
    wnid = WNIDS[0]
    files = {name: jpeg(index) for index, name in enumerate((f"{wnid}_0.JPEG", "../evil.JPEG", "/etc/evil.JPEG"))}
    inner = io.BytesIO(tar_bytes(files))
    with tarfile.open(fileobj=inner, mode="a") as archive:
        link = tarfile.TarInfo(f"{wnid}_1.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = tmp_path / "source.tar"
    source.write_bytes(tar_bytes({f"{wnid}.tar": inner.getvalue()}))
    before = set(tmp_path.parent.rglob("*"))
    prepare(source, tmp_path / "out", PrepareOptions(min_images=0, val_per_class=0), workers=1, max_bad=1)
    assert {row["name"]: row["reason"] for row in manifest(tmp_path / "out")} == {
        f"{wnid}_0.JPEG": None,
        "../evil.JPEG": "refused: its path leaves its folder",
        "/etc/evil.JPEG": "refused: its path leaves its folder",
        f"{wnid}_1.JPEG": "refused: a link, a device, or packed with holes",
    }
    assert all("evil" not in path.name for path in set(tmp_path.parent.rglob("*")) - before)


def test_a_name_that_stands_twice_means_its_last_occurrence(tmp_path):
    wnid = WNIDS[0]
    first, last = jpeg(1, 20, 20), jpeg(2, 20, 20)
    inner = io.BytesIO(tar_bytes({f"{wnid}_0.JPEG": first}))
    with tarfile.open(fileobj=inner, mode="a") as archive:
        member = tarfile.TarInfo(f"{wnid}_0.JPEG")
        member.size = len(last)
        archive.addfile(member, io.BytesIO(last))
    (tmp_path / f"{wnid}.tar").write_bytes(inner.getvalue())
    prepare(tmp_path, tmp_path / "out", PrepareOptions(min_images=0, val_per_class=0), workers=1)
    rows = manifest(tmp_path / "out")
    assert [row["sha256"] for row in rows if row["split"]] == [hashlib.sha256(last).hexdigest()]
    assert [row["reason"] for row in rows if not row["split"]] == ["a later file has the same name"]


@pytest.mark.parametrize("layout", ["nested.tar", "nested.tar.gz", "flat.tar", "flat.tar.gz"])
def test_a_truncated_archive_keeps_what_is_whole(tmp_path, layout, reference):
    classes = make_classes()
    source = write_layout(layout, tmp_path / layout, classes)
    whole = source.read_bytes()
    source.write_bytes(whole[: int(len(whole) * 0.85)])
    with pytest.raises(DataSourceError, match=r"classes are finished and kept: get the whole file.*--allow-truncated"):
        prepare(source, tmp_path / "out", OPTIONS, workers=1)
    source.write_bytes(whole)
    prepare(source, tmp_path / "out", OPTIONS, workers=1)
    assert contents(tmp_path / "out") == contents(reference)
    source.write_bytes(whole[: int(len(whole) * 0.85)])
    info = prepare(source, tmp_path / "cut", OPTIONS, workers=1, allow_truncated=True)
    assert sum(shard.num_samples for shard in info.splits["train"]) == 18


def test_a_damaged_class_archive_is_left_out_if_that_is_allowed(tmp_path):
    classes = make_classes()
    damaged = bytearray(tar_bytes(classes[WNIDS[0]]))
    damaged[2048 * 8 : 2048 * 8 + 4096] = b"x" * 4096
    write_folder(
        tmp_path / "tars", {f"{WNIDS[0]}.tar": bytes(damaged), f"{WNIDS[1]}.tar": tar_bytes(classes[WNIDS[1]])}
    )
    with pytest.raises(DataSourceError, match=rf"are damaged.*: {WNIDS[0]}\. The others are finished"):
        prepare(tmp_path / "tars", tmp_path / "out", OPTIONS, workers=1)
    prepare(tmp_path / "tars", tmp_path / "out", OPTIONS, workers=1, allow_truncated=True)
    reasons = {row["synset"]: row["reason"] for row in manifest(tmp_path / "out")}
    assert reasons == {WNIDS[0]: "damaged archive", WNIDS[1]: None}


@pytest.mark.parametrize("small_last", [False, True])
@pytest.mark.parametrize("layout", ["folder", "tar", "tar.gz"])
def test_the_processed_release_is_taken_as_it_comes(tmp_path, layout, small_last):
    classes = {wnid: files for wnid, files in make_classes().items() if wnid != OUTSIDE}
    files = split_files(classes, validation=4)
    small = {f"imagenet21k_resized/imagenet21k_small_classes/{wnid}/x.JPEG": jpeg(0) for wnid in ("n01440764", OUTSIDE)}
    files = files | small if small_last else small | files
    source = tmp_path / f"imagenet21k_resized.{layout}"
    if layout == "folder":
        source = write_folder(tmp_path / "source", files) / "imagenet21k_resized"
    else:
        source.write_bytes(gzip.compress(tar_bytes(files)) if layout == "tar.gz" else tar_bytes(files))
    counts = count(source, PrepareOptions(label_space="winter21"), workers=1)
    assert {(one.wnid, one.decision) for one in counts} == {(wnid, "kept") for wnid in classes}
    prepare(source, tmp_path / "out", PrepareOptions(label_space="winter21"), workers=1)
    rows = manifest(tmp_path / "out")
    assert {row["action"] for row in rows} == {"copied"}
    for wnid, images in classes.items():
        names = {row["name"] for row in rows if row["synset"] == wnid and row["split"] == "validation"}
        assert names == set(sorted(images)[:4])
    assert len(rows) == sum(map(len, classes.values()))


def test_classes_of_a_list_of_ones_own(tmp_path):
    (tmp_path / "mine.txt").write_text(f"{OUTSIDE}  # which fall11 lacks\n{WNIDS[1]}\n")
    options = dataclasses.replace(OPTIONS, label_space=str(tmp_path / "mine.txt"))
    out = prepared(tmp_path, make_classes(), options)
    counts = {one.wnid: one.decision for one in count(tmp_path / "source.tar", options, workers=1)}
    assert {wnid for wnid, decision in counts.items() if decision == "kept"} == {OUTSIDE, WNIDS[1]}
    (tmp_path / "mine.txt").unlink()
    assert {row["synset"] for row in manifest(out) if row["shard"]} == {OUTSIDE, WNIDS[1]}
    assert read_info(out).space.wnids == (OUTSIDE, WNIDS[1])
    assert "Label space custom, 2 classes." in (out / "SUMMARY.md").read_text()
    data = open_dataset(out)
    assert data.class_names == (OUTSIDE, WNIDS[1])
    targets = np.concatenate([data.index(number)["target"] for number in range(len(data.lengths))])
    assert np.bincount(targets).tolist() == [9, 9]
    assert len(open_dataset(out, label_space="fall11")) == 9
    assert not verify_shards(out)
    assert [level["images"] for level in describe(out)["depths"]] == [18]

    with pytest.raises(DataOutputError, match=r"label_space 'custom \(.*then and 'custom \(.*now"):
        prepare(tmp_path / "source.tar", out, dataclasses.replace(options, label_space=LabelSpace("custom", WNIDS[1:])))
    whole = json.loads((out / "_info.json").read_text())
    for wnids, message in ((["n1"], "n1"), ([WNIDS[1], OUTSIDE], "other classes")):
        (out / "_info.json").write_text(json.dumps({**whole, "wnids": wnids}))
        with pytest.raises(DataError, match=message):
            open_dataset(out)
    for wnids in (["n1"], [], [WNIDS[0], WNIDS[0]]):
        (out / "_info.json").write_text(json.dumps({**whole, "wnids": wnids}))
        for look in (describe, verify_shards):
            with pytest.raises(DataError, match=rf"{out}: _info.json names unknown classes"):
                look(out)
    (out / "_info.json").write_text(json.dumps({**whole, "wnids": WNIDS[1]}))
    with pytest.raises(DataError, match="is not a list"):
        read_info(out)


def test_what_is_not_finished_is_no_data_set(tmp_path):
    source = write_layout("nested.tar", tmp_path / "source.tar", make_classes())

    def stop(progress):
        if progress.stage == stage:
            raise KeyboardInterrupt

    for stage in ("classes", "manifest"):  # without any shard, and with all of them
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", OPTIONS, workers=1, progress=stop)
        assert any((tmp_path / "out").glob("*.tar")) == (stage == "manifest")
        assert not is_class_folder(tmp_path / "out")
        for split in ("train", "validation"):
            for place in (tmp_path / "out", f"file://{tmp_path}/out"):
                with pytest.raises(DataError, match="unfinished output of `wn21k data prepare`"):
                    open_dataset(place, split)
    prepare(source, tmp_path / "out", OPTIONS, workers=1)
    assert len(open_dataset(tmp_path / "out")) == 18


def test_a_label_space_goes_to_another_process_as_it_is():
    for space in (LabelSpace.load("fall11"), LabelSpace("custom", WNIDS), LabelSpace("imagenet1k", WNIDS)):
        there = pickle.loads(pickle.dumps(space))  # noqa: S301
        assert there == space
        assert there.is_shipped == (space.name == "imagenet21k_p_fall11")
    assert len(pickle.dumps(PrepareOptions())) < 1000
    with pytest.raises(InvalidArgumentError, match="imagenet1k names other classes"):
        PrepareOptions(label_space=LabelSpace("imagenet1k", WNIDS))


def test_what_the_system_puts_into_folders_is_in_nobodys_way(tmp_path, reference):
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    out = prepared(tmp_path, make_classes())
    assert contents(out) == {**contents(reference), ".DS_Store": b""}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".backup.tar").write_bytes(b"")
    with pytest.raises(DataOutputError, match="is not empty"):
        prepare(tmp_path / "source.tar", tmp_path / "mine", OPTIONS)
    assert (tmp_path / "mine" / ".backup.tar").exists()


def test_killed_while_its_work_is_removed_it_is_finished(tmp_path, reference, monkeypatch):
    remove = shutil.rmtree

    def killed(folder, **options):
        if folder.exists():
            (folder / "options.json").unlink()  # half of it
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, make_classes())
    monkeypatch.undo()
    assert (tmp_path / "out" / ".work.done").is_dir()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert contents(prepared(tmp_path, make_classes())) == contents(reference)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_short_edge(tmp_path):
    out = prepared(tmp_path, {WNIDS[0]: {f"{WNIDS[0]}_0.JPEG": jpeg(0, 80, 60)}},
                   PrepareOptions(min_images=0, val_per_class=0, size=32, resize="short-edge"))  # fmt: skip
    assert [(row["stored_width"], row["stored_height"]) for row in manifest(out)] == [(43, 32)]


def test_wrong_sources_and_outputs_are_one_line_each(tmp_path, monkeypatch):
    source = write_layout("nested.tar", tmp_path / "nested.tar", make_classes())
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_bytes(b"no archive")
    (tmp_path / "photos.tar").write_bytes(tar_bytes({"a/b.jpg": jpeg(0)}))
    (empty / "inner" / WNIDS[0]).mkdir(parents=True)
    for wrong, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "file", "is not a readable tar archive"),
        (tmp_path / "photos.tar", "neither a class archive nor in a class folder"),
        (empty, r"Did you mean .*inner\?"),
    ):
        with pytest.raises(DataSourceError, match=message):
            prepare(wrong, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataOutputError, match="is a file"):
        prepare(source, tmp_path / "file", OPTIONS)
    with pytest.raises(DataOutputError, match="is not empty"):
        prepare(source, tmp_path, OPTIONS)
    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with pytest.raises(DataOutputError, match=r"cannot be locked .*No locks available"):
        prepare(source, tmp_path / "locked", OPTIONS)
    monkeypatch.undo()
    with pytest.raises(DataSourceError, match="--min-images"):
        prepare(source, tmp_path / "none", PrepareOptions(), workers=1)
    prepare(source, tmp_path / "out", OPTIONS, workers=1)
    with pytest.raises(DataOutputError, match="size 32 then and 224 now"):
        prepare(source, tmp_path / "out", PrepareOptions(min_images=10, val_per_class=3, shard_size=7))
    (tmp_path / "other.tar").write_bytes(source.read_bytes())
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    with pytest.raises(DataSourceError, match="get the whole file"):
        prepare(source, tmp_path / "begun", OPTIONS, workers=1)
    with pytest.raises(DataOutputError, match=r"source 'nested.tar' then and 'other.tar' now"):
        prepare(tmp_path / "other.tar", tmp_path / "begun", OPTIONS, workers=1)
    for wrong in ({"quality": 0}, {"resize": "crop"}, {"shard_size": 0}):
        with pytest.raises(InvalidArgumentError):
            PrepareOptions(**wrong)


def test_without_ray_its_extra_is_named_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "source.tar").write_bytes(nested_tar(make_classes()))
    monkeypatch.setattr("wn21k_zoo.training.options.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"The Ray engine needs an extra: pip install .*\[ray\]"):
        prepare(tmp_path / "source.tar", tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_disk_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    source = write_layout("nested.tar", tmp_path / "nested.tar", make_classes())
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(DiskSpaceError, match="GB more are needed"):
        prepare(source, tmp_path / "out", OPTIONS, workers=1)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out" / ".work" / "classes").iterdir())


def test_a_dry_run_counts_what_a_real_run_makes(tmp_path, reference):
    info = read_info(reference)
    for layout in LAYOUTS:
        source = write_layout(layout, tmp_path / layout, make_classes())
        counts = count(source, OPTIONS, workers=1)
        assert sum(one.train for one in counts) == sum(shard.num_samples for shard in info.splits["train"])
        assert sum(one.validation for one in counts) == sum(shard.num_samples for shard in info.splits["validation"])
        size = sum(shard.num_bytes for shards in info.splits.values() for shard in shards)
        assert sum(one.stored_bytes for one in counts) == pytest.approx(size, rel=0.25)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_stand_in_archive(tmp_path, test_data):
    source = test_data / "data" / "tiny_imagenet_whole.tar.gz"
    info = prepare(source, tmp_path / "out", PrepareOptions(min_images=100, val_per_class=10), workers=2)
    assert {split: sum(s.num_samples for s in shards) for split, shards in info.splits.items()} == {
        "train": 27_860,
        "validation": 1_990,
    }
    rows = pq.read_table(tmp_path / "out" / MANIFEST_FILE, columns=["synset", "reason", "action"]).to_pydict()
    assert len(set(rows["synset"])) == 200
    assert {s for s, reason in zip(rows["synset"], rows["reason"], strict=True) if reason} == {OUTSIDE}
    assert set(rows["action"]) == {"copied", None}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 7_000_000])
def test_tar_headers_are_those_that_tarfile_writes(size):
    data = bytes(size)
    record = encode_record("n02123045_1", data, 7, {"label": 7})
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in (
            ("n02123045_1.jpg", data),
            ("n02123045_1.cls", b"7"),
            ("n02123045_1.json", b'{"label":7}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert expected.getvalue()[: len(record)] == record
    assert record[BLOCK : BLOCK + size] == data


def test_where_nothing_is_to_be_used_other_options_may_follow(tmp_path):
    classes = {WNIDS[0]: {f"{WNIDS[0]}_{index}.JPEG": jpeg(index, 20, 10) for index in range(4)}}
    with pytest.raises(DataSourceError, match=r"used: 1 classes: too few images\. .* --min-images, which is 500\."):
        prepared(tmp_path, classes, PrepareOptions(min_images=500, size=32))
    assert prepared(tmp_path, classes, PrepareOptions(min_images=0, val_per_class=1, size=32)).is_dir()


def test_hashes_that_float64_cannot_tell_apart():
    table = pa.table({"split": ["train", None, "train"], "order": pa.array([2**62, None, 2**62 + 1], pa.uint64())})
    least = {"train": np.array([5, 2**62 + 1], np.uint64), "validation": np.empty(0, np.uint64)}
    assert list(_shard_of_each(table, least)) == ["train-00000.tar", None, "train-00001.tar"]


@pytest.mark.parametrize(("images", "decision"), [(5, "too few images"), (6, "kept")])
def test_a_class_needs_more_images_than_the_bound(images, decision):
    source, options = ClassSource(wnid=WNIDS[0], path=Path(), num_bytes=0, position=0), PrepareOptions(min_images=5)
    assert decide(source, images, options, is_split=False) == decision
    assert decide(source, images, options, is_split=True) == "kept"
    outside = dataclasses.replace(source, wnid="n00001740")
    assert decide(outside, images, options, is_split=True) == "outside the label space"


def test_files_of_one_stem_have_keys_of_their_own():
    names = [f"{WNIDS[0]}_1.JPEG", f"{WNIDS[0]}_1.jpg", "other.jpg", f"{WNIDS[0]}_2.JPEG"]
    keys = _keys_of(WNIDS[0], names)
    assert keys == {
        names[0]: f"{WNIDS[0]}_1", names[1]: f"{WNIDS[0]}-000001", names[2]: f"{WNIDS[0]}-000002",
        names[3]: f"{WNIDS[0]}_2",
    }  # fmt: skip


def test_the_published_options():
    assert PrepareOptions() == PrepareOptions(
        label_space="fall11", min_images=500, val_per_class=50, size=224, resize="squash", quality=95, shard_size=10_000
    )
    for wrong in (
        {"quality": 101}, {"size": 0}, {"size": 8193}, {"val_per_class": -1}, {"min_images": -1}, {"size": 224.5},
        {"min_images": True}, {"shard_size": "10"},
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=r"it must be a whole number, from \d"):
            PrepareOptions(**wrong)


def test_on_a_disk_where_macos_lays_files_beside_it_goes_on(tmp_path):
    files = {f"{wnid}/{name}": data for wnid, of_class in make_classes().items() for name, data in of_class.items()}
    write_folder(tmp_path / "source", files)
    options = PrepareOptions(min_images=0, val_per_class=1, size=32)
    (tmp_path / "out").mkdir()
    for name in (".fseventsd", ".Trashes", "desktop.ini", "._x"):
        (tmp_path / "out" / name).touch()

    def stop(progress):
        if progress.stage == "shards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "source", tmp_path / "out", options, workers=1, progress=stop)
    for path in [*(tmp_path / "out").rglob("*")]:
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"x")
    info = prepare(tmp_path / "source", tmp_path / "out", options, workers=1)
    assert info.splits["train"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_typed_errors(tmp_path, number):
    with pytest.raises(DiskSpaceError, match="make room"), disk_full_as_error(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), disk_full_as_error(tmp_path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_what_another_process_has_just_completed_is_not_made_anew(tmp_path):
    output = prepared(tmp_path, make_classes())
    (output / ".work").mkdir()  # by a process that had seen the other's
    with pytest.raises(DataOutputError, match=r"has just completed .*; run the same command again"):
        prepared(tmp_path, make_classes())
    assert prepared(tmp_path, make_classes()) == output
    assert not (output / ".work").exists()


def test_a_folder_of_a_disk_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    prepared(tmp_path, make_classes())

    def refused(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(DataOutputError, match=r"cannot be written .*; name a writable folder"):
        prepare(tmp_path / "source.tar", tmp_path / "new", OPTIONS, workers=1)

    def damaged(path, *_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "mkdir", damaged)
    with pytest.raises(OSError, match="Input/output error"):
        prepare(tmp_path / "source.tar", tmp_path / "new", OPTIONS, workers=1)


@pytest.mark.parametrize("text", ["", "[", "null", '"x"', "[" * 100_000])
def test_options_that_are_damaged_are_one_error(tmp_path, text):
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "options.json").write_text(text)
    for name in WNIDS[:2]:
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / f"{name}_1.JPEG").write_bytes(jpeg(1))
    with pytest.raises(DataOutputError, match=r"options\.json is damaged; .* start anew \(--no-resume\)"):
        prepare(tmp_path / "source", tmp_path / "out", PrepareOptions(min_images=0, val_per_class=0), workers=1)


class _ShortReads(io.FileIO):
    """A file of a system that returns less than is asked for, and at last nothing more where ``ends`` is true."""

    ends = False

    def read(self, size=-1):
        return b"" if self.ends else super().read(min(size, 100) if size > 0 else size)


def test_a_read_that_returns_less_than_asked_for_loses_nothing(tmp_path, monkeypatch):
    prepared(tmp_path, make_classes())
    expected, opening = contents(tmp_path / "out"), Path.open

    def short(self, mode="r", buffering=-1, *others, **options):
        return _ShortReads(self, mode) if buffering == 0 else opening(self, mode, buffering, *others, **options)

    monkeypatch.setattr(Path, "open", short)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(_ShortReads, "ends", True)
    with pytest.raises(DataOutputError, match=r"\.tar has been damaged since it was written"):
        prepared(tmp_path, make_classes())
    monkeypatch.setattr(_ShortReads, "ends", False)
    prepared(tmp_path, make_classes())
    assert contents(tmp_path / "out") == expected
    assert not verify_shards(tmp_path / "out")
