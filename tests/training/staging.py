"""What a process of its own runs; imports nothing heavy."""

from wn21k_zoo.training.dataset import open_dataset
from wn21k_zoo.training.storage import Stage


def stage_all(place, stage, results):
    dataset = open_dataset(place, stage=Stage(stage))
    results.put([dataset.local(number)[0].stat().st_ino for number in range(len(dataset.shards))])


def no_locks(*_, **__):
    """As on a network file system that has none."""
    raise OSError(37, "No locks available")
