"""Files that are there whole or not at all, and what prepared shards must never change."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from wn21k_zoo.errors import DataError
from wn21k_zoo.training import shards
from wn21k_zoo.training.shards import INDEX_DTYPE, atomic_file, index_path, read_index, sample_hash, write_index


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synchronised there")
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_is_done(tmp_path, monkeypatch):
    target, done = tmp_path / "file", []
    fsync, replace = os.fsync, shards._replace

    def synced(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append("folder" if is_folder else "file")
        if not is_folder:
            assert not target.exists()
        fsync(descriptor)

    def renamed(source, to):
        done.append("name")
        replace(source, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shards, "_replace", renamed)
    with atomic_file(target) as file:
        file.write(b"content")
    assert done == ["file", "name", "folder"]
    assert target.read_bytes() == b"content"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_of_a_file_that_fails_nothing_is_left_and_the_former_one_stays(tmp_path, error):
    (tmp_path / "file").write_bytes(b"former")

    def fail():
        with atomic_file(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"former"


def test_two_processes_or_threads_write_files_of_different_names(tmp_path):
    with atomic_file(tmp_path / "file") as one:
        assert f".{os.getpid()}-" in one.name
        assert Path(one.name).name.startswith(".file.")
        assert one.name.endswith(".tmp")


def test_the_place_of_a_sample_is_the_one_it_has_always_had():
    assert sample_hash("n02123045_1") == 8290389399922624941


def test_an_index_of_another_length_or_type_is_refused(tmp_path):
    path = index_path(tmp_path / "train-00000.tar")
    write_index(path, np.zeros(3, INDEX_DTYPE))
    assert len(read_index(path, 3)) == 3
    with pytest.raises(DataError):
        read_index(path, 4)
    np.save(path, np.zeros(3))
    with pytest.raises(DataError):
        read_index(path, 3)
