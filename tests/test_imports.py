"""The import rule: a module may import those above it in the map of CONTRIBUTING.md, never those below."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wn21k_zoo

PACKAGE = Path(wn21k_zoo.__file__).parent
MAP = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
ORDER = re.findall(r"^  (\w+)(?:\.py|/)", MAP, re.MULTILINE)
TRAINING = re.findall(r"^    (\w+)\.py", MAP, re.MULTILINE)


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def runtime_imports(path, package=()):
    """Our modules that a file imports from a subpackage, except for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, *inside = name.split(".")
            if top == "wn21k_zoo" and inside[: len(package)] == [*package] and len(inside) > len(package):
                yield inside[len(package)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    mine = ORDER.index(module_of(path))
    for imported in runtime_imports(path):
        assert imported not in ORDER or ORDER.index(imported) <= mine, f"{path.name} imports {imported}"
    if module_of(path) == "training" and path.stem != "__init__":
        mine = TRAINING.index(path.stem)
        for imported in runtime_imports(path, ["training"]):
            assert TRAINING.index(imported) < mine, f"{path.name} imports {imported}"


def test_the_map_has_all_modules():
    assert sorted(ORDER) == sorted({"__init__", "_data", *map(module_of, FILES)})
    assert sorted(TRAINING) == sorted(
        path.stem for path in (PACKAGE / "training").glob("*.py") if path.stem != "__init__"
    )


def test_the_public_api_is_what_it_says():
    for name in wn21k_zoo.__all__:
        assert getattr(wn21k_zoo, name) is not None
    assert set(wn21k_zoo.__all__) <= set(dir(wn21k_zoo))
    assert callable(wn21k_zoo.predict)
    importlib.import_module("wn21k_zoo.predictor")
    assert callable(wn21k_zoo.predict)
    with pytest.raises(AttributeError):
        wn21k_zoo.nonsense  # noqa: B018
    assert not {"Any", "importlib", "annotations", "timm_models"} & set(dir(wn21k_zoo))  # the last registers names


def test_a_module_is_there_before_anything_imported_it():
    code = "import wn21k_zoo as w; print(w.errors.ImageError.__name__, w.tree.Node.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ImageError Node\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_exports_what_it_lists(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, wn21k_zoo; print({'torch', 'timm', 'numpy', 'PIL', 'nltk'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("module", ["cli.app", "training.recipe", "training.shards", "training.state"])
def test_what_a_quick_command_needs_does_not_import_torch(module):
    code = f"import sys, wn21k_zoo.{module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_another_module_imports_is_exported():
    trees = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in FILES
    }
    exported = {
        name: {element.value for element in node.value.elts if isinstance(element, ast.Constant)}
        for name, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    }
    hidden = {
        f"{node.module}.{alias.name}"
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in exported
        for alias in node.names
        if alias.name not in exported[node.module]
    }
    assert not hidden
