"""Every layout of ImageNet-21K as a stream of classes."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest

from wn21k_zoo.errors import DataSourceError
from wn21k_zoo.training.sources import Member, member_reader, open_source, read_members

from .archives import (
    OUTSIDE,
    WNIDS,
    make_classes,
    nested_tar,
    tar_bytes,
    write_folder,
    write_layout,
)


def classes_of(path, tmp_path):
    (tmp_path / "spool").mkdir(exist_ok=True)
    return list(open_source(path).classes(tmp_path / "spool", lambda _: True))


@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_that_was_made_on_a_mac(tmp_path, nested):
    classes = make_classes(2)
    files = {f"{wnid}.tar": tar_bytes(files) for wnid, files in classes.items()}
    if not nested:
        files = {f"{wnid}/{name}": data for wnid, files in classes.items() for name, data in files.items()}
    beside = [f"{Path(name).parent.as_posix()}/._{Path(name).name}" for name in files]
    members = {"./._n02123045": b"x"}
    for (name, data), hidden in zip(files.items(), beside, strict=True):
        members |= {hidden: b"x", name: data}
    (tmp_path / "mac.tar").write_bytes(tar_bytes(members))
    of_classes = classes_of(tmp_path / "mac.tar", tmp_path)
    found = {each.wnid: {member.name for member in read_members(each)} for each in of_classes}
    assert {wnid: names & set(classes[wnid]) for wnid, names in found.items()} == {
        wnid: set(files) for wnid, files in classes.items()
    }


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_a_class_in_several_places_are_refused(tmp_path, packed):
    one, other = WNIDS[:2]
    content = tar_bytes({f"{one}/a.jpg": b"a", f"{other}/b.jpg": b"b", f"{one}/c.jpg": b"c"})
    (tmp_path / "flat.tar").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataSourceError, match=r"has the files of .* in several places"):
        classes_of(tmp_path / "flat.tar", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_archive_that_is_there_twice_is_refused(tmp_path, packed):
    inner = tar_bytes({"a.jpg": b"a"})
    content = tar_bytes({f"one/{WNIDS[0]}.tar": inner, f"{WNIDS[1]}.tar": inner, f"two/{WNIDS[0]}.tar": inner})
    (tmp_path / "nested.tar").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataSourceError, match=rf"has the files of {WNIDS[0]} in several places"):
        classes_of(tmp_path / "nested.tar", tmp_path)
    with pytest.raises(DataSourceError, match="in several places"):  # classes that are done or skipped count, too
        list(open_source(tmp_path / "nested.tar").classes(tmp_path, lambda name: False))


@pytest.mark.parametrize("layout", ["nested.tar", "flat.tar", "nested.tar.gz", "flat.tar.gz"])
def test_damage_within_an_archive_is_not_its_end(tmp_path, layout):
    source = write_layout(layout, tmp_path / layout, make_classes())
    packed = layout.endswith(".gz")
    whole = bytearray(gzip.decompress(source.read_bytes()) if packed else source.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        begin = archive.getmembers()[-2].offset
    whole[begin : begin + 512] = b"x" * 512
    source.write_bytes(gzip.compress(bytes(whole)) if packed else whole)
    with pytest.raises(DataSourceError, match="is damaged"):
        classes_of(source, tmp_path)


def header(name, size, kind=tarfile.REGTYPE):
    """A header that tarfile itself would not write."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    block[156:157], block[148:156] = kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, 3 << 30])
def test_sizes_that_nobody_can_mean_are_damage(tmp_path, packed, kind, size):
    image = header(f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG", 0)
    content = image + header(f"{WNIDS[0]}/{WNIDS[0]}_1.JPEG", size, kind) + bytes(10_240)
    (tmp_path / "flat.tar").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataSourceError, match=r"is damaged|not fetched whole"):
        classes_of(tmp_path / "flat.tar", tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"{WNIDS[0]}.tar").write_bytes(content)
    if size < 0 or kind != tarfile.REGTYPE:
        with pytest.raises(DataSourceError, match=f"is damaged: .*a header has {size:,} bytes"):
            [*read_members(classes_of(tmp_path / "folder", tmp_path)[0])]


