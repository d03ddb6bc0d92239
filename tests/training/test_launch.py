"""The launch files: their syntax, and that what they start exists. No cluster is used."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock

from wn21k_zoo.training import train
from wn21k_zoo.training.status import mark_preempted

from .runs import make_folder, small_recipe

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "training" / "launch"
FILES = sorted(path for path in LAUNCH.iterdir() if path.name != "run.sh")


def options_of(text):
    return set(re.findall(r"(?<=\s)--(?:recipe|data|output|set)\b", text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_starts_the_trainer_with_arguments_that_it_has(path, capsys):
    text = path.read_text()
    assert "-m" in text
    assert "wn21k_zoo.training.train" in text
    assert options_of(text) >= {"--recipe", "--data", "--output"}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    helped = capsys.readouterr().out
    assert all(option in helped for option in options_of(text))
    for recipe in re.findall(r"training/recipes/\w+\.py", text):
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all(isinstance(document, dict) for document in documents)
    if path.stem == "kubernetes":
        service, job = documents
        assert (service["kind"], job["kind"]) == ("Service", "Job")
        pod = job["spec"]["template"]["spec"]
        assert service["metadata"]["name"] == pod["subdomain"]
        assert f"--master-addr={job['metadata']['name']}-0.{pod['subdomain']}" in pod["containers"][0]["args"]
        assert f"--nnodes={job['spec']['parallelism']}" in pod["containers"][0]["args"]
        assert pod["terminationGracePeriodSeconds"] >= 60
    else:
        (task,) = documents
        assert {"resources", "setup", "run"} <= set(task)
        assert shutil.which("bash") is None or shell_accepts(task["run"])


def shell_accepts(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


needs_bash = pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="no bash of this system's own")
needs_flock = pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
FLOCK = f'shift 2; exec {shutil.which("flock")} -w "${{SECONDS_TO_WAIT:-0}}" "$@"'  # in place of run.sh's 30


def with_programs(tmp_path, **scripts):
    """An environment in which these programs are replaced by scripts."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


def wait_for(file):
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_bash
def test_what_cannot_be_written_is_not_left_in_the_folder_of_a_run(tmp_path):
    environment = with_programs(tmp_path, torchrun="exit 0", mv="exit 1")
    mark_preempted(tmp_path / "run")
    done = subprocess.run(["bash", LAUNCH / "run.sh", tmp_path / "run", "x"], env=environment, check=False)
    assert done.returncode == 0
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".job")] == ["status.json"]


@needs_bash
@pytest.mark.parametrize(("code", "asked"), [(0, False), (1, False), (143, True)])
def test_slurm_goes_back_into_the_queue_when_the_run_was_told_to_stop(tmp_path, code, asked):
    assert shell_accepts((LAUNCH / "slurm.sbatch").read_text())
    environment = with_programs(
        tmp_path, srun=f"exit {code}", scontrol=f'[ "$1" = show ] && echo node1 || echo "$@" >> {tmp_path}/asked'
    ) | {"RECIPE": "r", "DATA": "d", "OUTPUT": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment["SLURM_NNODES"] = "2"
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == (0 if asked else code), done.stderr
    assert (tmp_path / "asked").exists() == asked
    if asked:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"


@needs_bash
def test_a_job_that_slurm_does_not_take_back_has_not_succeeded(tmp_path):
    environment = with_programs(tmp_path, srun="exit 143", scontrol='[ "$1" = show ] && echo node1') | {
        "RECIPE": "r", "DATA": "d", "OUTPUT": "o", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1",
    }  # fmt: skip
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, "submit it again" in done.stderr) == (143, True)
    elsewhere = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert (elsewhere.returncode, "submit from the repository" in elsewhere.stderr) == (1, True)


def mark(folder, state):
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 3}, indent=1) + "\n")


