"""The import rule: down this list a module may import those above it, never the reverse."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import wn21k_zoo

PACKAGE = Path(wn21k_zoo.__file__).parent
ORDER = (
    "errors", "synsets", "labels", "drawing", "tree", "wordnet", "checkpoints", "registry",
    "architectures", "convert", "cache", "transfer", "hub", "download", "locking", "building", "models", "timm_models",
    "urls", "images", "hierarchy", "prediction", "predictor", "cards", "publish", "training", "cli", "__main__",
)  # fmt: skip


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def runtime_imports(path):
    """Modules of ours that a file imports, except for type checking."""
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
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wn21k_zoo"):
            inside = node.module.split(".")[1:]
            yield from [inside[0]] if inside else [alias.name for alias in node.names if alias.name in ORDER]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("wn21k_zoo."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    mine = ORDER.index(module_of(path))
    for imported in runtime_imports(path):
        assert ORDER.index(imported) <= mine, f"{path.name} imports {imported}"


def test_the_public_api_is_what_it_says():
    for name in wn21k_zoo.__all__:
        assert getattr(wn21k_zoo, name) is not None
    assert set(wn21k_zoo.__all__) <= set(dir(wn21k_zoo))
    assert callable(wn21k_zoo.predict)
    importlib.import_module("wn21k_zoo.predictor")
    assert callable(wn21k_zoo.predict)
    with pytest.raises(AttributeError):
        wn21k_zoo.nonsense  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_exports_what_it_lists(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, wn21k_zoo; print({'torch', 'timm', 'numpy', 'PIL', 'nltk'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
