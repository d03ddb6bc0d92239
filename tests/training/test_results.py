"""training/results reports what its runs recorded."""

import json
from pathlib import Path

import pytest

from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.recipe_files import load_recipe

FOLDER = Path(__file__).parent.parent.parent / "training" / "results" / "stand_in"
ARMS = {"single label": "single_label", "semantic softmax": "semantic", "semantic softmax, distilled": "distilled"}
COLUMNS = (
    "semantic_top1", "raw_semantic_top1", "top1", "raw_top1", "top5", "mean_lca_error", "mean_lca_error_of_mistakes",
    "hierarchical_precision", "hierarchical_recall",
)  # fmt: skip


def rows():
    lines = (FOLDER / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def last(run):
    lines = map(json.loads, (FOLDER / run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "evaluation"][-1]


def test_the_table_is_what_was_measured():
    found = [row for row in rows() if row[1:2] != [] and row[1] in ("0", "1", "") and row[0] in (*ARMS, "(teacher)")]
    assert len(found) == 7
    for arm, seed, *cells in found:
        figures = last("teacher" if arm == "(teacher)" else f"{ARMS[arm]}-{seed}")
        assert cells == [f"{figures[column]:.2f}" for column in COLUMNS], arm


def test_the_table_of_the_longer_training_is_what_was_measured():
    found = [row for row in rows() if row[0].endswith(", 18 epochs")]
    assert len(found) == 2
    for arm, *cells in found:
        figures = last(f"{ARMS[arm.removesuffix(', 18 epochs')]}-long")
        assert (cells, figures["epoch"]) == ([f"{figures[column]:.2f}" for column in COLUMNS], 18), arm


def test_as_many_images_were_seen_as_is_said():
    seen = {last(f"{arm}-{seed}")["step"] for arm in ARMS.values() for seed in (0, 1)}
    recipe = load_recipe(f"{FOLDER.parent.parent / 'recipes' / 'stand_in.py'}:semantic")
    (steps,) = seen
    said = f"{steps * recipe.data.batch_size:,} images seen"
    assert said in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("arm", ARMS)
def test_the_levels_are_the_mean_of_two_seeds(arm):
    (row,) = [row for row in rows() if row[0] == arm and row[1] not in ("0", "1")]
    levels = [last(f"{ARMS[arm]}-{seed}")["levels"] for seed in (0, 1)]
    for depth, cell in enumerate(row[1:]):
        assert float(cell) == pytest.approx(sum(each[str(depth)] for each in levels) / 2, abs=0.0501)


@pytest.mark.parametrize("arm", [*ARMS.values(), "teacher"])
def test_the_runs_are_of_the_recipes_that_are_named(arm):
    recipe = load_recipe(f"{FOLDER.parent.parent / 'recipes' / 'stand_in.py'}:{arm}")
    for seed in (0, 1) if arm != "teacher" else (0,):
        run = arm if arm == "teacher" else f"{arm}-{seed}"
        recipe.run.seed = seed
        assert Recipe.from_json((FOLDER / run / "recipe.json").read_text()) == recipe
