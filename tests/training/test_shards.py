"""What prepared shards must never change."""

import numpy as np
import pytest

from wn21k_zoo.errors import DataError
from wn21k_zoo.training.shards import INDEX_DTYPE, index_path, read_index, sample_hash, write_index


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
