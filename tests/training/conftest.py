import os
import signal
import time

import pytest
import torch

from wn21k_zoo.training import engine

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


@pytest.fixture
def stop_at(monkeypatch):
    """Makes a run get SIGTERM after a step."""

    def at(step):
        react = engine._Run._react

        def stopping(self, answer):
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)  # the handler runs before the next line
                answer = answer._replace(stop=self.agreement.stops())
            react(self, answer)

        monkeypatch.setattr(engine._Run, "_react", stopping)

    return at
