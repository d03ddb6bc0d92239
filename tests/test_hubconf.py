"""torch.hub from an uninstalled checkout, in subprocesses where only the dependencies are importable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED

from wn21k_zoo.checkpoints import CHECKPOINTS

CHECKOUT = Path(__file__).parents[1]
# Nothing else in this environment may be needed.
BLOCK = """
import sys
from importlib.machinery import PathFinder
class Finder:
    blocked = {"typer", "nltk", "hypothesis", "jsonschema", "transformers", "pytest", "hatchling", "matplotlib"}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.blocked else PathFinder.find_spec(name, path, target)
sys.meta_path = [Finder if f is PathFinder else f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path = [p for p in sys.path if p not in (CHECKOUT, "")]
import torch
"""


def run(code, tmp_path, **variables):
    script = f"CHECKOUT = {str(CHECKOUT)!r}\n{BLOCK}\n{code}"
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cached_checkout(tmp_path):
    """The checkout where torch.hub would have put it, already trusted."""
    (tmp_path / "hub").mkdir()
    place = tmp_path / "hub" / "owner_repo_main"
    place.mkdir()
    for name in ("hubconf.py", "wn21k_zoo"):
        (place / name).symlink_to(CHECKOUT / name)
    return tmp_path


@pytest.mark.slow
def test_list_help_and_load_of_a_repository(cached_checkout):
    code = """
import json
name = "owner/repo:main"
arguments = {"trust_repo": True, "skip_validation": True, "verbose": False}
listed = torch.hub.list(name, **arguments)
helped = torch.hub.help(name, "resnet50_miil_in21k", trust_repo=True, skip_validation=True)
tree = torch.hub.load(name, "semantic_tree", "fall11", **arguments)
model = torch.hub.load(name, "EMBEDDED", num_classes=7, **arguments)
print(json.dumps([listed, helped, len(tree), model.num_classes]))
"""
    name = EMBEDDED.replace(".", "_")
    listed, helped, nodes, outputs = json.loads(run(code.replace("EMBEDDED", name), cached_checkout).splitlines()[-1])
    assert set(listed) == {
        *(checkpoint.name.replace(".", "_") for checkpoint in CHECKPOINTS),
        "predictor",
        "semantic_tree",
    }
    assert "num_classes" in helped
    assert (nodes, outputs) == (11_221, 7)


@pytest.mark.slow
def test_load_of_a_local_checkout_and_predictions_afterwards(tmp_path, photographs, embedded):
    code = f"""
predict = torch.hub.load({str(CHECKOUT)!r}, "predictor", name={EMBEDDED!r}, source="local")
assert {str(CHECKOUT)!r} not in sys.path
import os; os.chdir("/")
print(predict({str(photographs[0])!r}).label.wnid)
import wn21k_zoo
print(wn21k_zoo.__file__)
print(wn21k_zoo.predict({str(photographs[0])!r}, model={EMBEDDED!r}).label.wnid)
"""
    first, file, second = run(code, tmp_path).split()[-3:]
    assert first == second == embedded(photographs[0]).label.wnid
    assert Path(file).parent == CHECKOUT / "wn21k_zoo"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_every_checkpoint_has_an_entry_point(checkpoint):
    import importlib.util

    spec = importlib.util.spec_from_file_location("hubconf", CHECKOUT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    create = getattr(hubconf, checkpoint.name.replace(".", "_"))
    assert checkpoint.name in create.__doc__
    with torch.device("meta"):  # saves the time to initialise weights
        assert create(pretrained=False, num_classes=3).num_classes == 3


@pytest.mark.slow
def test_a_missing_dependency_is_named_by_torch_hub(tmp_path):
    code = f"""
Finder.blocked.add("timm")
try:
    torch.hub.load({str(CHECKOUT)!r}, "predictor", source="local")
except RuntimeError as error:
    print(error)
"""
    assert "timm" in run(code, tmp_path)
