"""An exported folder predicts the same in timm, transformers and here, also after a trip to a Hub and back."""

import base64
import json
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import published
import pytest
import safetensors.torch
import timm
import torch
from conftest import EMBEDDED
from hub_server import hub_server, serving
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from typer.testing import CliRunner

import wn21k_zoo
from wn21k_zoo import convert, create_transform, models, publish, timm_models
from wn21k_zoo.cli.app import app
from wn21k_zoo.errors import (
    ConversionError,
    InvalidArgumentError,
    LabelSpaceError,
    ModelError,
    OfflineError,
    PublishError,
    UnknownModelError,
    UnresolvedLabelSpaceError,
    WeightsNotFoundError,
)
from wn21k_zoo.labels import LABEL_SPACES, ClassNames, LabelSpace
from wn21k_zoo.saving import save_model
from wn21k_zoo.training.weights import classes_of

MOBILENET = "mobilenetv3_large_100.miil_in21k"
FILES = {"README.md", "config.json", "model.safetensors", "wn21k_labels.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model, exported."""
    return publish.export_folder(EMBEDDED, tmp_path_factory.mktemp("export") / "lite0")


def exported_file(name, place):
    """A published file with rule-made weights, exported."""
    torch.save({"state_dict": published.state_dict(name)}, place / f"{name}.pth")
    return publish.export_folder(place / f"{name}.pth", place / name)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    return exported_file("mobilenetv3_large_100", tmp_path_factory.mktemp("mobilenet"))


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_readable_names_are_unique(name):
    space = LabelSpace.load(name)
    assert len(set(space.unique_names)) == len(space)
    pairs = zip(space.names, space.unique_names, space.wnids, strict=True)
    assert all(unique in (plain, f"{plain} ({wnid})") for plain, unique, wnid in pairs)


def test_what_is_written(folder, mobilenet):
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((mobilenet / "config.json").read_text())
    assert config["architecture"] == "mobilenetv3_large_100"
    assert config["num_classes"] == len(config["label_names"]) == len(set(config["label_names"])) == 11_221
    assert set(config["label_descriptions"]) == set(config["label_names"])
    assert "model_args" not in config
    assert (config["pretrained_cfg"]["crop_mode"], config["pretrained_cfg"]["crop_pct"]) == ("squash", 1.0)
    assert not {"url", "file", "hf_hub_id", "state_dict"} & set(config["pretrained_cfg"])
    assert sum(name.endswith(")") and "(n" in name for name in config["label_names"]) == 482
    labels = json.loads((mobilenet / "wn21k_labels.json").read_text())
    space = LabelSpace.load("fall11")
    assert (labels["digest"], labels["head"]) == (space.digest, "semantic_softmax")
    assert labels["wnids"] == labels["tree"]["wnids"] == list(space.wnids)
    assert len(labels["tree"]["parents"]) == 11_221
    assert "library_name: timm" in (mobilenet / "README.md").read_text()


def test_a_folder_in_timm(folder, embedded, photographs):
    module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    for path, expected in zip(photographs, embedded(photographs), strict=True):
        with Image.open(path) as image, torch.inference_mode():
            found = module(transform(image.convert("RGB"))[None]).argmax().item()
        assert found == expected.top_k[0].index


def test_a_folder_here(folder, embedded, photographs):
    predictor = wn21k_zoo.Predictor(folder, device="cpu")
    assert (predictor.label_space.name, predictor.head) == ("imagenet1k", "softmax")
    for found, expected in zip(predictor(photographs), embedded(photographs), strict=True):
        assert [label.wnid for label in found.path] == [label.wnid for label in expected.path]
        assert found.top_k[0].index == expected.top_k[0].index
    fine_tune = wn21k_zoo.create_model(folder, num_classes=3)
    assert fine_tune.num_classes == 3


@pytest.mark.filterwarnings("default")  # of transformers' own
@pytest.mark.parametrize("which", [pytest.param("folder", marks=pytest.mark.slow), "mobilenet"])
def test_a_folder_in_transformers(which, request, photographs):
    transformers = pytest.importorskip("transformers")
    place = request.getfixturevalue(which)
    pipeline = transformers.pipeline("image-classification", str(place), device="cpu")
    loaded = models.load_model(place)
    transform = models.build_transform(loaded.data_config)
    for path in photographs:
        with Image.open(path) as image, torch.inference_mode():
            picture = image.convert("RGB")
            expected = loaded.module(transform(picture)[None])[0].softmax(-1)
            answer = pipeline(picture)[0]
        assert answer["label"] == loaded.label_space.unique_names[expected.argmax()]
        assert answer["score"] == pytest.approx(expected.max().item(), rel=1e-3)


def test_a_semantic_head_here(mobilenet, photographs):
    predictor = wn21k_zoo.Predictor(mobilenet, device="cpu")
    assert (predictor.label_space.name, predictor.head) == ("imagenet21k_p_fall11", "semantic_softmax")
    assert len(predictor(photographs[0]).levels) == 11


@pytest.mark.filterwarnings("default")  # of transformers' own
@pytest.mark.parametrize("which", ["folder", "mobilenet"])
def test_what_transformers_saves_is_read_as_what_it_was(which, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    place = request.getfixturevalue(which)
    module = transformers.AutoModelForImageClassification.from_pretrained(place)
    module.save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(place).save_pretrained(tmp_path)
    assert not (tmp_path / "wn21k_labels.json").exists()
    found, expected = (models.load_model(each) for each in (tmp_path, place))
    assert (found.label_space, found.head) == (expected.label_space, expected.head)
    assert found.data_config == expected.data_config
    expected_state = expected.module.state_dict()
    assert all(torch.equal(value, expected_state[key]) for key, value in found.module.state_dict().items())
    assert classes_of(str(tmp_path)) == expected.label_space.wnids
    assert str(create_transform(tmp_path)) == str(create_transform(place))


@pytest.mark.filterwarnings("default")  # of transformers' own
@pytest.mark.parametrize("which", ["folder", pytest.param("mobilenet", marks=pytest.mark.slow)])
def test_what_got_other_classes_since_is_not_what_it_was(which, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    module = transformers.AutoModelForImageClassification.from_pretrained(
        request.getfixturevalue(which), num_labels=3, ignore_mismatched_sizes=True
    )
    module.save_pretrained(tmp_path)
    with pytest.raises((LabelSpaceError, UnresolvedLabelSpaceError)):
        models.load_model(tmp_path)
    names = models.ClassNames(("cats", "dogs", "cows"))
    assert models.load_model(tmp_path, label_space=names).head == "softmax"
    with pytest.raises(InvalidArgumentError, match="Nothing says how to read the outputs"):
        models.load_model(tmp_path, label_space=("n02121808", "n02123045", "n02084071"))  # a cat, a tabby, a dog


def test_ofa_in_timm_after_our_import_and_here(tmp_path, photographs):
    place = exported_file("ofa_flops_595m_s", tmp_path)
    assert json.loads((place / "config.json").read_text())["architecture"] == "wn21k_ofa_flops_595m_s"
    assert timm_models.__all__
    module = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    with torch.inference_mode():
        logits = module(published.images())
    assert logits.argmax(1).tolist() == published.REFERENCE["ofa_flops_595m_s"]["argmax"]
    timm.models.save_for_hf(timm.create_model(f"local-dir:{place}"), tmp_path / "again", model_config={})
    assert timm.create_model(f"local-dir:{tmp_path / 'again'}").num_classes == 11221
    assert wn21k_zoo.predict(photographs[0], model=place, device="cpu").head == "semantic_softmax"


def test_dtypes(tmp_path):
    place = publish.export_folder(EMBEDDED, tmp_path / "half", dtype="float16")
    state = safetensors.torch.load_file(place / "model.safetensors")
    assert state["conv_stem.weight"].dtype == torch.float16
    assert state["bn1.num_batches_tracked"].dtype == torch.int64
    assert wn21k_zoo.predict("sample:cat", model=place).label.wnid == "n02121808"


def test_a_name_that_only_timm_has(tmp_path, monkeypatch):
    """Treated like a timm checkpoint, with a card of what is known."""
    module = timm.create_model("mobilenetv3_small_050")
    monkeypatch.setattr(publish, "build_checkpoint", lambda checkpoint, pretrained: module)
    place = publish.export_folder("mobilenetv3_small_050.lamb_in1k", tmp_path / "small")
    assert models.load_model(place).label_space.name == "imagenet1k"
    assert "mobilenetv3_small_050.lamb_in1k" in (place / "README.md").read_text()


def test_refusals_leave_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.pth").write_bytes(b"")
    module = timm.create_model("resnet50", num_classes=3)
    torch.save(module.state_dict(), tmp_path / "three.pth")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for model, place, options, error, words in (
        (EMBEDDED, "full", {}, InvalidArgumentError, "--force"),
        (EMBEDDED, "full", {"force": True}, InvalidArgumentError, r"full holds mine\.txt"),
        (EMBEDDED, "odd", {"force": True}, InvalidArgumentError, r"odd holds config\.json"),
        (EMBEDDED, "file", {}, InvalidArgumentError, "is a file"),
        (EMBEDDED, "file/below", {}, PublishError, "cannot be written"),
        (EMBEDDED, "new", {"dtype": "int8"}, InvalidArgumentError, "float32"),
        (EMBEDDED, "new", {"record": MOBILENET}, InvalidArgumentError, "weight files"),
        ("nonsense_model", "new", {}, UnknownModelError, "nonsense_model"),
        ("none.pth", "new", {}, UnknownModelError, "no file"),
        ("none.pth", "new", {"record": MOBILENET}, UnknownModelError, "no file"),
        (tmp_path / "bad.pth", "new", {}, ConversionError, "state dict"),
        (tmp_path / "three.pth", "new", {}, InvalidArgumentError, "none; choose one"),
        (tmp_path / "three.pth", "new", {"record": "resnet50.miil_in21k"}, InvalidArgumentError, "is not"),
    ):
        with pytest.raises(error, match=words):
            publish.export_folder(model, tmp_path / place, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_former_export_is_replaced_or_stays(folder, tmp_path, monkeypatch):
    place = damaged_copy(folder, tmp_path, config_json="former")
    replace = Path.replace

    def fail_once(self, target):
        if target == place / "config.json":
            monkeypatch.setattr(Path, "replace", replace)
            raise OSError(39, "Directory not empty")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(PublishError, match="not empty"):
        publish.export_folder(EMBEDDED, place, force=True)
    assert (place / "config.json").read_text() == "former"
    assert {path.name for path in place.iterdir()} == FILES
    publish.export_folder(EMBEDDED, place, force=True)
    assert {path.name for path in place.iterdir()} == FILES
    assert (place / "config.json").read_text() != "former"
    assert list(tmp_path.iterdir()) == [place]


def test_into_a_clone_of_a_repository(tmp_path):
    for hidden in (".git", ".DS_Store"):
        (tmp_path / "clone" / hidden).mkdir(parents=True)
    place = publish.export_folder(EMBEDDED, tmp_path / "clone")
    publish.export_folder(EMBEDDED, tmp_path / "clone", force=True)
    assert {path.name for path in place.iterdir()} == {*FILES, ".git", ".DS_Store"}


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_into_the_current_folder_through_a_link_and_after_a_kill(tmp_path, monkeypatch):
    (tmp_path / "real" / ".wn21k-export-left").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    publish.export_folder(EMBEDDED, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "real").iterdir()} == FILES
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    publish.export_folder(EMBEDDED, ".")
    assert {path.name for path in (tmp_path / "here").iterdir()} == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]


def damaged_copy(folder, tmp_path, **contents):
    place = tmp_path / "copy"
    place.mkdir()
    for name in FILES:
        (place / name).write_bytes((folder / name).read_bytes())
    for name, text in contents.items():
        (place / name.replace("_json", ".json")).write_text(text)
    return place


@pytest.mark.parametrize("wrong", [{"wnids": ["n1"]}, {"wnids": []}, {"wnids": 5}, {"head": "none"}, {"head": [1]}])
def test_what_an_export_states_may_be_damaged(folder, tmp_path, wrong):
    config = json.loads((folder / "config.json").read_text()) | wrong
    place = damaged_copy(folder, tmp_path, config_json=json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json is damaged, export the model again"):
        models.load_model(place)
    assert models.load_model(place, label_space="imagenet1k", head="softmax").head == "softmax"  # callers may override
    assert len(models.load_model(place, label_space="own").label_space) == 1000


@pytest.mark.parametrize(
    "left",
    [
        {},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"wnids": None}, {"head": None})),
        {"wnids": ["mine"], "head": None},
    ],
)
def test_where_nothing_is_stated_the_names_are_recognised(mobilenet, tmp_path, left):
    config = json.loads((mobilenet / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("label_space", "wnids", "head")} | left
    loaded = models.load_model(damaged_copy(mobilenet, tmp_path, config_json=json.dumps(config)))
    assert (loaded.label_space.name, loaded.head) == ("imagenet21k_p_fall11", "semantic_softmax")


def test_dry_run_lists_what_would_go_and_opens_no_socket(folder, tmp_path, monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    place = damaged_copy(folder, tmp_path, notes="not ours")
    done = CliRunner().invoke(app, ["publish", str(place), "--repo", "org/name", "--dry-run", "--private"])
    assert done.exit_code == 0, done.stderr
    assert {json.loads(line)["file"] for line in done.stdout.splitlines()} == FILES
    assert "would go to org/name, branch main, private" in done.stderr


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "The token is not valid: log in again"), (403, "may not write to org")]
)
def test_a_hub_that_refuses_a_token_says_what_to_do(folder, monkeypatch, status, hint):
    def refuse(*_, **__):
        response = types.SimpleNamespace(status_code=status, headers={}, request=None)
        raise HfHubHTTPError("no", response=response)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(PublishError, match=rf"org/name could not be published\. .*{hint}"):
        publish.publish_folder(folder, "org/name")


