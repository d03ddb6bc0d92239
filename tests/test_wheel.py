"""The wheel, outside the checkout, does what the checkout does."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import EMBEDDED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(ROOT)]
    subprocess.run(build, check=True)
    return next(target.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("wn21k_zoo/", "wn21k_zoo-")) or ".dist-info/" in name for name in names)
    shipped = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "wn21k_zoo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith((".pkl", ".pth", ".pt")) for name in names)


@pytest.mark.slow
def test_installed_wheel_predicts_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import wn21k_zoo; print(wn21k_zoo.__file__); "
        f"print(wn21k_zoo.predict('sample:cat', model={EMBEDDED!r}).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    place, result = done.stdout.splitlines()
    assert Path(place).is_relative_to(site)
    assert json.loads(result)["label"]["wnid"] == "n02121808"
