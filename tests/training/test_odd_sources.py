"""Sources that are damaged, mended, exchanged, or hold more than classes: nothing is lost without a word."""

import bz2
import contextlib
import gzip
import hashlib
import io
import logging
import os
import pathlib
import re
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wn21k_zoo.errors import BadImagesError, DataOutputError, DataSourceError
from wn21k_zoo.training import sources, tars
from wn21k_zoo.training.dry_run import count
from wn21k_zoo.training.manifest import read_table
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.shards import MANIFEST_FILE

from .archives import WNIDS, flat_files, jpeg, make_classes, nested_tar, sparse, tar_bytes, write_folder, write_layout

HOLES = "refused: a link, a device, or packed with holes"
OPTIONS = PrepareOptions(min_images=0, val_per_class=2, size=32, shard_size=7)


def make(source, output, options=OPTIONS, **others):
    return prepare(source, output, options, workers=1, **others)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(output):
    return pq.read_table(output / MANIFEST_FILE).to_pylist()


@pytest.fixture(scope="module")
def classes():
    return {wnid: files for wnid, files in make_classes(6).items() if wnid in WNIDS}


@pytest.fixture(scope="module")
def reference(classes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    make(write_layout("tars", folder / "tars", classes), folder / "out")
    return contents(folder / "out")


@pytest.mark.parametrize("layout", ["nested.tar", "flat.tar"])
@pytest.mark.parametrize("what", ["hole", "end"])
def test_zeros_where_a_download_is_missing_are_not_the_end(tmp_path, classes, layout, what, monkeypatch):
    monkeypatch.setattr(tars, "_PADDING", 1 << 14)
    source = write_layout(layout, tmp_path / layout, classes)
    whole = source.read_bytes()
    half = len(whole) // 2
    rest = bytes(len(whole)) if what == "end" else bytes(4096) + whole[half + 4096 :]
    source.write_bytes(whole[:half] + rest)
    with pytest.raises(DataSourceError, match=r"damaged|not fetched whole"):
        make(source, tmp_path / "out")


@pytest.mark.parametrize(
    "damage", [lambda tar: tar[:-6000], lambda tar: b"", lambda tar: tar[:2048] + bytes(4096) + tar[6144:]]
)
def test_a_class_archive_that_is_mended_is_read_again(tmp_path, classes, reference, damage):
    source = write_layout("tars", tmp_path / "tars", classes)
    one = source / f"{WNIDS[1]}.tar"
    whole = one.read_bytes()
    one.write_bytes(damage(whole))
    with pytest.raises(DataSourceError, match=rf"These class archives or folders are damaged.*{WNIDS[1]}\. The oth"):
        make(source, tmp_path / "out")
    one.write_bytes(whole)
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_an_image_that_is_mended_is_read_again(tmp_path, classes, reference):
    source = write_layout("folders", tmp_path / "folders", classes)
    path = source / WNIDS[0] / f"{WNIDS[0]}_3.JPEG"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(BadImagesError, match=rf"such as {path.name} of {WNIDS[0]}; that is more than 1\.0%"):
        make(source, tmp_path / "out")
    path.write_bytes(whole)
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_a_compressed_archive_whose_checksum_is_wrong_is_read_anew_unless_that_is_allowed(
    tmp_path, classes, reference, monkeypatch
):
    source = tmp_path / "whole.tar.gz"
    whole = gzip.compress(nested_tar(classes), mtime=0)
    source.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with pytest.raises(DataSourceError, match=r"CRC.*may be wrong as well: get the file anew.*--allow-truncated"):
        make(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "salvaged")
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.prepare_class", lambda *_: pytest.fail("done again"))
        make(source, tmp_path / "salvaged", allow_truncated=True)
    assert "| truncated | a checksum of the source was wrong |" in (tmp_path / "salvaged/SUMMARY.md").read_text()
    source.write_bytes(gzip.compress(nested_tar(classes | {WNIDS[0]: {f"{WNIDS[0]}_1.JPEG": jpeg(9)}}), mtime=0))
    with pytest.raises(DataOutputError, match=r"was made with --allow-truncated \(a checksum"):
        make(source, tmp_path / "salvaged")
    source.write_bytes(whole)
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_a_last_header_that_is_damaged_is_not_the_end_of_a_compressed_archive(tmp_path, classes):
    whole = tar_bytes(flat_files(classes, ""))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1].offset
    ends = len(whole.rstrip(b"\0"))
    padded = bytearray(whole[: -(-ends // 512) * 512] + bytes(1024))
    padded[last] ^= 1
    for name, data in (("plain.tar", bytes(padded)), ("packed.tar.gz", gzip.compress(bytes(padded)))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataSourceError, match="no header where one should be"):
            make(tmp_path / name, tmp_path / f"out {name}")


@pytest.mark.parametrize(
    "pack", [lambda tar: gzip.compress(tar) + b"rubbish", lambda tar: bz2.compress(tar)[:-9] + b"1"]
)
def test_what_was_read_before_damage_is_kept_where_it_was_checked(tmp_path, classes, pack):
    source = tmp_path / "whole.tar.xx"
    # More than a block of bz2, which is read as a whole.
    source.write_bytes(pack(nested_tar(classes | {"n01440764": {"x.txt": hashlib.shake_256().digest(3_000_000)}})))
    with pytest.raises(DataSourceError, match=r"is damaged.*classes are finished and kept.*--allow-truncated"):
        make(source, tmp_path / "out")
    make(source, tmp_path / "out", allow_truncated=True)


def test_classes_that_are_no_longer_in_the_source_are_not_dropped_silently(tmp_path, classes, reference):
    more = {**classes, "n01440764": {f"n01440764_{number}.JPEG": jpeg(number) for number in range(6)}}
    source = write_layout("folders", tmp_path / "folders", more)
    path = source / WNIDS[0] / f"{WNIDS[0]}_3.JPEG"
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(BadImagesError):
        make(source, tmp_path / "out")
    path.write_bytes(whole)
    shutil.rmtree(source / "n01440764")
    with pytest.raises(DataSourceError, match=r"no longer in the source: n01440764\. Put them back"):
        make(source, tmp_path / "out")
    make(source, tmp_path / "out", resume=False)
    assert contents(tmp_path / "out") == reference


def test_a_higher_limit_for_bad_images_needs_nothing_anew(tmp_path, classes, monkeypatch):
    source = write_layout("folders", tmp_path / "folders", classes)
    (source / WNIDS[0] / f"{WNIDS[0]}_3.JPEG").write_bytes(b"")
    with pytest.raises(BadImagesError):
        make(source, tmp_path / "out")
    monkeypatch.setattr("wn21k_zoo.training.prepare.prepare_class", lambda *_: pytest.fail("done again"))
    make(source, tmp_path / "out", max_bad=0.5)


def test_a_finished_class_that_was_damaged_is_done_again(tmp_path, classes, reference, monkeypatch):
    source = write_layout("folders", tmp_path / "folders", classes)
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, tmp_path / "out")
    os.truncate(tmp_path / "out" / ".work" / "classes" / f"{WNIDS[0]}.tar", 1000)
    with pytest.raises(DataOutputError, match=rf"{WNIDS[0]}\.tar has been damaged .*run the same command again"):
        make(source, tmp_path / "out")
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_what_is_complete_says_so_and_is_not_made_anew(tmp_path, classes, caplog):
    source = write_layout("nested.tar", tmp_path / "whole.tar", classes)
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    info = make(source, tmp_path / "out", allow_truncated=True)
    assert "| truncated | the source ended too early |" in (tmp_path / "out/SUMMARY.md").read_text()
    assert make(source, tmp_path / "out", allow_truncated=True) == info
    assert "was complete already; nothing was done" in caplog.text
    source.write_bytes(whole)
    with pytest.raises(
        DataOutputError, match=r"was made with --allow-truncated \(the source ended too early\); delete"
    ):
        make(source, tmp_path / "out")
    source.unlink()
    assert make(source, tmp_path / "out", allow_truncated=True) == info
    source.write_bytes(whole)
    make(source, tmp_path / "again")
    with pytest.raises(DataOutputError, match="is complete; delete it, or name another folder"):
        make(source, tmp_path / "again", resume=False)


@pytest.mark.parametrize("layout", ["folder", "tar", "tar.gz"])
@pytest.mark.parametrize("first", ["test", "train"])
@pytest.mark.parametrize("top", ["data/", "./", ""])
def test_images_for_tests_are_for_neither_split(tmp_path, classes, layout, first, top, caplog):
    images = list(classes[WNIDS[0]].values())
    files = {f"{top}{split}/{WNIDS[0]}/{split}.JPEG": images[number] for number, split in enumerate(("train", "valid"))}
    tested = {f"{top}test/{WNIDS[number]}/{number}.JPEG": images[number] for number in (0, 1)}
    files = tested | files if first == "test" else files | tested
    source = write_folder(tmp_path / "in", files) / top
    if layout != "folder":
        source = tmp_path / layout
        source.write_bytes(gzip.compress(tar_bytes(files)) if layout == "tar.gz" else tar_bytes(files))
    make(source, tmp_path / "out", PrepareOptions(size=16))
    assert {(row["name"], row["split"]) for row in rows(tmp_path / "out")} == {
        ("train.JPEG", "train"), ("valid.JPEG", "validation"),
    }  # fmt: skip
    assert {row["action"] for row in rows(tmp_path / "out")} == {"resized"}
    what = "neither a class nor in one"
    assert f"{what}, so left out: {'' if layout == 'folder' or top != 'data/' else top}test" in caplog.text
    assert what in (tmp_path / "out/SUMMARY.md").read_text()


@pytest.mark.parametrize("packed", [False, True])
def test_classes_beside_a_split_are_refused(tmp_path, classes, packed):
    files = {f"train/{WNIDS[0]}/a.JPEG": jpeg(0), f"{WNIDS[1]}/b.JPEG": jpeg(1)}
    (tmp_path / "in.tar").write_bytes(gzip.compress(tar_bytes(files)) if packed else tar_bytes(files))
    with pytest.raises(DataSourceError, match=rf"{WNIDS[1]} is beside the folders for training and validation"):
        make(tmp_path / "in.tar", tmp_path / "out")


def test_options_that_do_not_apply_are_told(tmp_path, caplog):
    split = write_folder(tmp_path / "split", {f"train/{WNIDS[0]}/a.JPEG": jpeg(0)})
    make(split, tmp_path / "1", PrepareOptions(min_images=0, size=32))
    assert "the source comes split; without effect: min_images" in caplog.text
    resized = write_folder(tmp_path / "resized", {f"imagenet21k_train/{WNIDS[0]}/a.JPEG": jpeg(0)})
    make(resized, tmp_path / "2", PrepareOptions(size=32))
    assert "the source comes split and resized; without effect: size" in caplog.text
    assert [row["action"] for row in rows(tmp_path / "2")] == ["copied"]


def test_images_can_be_kept_as_they_are(tmp_path, classes):
    source = write_layout("folders", tmp_path / "in", classes)
    make(source, tmp_path / "out", PrepareOptions(min_images=0, val_per_class=2, resize="none"))
    assert {row["action"] for row in rows(tmp_path / "out")} == {"copied"}


@pytest.mark.parametrize("layout", ["folders", "tars", "nested.tar", "flat.tar", "flat.tar.gz"])
def test_files_of_one_name_in_several_folders_of_a_class_are_several(tmp_path, layout):
    files = {f"{folder}/{number}.JPEG": jpeg(10 * number + len(folder)) for folder in ("a", "bb") for number in (1, 2)}
    make(write_layout(layout, tmp_path / layout, {WNIDS[0]: files | {"3.JPEG": jpeg(3)}}), tmp_path / "out")
    assert {row["name"] for row in rows(tmp_path / "out")} == {*files, "3.JPEG"}
    assert {(row["name"], row["split"]) for row in rows(tmp_path / "out") if row["split"] == "validation"} == {
        ("3.JPEG", "validation"), ("a/1.JPEG", "validation"),
    }  # fmt: skip
    assert len({row["key"] for row in rows(tmp_path / "out")}) == len({row["sha256"] for row in rows(tmp_path / "out")})


def test_a_folder_that_may_not_be_read_is_told(tmp_path, classes, monkeypatch):
    source, scandir = write_layout("folders", tmp_path / "in", classes), os.scandir

    def refused(path="."):
        if os.fspath(path).endswith(WNIDS[1]):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataSourceError, match=rf"may not be read: {WNIDS[1]}\."):
        make(source, tmp_path / "out")


def test_what_looks_like_a_class_under_another_name_is_told(tmp_path, classes, caplog):
    source = write_layout("folders", tmp_path / "in", classes)
    names = {"N01698640/a.jpg", "n01742172 (copy)/a.jpg", "n01644900.tar.gz", "train/n01440764/a.jpg", "lost+found/a"}
    write_folder(source, dict.fromkeys(names, b"x") | {"LICENSE": b"x", "README.txt": b"x"})
    (source / "n01440764").symlink_to(tmp_path / "not mounted")
    make(source, tmp_path / "out")
    told = "N01698640, n01440764, n01644900.tar.gz, n01742172 (copy), train"
    assert f"neither a class nor in one, so left out: {told}\n" in caplog.text
    assert f"- neither a class nor in one: {told}\n" in (tmp_path / "out/SUMMARY.md").read_text()
    caplog.clear()
    count(source, OPTIONS, workers=1)
    assert told in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_links_and_pipes_in_folders_and_holes_in_tars_are_refused(tmp_path, caplog):
    source = write_folder(tmp_path / "in", {f"{WNIDS[0]}/{number}.png": jpeg(number) for number in range(3)})
    write_folder(source / WNIDS[0], {".thumbnails/0.png": jpeg(7)})
    (source / WNIDS[0] / "linked").symlink_to(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(source / WNIDS[0] / "pipe.jpg")
    image, file = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "BMP")
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("a.bmp")
        member.size, member.type = len(image.getvalue()), tarfile.GNUTYPE_SPARSE
        archive.addfile(member, io.BytesIO(image.getvalue()))
        hidden = tarfile.TarInfo(".thumbnails/b.bmp")
        hidden.size = len(image.getvalue())
        archive.addfile(hidden, io.BytesIO(image.getvalue()))
    (source / f"{WNIDS[1]}.tar").write_bytes(file.getvalue())
    make(source, tmp_path / "out", max_bad=1)
    names = {row["name"]: row["reason"] for row in rows(tmp_path / "out")}
    pipe = "refused: a pipe or device, not a file"
    assert names.pop("pipe.jpg", pipe) == pipe
    assert names == {
        "0.png": None, "1.png": None, "2.png": None, "a.bmp": HOLES,
        "linked": "a link to a folder, which is not followed",
    }  # fmt: skip
    assert caplog.text.count("1 links to folders within classes are not followed") == 1
    summary = (tmp_path / "out/SUMMARY.md").read_text()
    assert "- links to folders within classes, which are not followed: 1\n" in summary
    assert "a link" not in summary.replace("- links", "")


def test_a_folder_test_above_all_classes_is_just_a_folder(tmp_path, classes):
    for name in ("home/test/data/", "test/", "home/test/"):
        path = tmp_path / f"{name.replace('/', '')}.tar"
        path.write_bytes(tar_bytes(flat_files(classes, name)))
        make(path, tmp_path / path.stem)
        assert rows(tmp_path / path.stem)


def test_what_is_resized_beside_classes_says_nothing_of_these(tmp_path, classes):
    source = write_layout("folders", tmp_path / "in", classes)
    write_folder(source, {f"imagenet21k_train/{WNIDS[0]}/x.JPEG": jpeg(0)})
    make(source, tmp_path / "out", PrepareOptions(min_images=0, size=16))
    assert {row["action"] for row in rows(tmp_path / "out")} == {"resized"}


@pytest.mark.parametrize("rest", [lambda size: (b"rubbish" * 2000)[:size], lambda size: bytes(1 << 20)])
def test_what_pads_the_last_record_of_a_tar_is_nothing(tmp_path, classes, rest):
    whole = nested_tar(classes)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
    begin = last.offset_data + last.size + 1024
    assert begin < len(whole)
    (tmp_path / "whole.tar").write_bytes(whole[:begin] + rest(len(whole) - begin))
    make(tmp_path / "whole.tar", tmp_path / "out")


@pytest.mark.parametrize("source", ["s3://bucket/whole.tar", "https:/host/whole.tar"])
def test_a_url_is_no_source(tmp_path, source):
    for read in (lambda: make(source, tmp_path / "out"), lambda: count(source)):
        with pytest.raises(DataSourceError, match=r"://.* is a URL; fetch it to this machine, or mount it"):
            read()


def test_classes_without_training_images_are_in_the_summary(tmp_path, classes):
    make(
        write_layout("folders", tmp_path / "in", classes),
        tmp_path / "out",
        PrepareOptions(min_images=0, size=32, val_per_class=5),
    )
    assert "- classes with validation images alone: 1\n" in (tmp_path / "out/SUMMARY.md").read_text()


def test_names_in_a_folder_are_those_in_an_archive():
    for name in (f"{WNIDS[0]}/a/b.jpg", f"./x/{WNIDS[0]}/./a/b.jpg", "a//b.jpg", f"{WNIDS[1]}/{WNIDS[0]}/a/b.jpg"):
        assert sources._inner(name) == "a/b.jpg"
    assert flat_files({WNIDS[0]: {"a": b""}}) == {f"{WNIDS[0]}/a": b""}


@pytest.mark.parametrize("share", range(5, 100, 10))
def test_a_part_that_is_damaged_anywhere_is_done_again(tmp_path, classes, reference, monkeypatch, share):
    source = write_layout("folders", tmp_path / "in", classes)
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, tmp_path / "out")
    part = min((tmp_path / "out/.work/classes").glob("*.parquet"))
    data = bytearray(part.read_bytes())
    place = len(data) * share // 100
    data[place : place + 8] = bytes(255 - byte for byte in data[place : place + 8])
    part.write_bytes(data)
    with contextlib.suppress(DataOutputError):  # if it is noticed late
        make(source, tmp_path / "out")
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


