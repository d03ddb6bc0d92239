"""How large a preparation will be, and whether there is room for it."""

import errno
import io
import types
from pathlib import Path

import pytest

from wn21k_zoo.errors import DataSourceError, DiskSpaceError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training import dry_run
from wn21k_zoo.training.dry_run import count
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.shards import WORK_FOLDER
from wn21k_zoo.training.sources import open_source

from .archives import (
    WNIDS,
    jpeg,
    make_classes,
    tar_bytes,
    write_folder,
    write_layout,
)

OPTIONS = PrepareOptions(min_images=10, val_per_class=3, size=32, shard_size=7)


def test_twice_the_output_is_needed_less_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    for expected, have in ((50, 0), (60, 20)):
        dry_run._refuse_space(expected, have, tmp_path)
        with pytest.raises(DiskSpaceError):
            dry_run._refuse_space(expected + 1, have, tmp_path)
    done = [types.SimpleNamespace(stored_bytes=4)] * 2  # from a fifth of the source, so 40 in all and 72 to come
    dry_run.check_space_during(done, 20, 100, tmp_path)
    with pytest.raises(DiskSpaceError):
        dry_run.check_space_during(done, 20, 200, tmp_path)


def test_space_is_reckoned_for_the_classes_that_were_not_looked_at(tmp_path, monkeypatch):
    image = jpeg(0, 16, 16)  # about 3.3 kB when stored
    files = {f"{wnid}/a.jpg": image for wnid in LabelSpace.load("fall11").wnids[:64]}
    write_folder(tmp_path / "in", files)
    needed = 2 * len(files) * (len(image) + 2816)
    for free in (needed + 1, 0.75 * needed):
        monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        options = PrepareOptions(min_images=0, val_per_class=0, size=32)
        if free > needed:
            prepare(tmp_path / "in", tmp_path / "fits", options, workers=1)
        else:
            with pytest.raises(DiskSpaceError):
                prepare(tmp_path / "in", tmp_path / "out", options, workers=1)


def test_shards_that_are_there_need_no_more_room(tmp_path, monkeypatch):
    source = write_layout("folders", tmp_path / "in", make_classes())

    def stop(progress):
        if progress.stage == "shards" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", OPTIONS, workers=1, progress=stop)
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    classes = [path.stat().st_size for path in (tmp_path / "out" / WORK_FOLDER / "classes").iterdir()]
    assert len(shards) >= 3
    asked = []
    monkeypatch.setattr(dry_run, "_refuse_space", lambda expected, have, output: asked.append(have))
    prepare(source, tmp_path / "out", OPTIONS, workers=1)
    assert asked == [sum(shards) + sum(classes)]


def test_what_was_copied_out_goes_when_it_is_counted(tmp_path):
    for layout in ("nested.tar.gz", "flat.tar.gz"):
        source = write_layout(layout, tmp_path / layout, make_classes())
        seen = 0
        for one in open_source(source).classes(tmp_path, lambda _: True):
            assert one.spooled
            dry_run.count_class(one, OPTIONS, is_split=False)
            assert not one.path.exists()
            seen += 1
        assert seen == 4


def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch):
    opened = Path.open

    def full(path, mode="r", **how):
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, **how)

    source = write_layout("nested.tar.gz", tmp_path / "in.tar.gz", make_classes())
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskSpaceError, match=r"No space is left in .*set TMPDIR"):
        count(source, OPTIONS, workers=1)


def test_on_ray_too_what_is_copied_out_is_counted_here(tmp_path):
    source = write_layout("nested.tar.gz", tmp_path / "in.tar.gz", make_classes())
    assert count(source, OPTIONS, engine="ray", ray_address="nobody:1") == count(source, OPTIONS, workers=1)


def test_a_dry_run_counts_names_once_and_nothing_that_is_refused(tmp_path):
    file = io.BytesIO(tar_bytes({"a.jpg": jpeg(0), "x/a.jpg": jpeg(1), "./a.jpg": jpeg(1), "../b.jpg": jpeg(2)}))
    write_folder(tmp_path / "in", {f"{WNIDS[0]}.tar": file.getvalue()})
    (one,) = count(tmp_path / "in", PrepareOptions(min_images=0, val_per_class=0), workers=1)
    assert (one.train, one.validation, one.decision) == (2, 0, "kept")


@pytest.mark.parametrize("layout", ["nested.tar", "nested.tar.gz"])
def test_a_dry_run_of_what_is_cut_off(tmp_path, layout):
    source = write_layout(layout, tmp_path / layout, make_classes())
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    with pytest.raises(DataSourceError, match="--allow-truncated"):
        count(source, OPTIONS, workers=1)
    counts = count(source, OPTIONS, workers=1, allow_truncated=True)
    assert 0 < sum(one.decision == "kept" for one in counts) < 3


def test_a_dry_run_of_what_is_scattered(tmp_path):
    files = {f"{wnid}/{number}.jpg": jpeg(number) for number in range(2) for wnid in WNIDS}
    (tmp_path / "source.tar").write_bytes(tar_bytes(files))
    for allowed in (False, True):  # nothing is cut off
        with pytest.raises(DataSourceError, match=r"name the folder instead\.$"):
            count(tmp_path / "source.tar", OPTIONS, workers=1, allow_truncated=allowed)
        with pytest.raises(DataSourceError, match=r"name the folder instead\.$"):
            prepare(tmp_path / "source.tar", tmp_path / "out", OPTIONS, workers=1, allow_truncated=allowed)


def test_a_dry_run_of_what_is_split_keeps_its_split_and_its_bytes(tmp_path):
    images = [jpeg(number, 80, 80) for number in range(3)]
    files = {f"imagenet21k_train/{WNIDS[0]}/a.jpg": images[0], f"imagenet21k_val/{WNIDS[1]}/b.jpg": images[1]}
    write_folder(tmp_path / "in", files)
    counts = count(tmp_path / "in", PrepareOptions(size=32), workers=1)
    assert {(one.wnid, one.train, one.validation, one.stored_bytes) for one in counts} == {
        (WNIDS[0], 1, 0, len(images[0]) + 2816), (WNIDS[1], 0, 1, len(images[1]) + 2816),
    }  # fmt: skip
