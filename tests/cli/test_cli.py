import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import timm
from conftest import EMBEDDED, run_in_terminal, start_interruptible
from PIL import Image
from timm.models import save_for_hf
from typer.testing import CliRunner

from wn21k_zoo import SemanticTree
from wn21k_zoo.checkpoints import CHECKPOINTS
from wn21k_zoo.cli import main
from wn21k_zoo.cli.app import _is_closed_pipe, app
from wn21k_zoo.cli.output import CSV_COLUMNS
from wn21k_zoo.cli.predict import _expand
from wn21k_zoo.errors import CacheError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.prediction import json_schema

ROOT = Path(__file__).parents[2]
MODEL = ["--model", EMBEDDED, "--device", "cpu"]


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def folder(tmp_path, photographs):
    (tmp_path / "below").mkdir()
    for name, source in (("b.png", photographs[0]), ("below/a.JPG", photographs[2])):
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "notes.txt").write_text("no image, and not named like one")
    return tmp_path


def test_jsonl_is_the_default_in_a_pipe(folder):
    done = run("predict", folder, *MODEL)
    assert done.exit_code == 0
    assert done.stderr == ""
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["source"] for result in results] == [str(folder / "b.png"), str(folder / "below" / "a.JPG")]
    validator = jsonschema.Draft202012Validator(json.loads(run("schema").stdout))
    for result in results:
        validator.validate(result)


NASTY = "\x1b]0;TITLE\x07\x1b[2J\x9b31m\nwn21k: forged"


@pytest.mark.parametrize("chosen", ["table", "json", "jsonl"])
def test_names_of_others_command_no_terminal(tmp_path, chosen):
    module = timm.create_model("test_vit", num_classes=2)
    save_for_hf(module, tmp_path / "model", model_config={"label_names": [f"cat{NASTY}", "[link=x]dog[/]"]})
    photo = tmp_path / f"a{NASTY}.png"
    Image.new("RGB", (8, 8)).save(photo)
    (tmp_path / f"b{NASTY}.png").write_bytes(b"broken")
    done = run("predict", photo, tmp_path / f"b{NASTY}.png", "--model", tmp_path / "model", "--format", chosen)
    assert done.exit_code == 3
    assert not [code for code in done.output if code not in "\n" and not code.isprintable()]
    assert len(done.stderr.splitlines()) == 2  # what is wrong with the one, and the number of failures
    if chosen == "jsonl":
        assert {f"cat{NASTY}", "[link=x]dog[/]"} == {
            each["name"] for each in json.loads(done.stdout.splitlines()[0])["top_k"]
        }
    if chosen == "table":
        assert "[link=x]dog[/]" in done.stdout
        info = run("info", tmp_path / "model", "--format", "table")
        assert info.exit_code == 0
        assert not [code for code in info.output if code not in "\n" and not code.isprintable()]


def test_json_is_one_array(folder):
    (folder / "c.png").write_bytes(b"broken")
    done = run("predict", folder, *MODEL, "--format", "json")
    assert done.exit_code == 3
    results = json.loads(done.stdout)
    assert len(results) == 3
    assert [result["source"] for result in results if "error" in result] == [str(folder / "c.png")]
    assert "1 of 3 images failed" in done.stderr
    for result in results:
        jsonschema.validate(result, json_schema())


def test_csv_has_the_documented_columns(folder):
    (folder / "c.png").write_bytes(b"")
    done = run("predict", folder, *MODEL, "--format", "csv", "--top-k", "2")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert (
        list(rows[0])
        == list(CSV_COLUMNS)
        == [row["column"] for row in map(json.loads, run("schema", "-f", "csv").stdout.splitlines())]
    )
    assert {row["kind"] for row in rows} == {"label", "level", "output", "error"}
    assert {row["rank"] for row in rows} == {"1", "2", ""}


def test_table():
    done = run("predict", "sample:cat", *MODEL, "--format", "table")
    assert done.exit_code == 0
    for words in ("domestic cat", "n02121808", "tiger cat", EMBEDDED, "imagenet1k", "fall11"):
        assert words in done.stdout


