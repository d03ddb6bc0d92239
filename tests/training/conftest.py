import pytest
import torch

from .runs import make_folder


@pytest.fixture
def one_thread():
    """The number of threads decides in which order numbers are added up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders of a module's own."""
    return make_folder(tmp_path_factory.mktemp("images"))
