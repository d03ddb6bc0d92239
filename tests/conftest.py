"""Fixtures. Tests never touch the user's caches or the internet."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

# Set before anything imports huggingface_hub or torch, which read these once.
_HOME = tempfile.mkdtemp(prefix="wn21k-test-")
os.environ.update(
    HF_HOME=_HOME,
    WN21K_CACHE=f"{_HOME}/wn21k",
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HUB_DISABLE_TELEMETRY="1",
    COLUMNS="120",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",  # read once in a process, so before any test of a GPU
    # Also for the processes that tests start: threads that wait for each other on cores that are in use take long.
    OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
)
for _name in ("WN21K_MODEL", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "WN21K_MIRROR"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from wn21k_zoo import Predictor, SemanticTree  # noqa: E402

settings.register_profile("same_examples", derandomize=True)
settings.load_profile("same_examples")


def pytest_collection_finish(session):
    """Hide GPUs, also from subprocesses, unless a collected test needs one: a GPU computes different bits."""
    if not any(item.get_closest_marker("gpu") for item in session.items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def _on_the_cpu():
    """Hide the GPU of a Mac."""
    with pytest.MonkeyPatch.context() as patch:
        asked = torch.backends.mps.is_available
        patch.setattr(
            torch.backends.mps, "is_available", functools.wraps(asked)(lambda: False)
        )  # torch.compile unwraps
        yield


EMBEDDED = "efficientnet_lite0.embedded_in1k"


def pytest_unconfigure():
    """Clean up after every process that ran tests."""
    shutil.rmtree(_HOME, ignore_errors=True)


def run_in_terminal(command, environment):
    """Run with stderr on a pseudo-terminal; returns the process and what the terminal showed."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    shown = []

    def read():
        with contextlib.suppress(OSError):  # Linux ends a pseudo-terminal with EIO
            while chunk := os.read(ours, 4096):
                shown.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment, check=False)
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    return done, b"".join(shown).decode(errors="replace")


def start_interruptible(command, **options):
    """Start a process that Ctrl-C reaches even if the tests run in the background, with SIGINT ignored."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **pipes, **options)
    finally:
        signal.signal(signal.SIGINT, former)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def fall11():
    return SemanticTree.load("fall11")


@pytest.fixture(scope="session")
def embedded():
    return Predictor(EMBEDDED, device="cpu")


@pytest.fixture(scope="session")
def photographs():
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "astronaut.png")
    return [folder / name for name in names]


@pytest.fixture(scope="session")
def test_data():
    folder = os.environ.get("WN21K_TEST_DATA")
    if not folder:
        pytest.skip("WN21K_TEST_DATA names no folder of real images")
    return Path(folder)
