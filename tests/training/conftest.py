import itertools
import shutil
import signal
import tarfile
import time

import pytest
import torch

from wn21k_zoo.training import engine
from wn21k_zoo.training.optimization import Criterion
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.shards import index_path, read_index, read_info

from .archives import WNIDS, jpeg
from .loading import SIZE
from .runs import make_folder


@pytest.fixture(scope="module")
def one_thread():
    """Run on one thread: the number of threads determines the order of additions."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders, one set per test module."""
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def stop_at(monkeypatch):
    """Make a run receive SIGTERM after a step."""

    def at(step):
        react = engine._Run._react

        def stopping(self, answer):
            if self.step == step:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0)  # the handler runs before the next line
                answer = answer._replace(stop=self.agreement.stops())
            react(self, answer)

        monkeypatch.setattr(engine._Run, "_react", stopping)

    return at


@pytest.fixture
def at_loss(monkeypatch):
    """Pass logits through a function before each loss; it also gets the number of the call, from 1."""

    def at(action):
        forward, numbers = Criterion.forward, itertools.count(1)
        monkeypatch.setattr(
            Criterion, "forward", lambda self, logits, *others: forward(self, action(logits, next(numbers)), *others)
        )

    return at


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WN21K_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """67 training samples in 7 shards, 8 samples for validation."""
    folder = tmp_path_factory.mktemp("shards")
    source = folder / "source"
    for number, wnid in enumerate(WNIDS[:2]):
        (source / wnid).mkdir(parents=True)
        for index in range(38 - number):
            (source / wnid / f"{wnid}_{index}.JPEG").write_bytes(jpeg(100 * number + index, 24 + index % 9, 20))
    prepare(source, folder / "out", PrepareOptions(min_images=0, val_per_class=4, size=SIZE, shard_size=10), workers=1)
    return folder / "out"


@pytest.fixture
def damaged(shards, tmp_path):
    """Two shards whose sample 5 is zeroed after its first two bytes; the folder, and names of shard and file."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    names = []
    for shard in read_info(folder).splits["train"][:2]:
        entry = read_index(index_path(folder / shard.name))[5]
        with (folder / shard.name).open("r+b") as file:
            file.seek(int(entry["offset"]) + 2)
            file.write(bytes(int(entry["size"]) - 2))
        with tarfile.open(folder / shard.name) as archive:
            names.append((shard.name, archive.getmembers()[15].name))
    return folder, names