@pytest.mark.parametrize("layout", ["nested.tar", "flat.tar"])
def test_a_damaged_header_does_not_hide_a_wrong_checksum(tmp_path, classes, reference, layout):
    whole = write_layout(layout, tmp_path / layout, classes).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1].offset
    damaged = bytearray(whole)
    damaged[3000] ^= 1  # of an image
    damaged[last] ^= 1
    source = tmp_path / "in.tar.gz"
    source.write_bytes(gzip.compress(bytes(damaged))[:-8] + gzip.compress(whole)[-8:])
    with pytest.raises(DataSourceError, match=r"CRC check failed.* may be wrong as well"):
        make(source, tmp_path / "out")
    source.write_bytes(gzip.compress(whole))
    shutil.copytree(tmp_path / "out", tmp_path / "allowed")
    make(source, tmp_path / "allowed", allow_truncated=True)
    assert "| truncated | a checksum of the source was wrong |" in (tmp_path / "allowed/SUMMARY.md").read_text()
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_what_was_allowed_to_be_wrong_is_not_kept_by_a_run_that_does_not_allow_it(
    tmp_path, classes, reference, monkeypatch
):
    whole = gzip.compress(nested_tar(classes), 0)
    damaged = bytearray(whole)
    damaged[3000] ^= 1
    source = tmp_path / "in.tar.gz"
    source.write_bytes(damaged)
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, tmp_path / "out", allow_truncated=True, max_bad=1)
    source.write_bytes(whole)
    shutil.copytree(tmp_path / "out", tmp_path / "anew")
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference
    make(source, tmp_path / "anew", resume=False, allow_truncated=True)
    assert contents(tmp_path / "anew") == reference


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_else_lies_beside_tests_is_no_matter(tmp_path, classes, pack):
    image = classes[WNIDS[0]][f"{WNIDS[0]}_1.JPEG"]
    for number, first in enumerate(("data/test/{}/1.JPEG", "test/{}/1.JPEG", "test/{}/sub/1.JPEG")):
        top = first.partition("test/")[0]
        files = {first.format(WNIDS[1]): image, f"{top}test.txt": b"x", f"{top}test/README.txt": b"x"}
        files |= {f"{top}train/{WNIDS[0]}/2.JPEG": image, f"{top}val/{WNIDS[0]}/3.JPEG": image}
        (tmp_path / f"{number}").write_bytes(pack(tar_bytes(files)))
        make(tmp_path / f"{number}", tmp_path / f"out{number}")
        assert {(row["name"], row["split"]) for row in rows(tmp_path / f"out{number}")} == {
            ("2.JPEG", "train"), ("3.JPEG", "validation"),
        }  # fmt: skip
    files = {f"test/{WNIDS[0]}/{number}.jpg": image for number in range(9)}
    for number, others in enumerate((flat_files(classes, ""), {f"{WNIDS[0]}.tar": tar_bytes(classes[WNIDS[0]])})):
        whole = pack(tar_bytes(files | others))
        source = tmp_path / f"cut{number}"
        source.write_bytes(whole[: len(pack(tar_bytes(files))) // 2])
        for allowed in (False, True):  # nobody knows what stands behind
            with pytest.raises(DataSourceError, match="is not a readable tar archive"):
                make(source, tmp_path / f"of {number}", allow_truncated=allowed)
        source.write_bytes(whole)
        make(source, tmp_path / f"of {number}", max_bad=1)
        assert not {row["name"] for row in rows(tmp_path / f"of {number}")} & {f"{number}.jpg" for number in range(9)}


def test_a_stray_class_archive_beside_tests_changes_no_layout(tmp_path, classes):
    stray = {f"test/{WNIDS[0]}/t.JPEG": jpeg(1), f"test/{WNIDS[0]}.tar": tar_bytes({"s.JPEG": jpeg(2)})}
    for number, more in enumerate(({}, {f"{WNIDS[1]}.tar": tar_bytes({"s.JPEG": jpeg(2)})})):
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(stray | more | flat_files(classes, "")))
        make(tmp_path / f"{number}.tar", tmp_path / f"out{number}")
        assert {row["name"] for row in rows(tmp_path / f"out{number}")} == {
            name for each in classes.values() for name in each
        }


def test_what_is_still_damaged_costs_no_finished_shard(tmp_path, classes, monkeypatch):
    source = write_layout("tars", tmp_path / "in", classes)
    one = source / f"{WNIDS[1]}.tar"
    one.write_bytes(one.read_bytes()[:3000])
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, tmp_path / "out", allow_truncated=True)
    monkeypatch.setattr("wn21k_zoo.training.gather.write_shard", lambda *_: pytest.fail("written again"))
    make(source, tmp_path / "out", allow_truncated=True)