@needs_bash
@pytest.mark.parametrize(
    ("before", "elsewhere", "after", "code", "expected", "state"),
    [
        ("preempted", False, None, 1, 1, "waiting"),  # it failed before it began: an old mark must not requeue it
        ("preempted", False, "failed", 1, 1, "failed"),
        ("preempted", True, "failed", 1, 1, "failed"),
        ("preempted", True, "preempted", 1, 143, "preempted"),
        (None, True, "preempted", 1, 143, "preempted"),
        (None, False, "preempted", 1, 1, "failed"),  # torchrun stopped the others when one died
        (None, False, "running", 1, 1, "failed"),
        (None, False, "finished", 0, 0, "finished"),
        (None, False, None, 2, 2, None),
    ],
)
def test_the_exit_code_says_whether_this_run_was_told_to_stop(
    tmp_path, before, elsewhere, after, code, expected, state
):
    output = tmp_path / "run"
    if before is not None:
        mark(output, before)
    mark(tmp_path / "other", after or "")
    write = f"mkdir -p {output}; cp {tmp_path}/other/status.json {output}" if after is not None else ":"
    if elsewhere:  # written by run.sh on another machine
        write += f"; touch {output}/.asked-to-stop"
    environment = with_programs(tmp_path, torchrun=f'echo "$@" > {tmp_path}/arguments; {write}; exit {code}')
    done = subprocess.run(["bash", LAUNCH / "run.sh", output, "-m", "a b"], env=environment, capture_output=True)
    assert done.returncode == expected, done.stderr
    assert (tmp_path / "arguments").read_text() == "-m a b\n"
    assert state is None or json.loads((output / "status.json").read_text())["state"] == state
    assert (output / ".failed").exists() == (code != 0 and not elsewhere)


@needs_bash
@needs_flock
@pytest.mark.parametrize(("slurm", "number"), [({"SLURM_JOB_ID": "8"}, []), ({}, ["--node-rank", "0"])])
def test_a_second_job_leaves_the_folder_of_the_first_alone(tmp_path, slurm, number):
    output = tmp_path / "run"
    mark(output, "running")
    (output / ".asked-to-stop7").touch()
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    environment = with_programs(tmp_path, torchrun=f"touch {tmp_path}/begun", flock=FLOCK) | slurm
    command = ["bash", LAUNCH / "run.sh", output, *number, "x"]
    with FileLock(output / ".lock"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, (tmp_path / "begun").exists()) == (1, False)
        assert "another job is writing to" in done.stderr
        assert {
            path.name: path.read_bytes() for path in output.iterdir() if path.name not in (".lock", ".failed8")
        } == before
        if not slurm:  # another machine, which may have come back
            assert subprocess.run([*command[:3], "--node-rank=1"], env=environment, check=False).returncode == 0
    assert subprocess.run(command, env=environment, check=False).returncode == 0


