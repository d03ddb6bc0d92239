import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wn21k_zoo import files
from wn21k_zoo.files import atomic_file


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synchronised there")
def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_is_done(tmp_path, monkeypatch):
    target, done = tmp_path / "file", []
    fsync, replace = os.fsync, files.replace

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
    monkeypatch.setattr(files, "replace", renamed)
    with atomic_file(target) as file:
        file.write(b"content")
    assert done == ["file", "name", "folder"]
    assert target.read_bytes() == b"content"


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_and_special_files_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_bytes(b"former")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    with atomic_file(tmp_path / "pipe") as file:
        file.write(b"row")
    reader.join()
    assert read == [b"row"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no such name here")  # noqa: PTH110
@pytest.mark.parametrize("piped", [False, True])
def test_what_goes_to_stdout_goes_there(tmp_path, piped):
    code = "from pathlib import Path; from wn21k_zoo.files import atomic_file\n"
    code += "with atomic_file(Path('/dev/stdout')) as file: file.write(b'rows')"
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE if piped else out)
    assert (done.stdout or (tmp_path / "out").read_bytes()) == b"rows"
    assert os.path.lexists("/dev/stdout")


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