def test_the_root_of_a_disk_can_be_a_source(tmp_path, classes, monkeypatch):
    source, is_file = write_layout("folders", tmp_path / "in", classes), pathlib.Path.is_file
    (source / "lost+found").mkdir()

    def refused(path):
        if "lost+found" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(pathlib.Path, "is_file", refused)
    make(source, tmp_path / "out")


def test_archives_that_are_mended_are_read_again_whatever_was_allowed(tmp_path, classes, reference):
    source = write_layout("tars", tmp_path / "tars", classes)
    paths = [source / f"{wnid}.tar" for wnid in WNIDS[:2]]
    whole = [path.read_bytes().ljust(80_000, b"\0") for path in paths]
    for path in paths:
        path.write_bytes(bytes(80_000))  # as files that were given their size before they were fetched
    with pytest.raises(DataSourceError, match="These class archives or folders are damaged"):
        make(source, tmp_path / "out")
    paths[0].write_bytes(whole[0])
    make(source, tmp_path / "out", allow_truncated=True)
    lines = (tmp_path / "out/classes.csv").read_text()
    assert f"{WNIDS[0]},kept" in lines
    assert f"{WNIDS[1]},damaged archive" in lines
    paths[1].write_bytes(whole[1])
    with pytest.raises(
        DataOutputError, match=r"with --allow-truncated \(class archives or folders that were damaged: 1"
    ):
        make(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_an_archive_that_may_not_be_read_is_told_and_costs_no_other(tmp_path, classes, monkeypatch):
    source, opening = write_layout("tars", tmp_path / "u_raw", classes), pathlib.Path.open

    def refused(path, *arguments, **options):
        if path.name == f"{WNIDS[1]}.tar":
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", refused)
    with pytest.raises(DataSourceError, match=rf"may not be read: {WNIDS[1]}\. The others are finished"):
        make(source, tmp_path / "u")
    make(source, tmp_path / "u", allow_truncated=True)
    assert {row["synset"] for row in rows(tmp_path / "u") if row["split"]} == {*classes} - {WNIDS[1]}


def test_a_fault_of_the_source_is_not_blamed_on_an_output_with_such_a_name(tmp_path, classes, monkeypatch):
    def refuses(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "in_raw" / "x"))

    source = write_layout("folders", tmp_path / "in_raw", classes)
    monkeypatch.setattr("wn21k_zoo.training.prepare.check_space_before", refuses)
    with pytest.raises(PermissionError):
        make(source, tmp_path / "in")