@needs_bash
@needs_flock
@pytest.mark.parametrize(
    ("slurm", "number"), [({}, []), ({}, ["--node-rank=1"]), ({"SLURM_JOB_ID": "8", "SLURM_NODEID": "0"}, [])]
)
def test_a_second_start_does_not_mark_the_run_of_the_first(tmp_path, slurm, number):
    output = tmp_path / "run"
    environment = with_programs(tmp_path, torchrun=f"touch {tmp_path}/begun; read -r line", flock=FLOCK) | slurm
    command = ["bash", LAUNCH / "run.sh", output, *number, "x"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as first:
        wait_for(tmp_path / "begun")
        mark(output, "running")
        again = {"SLURM_JOB_ID": "9"} if slurm else {}
        done = subprocess.run(command, env=environment | again, capture_output=True, text=True, check=False)
        assert (done.returncode, "another job is writing to" in done.stderr) == (1, True)
        assert json.loads((output / "status.json").read_text())["state"] == "running"
        assert not list(output.glob(".failed" if not slurm else ".failed8"))
        other = {"SLURM_JOB_ID": "8", "SLURM_NODEID": "1"} if slurm else {"HOSTNAME": "another"}  # of the same job
        joined = [(command, environment | other)]
        for rank in (["--node-rank=2"], ["--node-rank", "3", "-m", "y"]) if not slurm else ():
            joined.append(([*command[:3], *rank], environment))  # another pod that has the name of the same machine
        for started, by in joined:
            done = subprocess.run(started, env=by, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (1, "")  # as its torchrun here, at the end of its input
        first.communicate(b"go\n")
    assert first.returncode == 0


@needs_bash
@needs_flock
@pytest.mark.parametrize("held", [".job.slurm", ".lock"])
def test_the_other_machines_of_a_job_that_is_refused_do_not_look_preempted(tmp_path, held):
    output = tmp_path / "run"
    output.mkdir()
    begun = f"touch {tmp_path}/begun"
    environment = with_programs(tmp_path, torchrun=f"{begun}; exec sleep 60", flock=f"{begun}; {FLOCK}")
    environment["SLURM_JOB_ID"] = "8"
    command = ["bash", LAUNCH / "run.sh", output, "x"]
    other = {"SLURM_NODEID": "1", "SECONDS_TO_WAIT": "60"}
    with FileLock(output / held), subprocess.Popen(command, env=environment | other, start_new_session=True) as second:
        wait_for(tmp_path / "begun")
        assert subprocess.run(command, env=environment | {"SLURM_NODEID": "0"}, check=False).returncode == 1
        os.killpg(second.pid, signal.SIGTERM)  # as srun --kill-on-bad-exit does
        assert second.wait(30) == 1


@needs_bash
@needs_flock
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop_while_it_waits_for_another_job(tmp_path, name):
    (tmp_path / "run").mkdir()
    environment = with_programs(tmp_path, torchrun="", flock=f"touch {tmp_path}/begun; {FLOCK}")
    environment |= {"SLURM_JOB_ID": "8", "SECONDS_TO_WAIT": "60"}
    command = ["bash", LAUNCH / "run.sh", tmp_path / "run", "x"]
    with FileLock(tmp_path / "run" / ".lock"), subprocess.Popen(command, env=environment, start_new_session=True) as it:
        wait_for(tmp_path / "begun")
        os.killpg(it.pid, getattr(signal, name))  # as Slurm does
        assert it.wait(30) == 143


@needs_bash
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_other_signals_of_schedulers_ask_to_stop_as_well(tmp_path, name):
    script = f"trap 'touch {tmp_path}/saved; exit 1' TERM; touch {tmp_path}/begun; while true; do sleep 0.1; done"
    process = subprocess.Popen(
        ["bash", LAUNCH / "run.sh", tmp_path / "run", "x"],
        env=with_programs(tmp_path, torchrun=script),
        preexec_fn=lambda: signal.signal(getattr(signal, name), signal.SIG_DFL),  # bash cannot trap what nohup ignores
    )
    wait_for(tmp_path / "begun")
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children() if name != "SIGHUP" else ():  # as Slurm does
            each.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()


@needs_bash
@pytest.mark.parametrize(
    ("state", "failed", "expected"),
    [
        (None, False, 143),
        ("waiting", False, 143),
        ("running", False, 143),
        ("failed", False, 7),
        (None, True, 7),  # because another machine's run failed: srun stopped this one, say
        ("waiting", True, 7),
    ],
)
@pytest.mark.parametrize("end", ["exit 7", "trap - TERM; kill $$"])
def test_told_to_stop_before_the_run_can_say_anything(tmp_path, state, failed, expected, end):
    output = tmp_path / "run"
    write = f"cp {tmp_path}/other/status.json {output}" if state else ":"
    write += f"; touch {output}/.failed" if failed else ""
    mark(tmp_path / "other", state or "")
    mark(output, "failed")  # left by an earlier run
    environment = with_programs(
        tmp_path, torchrun=f"trap '{write}; {end}' TERM; touch {tmp_path}/begun; while true; do sleep 0.1; done"
    )
    process = subprocess.Popen(["bash", LAUNCH / "run.sh", output, "-m", "x"], env=environment)
    wait_for(tmp_path / "begun")
    process.terminate()
    assert process.wait(30) == (1 if expected == 7 and end != "exit 7" else expected)
    assert (output / ".asked-to-stop").exists()


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def launched(tmp_path, data, output):
    return [
        "bash", str(LAUNCH / "run.sh"), str(output), "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "wn21k_zoo.training.train", "--recipe", str(tmp_path / "recipe.json"),
        "--data", str(data), "--output", str(output), "--workers", "0", "--device", "cpu",
    ]  # fmt: skip


@needs_bash
@pytest.mark.slow
def test_a_run_told_to_stop_ends_with_143_and_goes_on(tmp_path):
    data, output = make_folder(tmp_path / "data"), tmp_path / "run"
    (tmp_path / "recipe.json").write_text(small_recipe(schedule={"epochs": 300}).to_json())
    command = launched(tmp_path, data, output)
    reached = 0
    for _ in range(2):
        process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE, text=True)
        while not (output / "metrics.jsonl").exists() or len((output / "metrics.jsonl").read_text()) <= reached:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)  # as Slurm does
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 143, errors
        assert json.loads((output / "status.json").read_text())["state"] == "preempted"
        reached = len((output / "metrics.jsonl").read_text())


def is_rank(process, rank):
    try:
        return process.environ().get("RANK") == rank and "wn21k_zoo.training.train" in process.cmdline()
    except psutil.Error:  # the process is gone
        return False


@needs_bash
@pytest.mark.slow
def test_a_worker_that_is_killed_is_a_failure_although_torchrun_stops_the_other(tmp_path):
    data, output = make_folder(tmp_path / "data"), tmp_path / "run"
    (tmp_path / "recipe.json").write_text(small_recipe(schedule={"epochs": 300}).to_json())
    process = subprocess.Popen(
        launched(tmp_path, data, output), env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not (output / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    next(each for each in psutil.Process(process.pid).children(recursive=True) if is_rank(each, "1")).kill()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1, errors
    assert json.loads((output / "status.json").read_text())["state"] == "failed"
