"""A conversion is right if the converted network gives the same logits as the original."""

import builtins
import functools
import io
import os
import pickle
import pickletools
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import published
import pytest
import safetensors.torch
import timm
import torch

from wn21k_zoo import SemanticTree, convert, download
from wn21k_zoo.checkpoints import CHECKPOINTS, EMBEDDED_CHECKPOINT
from wn21k_zoo.convert import read_state_dict
from wn21k_zoo.errors import ConversionError, TreeError, UnknownModelError
from wn21k_zoo.registry import get_checkpoint


@pytest.fixture(scope="module", params=published.REFERENCE)
def converted(request):
    """(name in the reference, its published entries after conversion)."""
    wrapped = {f"module.{key}": value for key, value in published.state_dict(request.param, counters=False).items()}
    return request.param, convert.convert_state_dict(wrapped)


def test_reference_logits(converted):
    name, found = converted
    expected = published.REFERENCE[name]
    assert (found.architecture, found.num_classes) == (published.ARCHITECTURE_OF[name], 11_221)
    module = convert.build(found.architecture, num_classes=11_221).eval()
    module.load_state_dict(found.state_dict, strict=True)
    with torch.inference_mode():
        logits = module(published.images())
    for row, std in enumerate(expected["logits_std"]):
        first = torch.tensor(expected["logits_first16"][row])
        torch.testing.assert_close(logits[row, :16], first, rtol=1e-3, atol=1e-3 * std)
        assert logits[row].sum().item() == pytest.approx(expected["logits_sum"][row], rel=1e-3)
        assert logits[row].std().item() == pytest.approx(std, rel=1e-3)
    assert logits.argmax(1).tolist() == expected["argmax"]


def test_round_trip(converted, tmp_path):
    name, found = converted
    convert.save_safetensors(found, tmp_path / "out.safetensors")
    again = convert.convert_file(tmp_path / "out.safetensors")  # timm's layout is recognised as well
    assert (again.architecture, again.num_classes) == (found.architecture, found.num_classes)
    assert list(again.state_dict) == list(found.state_dict)
    assert all(torch.equal(again.state_dict[key], value) for key, value in found.state_dict.items())
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["architecture"] == published.ARCHITECTURE_OF[name]


def test_missing_and_unknown_keys_are_named():
    entries = published.state_dict("mobilenetv3_large_100")
    del entries["conv_stem.weight"]
    with pytest.raises(ConversionError, match=r"mobilenetv3_large_100: missing conv_stem\.weight"):
        convert.convert_state_dict(entries)
    entries = published.state_dict("ofa_flops_595m_s")
    entries["blocks.3.mobile_inverted_conv.surprise.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError, match=r"unknown blocks\.3\.mobile_inverted_conv\.surprise\.weight"):
        convert.convert_state_dict(entries)
    entries = published.state_dict("mobilenetv3_large_100")
    entries["conv_stem.weight"] = torch.zeros(16, 4, 3, 3)
    with pytest.raises(ConversionError, match=r"another shape conv_stem\.weight"):
        convert.convert_state_dict(entries)
    with pytest.raises(ConversionError, match="missing"):
        convert.convert_state_dict(entries, architecture="resnet50")
    with pytest.raises(UnknownModelError, match="Did you mean resnet50"):
        convert.convert_state_dict(entries, architecture="resnet5")


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(())])
def test_a_head_whose_bias_does_not_fit_its_weight(bias):
    entries = published.state_dict("mobilenetv3_large_100")
    with pytest.raises(ConversionError, match=r"mobilenetv3_large_100: of another shape classifier\.bias\.$"):
        convert.convert_state_dict({**entries, "classifier.bias": bias})


def test_where_two_share_a_layout_the_person_decides(monkeypatch):
    twin = type(CHECKPOINTS[0])(**{**vars(get_checkpoint("resnet50.miil_in21k")), "architecture": "resnet50_gn"})
    monkeypatch.setattr(convert, "CHECKPOINTS", (*CHECKPOINTS, twin))
    known = convert._skeleton
    monkeypatch.setattr(convert, "_skeleton", lambda name: known("resnet50" if name == "resnet50_gn" else name))
    entries = {key: torch.zeros(value.shape) for key, value in known("resnet50").state_dict().items()}
    with pytest.raises(ConversionError, match=r"resnet50, resnet50_gn.*--architecture"):
        convert.convert_state_dict(entries)
    assert convert.convert_state_dict(entries, "resnet50").architecture == "resnet50"


def test_other_heads_are_converted_too():
    entries = {key: torch.zeros(value.shape) for key, value in timm.create_model("tresnet_m").state_dict().items()}
    assert convert.convert_state_dict(entries).num_classes == 1_000