def test_why_there_is_nothing_to_use_is_told(tmp_path, classes):
    source = write_folder(tmp_path / "broken", {f"{wnid}/{number}.jpg": b"x" for wnid in WNIDS[:2] for number in "ab"})
    with pytest.raises(BadImagesError, match="4 of 4 images cannot be used"):
        make(source, tmp_path / "out")
    with pytest.raises(DataSourceError, match=r"is to be used: 4 images that cannot be used\."):
        make(source, tmp_path / "out", max_bad=1)
    source = write_layout("tars", tmp_path / "tars", classes)
    for path in source.iterdir():
        path.write_bytes(b"damaged" * 100)
    with pytest.raises(DataSourceError, match="These class archives or folders are damaged"):
        make(source, tmp_path / "other")
    with pytest.raises(DataSourceError, match=r"is to be used: \d classes: damaged archive\."):
        make(source, tmp_path / "other", allow_truncated=True)


def test_classes_without_images_are_not_counted_and_may_go(tmp_path, classes, monkeypatch):
    files = {f"{split}/{wnid}/{split}.jpg": jpeg(0) for split in ("train", "val") for wnid in WNIDS[:2]}
    source = write_folder(tmp_path / "in", files)
    for split in ("train", "val"):
        (source / split / WNIDS[2]).mkdir()
    make(source, tmp_path / "out")
    summary = (tmp_path / "out/SUMMARY.md").read_text()
    assert re.search(r"\| classes \| +2 \|", summary)
    assert "validation images alone" not in summary
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, tmp_path / "again")
    for split in ("train", "val"):
        (source / split / WNIDS[2]).rmdir()
    make(source, tmp_path / "again")
    assert WNIDS[2] not in (tmp_path / "again/classes.csv").read_text()


