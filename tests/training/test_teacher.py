"""Teachers with other classes than the student, or with another kind of head."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models import save_for_hf
from torch import nn

from wn21k_zoo import LabelSpace
from wn21k_zoo.checkpoints import CHECKPOINTS
from wn21k_zoo.errors import RecipeError
from wn21k_zoo.labels import ClassNames
from wn21k_zoo.training.export import export_run, load_run
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.losses import SemanticDistillationLoss
from wn21k_zoo.training.network import Normalized
from wn21k_zoo.training.optimization import Criterion
from wn21k_zoo.training.teacher import Translated, build_teacher, digest_of
from wn21k_zoo.tree import SemanticTree

from .checks import lines, run
from .runs import make_folder, small_recipe

# mammal, person, plant; feline, canine; lion
WNIDS = ("n01861778", "n00007846", "n00017222", "n02120997", "n02083346", "n02129165")
MAMMAL, PERSON, PLANT, FELINE, CANINE, LION = WNIDS
TREE = SemanticTree.from_wnids(WNIDS)  # mammal, person, plant; feline, canine; lion
WOLF = "n02114100"


def translated(logits, wnids, head, student="semantic_softmax", tree=TREE):
    """Probability of each class of the tree by wnid, for one image."""
    teacher = Translated(nn.Identity(), LabelSpace("theirs", wnids), head, tree, student)
    found = teacher(torch.tensor([logits])).exp()[0]
    return dict(zip([tree.wnids[index] for index in Levels(tree).columns], found.tolist(), strict=True)), teacher.known


def test_a_softmax_over_finer_classes_is_added_up_and_what_is_missing_is_spread_over_the_level():
    found, known = translated([0.5, 0.3, 0.2], (LION, WOLF, PERSON), "softmax")
    lion, wolf, person = torch.tensor([0.5, 0.3, 0.2]).softmax(0).tolist()
    assert found == pytest.approx(
        {
            MAMMAL: lion + wolf, PERSON: person, PLANT: 0.0,
            FELINE: lion + person / 2, CANINE: wolf + person / 2, LION: 1.0,
        },
        abs=1e-6,
    )  # fmt: skip
    assert known == 5  # all but plant


def test_a_semantic_softmax_over_more_classes_keeps_what_both_have():
    wnids = (*WNIDS, "n02374451")  # horse, a mammal like the felines and canines
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    found, known = translated(logits.tolist(), wnids, "semantic_softmax")
    feline, canine, horse = logits[[3, 4, 6]].softmax(0).tolist()
    expected = dict(zip((MAMMAL, PERSON, PLANT), logits[:3].softmax(0).tolist(), strict=True))
    expected |= {FELINE: feline + horse / 2, CANINE: canine + horse / 2, LION: 1.0}
    assert found == pytest.approx(expected, abs=1e-6)
    assert known == 6


def test_a_sigmoid_gives_the_most_probable_of_a_subtree():
    found, _ = translated([2.0, -1.0], (LION, CANINE), "sigmoid")
    lion, canine = torch.tensor([2.0, -1.0]).sigmoid().tolist()
    assert found[MAMMAL] == pytest.approx(lion + (1 - lion) / 3, abs=1e-6)
    total = lion + canine  # above 1, so nothing is missing; the loss's softmax divides by it
    assert (found[FELINE], found[CANINE]) == pytest.approx((lion, canine), abs=1e-6)
    assert total > 1


def test_one_softmax_for_a_student_of_one_softmax_is_not_added_up():
    found, known = translated([0.5, 0.3, 0.2], (LION, WOLF, PERSON), "softmax", "softmax")
    lion, wolf, person = torch.tensor([0.5, 0.3, 0.2]).softmax(0).tolist()
    expected = {LION: lion, CANINE: wolf, PERSON: person, MAMMAL: 0.0, PLANT: 0.0, FELINE: 0.0}
    assert found == pytest.approx(expected, abs=1e-6)
    assert known == 3


def test_a_semantic_softmax_teaches_one_softmax_its_leaves():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0))
    found, known = translated(logits.tolist(), WNIDS, "semantic_softmax", "softmax")
    mammal, person, plant = logits[:3].softmax(0).tolist()
    feline, canine = logits[3:5].softmax(0).tolist()
    expected = {MAMMAL: 0.0, PERSON: person, PLANT: plant, FELINE: 0.0, CANINE: mammal * canine, LION: mammal * feline}
    assert found == pytest.approx(expected, abs=1e-6)
    assert known == 4


def test_a_semantic_softmax_teaches_one_softmax_over_other_classes():
    tree = SemanticTree.from_wnids((FELINE, CANINE, PLANT, LION))
    wnids = (*WNIDS, WOLF)
    found, known = translated([0.0] * 7, wnids, "semantic_softmax", "softmax", tree)
    # A third is mammal, half of it feline and so lion, half canine and so wolf. The student does not know person, so
    # that third is spread.
    third = 1 / 3 / 4
    assert found == pytest.approx({FELINE: third, CANINE: 1 / 6 + third, PLANT: 1 / 3 + third, LION: 1 / 6 + third})
    assert known == 3


def test_a_sigmoid_teaches_one_softmax_what_stands_out():
    probability = torch.tensor([0.9, 0.1, 0.0001, 0.8, 0.2, 0.3])  # mammal, person, plant; feline, canine; lion
    found, known = translated(probability.logit().tolist(), WNIDS, "sigmoid", "softmax")
    own = torch.tensor([0.1, 0.1, 0.0001, 0.5, 0.2, 0.3])
    assert found == pytest.approx(dict(zip(WNIDS, (own / own.sum()).tolist(), strict=True)), abs=1e-6)
    assert known == 6


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
@pytest.mark.parametrize("student", ["semantic_softmax", "softmax"])
def test_any_record_teaches_any_student(checkpoint, student):
    tree, space = SemanticTree.load("fall11"), LabelSpace.load(checkpoint.label_space)
    teacher = Translated(nn.Identity(), space, checkpoint.head, tree, student)
    theirs = teacher(torch.randn(2, len(space), generator=torch.Generator().manual_seed(0)))
    assert teacher.known >= 500
    parts = Levels(tree, "level").split(theirs) if student == "semantic_softmax" else [theirs]
    for part in parts:
        torch.testing.assert_close(part.exp().sum(1), torch.ones(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["softmax", "semantic_softmax"])
def test_a_teacher_of_nothing_that_the_student_knows(head):
    with pytest.raises(RecipeError, match="knows none of the classes of animals"):
        translated([0.0, 0.0], (PLANT, PERSON), head, tree=SemanticTree.from_wnids((FELINE, CANINE), name="animals"))


@given(
    st.sampled_from(["softmax", "semantic_softmax", "sigmoid"]),
    st.sampled_from(["softmax", "semantic_softmax"]),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
)
def test_whatever_it_says_is_something_to_learn_from(head, student_head, logits):
    teacher = Translated(nn.Identity(), LabelSpace("theirs", (LION, FELINE, CANINE, PERSON)), head, TREE, student_head)
    per_level = student_head == "semantic_softmax"
    theirs = teacher(torch.tensor([logits]))
    assert theirs.isfinite().all()
    for scores in Levels(TREE, "level").split(theirs) if per_level else [theirs]:
        assert float(scores.exp().sum()) >= 1 - 1e-5
    student = torch.zeros(1, 6, requires_grad=True)
    SemanticDistillationLoss(TREE, "level", per_level)(student, theirs).backward()
    assert student.grad.isfinite().all()


def test_a_teacher_that_says_nothing_of_a_level_counts_for_little():
    sure, unsure = (
        Translated(nn.Identity(), LabelSpace("theirs", (LION, CANINE, PERSON)), "softmax", TREE, "semantic_softmax")(
            torch.tensor([logits])
        )
        for logits in ([9.0, 0.0, 0.0], [0.0, 0.0, 9.0])  # a feline; a person, who is neither feline nor canine
    )
    student = torch.tensor([[0.0, 0.0, 0.0, 5.0, -5.0, 0.0]])  # in level order, sure of one in the second level
    where = Levels(TREE).slices[1]
    certain = [float(each[:, where].softmax(1).max()) for each in (sure, unsure)]
    assert certain[0] > 0.99
    assert certain[1] == pytest.approx(0.5, abs=1e-3)
    assert SemanticDistillationLoss(TREE, "level")(student, unsure).isfinite()


@pytest.mark.parametrize("space", ["fall11", "winter21"])
def test_the_embedded_default_teaches_either_release(space):
    recipe = small_recipe(loss={"teacher": "efficientnet_lite0.embedded_in1k", "distillation_weight": 1.0})
    tree = SemanticTree.load(space)
    teacher, about, _ = build_teacher(recipe, tree.label_space, Levels(tree, "level"))
    assert "is a softmax over imagenet1k; it knows" in about
    with torch.no_grad():
        theirs = teacher(torch.rand(2, 3, 64, 64))
    assert theirs.shape == (2, len(tree))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", ["semantic_softmax", "single_label"])
def test_a_run_with_a_teacher_of_other_classes(data, tmp_path, capsys, kind):
    recipe = small_recipe(
        loss={"kind": kind, "teacher": "efficientnet_lite0.embedded_in1k", "distillation_weight": 1.0},
        schedule={"max_steps": 2},
    )
    run(recipe, data, tmp_path / "distilled")
    assert "the teacher efficientnet_lite0.embedded_in1k is a softmax over imagenet1k" in capsys.readouterr().err
    recipe.loss.teacher, recipe.loss.distillation_weight = None, 0.0
    run(recipe, data, tmp_path / "alone")
    assert lines(tmp_path / "distilled")[0]["loss"] > lines(tmp_path / "alone")[0]["loss"]


def test_a_teacher_of_the_same_classes_has_its_own_normalisation_and_the_students_order(data, tmp_path):
    recipe = small_recipe(data={"augmentation": "none"}, model={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    run(recipe, data, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model")
    trained = load_run(tmp_path / "run")
    levels = Levels(trained.space and SemanticTree.from_label_space(trained.space), "level")
    assert levels.columns.tolist() != levels.positions.tolist()
    student = small_recipe(loss={"distillation_weight": 1.0})
    images = torch.rand(2, 3, 32, 32)
    for name in (tmp_path / "model", tmp_path / "run" / "checkpoints" / "best.pt"):
        student.loss.teacher = str(name)
        teacher, about, _ = build_teacher(student, trained.space, levels)
        pixels = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
        with torch.no_grad():
            torch.testing.assert_close(teacher(images), trained.module.eval()(pixels)[:, levels.columns])
        assert not about


def test_a_teacher_that_does_not_say_how_it_is_read_is_asked_for(tmp_path):
    module = timm.create_model("test_convnext", num_classes=len(WNIDS))
    save_for_hf(module, tmp_path / "teacher", model_config={"label_names": list(WNIDS)})
    student = small_recipe(loss={"teacher": str(tmp_path / "teacher"), "distillation_weight": 1.0})
    levels = Levels(TREE, "level")
    with pytest.raises(RecipeError, match=r"loss\.teacher_head: Nothing says how"):
        build_teacher(student, TREE.label_space, levels)
    for head in ("softmax", "sigmoid"):
        student.loss.teacher_head = head
        assert f"is a {head} over" in build_teacher(student, TREE.label_space, levels)[1]
    for prefix in ("", "random:"):
        student.loss.teacher = f"{prefix}efficientnet_lite0.embedded_in1k"
        with pytest.raises(RecipeError, match=r"loss\.teacher_head: .* states its own"):
            build_teacher(student, TREE.label_space, levels)
    student.loss.teacher = str(tmp_path / "x.pt")
    with pytest.raises(RecipeError, match=r"leave out loss\.teacher_head"):
        build_teacher(student, TREE.label_space, levels)
    student.loss.teacher, student.loss.distillation_weight = None, 0.0
    with pytest.raises(RecipeError, match=r"there is no loss\.teacher\."):
        student.check()


def test_a_teacher_of_classes_that_are_no_synsets_is_refused(tmp_path):
    names = ("cat", "dog", "house")
    module = timm.create_model("test_convnext", num_classes=len(names))
    save_for_hf(module, tmp_path / "folder", model_config={"label_names": list(names)})
    recipe = small_recipe(data={"label_space": None}, loss={"kind": "single_label"}, schedule={"max_steps": 1})
    run(recipe, make_folder(tmp_path / "images", names=names), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*.pt")
    for teacher in (tmp_path / "folder", checkpoint):
        student = small_recipe(loss={"teacher": str(teacher), "distillation_weight": 1.0})
        with pytest.raises(
            RecipeError, match=rf"The classes of loss\.teacher .*{teacher.name} are not known to be synsets"
        ):
            build_teacher(student, TREE.label_space, Levels(TREE, "level"))


def test_a_teachers_digest_is_of_all_its_weights_and_buffers():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    digests = {digest_of(module)}
    for change in (module[0].weight.data, module[0].bias.data, module[1].running_mean):
        change += 1
        digests.add(digest_of(module))
    assert len(digests) == 4


def test_classes_that_are_no_synsets_are_taught_by_a_softmax_over_the_same_names(tmp_path, capsys):
    names = ("cat", "dog", "house", "Käfer")
    data = make_folder(tmp_path / "images", names=names)
    own = {"data": {"label_space": None}, "schedule": {"max_steps": 2}}
    recipe = small_recipe(loss={"kind": "single_label"}, **own)
    run(recipe, data, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model")
    module = timm.create_model("test_convnext", num_classes=4).eval()
    save_for_hf(module, tmp_path / "turned", model_config={"label_names": names[::-1]})
    student = small_recipe(loss={"kind": "single_label", "distillation_weight": 1.0}, **own)
    classes, images = ClassNames(sorted(names)), torch.rand(2, 3, 32, 32)
    trained = load_run(tmp_path / "run")
    for name in (tmp_path / "model", tmp_path / "run" / "checkpoints" / "best.pt"):
        student.loss.teacher = str(name)
        teacher, about, _ = build_teacher(student, classes, None)
        torch.testing.assert_close(
            teacher(images), Normalized(trained.module.eval(), recipe.model.mean, recipe.model.std)(images)
        )
        assert not about
    capsys.readouterr()
    run(student, data, tmp_path / "distilled")
    with_teacher, without = (lines(tmp_path / each)[0]["loss"] for each in ("distilled", "run"))
    assert with_teacher > without
    student.loss.teacher, student.loss.teacher_head = str(tmp_path / "turned"), "softmax"
    mean, std = module.pretrained_cfg["mean"], module.pretrained_cfg["std"]
    expected = Normalized(module, mean, std)(images)[:, [names[::-1].index(each) for each in classes]]
    torch.testing.assert_close(build_teacher(student, classes, None)[0](images), expected)
    for teacher, head, of in (
        (tmp_path / "turned", "sigmoid", classes),
        (tmp_path / "turned", "softmax", ClassNames(("cat", "dog"))),
        ("efficientnet_lite0.embedded_in1k", None, classes),
        ("random:efficientnet_lite0.embedded_in1k", None, classes),
    ):
        student.loss.teacher, student.loss.teacher_head = str(teacher), head
        with pytest.raises(RecipeError, match="is not a softmax over the classes of the data"):
            build_teacher(student, of, None)


def test_distillation_without_a_tree_is_that_of_one_softmax():
    recipe = small_recipe(loss={"kind": "single_label", "teacher": "x.pt", "distillation_weight": 2.0})
    logits, teacher, targets = torch.randn(3, len(WNIDS)), torch.randn(3, len(WNIDS)), torch.tensor([0, 1, 2])
    whole = Criterion(recipe, None)(logits, targets, teacher) - Criterion(recipe, None)(logits, targets)
    expected = SemanticDistillationLoss(TREE, "level", per_level=False)(logits, teacher)
    torch.testing.assert_close(whole, 2 * expected / 3)


def test_a_random_teacher_takes_images_of_the_size_of_the_recipe(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    recipe = small_recipe("vit_tiny_patch16_224", loss={"teacher": f"random:{tmp_path}", "distillation_weight": 1.0})
    teacher, _, _ = build_teacher(recipe, TREE.label_space, Levels(TREE, "level"))
    assert teacher(torch.rand(2, 3, 32, 32)).shape == (2, len(WNIDS))