def test_the_embedded_file_becomes_timms():
    path = download.fetch(get_checkpoint(EMBEDDED_CHECKPOINT)).path
    found = convert.convert_file(path)
    published_values = list(torch.load(path, weights_only=True).values())
    assert found.architecture == "tf_efficientnet_lite0"
    assert len(found.state_dict) == 296
    # Both list entries in the order of the network.
    pairs = zip(found.state_dict.values(), published_values, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_activated_batch_norm_scales_by_a_positive_weight():
    entries = published.state_dict("tresnet_m")
    entries["body.conv1.1.weight"][0] = -2.0
    found = convert.convert_state_dict(entries)
    assert found.state_dict["body.conv1.bn.weight"][0].item() == pytest.approx(2.0 + 1e-5)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_wrappers(wrapper, tmp_path):
    entries = {key: torch.zeros(value.shape) for key, value in timm.create_model("resnet50").state_dict().items()}
    torch.save({wrapper: entries, "epoch": 3} if wrapper else entries, tmp_path / "model.pth")
    assert convert.convert_file(tmp_path / "model.pth").architecture == "resnet50"


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConversionError, match="not there"):
        convert.convert_file(tmp_path / "none.pth")
    with pytest.raises(ConversionError, match="a folder"):
        convert.convert_file(tmp_path)
    for name, content in (("a.pth", b""), ("b.safetensors", b"12345678{}"), ("c.pth", b"not a checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match="not a plain state dict"):
            convert.convert_file(tmp_path / name)
    for name, value in (("d.pth", [1, 2]), ("e.pth", {}), ("f.pth", {"x": 1}), ("g.pth", {1: torch.zeros(1)})):
        torch.save(value, tmp_path / name)
        with pytest.raises(ConversionError, match="not a"):
            convert.convert_file(tmp_path / name)


class Reduced:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call

    def __call__(self, *_):
        """Makes it look callable, which pickling requires."""


class Stateful:
    def __setstate__(self, state):
        os.system(state["command"])  # noqa: S605

    def __getstate__(self):
        return {"command": self.command}


def stateful(command):
    found = Stateful()
    found.command = command
    return found


class Evil(torch.Tensor):
    def __reduce_ex__(self, protocol):
        return os.system, (self.command,)


def evil_tensor(command):
    found = torch.zeros(1).as_subclass(Evil)
    found.command = command
    return found


HOSTILE = {
    "os.system": lambda command: Reduced(os.system, command),
    "subprocess": lambda command: Reduced(subprocess.check_call, ["sh", "-c", command]),
    "eval": lambda command: Reduced(builtins.eval, f"__import__('os').system({command!r})"),
    "exec": lambda command: Reduced(builtins.exec, f"import os; os.system({command!r})"),
    "getattr": lambda command: Reduced(Reduced(getattr, Reduced(builtins.__import__, "os"), "system"), command),
    "partial": lambda command: Reduced(Reduced(functools.partial, os.system, command)),
    "setstate": stateful,
    "tensor subclass": evil_tensor,
    "numpy": lambda command: np.array([Reduced(os.system, command)], dtype=object),
    "nested pickle": lambda command: Reduced(pickle.loads, pickle.dumps(Reduced(os.system, command))),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "renamed"])
def test_hostile_pickles_execute_nothing(kind, form, tmp_path):
    marker = tmp_path / "executed"
    content = {"state_dict": {"conv_stem.weight": HOSTILE[kind](f"touch {marker}")}}
    path = tmp_path / ("model.safetensors" if form == "renamed" else "model.pth")
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
        path.write_bytes(buffer.getvalue())
    with pytest.raises(ConversionError, match="nothing in it was executed"):
        convert.convert_file(path)
    assert not marker.exists()
    if form == "plain":  # the file is harmful: Python's own unpickling executes it
        pickle.loads(path.read_bytes())  # noqa: S301
        assert marker.exists()


def test_a_zip_that_would_leave_its_folder_writes_nothing(tmp_path):
    path = tmp_path / "inner" / "model.pth"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../escaped/data.pkl", b"x")
        archive.writestr("/tmp/escaped.pkl", b"x")  # noqa: S108
    with pytest.raises(ConversionError):
        convert.convert_file(path)
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    found = convert.Converted(architecture="resnet50", num_classes=1, state_dict={"x": torch.zeros(1)})
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", tmp_path / "none" / "out.safetensors"):
        with pytest.raises(ConversionError, match="cannot be written"):
            convert.save_safetensors(found, place)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder"]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_file_of_weights_is_as_any_other(tmp_path):
    shared = torch.arange(6.0)
    state = {"one": shared, "other": shared, "part": shared.view(2, 3).t(), "one_more": torch.zeros(())}
    (tmp_path / "link").symlink_to(tmp_path / "out.safetensors")
    (tmp_path / "plain").touch()
    convert.write_safetensors(state, tmp_path / "link", more="said")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "more": "said"}
    (tmp_path / "full").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - its words are the system's
        convert.write_safetensors(state, tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "link", "out.safetensors", "plain"}


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_compressed_files_of_torch_are_refused(tmp_path, suffix):
    plain, path = tmp_path / "plain.pth", tmp_path / f"x{suffix}"
    torch.save({"a": torch.zeros(3)}, plain)
    assert read_state_dict(plain).keys() == {"a"}
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ConversionError, match="its parts are compressed"):
        read_state_dict(path)
    with pytest.raises(TreeError, match="its parts are compressed"):
        SemanticTree.from_published(path)


def test_what_else_is_in_a_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(3)}, "args": SimpleNamespace(lr=0.1)}, tmp_path / "last.pth.tar")
    with pytest.raises(ConversionError, match=r"\(it contains types\.SimpleNamespace\)"):
        read_state_dict(tmp_path / "last.pth.tar")


def test_numbers_that_are_not_in_the_file_are_not_made_up(tmp_path):
    file = io.BytesIO()
    torch.save({"a": torch.zeros(10_000)}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    for _ in range(4):  # two numbers of the format, of the machine, and of the tensor
        pickletools.dis(file, io.StringIO())
    claimed = file.getvalue()[: file.tell()].replace(b"M" + (10_000).to_bytes(2, "little"), b"M\xff\xff")
    (tmp_path / "x.pth").write_bytes(claimed + pickle.dumps([], 2))  # no storages follow
    with pytest.raises(ConversionError, match="claims more numbers than are in it"):
        read_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 1).expand(2**31, 1280),
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_numbers_are_refused(tmp_path, tensor):
    torch.save({"a": torch.zeros(3), "b": tensor}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="the entry 'b' is no plain tensor"):
        read_state_dict(tmp_path / "x.pth")