def test_what_cannot_be_published(folder, tmp_path, monkeypatch):
    for repo in (
        "name",
        "org/a b",
        "org/a/b",
        "-org/name",
        "org/a--b",
        "org/a..b",
        "org/a.git",
        "org/a.",
        "org/a@main",
    ):
        with pytest.raises(InvalidArgumentError, match="ORG/NAME"):
            publish.publish_folder(folder, repo)
    with pytest.raises(InvalidArgumentError, match="not a folder"):
        publish.publish_folder(tmp_path / "none", "org/name")
    place = damaged_copy(folder, tmp_path)
    with pytest.raises(PublishError, match="hf auth login"):
        publish.publish_folder(place, "org/name")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(PublishError, match="could not be published"):
        publish.publish_folder(place, "org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError):
        publish.publish_folder(place, "org/name")
    for card in ("---\nlicense: [mit\n---\n", "---\n- mit\n---\n"):
        (place / "README.md").write_text(card)
        with pytest.raises(PublishError, match=r"at the top of .*README.md are not valid"):
            publish.plan_upload(place)
    (place / "README.md").write_bytes("---\nlicense: mit\n---\né".encode("latin-1"))
    with pytest.raises(PublishError, match="is not UTF-8"):
        publish.plan_upload(place)
    (place / "README.md").unlink()
    with pytest.raises(PublishError, match="without a card"):
        publish.plan_upload(place)
    safetensors.torch.save_file({"x": torch.zeros(1)}, place / "model.safetensors")
    (place / "README.md").write_text("")
    with pytest.raises(ModelError, match="do not fit"):
        publish.plan_upload(place)
    (place / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError):
        publish.plan_upload(place)


@contextmanager
def write_server():
    """A Hub as far as uploads need one; yields its endpoint, the commits and the requests."""
    committed, seen = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            seen.append((self.path, self.headers.get("authorization"), body[:300]))
            if self.path.endswith("/api/repos/create"):
                answer = {"url": f"{endpoint}/org/name"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
                answer = {"files": modes}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        committed[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                answer = {"commitUrl": f"{endpoint}/org/name/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            else:
                answer = {"warnings": [], "errors": []}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as endpoint:
        yield endpoint, committed, seen


@pytest.mark.slow
def test_with_a_token_and_a_message_of_ones_own(folder, tmp_path):
    code = f"""
from wn21k_zoo.publish import publish_folder
publish_folder({str(folder)!r}, "org/name", token="hf_mine", commit_message="Better weights")
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    with write_server() as (endpoint, committed, seen):
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert set(committed) == FILES
    assert {authorization for _, authorization, _ in seen} == {"Bearer hf_mine"}
    assert any(b"Better weights" in body for _, _, body in seen)


def test_the_card_of_a_network_of_ones_own_names_its_repository(tmp_path, monkeypatch):
    place = save_model(
        timm.create_model("test_resnet", num_classes=2), tmp_path / "mine", label_space=ClassNames(["a", "b"])
    )
    before = (place / "README.md").read_bytes()
    done = CliRunner().invoke(app, ["publish", str(place), "--repo", "org/name", "--dry-run"])
    assert done.exit_code == 0
    assert "states no licence" in done.stderr
    with write_server() as (endpoint, committed, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        publish.publish_folder(place, "org/name")
        card = committed["README.md"].decode()
        publish.publish_folder(place, "org/name", revision="dev")
        of_branch = committed["README.md"].decode()
    assert of_branch.count('"hf-hub:org/name@dev"') == 2
    assert 'pipeline("image-classification", "org/name", revision="dev")' in of_branch
    assert 'predict("photo.jpg", model="hf-hub:org/name")' in card
    assert 'create_model("hf-hub:org/name", pretrained=True)' in card
    assert 'pipeline("image-classification", "org/name")' in card
    assert "FOLDER" not in card
    assert (place / "README.md").read_bytes() == before


FINETUNE = Path(__file__).parent.parent / "training" / "recipes" / "finetune.py"


@pytest.mark.slow
def test_to_a_hub_and_back(folder, tmp_path, embedded):
    environment = {**os.environ, "HF_TOKEN": "hf_x", "WN21K_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "wn21k_zoo", "publish", str(folder), "--repo", "org/name", "--revision", "dev"]
    with write_server() as (endpoint, committed, seen):
        environment["HF_ENDPOINT"] = endpoint
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{endpoint}/org/name/commit/abc\n"
    assert set(committed) == FILES
    assert "/api/models/org/name/branch/dev" in [path for path, _, _ in seen]
    assert any(path.startswith("/api/models/org/name/commit/dev") for path, _, _ in seen)
    assert all(authorization == "Bearer hf_x" for _, authorization, _ in seen)
    assert committed["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    code = """
import timm, wn21k_zoo
module = timm.create_model("hf-hub:org/name", pretrained=True)
mine = wn21k_zoo.create_model("hf-hub:org/name")
assert (module.conv_stem.weight == mine.conv_stem.weight).all()
found = wn21k_zoo.predict("sample:cat", model="hf-hub:org/name")
print(found.label.wnid, found.label_space, found.top_k[0].index)
"""
    with hub_server({f"org/name/resolve/main/{name}": content for name, content in committed.items()}) as (endpoint, _):
        environment.update(HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1")
        first = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    assert first.returncode == 0, first.stderr
    expected = embedded("sample:cat")
    assert first.stdout.split() == [expected.label.wnid, "imagenet1k", str(expected.top_k[0].index)]
    predict = [sys.executable, "-m", "wn21k_zoo", "predict", "sample:cat", "--model", "hf-hub:org/name", "--offline"]
    offline = subprocess.run(predict, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(offline.stdout)["label"]["wnid"] == expected.label.wnid
    for subject, keys in ((["info"], ("architecture",)), (["train", "show"], ("model", "architecture"))):
        name = "hf-hub:org/name" if subject == ["info"] else f"{FINETUNE}:finetune:hf-hub:org/name@main"
        command = [sys.executable, "-m", "wn21k_zoo", "--offline", *subject, name]
        value = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        for key in keys:
            value = value[key]
        assert value == "tf_efficientnet_lite0"


def test_the_command(tmp_path):
    done = CliRunner().invoke(app, ["export", EMBEDDED, str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "model.safetensors 18.8 MB" in done.stderr
    done = CliRunner().invoke(app, ["export", EMBEDDED, str(tmp_path / "out")])
    assert done.exit_code == 2
    assert convert.convert_file(Path(tmp_path / "out" / "model.safetensors")).architecture == "tf_efficientnet_lite0"


def test_a_folder_is_nothing_to_export(folder, tmp_path, monkeypatch):
    (tmp_path / "fold").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("fold", "./fold", folder):
        with pytest.raises(
            InvalidArgumentError, match="is a folder; export takes a record's name, a timm model or a w"
        ):
            publish.export_folder(model, tmp_path / "out")
    (tmp_path / EMBEDDED).mkdir()  # a record's name takes precedence over a folder of that name
    assert {path.name for path in publish.export_folder(EMBEDDED, tmp_path / "out").iterdir()} == FILES


def test_a_file_that_does_not_fit_its_record_is_a_typed_error(tmp_path, monkeypatch):
    (tmp_path / "odd.pth").write_bytes(b"")
    odd = convert.Converted(architecture="resnet50", num_classes=11_221, state_dict={"x": torch.zeros(1)})
    monkeypatch.setattr(convert, "convert_file", lambda path, architecture: odd)
    with pytest.raises(ConversionError, match=r"odd\.pth does not fit resnet50\.miil_in21k"):
        publish.export_folder(tmp_path / "odd.pth", tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_no_file_from_elsewhere_is_published(folder, tmp_path):
    place = damaged_copy(folder, tmp_path)
    (tmp_path / "secret").write_text("secret")
    (place / "wn21k_labels.json").unlink()
    (place / "wn21k_labels.json").symlink_to(tmp_path / "secret")
    with pytest.raises(PublishError, match=r"wn21k_labels\.json is a link to a file elsewhere"):
        publish.plan_upload(place)
    for none in ("wn21k_labels.json", "gone.json"):
        (place / "wn21k_labels.json").unlink()
        (place / "wn21k_labels.json").symlink_to(none)
        with pytest.raises(PublishError, match=r"wn21k_labels\.json is a link"):
            publish.plan_upload(place)
