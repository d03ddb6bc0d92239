"""A process that is told to stop, and what is saved of an unfinished run."""

import io
import os
import signal
import sys
import threading
import time

import pytest
import torch

from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.rescue import Rescue
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.training.status import read_status, write_status

from .checks import ALONE

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


@pytest.fixture
def deaf():
    """Ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_wishes_within_and_what_they_were_before_after(deaf):
    signals = Signals(patience=300)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with signals.listening(), signals.patient(lambda until: None):
        assert not signals.number
        signal.raise_signal(signal.SIGINT)
        assert (signals.number, signals.code) == (signal.SIGINT, 130)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert (signals.number, signals.code) == (signal.SIGTERM, 143)
    assert {number: signal.getsignal(number) for number in before} == before
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert wakeup == -1


def a_run(tmp_path, state="running"):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-00000007.pt").write_bytes(b"")
    write_status(tmp_path, state, 7)
    return folder


def test_what_changes_is_waited_for_and_no_longer_than_there_is_time(tmp_path):
    rescue, saved = Rescue(a_run(tmp_path), ALONE), []
    rescue.begun, rescue.save = True, lambda: saved.append(1)
    holds, done = threading.Event(), threading.Event()

    def change():
        with rescue.changing:
            holds.set()
            done.wait()

    thread = threading.Thread(target=change)
    thread.start()
    holds.wait()
    begin = time.monotonic()
    rescue(begin + 0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    assert not saved
    assert read_status(tmp_path)["state"] == "preempted"
    done.set()
    thread.join()
    rescue(time.monotonic() + 5)
    assert saved


def test_what_cannot_be_saved_is_said_and_the_run_is_marked_all_the_same(tmp_path, capsys):
    rescue = Rescue(a_run(tmp_path), ALONE)

    def fail():
        raise OSError("no space")

    rescue.begun, rescue.save = True, fail
    rescue(time.monotonic() + 5)
    assert read_status(tmp_path) == {"state": "preempted", "step": 7}
    assert "no space" in capsys.readouterr().err


def test_a_run_that_failed_on_another_rank_is_not_marked(tmp_path):
    rescue = Rescue(a_run(tmp_path, "failed"), ALONE)
    rescue.begun = True
    rescue(time.monotonic() + 5)
    assert read_status(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_other_ranks_wait_until_the_leading_one_is_done(tmp_path, state):
    rescue = Rescue(a_run(tmp_path, state), World(1, 2, torch.device("cpu")))
    rescue.begun = True
    begin = time.monotonic()
    rescue(begin + 0.4)
    assert (time.monotonic() - begin >= 0.4) == (state == "running")
    assert read_status(tmp_path)["state"] == state


def test_a_failure_of_a_run_before_does_not_keep_the_mark_away(tmp_path):
    Rescue(a_run(tmp_path, "failed"), ALONE)(time.monotonic() + 5)
    assert read_status(tmp_path)["state"] == "preempted"


def test_a_terminal_has_its_cursor_back(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    Rescue(a_run(tmp_path), ALONE)(time.monotonic() + 5)
    assert "\x1b[?25h" in sys.stderr.getvalue()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no signal to stand for another")
def test_windows_way_to_end_a_program_is_as_sigterm(monkeypatch):
    monkeypatch.setattr("wn21k_zoo.training.signals._ENDS", (signal.SIGTERM, signal.SIGUSR1))  # stands in for SIGBREAK
    before = signal.getsignal(signal.SIGUSR1)
    signals = Signals(patience=300)
    with signals.listening(), signals.patient(lambda until: None):
        signal.raise_signal(signal.SIGUSR1)
        assert (signals.number, signals.code) == (signal.SIGTERM, 143)
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_a_terminal_is_as_sigterm_but_under_nohup(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        signals = Signals(patience=300)
        with signals.listening(), signals.patient(lambda until: None):
            signal.raise_signal(signal.SIGHUP)
            assert signals.number == (0 if ignored else signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
