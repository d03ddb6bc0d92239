"""Functions that run in subprocesses; imports nothing heavy."""

import os
import time

from wn21k_zoo.training import dataset
from wn21k_zoo.training.dataset import open_dataset
from wn21k_zoo.training.storage import Stage


def stage_all(place, stage, results):
    dataset = open_dataset(place, stage=Stage(stage))
    results.put([dataset.local(number)[0].stat().st_ino for number in range(len(dataset.lengths))])


def index_all(place, cache, results):
    """Puts the number of indexes this process wrote."""
    os.environ["WN21K_DATA_CACHE"] = str(cache)
    write, written = dataset.write_index, []

    def slowly(path, index):
        time.sleep(0.2)  # gives the others time to arrive
        written.append(path)
        write(path, index)

    dataset.write_index = slowly
    open_dataset(place, label_space="winter21")
    results.put(len(written))


def no_locks(*_, **__):
    """As on a network file system without locks."""
    raise OSError(37, "No locks available")
