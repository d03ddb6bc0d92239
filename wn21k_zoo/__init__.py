"""ImageNet-21K pretrained models with labels at every level of the WordNet hierarchy.

Importing the package imports neither torch nor timm; names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "AnimatedImageWarning": "images",
    "Checkpoint": "checkpoints",
    "ClassNames": "labels",
    "FallbackModelWarning": "models",
    "LabelSpace": "labels",
    "Prediction": "prediction",
    "Predictor": "predictor",
    "SemanticTree": "tree",
    "Wn21kError": "errors",
    "create_model": "building",
    "create_transform": "models",
    "get_checkpoint": "registry",
    "list_checkpoints": "registry",
    "predict": "predictor",
    "save_model": "saving",
}

__all__ = ["__version__", *sorted(_HOME_OF)]

if TYPE_CHECKING:
    from wn21k_zoo.building import create_model as create_model
    from wn21k_zoo.checkpoints import Checkpoint as Checkpoint
    from wn21k_zoo.errors import Wn21kError as Wn21kError
    from wn21k_zoo.images import AnimatedImageWarning as AnimatedImageWarning
    from wn21k_zoo.labels import ClassNames as ClassNames
    from wn21k_zoo.labels import LabelSpace as LabelSpace
    from wn21k_zoo.models import FallbackModelWarning as FallbackModelWarning
    from wn21k_zoo.models import create_transform as create_transform
    from wn21k_zoo.prediction import Prediction as Prediction
    from wn21k_zoo.predictor import Predictor as Predictor
    from wn21k_zoo.predictor import predict as predict
    from wn21k_zoo.registry import get_checkpoint as get_checkpoint
    from wn21k_zoo.registry import list_checkpoints as list_checkpoints
    from wn21k_zoo.saving import save_model as save_model
    from wn21k_zoo.tree import SemanticTree as SemanticTree


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
            globals()[name] = value
            return value
        import pkgutil

        if any(found.name == name for found in pkgutil.iter_modules(__path__)):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Leave out modules that nobody asked for: code that inspects every name would import them.
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})