@pytest.mark.parametrize("packed", [False, True])
def test_a_size_below_0_in_another_header_is_damage(tmp_path, packed):
    image, record = header(f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG", 0), b"13 size=-512\n"
    about = header("x", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")
    content = image + about + header(f"{WNIDS[0]}/{WNIDS[0]}_1.JPEG", 0) + bytes(10_240)
    (tmp_path / "flat.tar").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataSourceError, match="is damaged"):
        classes_of(tmp_path / "flat.tar", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_without_end_are_damage(tmp_path, kind):
    image = header(f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG", 0)
    (tmp_path / "flat.tar").write_bytes(image + header("x", 0, kind) * 3_000 + image + bytes(10_240))
    with pytest.raises(DataSourceError, match=r"is damaged .*: too many headers describe one member\.$"):
        classes_of(tmp_path / "flat.tar", tmp_path)


def test_a_class_that_is_there_twice_is_refused(tmp_path):
    write_folder(tmp_path / "in", {f"{WNIDS[0]}.tar": tar_bytes({}), f"{WNIDS[0]}/a.jpg": b"a"})
    with pytest.raises(DataSourceError, match=rf"is there twice, .*{WNIDS[0]} and .*{WNIDS[0]}\.tar; remove one"):
        classes_of(tmp_path / "in", tmp_path)
    write_folder(tmp_path / "split", {f"{split}/{WNIDS[0]}/a.jpg": b"a" for split in ("train", "val", "validation")})
    with pytest.raises(DataSourceError, match=r"is there twice, .*val.* and .*val.*; remove one"):
        classes_of(tmp_path / "split", tmp_path)


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train", "validation"), ("train", "valid"), ("imagenet21k_train", "imagenet21k_val")]
)
def test_folders_of_splits_have_their_names(tmp_path, names):
    write_folder(tmp_path / "in", {f"{names[0]}/{WNIDS[0]}/a.jpg": b"a", f"{names[1]}/{WNIDS[0]}/b.jpg": b"bb"})
    found = classes_of(tmp_path / "in", tmp_path)
    assert {one.split: one.num_bytes for one in found} == {"train": 1, "validation": 2}


def test_what_is_named_like_a_class_and_more_is_none(tmp_path):
    write_folder(tmp_path / "in", {f"{WNIDS[0]}/a.jpg": b"a", f"{WNIDS[0]}_old/b.jpg": b"b", "n0212304599/c.jpg": b"c"})
    assert [one.wnid for one in classes_of(tmp_path / "in", tmp_path)] == [WNIDS[0]]


def test_images_of_every_kind_in_the_order_of_their_names(tmp_path):
    names = sorted(
        f"{number}{kind}" for number in range(9) for kind in (".png", ".webp", ".bmp", ".JPG", ".jpeg", ".gif", ".tif")
    )
    write_folder(tmp_path / "in" / WNIDS[0], dict.fromkeys(reversed([*names, "a.txt", "b.xml"]), b"x"))
    (one,) = classes_of(tmp_path / "in", tmp_path)
    assert [member.name for member in read_members(one)] == names


def test_links_and_devices_of_every_kind_are_refused(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, kind in enumerate((tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "x"
            archive.addfile(member)
    write_folder(tmp_path / "in", {f"{WNIDS[0]}.tar": file.getvalue()})
    (one,) = classes_of(tmp_path / "in", tmp_path)
    assert ["a link, a device" in (member.refused or "") for member in read_members(one)] == [True] * 4


def test_a_file_that_is_shorter_than_its_header_says_is_not_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"12345")
    with member_reader() as read:
        assert read(Member("a.jpg", tmp_path / "a.jpg", 1, 4)) == b"2345"
        with pytest.raises(OSError, match="is cut off"):
            read(Member("a.jpg", tmp_path / "a.jpg", 1, 5))


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_archives_of_other_packers(tmp_path, pack):
    (tmp_path / "nested.tar").write_bytes(pack(nested_tar(make_classes())))
    assert [one.wnid for one in classes_of(tmp_path / "nested.tar", tmp_path)] == [*WNIDS, OUTSIDE]
    whole = (tmp_path / "nested.tar").read_bytes()
    (tmp_path / "nested.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataSourceError, match="was not fetched whole"):
        classes_of(tmp_path / "nested.tar", tmp_path)