def test_an_output_within_its_source_is_nothing_that_was_left_out(tmp_path, classes, monkeypatch, caplog):
    source = write_layout("folders", tmp_path / "in", classes)
    make(source, source / "out")
    expected = (source / "out/SUMMARY.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, source / "again")
    make(source, source / "again")
    assert (source / "again/SUMMARY.md").read_text() == expected
    assert "left out" not in caplog.text


def inverted(path):
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half : half + 8] = bytes(255 - byte for byte in data[half : half + 8])
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["classes/*.parquet", "classes/*.tar", "shards/*.json"])
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 20), lambda path: path.unlink(), inverted])
def test_finished_work_that_is_damaged_is_done_again(tmp_path, classes, reference, monkeypatch, what, damage):
    source = write_layout("folders", tmp_path / "in", classes)
    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.prepare.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, tmp_path / "out")
    damage(min((tmp_path / "out/.work").glob(what)))
    if what == "classes/*.tar" and damage is not inverted:  # all shards were made of it, but it may be needed again
        for path in (tmp_path / "out/.work/shards").iterdir():
            path.unlink()
        with pytest.raises(DataOutputError, match="run the same command again"):
            make(source, tmp_path / "out")
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == reference


def test_what_the_disk_fails_to_read_is_not_deleted(tmp_path, classes, monkeypatch):
    source, calls = write_layout("folders", tmp_path / "in", classes), []

    def fails(path, *arguments, **options):
        calls.append(path)
        if len(calls) == 10:
            raise OSError(5, "Input/output error", str(path))
        return read_table(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("wn21k_zoo.training.gather.read_table", fails)
        with pytest.raises(OSError, match="Input/output error"):
            make(source, tmp_path / "out")
    assert len(list((tmp_path / "out/.work/classes").glob("*.parquet"))) == len(classes)
    make(source, tmp_path / "out")


def test_a_source_whose_archives_were_deleted_needs_no_more_work(tmp_path, classes):
    source = write_layout("tars", tmp_path / "in", classes)
    info = make(source, tmp_path / "out")
    for path in source.iterdir():
        path.unlink()
    assert make(source, tmp_path / "out") == info
    shutil.copytree(tmp_path / "out", source / "prepared")
    assert make(source, source / "prepared") == info
    shutil.rmtree(source / "prepared")
    for wrong in (source, tmp_path / "note.txt"):
        (tmp_path / "note.txt").write_text("x")
        with pytest.raises(DataSourceError):
            make(wrong, tmp_path / ("other" if wrong == source else "out"))


def test_progress_ends_at_its_total(tmp_path, classes):
    source, seen = write_layout("tars", tmp_path / "in", classes), []
    one = source / f"{WNIDS[1]}.tar"
    whole = one.read_bytes()
    one.write_bytes(whole[:3000])
    with pytest.raises(DataSourceError):
        make(source, tmp_path / "out")
    one.write_bytes(whole)
    make(source, tmp_path / "out", progress=seen.append)
    of_classes = [(each.done, each.total) for each in seen if each.stage == "classes"]
    assert of_classes[0][0] < of_classes[-1][0] == of_classes[-1][1]


def test_a_checksum_that_was_wrong_is_forgotten_with_what_was_read(tmp_path, classes, reference):
    whole = gzip.compress(nested_tar(classes), mtime=0)
    source = tmp_path / "in.tar.gz"
    source.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with pytest.raises(DataSourceError, match="No image of the source"):
        make(source, tmp_path / "out", PrepareOptions(min_images=500, size=32), allow_truncated=True)
    source.write_bytes(whole)
    make(source, tmp_path / "out", allow_truncated=True)
    assert contents(tmp_path / "out") == reference


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_with_holes_is_refused_and_moves_no_other_to_another_class(tmp_path, classes, pack):
    whole = tar_bytes(flat_files(classes, ""))
    second = whole.index(f"{WNIDS[1]}/".encode())
    for size in (4096, 1 << 32):
        holes = [sparse(f"{WNIDS[0]}/{name}", size)[:-1024] for name in ("note.txt", "z.jpg")]
        (tmp_path / "in.tar").write_bytes(pack(whole[:second] + b"".join(holes) + whole[second:]))
        make(tmp_path / "in.tar", tmp_path / f"{size}", max_bad=1)
        found = sorted((row["synset"], row["name"], row["reason"]) for row in rows(tmp_path / f"{size}"))
        images = [(wnid, name, None) for wnid, images in classes.items() for name in images]
        assert found == sorted([*images, (WNIDS[0], f"{WNIDS[0]}/z.jpg", HOLES)])
    whole = nested_tar(classes)
    second = whole.index(f"{WNIDS[1]}.tar".encode())
    holes = sparse("README.txt", 1 << 32)[:-1024]
    (tmp_path / "in.tar").write_bytes(pack(whole[:second] + holes + whole[second:]))
    make(tmp_path / "in.tar", tmp_path / "nested")
    assert sorted((row["synset"], row["name"], row["reason"]) for row in rows(tmp_path / "nested")) == sorted(images)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_class_archive_with_holes_is_refused(tmp_path, pack):
    (tmp_path / "in.tar").write_bytes(pack(sparse(f"{WNIDS[0]}.tar", 1 << 32)))
    with pytest.raises(DataSourceError, match="was packed with holes"):
        make(tmp_path / "in.tar", tmp_path / "out")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1 << 20
    with pytest.raises(DataSourceError, match="was packed with holes"):
        count(tmp_path / "in.tar", OPTIONS, workers=1)


@pytest.mark.parametrize(
    "about",
    [{"GNU.sparse.map": "x"}, {"GNU.sparse.size": "x"}, {"GNU.sparse.realsize": "abc"}, {"size": str(10**30)}],
)
def test_damaged_sizes_and_lists_of_holes_are_errors_of_the_source(tmp_path, about):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(f"{WNIDS[0]}/a.jpg")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", **about}
        archive.addfile(member)
    (tmp_path / "in.tar").write_bytes(file.getvalue())
    with pytest.raises(DataSourceError, match="damaged or was not fetched whole"):
        make(tmp_path / "in.tar", tmp_path / "out")


def test_an_archive_that_begins_with_tests_may_be_cut_off(tmp_path, classes):
    tests = tar_bytes({f"test/{WNIDS[0]}/t.JPEG": jpeg(1)}).rstrip(b"\0")
    whole = tests + bytes(-len(tests) % 512) + nested_tar(classes)
    (tmp_path / "in.tar.gz").write_bytes(gzip.compress(whole.rstrip(b"\0"))[:-300])
    make(tmp_path / "in.tar.gz", tmp_path / "out", allow_truncated=True)
    found = {row["name"] for row in rows(tmp_path / "out")}
    assert found
    assert found < {name for images in classes.values() for name in images}
