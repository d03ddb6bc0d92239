"""What a command and the function behind it both take has the same default in both."""

from inspect import Parameter, signature

import pytest

from wn21k_zoo.cli import data, predict, train
from wn21k_zoo.predictor import Predictor
from wn21k_zoo.training import dry_run, evaluate, export, inspect, options, plan, prepare

PAIRS = (
    (data.prepare, options.PrepareOptions),
    (data.prepare, prepare.prepare),
    (data.prepare, dry_run.count),
    (data.show, inspect.contact_sheet),
    (predict.predict, Predictor),
    (train.evaluate, evaluate.evaluate),
    (train.export, export.export_run),
    (train.plan, plan.plan),
)


@pytest.mark.parametrize(("command", "function"), PAIRS, ids=lambda one: f"{one.__module__}.{one.__name__}")
def test_both_have_the_same_defaults(command, function):
    theirs = signature(function).parameters
    both = [(one, theirs[name]) for name, one in signature(command).parameters.items() if name in theirs]
    assert both
    for ours, other in both:
        assert Parameter.empty in (ours.default, other.default) or ours.default == other.default, ours.name
