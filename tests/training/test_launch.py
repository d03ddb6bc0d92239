"""The launch files: their syntax, and that they start what there is. Nothing here has seen a cluster."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from wn21k_zoo.training import train

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "training" / "launch"
FILES = sorted(LAUNCH.iterdir())


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
        assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in pod["containers"][0]["args"]
        assert f"--nnodes={job['spec']['parallelism']}" in pod["containers"][0]["args"]
        assert pod["terminationGracePeriodSeconds"] >= 60
    else:
        (task,) = documents
        assert {"resources", "setup", "run"} <= set(task)
        assert shell_accepts(task["run"])


def shell_accepts(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_slurm_goes_back_into_the_queue_when_the_run_is_marked_preempted(tmp_path):
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert shell_accepts(text)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "srun": "exit 1",
        "scontrol": f'[ "$1" = show ] && echo node1 || echo "$@" >> {tmp_path}/asked',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin", "RECIPE": "r", "DATA": "d", "OUTPUT": str(tmp_path),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
    }  # fmt: skip
    for state, code, asked in (("failed", 1, None), ("preempted", 0, "requeue 7")):
        (tmp_path / "status.json").write_text(f'{{\n "state": "{state}",\n "step": 3\n}}\n')
        done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert (tmp_path / "asked").exists() == (asked is not None)
    assert (tmp_path / "asked").read_text().strip() == "requeue 7"
