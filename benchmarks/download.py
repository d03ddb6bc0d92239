"""Download and load a checkpoint of ViT-B/16's size from a local server, compared with huggingface_hub + safetensors.

    python benchmarks/download.py [--rounds 3]

Both fetch the same 378 MB file from the same server, in turn, in one run: seconds for the download, for loading what
was just downloaded, and for finding and loading it again from the cache. Ours hashes the file each time;
huggingface_hub compares its size. The last column is ours divided by theirs.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = "timm/vit_base_patch16_224_miil.in21k"
WEIGHTS = """
import sys, safetensors.torch, timm
state = timm.create_model("vit_base_patch16_224_miil", num_classes=11_221).state_dict()
safetensors.torch.save_file(state, sys.argv[1])
"""
SERVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from hub_server import hub_server
content = Path({file!r}).read_bytes()
with hub_server({{"{repo}/resolve/main/model.safetensors": content}}) as (endpoint, _):
    print(endpoint, flush=True)
    sys.stdin.read()
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        file = make_weights(Path(folder))
        print(f"{file.stat().st_size / 1e6:.0f} MB")
        with server(file) as endpoint:
            os.environ.update(
                HF_ENDPOINT=endpoint,
                HF_HOME=f"{folder}/hf",
                HF_HUB_DISABLE_XET="1",
                HF_HUB_DISABLE_PROGRESS_BARS="1",
                HF_HUB_DISABLE_TELEMETRY="1",
            )
            times = {"wn21k_zoo": [], "huggingface_hub": []}
            for index in range(rounds):
                order = (ours, theirs) if index % 2 == 0 else (theirs, ours)
                for run in order:
                    times["wn21k_zoo" if run is ours else "huggingface_hub"].append(run(Path(folder)))
    report(times)


def make_weights(folder):
    """In another process, as huggingface_hub reads its endpoint when it is first imported."""
    file = folder / "vit.safetensors"
    subprocess.run([sys.executable, "-c", WEIGHTS, str(file)], check=True)
    return file


@contextlib.contextmanager
def server(file):
    code = SERVER.format(tests=str(Path(__file__).parents[1] / "tests"), file=str(file), repo=REPO)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate("")


def ours(folder):
    from wn21k_zoo import download
    from wn21k_zoo.registry import get_checkpoint

    checkpoint = get_checkpoint("vit_base_patch16_224_miil.in21k")
    cache = folder / "ours"
    return measure(lambda: download.fetch(checkpoint, cache_dir=cache).path, cache)


def theirs(folder):
    from huggingface_hub import hf_hub_download

    cache = folder / "theirs"
    return measure(lambda: hf_hub_download(REPO, "model.safetensors", cache_dir=cache), cache)


def measure(fetch, cache):
    """Seconds to download, to load, and to find and load again; the cache is empty before and after."""
    import safetensors.torch

    begin = time.perf_counter()
    path = fetch()
    downloaded = time.perf_counter()
    touch(safetensors.torch.load_file(path))
    loaded = time.perf_counter()
    touch(safetensors.torch.load_file(fetch()))
    again = time.perf_counter()
    shutil.rmtree(cache)
    return downloaded - begin, loaded - downloaded, again - loaded


def touch(state):
    """Read all values, as safetensors only maps the file."""
    return sum(float(value.sum()) for value in state.values())


def report(times):
    print(f"{'median seconds':<22}{'wn21k_zoo':>12}{'huggingface_hub':>18}{'ratio':>8}")
    for index, what in enumerate(("download", "load", "from the cache + load")):
        mine, other = (statistics.median(one[index] for one in times[name]) for name in times)
        print(f"{what:<22}{mine:>12.2f}{other:>18.2f}{mine / other:>8.2f}")


if __name__ == "__main__":
    main()
