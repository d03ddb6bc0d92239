"""Load recipes from files, one's own, shipped or of runs, and override their fields."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wn21k_zoo.errors import RecipeError, Wn21kError, did_you_mean, first_line
from wn21k_zoo.files import RECIPE_FILE, expanded, is_run, parse_json, text_of, visible
from wn21k_zoo.training.recipe import ELSEWHERE, Model, Recipe, Section, near_field

__all__ = ["listed_in", "load_recipe", "override", "shipped_recipes"]


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipe files, by name without ``.py``; a wheel has a copy of those in a clone."""
    package = Path(__file__).parent.parent
    folder = package / "_recipes"
    if not folder.is_dir():
        folder = package.parent / "training" / "recipes"
    return {path.stem: path for path in visible(folder, "*.py")}


def load_recipe(where: str) -> Recipe:
    """Load the recipe of ``FILE.py`` (its first function), ``FILE.py:function``, or a run's ``recipe.json``.

    ``FILE.py:function:text`` passes the text to the function as its argument. FILE.py may also be the name of one of
    :func:`shipped_recipes`, where no run or file has that name.

    Raises:
        RecipeError: No such file or function, or the function fails.
    """
    path, name, argument = _divided(where)
    if is_run(path):
        path /= RECIPE_FILE
    if not path.is_file() or path.suffix not in (".py", ".json"):
        what = "is a folder; name a file in it" if path.is_dir() else "is not a recipe file"
        beside = [each.name for each in visible(path.parent, "*.py")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, [*beside, *shipped_recipes()])
        raise RecipeError(
            f"{path} {what}; a recipe is FILE.py:function, recipe.json, or what `wn21k train list` shows.{near}"
        )
    if path.suffix == ".json":
        try:
            return Recipe.from_json(_text(path))
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
    every = _functions_in(path)
    functions = {each: function for each, function in every.items() if not _required(function)}
    if not every or not (functions or name or argument):
        raise RecipeError(f"{path} has no function that can be called without arguments and returns a recipe.")
    if name and name not in every:
        raise RecipeError(f"{path} has no recipe {name!r}.{did_you_mean(name, every)} It has {', '.join(every)}.")
    function = every[name or next(iter(every if argument else functions))]
    if argument and not inspect.signature(function).parameters:
        raise RecipeError(f"The recipe {function.__name__} takes no argument, but {where} gives it {argument!r}.")
    if (required := _required(function)) > bool(argument):
        how = f"; write {path}:{function.__name__}:TEXT" if required == 1 else ", but can be given at most one"
        raise RecipeError(f"The recipe {function.__name__} takes {required} argument{'s'[: required - 1]}{how}.")
    try:
        recipe = function(argument) if argument else function()
    except Wn21kError:
        raise
    except AttributeError as error:
        known = type(error.obj).model_fields if isinstance(error.obj, Section) else {}
        near = did_you_mean(error.name or "", known)
        raise RecipeError(f"{where} fails with {first_line(error)}.{near}") from error
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{where} fails with {first_line(error)}.") from error
    if not isinstance(recipe, Recipe):
        others = [each for each in every if each != function.__name__]
        near = f" If it is not a recipe, name another ({', '.join(others)})." if others else ""
        raise RecipeError(
            f"{path}: {function.__name__} returns a {type(recipe).__name__}, not a recipe; does it end with `return "
            f"recipe`?{near}"
        )
    return recipe


def _divided(where: str) -> tuple[Path, str | None, str | None]:
    """Split into file, function and text."""
    if match := re.fullmatch(r"(.+?\.py)(?::(\w*))?(?::(.+))?", where, re.DOTALL):
        return expanded(match[1], RecipeError), match[2], match[3]
    path = expanded(where, RecipeError)
    match = re.fullmatch(r"(\w{2,})(?::(\w*))?(?::(.+))?", where, re.DOTALL)  # one letter is a Windows drive
    if match is None or path.is_file() or is_run(path):
        return path, None, None
    return shipped_recipes().get(match[1], Path(match[1])), match[2], match[3]


