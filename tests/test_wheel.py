"""The wheel, outside the checkout, works like the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import EMBEDDED
from training.runs import make_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)]
    subprocess.run(build, check=True, cwd=ROOT)
    return next(target.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("wn21k_zoo/", "wn21k_zoo-")) or ".dist-info/" in name for name in names)
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "wn21k_zoo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped <= set(names)
    assert "wn21k_zoo/py.typed" in names  # without it, type checkers ignore our annotations
    recipes = {f"wn21k_zoo/_recipes/{path.name}" for path in (ROOT / "training" / "recipes").glob("*.py")}
    assert recipes == {name for name in names if "recipes/" in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith((".pkl", ".pth", ".pt")) for name in names)


def test_editable_installation_is_a_path_alone(tmp_path):
    # What else lies there is a namespace package, which a running notebook would import in place of the checkout.
    build = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert [name for name in names if ".dist-info/" not in name] == ["_wn21k_zoo.pth"]


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with only the wheel, as it is installed: all its files are the package's."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.mark.slow
def test_installed_wheel_predicts_elsewhere(site, tmp_path):
    code = (
        "import wn21k_zoo; print(wn21k_zoo.__file__); "
        f"print(wn21k_zoo.predict('sample:cat', model={EMBEDDED!r}).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    place, result = done.stdout.splitlines()
    assert Path(place).is_relative_to(site)
    assert json.loads(result)["label"]["wnid"] == "n02121808"


@pytest.mark.slow
def test_installed_wheel_trains_elsewhere(site, tmp_path):
    make_folder(tmp_path / "photos", images=10)
    run = [
        sys.executable,
        "-m",
        "wn21k_zoo.training.train",
        "--recipe",
        "finetune:embedded",
        "--debug",
        "--workers",
        "0",
    ]
    done = subprocess.run(
        [*run, "--data", "photos", "--output", "run"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
