import subprocess
import sys

import pytest

CODE = """
import sys
sys.modules[sys.argv.pop(1)] = None
from wn21k_zoo.cli import main
main()
"""


@pytest.mark.parametrize("missing", ["cv2", "pyarrow", "simplejpeg"])
def test_a_missing_library_is_an_error_that_names_the_extra(tmp_path, missing):
    command = [sys.executable, "-c", CODE, missing, "data", "prepare", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    expected = f'wn21k: Training data ({missing} is missing) needs an extra: pip install "wn21k-zoo[data]"\n'
    assert done.stderr == expected


@pytest.mark.slow
def test_a_plot_names_its_extra(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1}\n')
    command = [sys.executable, "-c", CODE, "matplotlib.figure", "train", "plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'wn21k: A plot needs an extra: pip install "wn21k-zoo[plot]"\n'