def _text(path: Path) -> str:
    try:
        return text_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {first_line(error)}.") from None


def listed_in(path: Path) -> dict[str, str]:
    """Return the recipe functions of a file, with the first line of each one's docstring; the file is not run.

    Left out are functions whose names begin with _, that need arguments, that return nothing, or that are annotated to
    return something other than a recipe.

    Raises:
        RecipeError: The file is not Python, or cannot be read.
    """
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise RecipeError(f"{path}: {first_line(error)}") from None
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    return {
        name: (ast.get_docstring(node) or "").partition("\n")[0]
        for name, node in functions.items()
        if _returns_recipe(node)
        and node.args.vararg is node.args.kwarg is None
        and len(node.args.posonlyargs) + len(node.args.args) == len(node.args.defaults)
        and None not in node.args.kw_defaults
    }


def _returns_recipe(node: ast.FunctionDef) -> bool:
    if node.returns is not None:
        return "Recipe" in ast.unparse(node.returns)
    return any(isinstance(each, ast.Return) and each.value is not None for each in ast.walk(node))


def _required(function: Callable[..., Any]) -> int:
    """Number of required arguments."""
    return sum(each.default is each.empty for each in inspect.signature(function).parameters.values())


def _functions_in(path: Path) -> dict[str, Callable[..., Recipe]]:
    """Return the public functions defined in a file, in order."""
    spec = importlib.util.spec_from_file_location(f"wn21k_recipe_{path.stem}", path)
    assert spec is not None  # noqa: S101
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    sys.path.insert(0, str(path.parent))  # a recipe may import its neighbours
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{path}: {first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
        sys.dont_write_bytecode = writes
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__
    }


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return a copy with fields set by ``section.field=value``; null is None, as is none where a field can be None.

    Lists and objects are JSON; ``model.arguments.NAME=value`` sets a single one of ``model.arguments``.

    Raises:
        RecipeError: There is no such field, or it cannot have that value.
    """
    changed = recipe.model_copy(deep=True)
    for setting in settings:
        path, equals, text = setting.partition("=")
        *sections, field = (part.strip() for part in path.split("."))
        owner: Any = None
        target: Any = changed
        for section in sections:
            owner, target = target, _field(target, section, path)
        if isinstance(target, dict) and equals and field.isidentifier():
            setattr(owner, sections[-1], {**target, field: _value(text.strip())})
            continue
        if not equals or not field or isinstance(_field(target, field, path), Section):
            raise RecipeError(f"--set {setting}: write section.field=value, such as optimizer.lr=1e-3.")
        _set(target, field, text.strip())
    return changed


def _field(target: Any, name: str, path: str) -> Any:
    fields = type(target).model_fields if isinstance(target, Section) else {}
    if name not in fields:
        leaf = path.rpartition(".")[2]
        leaf = ELSEWHERE.get(leaf, leaf)
        known = [
            f"{section}.{each}" if isinstance(value, Section) else section
            for section, value in Recipe(name="any", model=Model(architecture="any"))
            for each in (type(value).model_fields if isinstance(value, Section) else ("",))
        ]
        same = [each for each in known if leaf == each.rpartition(".")[2]]
        in_section = isinstance(target, Section) and not isinstance(target, Recipe)
        near = near_field(name, type(target)) if in_section else did_you_mean(path, known)
        near = f" Did you mean {' or '.join(same)}?" if same else near
        raise RecipeError(f"A recipe has no field {path or name}.{near}")
    return getattr(target, name)


def _set(target: Section, field: str, text: str) -> None:
    if text.lower() == "none":
        try:
            setattr(target, field, None)
        except RecipeError:
            setattr(target, field, text)
        return
    setattr(target, field, _value(text))


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return _as_python(text)


def _as_python(text: str) -> Any:
    """Parse what is not JSON: true, false and null in capitals, numbers such as .1 and 1_000, and text."""
    if text.lower() in ("true", "false", "null"):
        return parse_json(text.lower())
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