def test_level_threshold_and_top_k():
    result = json.loads(run("predict", "sample:cat", *MODEL, "--level", 2, "-k", 3, "-t", 0.94).stdout)
    assert [level["depth"] for level in result["levels"]] == [2]
    assert len(result["levels"][0]["labels"]) == len(result["top_k"]) == 3
    assert result["label"]["wnid"] == "n00015388"
    done = run("predict", "sample:cat", *MODEL, "--level", 77)
    assert done.exit_code == 2
    assert "its levels are 0, 1" in done.stderr


def test_stdin_and_globs(folder):
    done = run("predict", "-", *MODEL, stdin=f"\ufeff{folder / 'b.png'}\n\nsample:coffee\n")  # PowerShell's BOM
    assert [json.loads(line)["source"] for line in done.stdout.splitlines()] == [str(folder / "b.png"), "sample:coffee"]
    assert run("predict", "-", *MODEL, stdin="").exit_code == 1
    assert run("predict", "-", "sample:cat", *MODEL).exit_code == 2
    assert len(run("predict", folder / "**" / "*.[pJ]*", *MODEL, "-q").stdout.splitlines()) == 2
    assert "No file matches" in run("predict", folder / "*.webp", *MODEL).stderr


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_pattern_follows_no_circle_of_links(folder):
    (folder / "below" / "up").symlink_to(folder)
    (folder / "z.png").symlink_to(folder / "b.png")  # a link to a file is one more image
    done = run("predict", folder / "**" / "*.[pJ]*", *MODEL, "-q")
    found = [json.loads(line)["source"] for line in done.stdout.splitlines()]
    assert found == [str(folder / name) for name in ("b.png", "below/a.JPG", "z.png")]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_linked_folders_are_walked_once(folder, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "class").symlink_to(folder)
    (folder / "below" / "round").symlink_to(linked)
    (folder / "below" / "up").symlink_to(linked.parent)
    (linked / "again").symlink_to(folder / "below")
    shutil.copytree(folder / "below", linked / "own", symlinks=True)
    (linked / "a_link").symlink_to(linked / "own")
    results = [json.loads(line) for line in run("predict", linked, *MODEL).stdout.splitlines()]
    found = {str(Path(result["source"]).relative_to(linked)) for result in results}
    assert len(found) == len(results)
    assert found in ({"class/b.png", "class/below/a.JPG", "own/a.JPG"}, {"again/a.JPG", "own/a.JPG"})


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
@pytest.mark.parametrize(
    ("command", "closed"),
    [("list", ">&-"), ("info resnet50.miil_in21k", "2>&-"), ("tree search dog", "<&- >&- 2>&-")],
)
def test_closed_streams_are_no_error(closed, command):
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} -m wn21k_zoo {command} --offline {closed}"],
        capture_output=True,
        text=True,
        input="",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdin_names_no_image(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["wn21k", "predict", "-", *MODEL])
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdin.close()
    assert end.value.code == 1
    assert "stdin named no image" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
