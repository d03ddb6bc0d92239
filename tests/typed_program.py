"""A user's program, only for mypy (`make check`): checks what the package's annotations promise."""

from typing import Any, assert_type

import numpy as np

from wn21k_zoo import ClassNames, Prediction, Predictor, Wn21kError, predict
from wn21k_zoo.training.losses import SemanticSoftmaxLoss
from wn21k_zoo.tree import SemanticTree


def program(either: str | list[str]) -> None:
    predictor = Predictor()
    assert_type(predictor("a.jpg"), Prediction)
    assert_type(predictor("a.jpg", errors="return"), Prediction | Wn21kError)
    assert_type(predictor(["a.jpg", "b.jpg"]), list[Prediction])
    assert_type(predictor(("a.jpg", b"..."), errors="return"), list[Prediction | Wn21kError])
    assert_type(predictor(np.zeros((2, 4, 4, 3), np.uint8)), Any)  # one or several
    assert_type(predictor(either), Prediction | list[Prediction])
    assert_type(predictor.tree, SemanticTree | None)
    assert_type(Predictor(label_space=ClassNames(["cat", "dog"]))("a.jpg").top_k[0].wnid, str)
    assert_type(predict("a.jpg"), Prediction)
    assert_type(predict(f"{number}.jpg" for number in range(2)), list[Prediction])
    _ = predict("a.jpg").labels()[0].no_such_thing  # type: ignore[attr-defined]
    SemanticSoftmaxLoss(SemanticTree.load("fall11"), label_smoothing="0.2")  # type: ignore[arg-type]
