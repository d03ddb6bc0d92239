"""Every card says exactly what its record says, and the files in the checkout are up to date."""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import published
import pytest
import skimage
import timm
import torch
import yaml
from hub_server import hub_server
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from typer.testing import CliRunner

import wn21k_zoo.timm_models
from wn21k_zoo import cards, publish
from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.checkpoints import CHECKPOINTS, HubSource, Metric, PackageSource, URLSource
from wn21k_zoo.cli.cards import app
from wn21k_zoo.errors import InvalidArgumentError, RecordError, UnknownModelError
from wn21k_zoo.labels import LabelSpace

ROOT = Path(__file__).parents[1]
every_record = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
FIRST = CHECKPOINTS[1]
MEASURED_HERE = Metric(
    name="top-1", value=12.5, dataset="ImageNet-1K, validation", protocol="as trained", measured_by="wn21k evaluate"
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the generated files: README and cards."""
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / cards.FOLDER).mkdir()
    for path in (ROOT / cards.FOLDER).glob("*.md"):
        (tmp_path / cards.FOLDER / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def run(checkout, monkeypatch):
    """The commands, run in that copy; ``change`` replaces records of the same name."""
    monkeypatch.setattr(cards, "find_checkout", lambda: checkout)

    def invoke(*arguments, change=()):
        changed = {one.name: one for one in change}
        records = tuple(changed.get(one.name, one) for one in CHECKPOINTS)
        planned = functools.partial(PLANNED_FILES, checkpoints=records)
        monkeypatch.setattr(cards, "planned_files", planned)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


PLANNED_FILES = cards.planned_files


def read(checkpoint):
    return ModelCard.load(ROOT / cards.FOLDER / f"{checkpoint.name}.md")


@every_record
def test_front_matter_is_that_of_the_record(checkpoint):
    card = read(checkpoint)
    library = "wn21k_zoo" if checkpoint.architecture in ARCHITECTURES else "timm"
    assert (card.data.license, card.data.library_name) == (checkpoint.license, library)
    assert card.data.pipeline_tag == "image-classification"
    assert {"image-classification", library} == set(card.data.tags) & {"image-classification", "timm", "wn21k_zoo"}
    if "How these weights were trained: unknown" in card.text:
        assert card.data.datasets is None
    else:
        assert all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) for dataset in card.data.datasets)
    metrics = [(one.value, one.name, one.protocol, one.measured_by) for one in checkpoint.metrics]
    found = [
        (one.metric_value, one.metric_name, one.metric_args["protocol"], one.metric_args["measured_by"])
        for one in card.data.eval_results or ()
    ]
    assert found == metrics
    for one in card.data.eval_results or ():
        assert one.verified is None  # only the Hub may set it
        assert one.source_url == checkpoint.paper


@every_record
def test_front_matter_survives_a_round_trip(checkpoint):
    card = read(checkpoint)
    header = yaml.safe_load(card.content.split("---\n")[1])
    if checkpoint.metrics:
        assert eval_results_to_model_index(checkpoint.name, card.data.eval_results) == header["model-index"]
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict() == cards.card_data(checkpoint).to_dict()


@every_record
def test_card_is_up_to_date(checkpoint):
    path = ROOT / cards.FOLDER / f"{checkpoint.name}.md"
    text = path.read_text(encoding="utf-8")
    assert text == cards.render_card(checkpoint, cards.prose_of(text)), "run wn21k cards build"
    assert len(cards.prose_of(text)) > 200


@every_record
def test_card_shows_all_sources_and_what_is_unknown(checkpoint):
    text = read(checkpoint).text
    assert "None" not in text
    rows = text.partition("## Sources of the weights")[2].partition("## Citation")[0].splitlines()
    rows = [row for row in rows if re.match(r"\| \d", row)]
    assert len(rows) == len(checkpoint.sources)
    for row, source in zip(rows, checkpoint.sources, strict=True):
        place = {HubSource: "repo_id", URLSource: "url", PackageSource: "package"}[type(source)]
        assert getattr(source, place) in row
        *_, size, digest = (cell.strip() for cell in row.strip("|").split("|"))
        assert size == (f"{source.num_bytes:,}" if source.num_bytes else "unknown")
        assert source.sha256 in digest if source.sha256 else digest.startswith("unknown")
        assert (getattr(source, "sha256_prefix", None) or "") in digest


@every_record
def test_card_names_every_door(checkpoint):
    text = read(checkpoint).text
    assert wn21k_zoo.timm_models  # registers
    for name in re.findall(r'timm\.create_model\("([^:]*?)"', text):
        assert timm.is_model_pretrained(name)
    assert f'predict("photo.jpg", model="{checkpoint.name}")' in text
    assert f'"{checkpoint.name.replace(".", "_")}", source="local")' in text
    assert f"wn21k predict photo.jpg --model {checkpoint.name}\n" in text
    assert f"wn21k export {checkpoint.name} DIR\nwn21k publish DIR --repo ORG/NAME\n" in text
    for place in ("local-dir:DIR", "hf-hub:ORG/NAME"):
        assert f'timm.create_model("{place}", pretrained=True)' in text
    own = checkpoint.architecture in ARCHITECTURES
    assert ('pipeline("image-classification", "DIR")' in text) != own
    assert ("transformers cannot load" in text) == own == ("timm lacks the architecture\n" in text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name", "which"),
    [
        ("mobilenetv3_large_100", "mobilenetv3_large_100.miil_in21k", ""),
        ("ofa_flops_595m_s", "ofa_flops_595m_s.miil_in21k", "DIR"),  # run alone: another entry point might register it
    ],
)
def test_usage_is_as_the_card_says(file, name, which, tmp_path):
    """Run word for word, with rule-made weights on a local Hub; for OFA, which is on no Hub, from a folder."""
    pytest.importorskip("transformers")
    torch.save(published.state_dict(file), tmp_path / "file.pth")
    place = publish.export_folder(tmp_path / "file.pth", tmp_path / "DIR")
    shutil.copy(Path(skimage.__file__).parent / "data" / "rocket.jpg", tmp_path / "photo.jpg")
    files = {f"ORG/NAME/resolve/main/{path.name}": path.read_bytes() for path in place.iterdir()}
    files[f"timm/{name}/resolve/main/model.safetensors"] = (place / "model.safetensors").read_bytes()
    usage = (ROOT / cards.FOLDER / f"{name}.md").read_text(encoding="utf-8").split("## Usage")[1].split("\n## ")[0]
    usage = usage.replace("PATH/TO/CHECKOUT", str(ROOT)).replace("ORG/NAME\n", "ORG/NAME --dry-run\n")
    python = "\n".join(code for code in re.findall(r"```python\n(.*?)```", usage, re.DOTALL) if which in code)
    shell = "".join(re.findall(r"```sh\n(.*?)```", usage, re.DOTALL))
    assert "hf-hub:" in python
    assert "export" in shell
    with hub_server(files) as (endpoint, _):
        environment = {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "WN21K_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
        done = subprocess.run([sys.executable, "-c", python], **options)
        assert done.returncode == 0, done.stderr
        if not which:
            shutil.rmtree(place)  # the command recreates it
            done = subprocess.run(["sh", "-e", "-c", shell], **options)
            assert done.returncode == 0, done.stderr
            assert (place / "model.safetensors").is_file()


@every_record
def test_what_is_said_of_timms_configuration_is_true(checkpoint):
    config = timm.get_pretrained_cfg(checkpoint.name) if timm.is_model_pretrained(checkpoint.name) else None
    differs = config is not None and (config.crop_pct, config.crop_mode) == (0.875, "center") != (
        checkpoint.crop_pct,
        checkpoint.data_config["crop_mode"],
    )
    assert ("`crop_pct` 0.875 with a centre crop" in read(checkpoint).text) == differs


@every_record
def test_parameters_are_those_of_the_network(checkpoint):
    with torch.device("meta"):
        network = wn21k_zoo.create_model(checkpoint.name, pretrained=False)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == cards.parameter_count(checkpoint)
    assert f"| {count:,} |" in read(checkpoint).text


@every_record
def test_facts_of_the_labels(checkpoint):
    text = read(checkpoint).text
    assert LabelSpace.load(checkpoint.label_space).digest in text
    if checkpoint.label_space == "imagenet21k_p_fall11":
        assert "482 of the 11,221 classes share their name" in text
        assert "11 of them, with 302, 1,378," in text
        assert "argmax over all outputs is wrong" in text
    assert ("arxiv.org/abs/2104.10972" in text) == ("bibtex" in text) == (checkpoint.paper is not None)


def test_readme_table_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == cards.with_zoo_table(text), "run wn21k cards build"
    for checkpoint in CHECKPOINTS:
        assert f"| [`{checkpoint.name}`]({cards.FOLDER}/{checkpoint.name}.md) | `{checkpoint.label_space}` |" in text


def test_every_card_has_a_record():
    assert {path.stem for path in (ROOT / cards.FOLDER).iterdir()} == {one.name for one in CHECKPOINTS}


def test_what_is_not_known_is_said():
    nothing = replace(
        FIRST, name="resnet50.a", architecture="resnet50", sources=(), license=None, paper=None, origin=None, metrics=()
    )
    text = cards.render_card(nothing)
    assert "None" not in text
    assert "license" not in cards.card_data(nothing).to_dict()
    for fact in ("| licence of the weights | unknown |", "Accuracy: unknown", "Where the weights are: unknown"):
        assert fact in text
    assert "| unknown | unknown | unknown |" in cards.zoo_table([nothing])
    assert cards.prose_of(text) == ""
    other = cards.render_card(replace(nothing, paper="https://example.org/paper"))
    assert "The paper: https://example.org/paper." in other
    assert "bibtex" not in other


def test_figures_of_two_measurers_are_not_given_one_source():
    fine_tuned = next(one for one in CHECKPOINTS if one.label_space == "imagenet1k" and one.metrics)
    both = replace(fine_tuned, metrics=(*fine_tuned.metrics, MEASURED_HERE))
    found = ModelCard(cards.render_card(both)).data.eval_results
    assert [one.source_url for one in found] == [None, None]
    assert [one.metric_args["measured_by"] for one in found] == [fine_tuned.paper, "wn21k evaluate"]


def test_lost_markers_are_an_error():
    text = cards.render_card(FIRST, "By hand.")
    assert cards.prose_of(text) == "By hand."
    for broken in (text.replace(cards.PROSE[1], ""), text + cards.PROSE[0], "", text.replace(*cards.PROSE)):
        with pytest.raises(RecordError, match=r"x\.md needs <!-- prose -->"):
            cards.prose_of(broken, "x.md")
    with pytest.raises(RecordError, match="README"):
        cards.with_zoo_table("# No table")


def test_check(run, checkout):
    assert run("build", "--check").exit_code == 0
    changed = replace(FIRST, metrics=(replace(FIRST.metrics[0], value=99.9),))
    done = run("build", "--check", change=[changed])
    assert done.exit_code == 1
    named = [line for line in done.stderr.splitlines() if "out of date" in line]
    assert len(named) == 2
    assert f"{FIRST.name}.md is out of date" in named[0]
    assert "README.md is out of date" in named[1]
    assert "99.9" not in (checkout / "README.md").read_text(encoding="utf-8")


def test_build_writes_what_differs_and_keeps_prose(run, checkout):
    path = checkout / cards.FOLDER / f"{FIRST.name}.md"
    text = path.read_text(encoding="utf-8").replace(cards.PROSE[1], f"\nMy own | words, *kept*.\n{cards.PROSE[1]}")
    path.write_text(text.replace("## Facts", "## Fictions"), encoding="utf-8")
    changed = replace(FIRST, metrics=(replace(FIRST.metrics[0], value=99.9),))
    done = run("build", change=[changed])
    assert done.exit_code == 0
    assert f"2 of {len(CHECKPOINTS) + 1} files written" in done.stderr
    text = path.read_text(encoding="utf-8")
    assert "My own | words, *kept*." in text
    assert "| 99.9 | semantic top-1 |" in text
    assert "Fictions" not in text
    assert "99.9 semantic top-1" in (checkout / "README.md").read_text(encoding="utf-8")
    assert run("build", "--check", change=[changed]).exit_code == 0
    assert not [*checkout.rglob("*.part"), *checkout.rglob(".*.tmp")]


def test_line_ends_of_windows_are_no_difference(run, checkout):
    path = checkout / cards.FOLDER / f"{FIRST.name}.md"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert run("build", "--check").exit_code == 0


def test_a_card_without_a_record_is_named_and_not_deleted(run, checkout):
    left = checkout / cards.FOLDER / "gone.miil_in21k.md"
    left.write_text(cards.render_card(FIRST, "By hand."), encoding="utf-8")
    (checkout / cards.FOLDER / "NOTES.md").write_text("no card", encoding="utf-8")
    for arguments, code in ((["build"], 0), (["build", "--check"], 1)):
        done = run(*arguments)
        assert done.exit_code == code
        assert "gone.miil_in21k.md belongs to no record" in done.stderr
        assert "NOTES.md" not in done.stderr
    assert left.exists()


def test_output_takes_the_prose_along_and_leaves_the_readme_alone(run, checkout, tmp_path):
    readme = (checkout / "README.md").read_bytes()
    folder = tmp_path / "elsewhere" / "cards"
    assert run("build", "--output", folder, "--check").exit_code == 1
    assert not folder.exists()
    assert run("build", "--output", folder).exit_code == 0
    assert (folder / f"{FIRST.name}.md").read_bytes() == (checkout / cards.FOLDER / f"{FIRST.name}.md").read_bytes()
    assert len(list(folder.iterdir())) == len(CHECKPOINTS)
    assert (checkout / "README.md").read_bytes() == readme
    assert run("build", "--output", folder, "--check").exit_code == 0


def test_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(cards, "find_checkout", lambda: None)
    done = CliRunner().invoke(app, ["build"])
    assert isinstance(done.exception, InvalidArgumentError)
    assert "--output" in str(done.exception)
    shown = CliRunner().invoke(app, ["show", FIRST.name])
    assert shown.exit_code == 0
    assert shown.stdout == cards.render_card(FIRST)
    assert CliRunner().invoke(app, ["build", "--output", str(tmp_path / "cards")]).exit_code == 0
    assert (tmp_path / "cards" / f"{FIRST.name}.md").read_text(encoding="utf-8") == cards.render_card(FIRST)


def test_show_is_the_file():
    done = CliRunner().invoke(app, ["show", FIRST.name])
    assert done.stdout == (ROOT / cards.FOLDER / f"{FIRST.name}.md").read_text(encoding="utf-8")
    assert isinstance(CliRunner().invoke(app, ["show", "resnet5.miil_in21k"]).exception, UnknownModelError)


def test_what_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "cards"):
        done = CliRunner().invoke(app, ["build", "--output", str(place)])
        assert isinstance(done.exception, InvalidArgumentError | RecordError)
        assert str(file) in str(done.exception)