@pytest.mark.parametrize(
    ("code", "processes"),
    [
        ("from wn21k_zoo.cli import main; main()", "1"),
        ("from wn21k_zoo.messages import say; from wn21k_zoo.training.train import _end; say('done'); _end(0)", "2"),
    ],
)
def test_a_log_whose_disk_is_full_changes_no_exit_code(code, processes, tmp_path):
    environment = {**os.environ, "WORLD_SIZE": processes, "WN21K_CACHE": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", code, "cache", "list"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, env=environment, check=False)
    assert done.returncode == 0


def test_what_is_hidden_in_a_folder_is_left_alone(folder):
    for name in (".thumbnails/a.png", "__MACOSX/a.png", "._b.png", "deeper/c.png", ".d.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "b.png", folder / name)
    results = map(json.loads, run("predict", folder, *MODEL).stdout.splitlines())
    assert [Path(result["source"]).name for result in results] == ["b.png", "a.JPG", "c.png"]
    hidden = json.loads(run("predict", folder / ".thumbnails", *MODEL).stdout)
    assert hidden["source"].endswith("a.png")  # hidden, but the user named it


@pytest.mark.slow
def test_the_progress_bar_is_on_stderr_and_the_data_on_stdout(folder):
    (folder / "c.png").write_bytes(b"broken")
    command = [sys.executable, "-m", "wn21k_zoo", "predict", str(folder), *MODEL]
    done, terminal = run_in_terminal(command, dict(os.environ))
    assert done.returncode == 3
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 3
    assert "3/3" in terminal
    assert "c.png is not an image" in terminal


def test_what_holds_nothing_does_not_stop_the_rest(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run("predict", folder / "b.png", tmp_path / "empty", folder / "*.webp", "x" * 300, *MODEL)
    assert done.exit_code == 3
    assert [("error" in result) for result in map(json.loads, done.stdout.splitlines())] == [False, True, True, True]
    done = run("predict", tmp_path / "empty", *MODEL)
    assert (done.exit_code, "holds no images" in done.stderr) == (1, True)


@pytest.mark.slow
def test_json_in_a_pipe_is_utf_8(tmp_path, photographs):
    name = str(tmp_path / "caf\u00e9 \U0001f600.png")
    shutil.copy(photographs[0], name)
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    for arguments, given in (([name], b""), (["-"], os.fsencode(name))):
        command = [sys.executable, "-m", "wn21k_zoo", "predict", *arguments, *MODEL]
        done = subprocess.run(command, input=given, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.decode("utf-8"))["source"] == name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_file_names_that_are_no_text(tmp_path, photographs):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write(photographs[0].read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for arguments, given in ((["-"], name), ([os.fsdecode(name)], b"")):
        command = [sys.executable, "-m", "wn21k_zoo", "predict", *arguments, *MODEL]
        done = subprocess.run(command, input=given, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert os.fsencode(json.loads(done.stdout)["source"]) == name


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["predict", "none.jpg"], 1, "There is no file none.jpg."),
        (["predict"], 2, "Missing argument"),
        (["predict", "sample:cat", "--format", "xml"], 2, "xml"),
        (["predict", "sample:cat", "--top-k", "0"], 2, "top-k"),
        (["predict", "sample:cat", "--modl", "x"], 2, "--model"),
        (["predict", "sample:cat", "--model", "efficientnet_lite0.embeded_in1k"], 1, EMBEDDED),
        (["predict", "sample:cat", "--model", "no/such/folder"], 1, "There is no folder"),
        (["predict", "sample:cat", "--model", "convnext_tiny.in12k"], 1, "does not answer"),
        (["predict", "sample:cat", *MODEL, "--tree", "fal11"], 1, "Did you mean fall11"),
        (["predict", "sample:cat", "--model", EMBEDDED, "--device", "gpu"], 2, "cannot be used here"),
        (["predict", "sample:dog", *MODEL], 1, "cat, coffee, rocket"),
        (["predict", "https://example.org/x.png", *MODEL], 1, "--allow-url"),
        (["list", "mobilnet"], 1, "mobilenetv3_large_100.miil_in21k"),
        (["info", "efficientnet_lite0.embeded_in1k"], 1, EMBEDDED),
        (["tree", "path", "n04399382"], 1, "nearest ancestor"),
        (["tree", "path", "tabby"], 1, "names 2 classes"),
        (["tree", "search", "no such thing"], 1, "matches"),
        (["tree", "search", "n04399382"], 1, "nearest ancestor"),
        (["tree", "search", "N04399382 "], 1, "nearest ancestor"),
        (["tree", "search", "tree", "--limit", "2"], 0, "2 of 199 classes"),
        (["tree", "show", "--tree", "none.txt"], 1, "name a text file of wnids"),
        (["predict", "sample:cat", "--model", ""], 1, "The model name is empty"),
        (["info", ""], 1, "The model name is empty"),
        (["data", "prepare", "images", "out", "--format", "json"], 2, "is for --dry-run"),
        (["data", "prepare", "images", "out", "--ray-address", "auto"], 2, "add --engine ray"),
        (["tree", "compare", "none.pth"], 1, "No tree is called 'none.pth'"),
        (["nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line_and_an_exit_code(arguments, code, words):
    done = run(*arguments)
    assert done.exit_code == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert all(line.startswith("wn21k: ") for line in done.stderr.splitlines())


@pytest.mark.slow
def test_debug_shows_the_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "wn21k_zoo", "info", "nonsense.nonsense", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_fallback_is_one_line_on_stderr_unless_quiet():
    done = run("predict", "sample:cat")
    assert done.exit_code == 0
    assert done.stderr.count("\n") == 1
    assert "WN21K_MODEL" in done.stderr
    quiet = run("predict", "sample:cat", "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_info(checkpoint):
    details = json.loads(run("info", checkpoint.name).stdout)
    assert details["label_space"] == checkpoint.label_space
    assert [source["sha256"] for source in details["sources"]] == [source.sha256 for source in checkpoint.sources]
    table = run("info", checkpoint.name, "--format", "table").stdout
    unknown = [key for key, value in details.items() if value in (None, []) and key != "local_file"]
    unknown += [key for source in details["sources"] for key, value in source.items() if value is None]
    assert table.count("unknown") == len(unknown)


def test_info_needs_no_cache_that_may_be_read(monkeypatch):
    def refused(_):
        raise CacheError("It cannot be read.")

    monkeypatch.setattr("wn21k_zoo.on_disk.find_local", refused)
    assert json.loads(run("info", "resnet50.miil_in21k").stdout)["local_file"] is None
    assert "It cannot be read." in run("info", "resnet50.miil_in21k", "--format", "table").stdout


def test_list_names_every_record():
    rows = [json.loads(line) for line in run("list").stdout.splitlines()]
    assert [row["name"] for row in rows] == [checkpoint.name for checkpoint in CHECKPOINTS]
    assert "imagenet1k" in run("list", "*embedded*", "-f", "table").stdout


def test_doctor():
    found = {row["what"]: row["value"] for row in map(json.loads, run("doctor").stdout.splitlines())}
    assert found[EMBEDDED].startswith("usable offline")
    assert "not on this machine" in found["mobilenetv3_large_100.miil_in21k"]
    assert {"python", "torch", "timm", "device", "hub cache"} <= set(found)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {name.removeprefix("extra ") for name in found if name.startswith("extra ")} == {*declared} - {"test", "dev"}


@pytest.mark.skipif(os.name == "nt", reason="any name has a home there")
def test_doctor_goes_on_where_something_is_wrong(monkeypatch):
    monkeypatch.setenv("WN21K_CACHE", "~nobody-of-that-name/cache")
    monkeypatch.setenv("WN21K_DATA_CACHE", "~nobody-of-that-name/data")
    found = {row["what"]: row["value"] for row in map(json.loads, run("doctor").stdout.splitlines())}
    assert all("home folder is not known" in found[name] for name in ("cache", "data cache", CHECKPOINTS[-1].name))


def test_tree_commands(tmp_path, monkeypatch):
    assert json.loads(run("tree", "search", "tabby cat").stdout.splitlines()[0])["wnid"] == "n02123045"
    assert [json.loads(line)["depth"] for line in run("tree", "path", "n02123045").stdout.splitlines()] == [0, 1, 2, 3]
    for name in ("Shih-Tzu", " shih  tzu", "SHIH_TZU"):
        assert run("tree", "path", name).stdout == run("tree", "path", "n02086240").stdout
    between = run("tree", "path", "n02123045", "n02084071")
    assert "distance 3" in between.stderr
    assert len(between.stdout.splitlines()) == 4
    assert run("tree", "path", "n02123045", "n07920052").exit_code == 1
    assert run("tree", "show", "n02121808", "-f", "dot").stdout.startswith("digraph")
    assert "tabby" in run("tree", "show", "n02121808", "-f", "tree").stdout
    assert len(json.loads(run("tree", "show").stdout)) == 302
    listed = list(csv.DictReader(io.StringIO(run("tree", "show", "-f", "csv", "--tree", "imagenet1k").stdout)))
    assert [row["wnid"] for row in listed] == list(LabelSpace.load("imagenet1k").wnids)
    assert (listed[281]["index"], listed[281]["name"]) == ("281", "tabby, tabby cat")
    cats = [json.loads(line) for line in run("tree", "show", "n02121808", "-f", "jsonl", "-d", 1).stdout.splitlines()]
    tree = SemanticTree.load("fall11")
    nodes = (tree["n02121808"], *tree.children("n02121808"))
    assert [row["index"] for row in cats] == sorted(node.index for node in nodes)
    assert len(run("tree", "show", "-f", "jsonl", "-d", 1).stdout.splitlines()) == 302
    (tmp_path / "pets.txt").write_text("n02121808\nn02123045\n")
    assert "tabby" in run("tree", "show", "--tree", tmp_path / "pets.txt", "-f", "tree").stdout
    (tmp_path / "fall11.txt").write_text("\n".join(SemanticTree.load("fall11").wnids))
    assert run("tree", "compare", tmp_path / "fall11.txt").exit_code == 0
    assert run("tree", "compare", tmp_path / "pets.txt").exit_code == 1
    lost = json.loads(run("tree", "compare", "winter21").stdout)["only in fall11"]
    assert len(lost) == 11_221 - 10_450
    assert run("tree", "build", "--output", tmp_path / "pets.txt").exit_code == 2
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert "tabby" in run("tree", "show", "--tree", "~/pets.txt", "-f", "tree").stdout
    assert run("tree", "compare", "~/fall11.txt").exit_code == 0
    assert "data.noun" in run("tree", "build", "--check", "--wordnet", tmp_path / "none").stderr


IMPORTS_AFTER = """
import sys
from wn21k_zoo.cli.app import app
try:
    app({})
finally:
    print("torch" in sys.modules, "timm" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["tree", "--help"], ["--version"], ["list"]])
def test_light_commands_import_no_torch(arguments):
    code = IMPORTS_AFTER.format("sys.argv[1:]")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("False False\n"), done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "predict --model eff",
        "info eff",
        "download eff",
        "verify eff",
        "cache prune eff",
        "export eff",
        "cards show eff",
    ],
)
def test_names_of_records_are_completed(line):
    words = f"wn21k {line}"
    environment = {"_WN21K_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert EMBEDDED in CliRunner().invoke(app, prog_name="wn21k", env=environment).output


def test_completion_imports_no_torch():
    code = IMPORTS_AFTER.format("prog_name='wn21k'")
    environment = {
        **os.environ,
        "_WN21K_COMPLETE": "complete_bash",
        "COMP_WORDS": "wn21k predict --model eff",
        "COMP_CWORD": "3",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert EMBEDDED in done.stdout
    assert done.stderr == "False False\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_interrupt_is_130_without_a_traceback():
    process = start_interruptible([sys.executable, "-m", "wn21k_zoo", "predict", "-", *MODEL])
    try:
        process.stdin.write("sample:cat\n" * 16)  # one batch: results arrive while stdin is still open
        process.stdin.flush()
        assert process.stdout.readline().startswith("{")
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_interrupt_does_not_wait_for_an_image_in_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    process = start_interruptible([sys.executable, "-m", "wn21k_zoo", "predict", str(tmp_path / "pipe.png"), *MODEL])
    try:
        with (tmp_path / "pipe.png").open("wb") as pipe:  # waits until the image is being read
            process.send_signal(signal.SIGINT)
            _, shown = process.communicate(timeout=30)
            pipe.close()
    finally:
        process.kill()
    assert process.returncode == 130
    assert shown == "wn21k: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes as on POSIX")
def test_pipes_in_a_folder_are_passed_over(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "image.png").touch()
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    assert sorted(_expand([str(tmp_path)])) == [str(tmp_path / "dead.png"), str(tmp_path / "image.png")]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_on_stdin_is_no_list_of_paths(suffix):
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG" if suffix == "jpg" else suffix)
    done = CliRunner().invoke(app, ["predict", "-", *MODEL], input=file.getvalue())
    assert done.exit_code == 2
    assert done.stderr.startswith("wn21k: stdin holds an image, or paths that are not one per line in UTF-8")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes as on POSIX")
def test_a_reader_that_stops_early_is_no_error():
    command = (
        f"{sys.executable} -m wn21k_zoo predict sample:cat sample:coffee sample:rocket {' '.join(MODEL)} | head -c 5"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert done.stdout == '{"sou'
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="any name has a home there")
@pytest.mark.parametrize(
    "command",
    [
        "info NOBODY",
        "predict sample:cat --model NOBODY",
        "evaluate NOBODY shards",
        "evaluate NAME NOBODY",
        "export NOBODY out",
        "export NAME NOBODY",
        "publish NOBODY --repo org/name --dry-run",
        "train plan NOBODY.py",
        "train plan finetune:finetune:NOBODY",
        "train plot NOBODY",
        "train export NOBODY out",
        "data info NOBODY",
        "data prepare images NOBODY",
        "data prepare NOBODY out",
        "predict sample:cat --model NAME --tree NOBODY",
        "tree show --tree NOBODY",
        "tree compare NOBODY",
        "tree build --check --wordnet NOBODY",
        "data show shards --output=NOBODY",
        "train plot run --output=NOBODY",
        "evaluate NAME images --plot=NOBODY",
        "evaluate NAME images --output=NOBODY",
        "evaluate NAME images --predictions=NOBODY",
        "convert model.pth --output=NOBODY",
        "cards build --output=NOBODY",
        "tree build --output=NOBODY",
        "cache list --cache-dir NOBODY",
    ],
)
def test_the_home_folder_of_nobody_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command.replace("NOBODY", "~nobody-of-that-name/x").replace("NAME", EMBEDDED).split()
    done = run(*arguments)
    assert done.exit_code in (1, 2)
    assert "~nobody-of-that-name/x" in done.stderr
    assert "unexpected" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="who may make links there is another matter")
@pytest.mark.parametrize(
    "command",
    [
        "info LONG",
        "predict LONG --model NAME",
        "predict sample:cat --model LONG",
        "predict sample:cat --model NAME --tree LONG",
        "evaluate LONG shards",
        "export LONG out",
        "export NAME LONG",
        "train show LONG",
        "train plan LONG",
        "train plot LONG",
        "train export LONG out",
        "data info LONG",
        "data prepare LONG out",
        "tree show --tree LONG",
        "cards build --output LONG",
        "export NAME LOOP",
        "data info LOOP",
    ],
)
def test_what_no_file_system_takes_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    arguments = command.replace("LONG", "x" * 300).replace("LOOP", "loop").replace("NAME", EMBEDDED).split()
    done = run(*arguments)
    assert done.exit_code in (1, 2, 3)
    messages = [line for line in done.stderr.splitlines() if line.startswith("wn21k: ")] or [done.stdout]
    assert len(messages) == 1
    assert "x" * 300 in messages[0] or "loop" in messages[0]
    assert "unexpected" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_who_has_had_enough_is_known_by_windows_word_for_it_too(monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise OSError(errno.EINVAL, "Invalid argument")

    errors = (BrokenPipeError(), OSError(errno.EINVAL, "Invalid argument"), ValueError())
    assert [_is_closed_pipe(error) for error in errors] == [True, False, False]
    monkeypatch.setattr("wn21k_zoo.cli.app.os", SimpleNamespace(name="nt"))
    assert [_is_closed_pipe(error) for error in errors] == [True, False, False]  # stdout is not closed
    monkeypatch.setattr(sys, "stdout", Closed())
    assert [_is_closed_pipe(error) for error in errors] == [True, True, False]
