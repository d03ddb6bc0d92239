import contextlib
import errno
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import platformdirs
import pytest
from conftest import EMBEDDED

from wn21k_zoo import files, registry
from wn21k_zoo.building import configured_folder, create_model, read_config
from wn21k_zoo.cache import cache_dir
from wn21k_zoo.download import fetch
from wn21k_zoo.errors import CacheError, DataError, DataOutputError, InvalidArgumentError
from wn21k_zoo.files import atomic_file, check_writable, expanded, is_hidden, local_path, parse_json, text_of
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.messages import bars, on_terminal, say
from wn21k_zoo.training.storage import data_cache_dir


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


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no such disk here")  # noqa: S108
def test_a_file_in_shared_memory_is_whole_or_not_there():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "status.json"
        path.write_bytes(b"former")
        with contextlib.suppress(ZeroDivisionError), atomic_file(path) as file:
            file.write(b"n")
            assert path.read_bytes() == b"former"
            raise ZeroDivisionError
        assert path.read_bytes() == b"former"
        assert [entry.name for entry in Path(folder).iterdir()] == ["status.json"]


@pytest.mark.parametrize("take", [lambda place: expanded(place, DataError), configured_folder, create_model])
@pytest.mark.parametrize("place", [None, 7, ["a"]])
def test_what_is_no_path_is_one_line(take, place):
    with pytest.raises((DataError, InvalidArgumentError), match=r"give a str or a pathlib\.Path"):
        take(place)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last two as Windows programs write
def test_texts_that_others_write(tmp_path, encoding):
    (tmp_path / "mine.txt").write_text("n02121808 # Katze, größer\n", encoding=encoding)
    assert LabelSpace.from_file(tmp_path / "mine.txt").wnids == ("n02121808",)
    text = '{"architecture": "größer"}'
    assert parse_json(text_of(text.encode(encoding))) == parse_json(text.encode(encoding)) == json.loads(text)
    (tmp_path / "config.json").write_text(text, encoding=encoding)
    assert read_config(tmp_path)["architecture"] == "größer"


@pytest.mark.parametrize("seconds", [0.1, 60])
def test_on_windows_a_name_is_waited_for(tmp_path, monkeypatch, seconds):
    source, target, refused = tmp_path / "new", tmp_path / "old", []
    source.write_bytes(b"new")
    rename = Path.replace

    def busy(self, to):
        if len(refused) < 5:
            refused.append(to)
            raise PermissionError(13, "Access is denied")
        return rename(self, to)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))
    clock = [0.0]
    time = SimpleNamespace(sleep=lambda seconds: clock.append(clock[-1] + seconds), monotonic=lambda: clock[-1])
    monkeypatch.setattr(files, "time", time)
    if seconds < 1:
        with pytest.raises(PermissionError):
            files.replace(source, target, patience=seconds)
        assert len(refused) == 3
    else:
        files.replace(source, target, patience=seconds)
        assert target.read_bytes() == b"new"
    monkeypatch.undo()


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "there").write_bytes(b"content")
    for name in ("there", "new"):
        check_writable(tmp_path / name)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("there", b"content")]
    allowed, opened = [], Path.open

    def refused(self, mode):
        if mode != allowed[-1]:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode)

    monkeypatch.setattr(Path, "open", refused)
    # In a folder that is not ours; on Windows, also a file that another program has open.
    for mode, names in (("ab", ("there", "new")), ("xb", ("there",))):
        allowed.append(mode)
        for name in names:
            with pytest.raises(
                DataOutputError, match=f"{name} cannot be written: Permission denied; name another file"
            ):
                check_writable(tmp_path / name)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no such name here")  # noqa: PTH110
def test_stdout_can_be_written_wherever_it_goes(tmp_path):
    code = "from pathlib import Path; from wn21k_zoo.files import check_writable; check_writable(Path('/dev/stdout'))"
    with (tmp_path / "out").open("wb") as out:
        for stdout in (subprocess.PIPE, out):
            subprocess.run([sys.executable, "-c", code], check=True, stdout=stdout)


@pytest.mark.parametrize("name", [".DS_Store", "._a.jpg", "__MACOSX", "$RECYCLE.BIN", "Thumbs.db", "lost+found"])
def test_what_systems_put_into_folders_is_nobodys(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["Lost+Found", "thumbs", "bin", "System", "a.jpg"])
def test_what_is_called_nearly_so_is_somebodys(name):
    assert not is_hidden(name)


def test_without_a_console_nothing_is_said(monkeypatch, capsys):
    say("a line")
    assert capsys.readouterr().err == "wn21k: a line\n"
    monkeypatch.setattr(sys, "stderr", None)
    say("a line")
    assert not on_terminal()


class Closed(io.StringIO):
    """A closed terminal, or a log on a full disk."""

    def write(self, text=""):
        raise OSError(errno.EIO, "Input/output error")

    flush = write


def test_what_nobody_can_read_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Closed())
    say("a line")
    with bars("{task.description}") as shown:
        shown.update(shown.add_task("work", total=2), advance=1)
        shown.console.print("a line")


@pytest.mark.parametrize("text", ["s3://bucket/run", "gs:/x", "hdfs://a/b", "file:///tmp/x"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_place_to_write_to(text, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataOutputError, match="is a URL; name a path of this machine"):
        local_path(kind(text), DataOutputError)
    if os.name != "nt":  # where no folder can have this name
        Path(text.partition("/")[0]).mkdir()
        assert local_path(kind(text), DataOutputError) == Path(text)


def test_a_url_is_known_in_a_path_of_windows():
    with pytest.raises(DataOutputError, match="s3://bucket"):
        local_path(PureWindowsPath("s3://bucket/run"), DataOutputError)


@pytest.mark.parametrize("text", ["s3:x", "C:/x", "C:\\x", "~/x", "a/b:/c", "x"])
def test_what_is_no_url_may_be_written(text):
    assert local_path(text, DataOutputError) == Path(text).expanduser()


def test_who_has_no_home_is_told_what_to_set(monkeypatch):
    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(platformdirs, "user_cache_path", homeless)
    for name in ("WN21K_CACHE", "WN21K_DATA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CacheError, match=r"no home folder.*set WN21K_CACHE"):
        cache_dir()
    with pytest.raises(DataError, match=r"no home folder.*set WN21K_DATA_CACHE"):
        data_cache_dir()
    assert fetch(registry.get_checkpoint(EMBEDDED)).path.is_file()  # which needs no cache


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_what_a_full_disk_hides_on_closing_is_told(tmp_path):
    code = f"""
import resource, signal
from pathlib import Path
from wn21k_zoo.files import atomic_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_file(Path({str(tmp_path / "rows")!r})) as file:
        file.write(bytes(5000))
        raise KeyError("of the caller")
except KeyError:
    print("told")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("told\n", "")
    assert not [*tmp_path.iterdir()]
