"""Weights on this machine: where they are, whether they can be had, and whether they are the published bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from io import BytesIO
from pathlib import Path

from wn21k_zoo.checkpoints import Checkpoint, HubSource, PackageSource
from wn21k_zoo.errors import ChecksumError, DownloadError, MissingExtraError, WeightsNotFoundError, first_line

__all__ = ["fetch_from_hub", "find_local", "is_reachable", "read_verified"]

PROBE_SECONDS = 0.5
ANSWER_SECONDS = 10.0


def find_local(checkpoint: Checkpoint) -> Path | None:
    """The weight file of a checkpoint if it is on this machine; opens no connection."""
    for source in checkpoint.sources:
        found = _in_package(source) if isinstance(source, PackageSource) else _in_hub_cache(source)
        if found is not None:
            return found
    return None


def is_reachable(checkpoint: Checkpoint, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the first source on the Hub answers one request within ``seconds``, look-up of the name included."""
    source = next((source for source in checkpoint.sources if isinstance(source, HubSource)), None)
    if source is None or _is_offline():
        return False
    answers: list[int] = []
    # A thread, because no time-out reaches the look-up of a name.
    probe = threading.Thread(target=_probe, args=(source, seconds, answers), daemon=True)
    probe.start()
    probe.join(seconds + 0.1)
    return bool(answers) and answers[0] < 400


def fetch_from_hub(source: HubSource, filenames: tuple[str, ...] | None = None) -> Path:
    """The first of the source's files that is in the Hub's cache or else on the Hub, with a progress bar.

    Args:
        source: The repository.
        filenames: Files to look for in order of preference, by default those of the source.

    Raises:
        WeightsNotFoundError: Offline and not in the cache, or the repository has none of the files.
        DownloadError: The Hub does not answer or refuses.
    """
    filenames = filenames or source.filenames
    for filename in filenames:
        if (found := _in_hub_cache(source, (filename,))) is not None:
            return found
    if _is_offline():
        raise WeightsNotFoundError(
            f"{source.repo_id} is not in the Hub's cache and HF_HUB_OFFLINE is set; unset it, or fetch it where there "
            f"is a network: hf download {source.repo_id} {filenames[0]}"
        )
    for filename in filenames:
        if _exists_on_hub(source, filename):
            return _hub_download(source, filename)
    raise WeightsNotFoundError(f"{source} has none of {', '.join(filenames)}; is the name right?")


def read_verified(path: Path, sha256: str) -> BytesIO:
    """The content of a file, checked before anything reads it: what was hashed is what is used.

    Raises:
        ChecksumError: Its sha256 is another.
        WeightsNotFoundError: It cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsNotFoundError(f"{path} cannot be read ({error.strerror}).") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ChecksumError(
            f"{path} is not the published file, so it was not loaded: sha256 expected {sha256}, got {found}. "
            "Install or download it again."
        )
    return BytesIO(content)


def require_package(source: PackageSource) -> Path:
    """The file of a :class:`PackageSource`.

    Raises:
        MissingExtraError: The package is not installed.
    """
    path = _in_package(source)
    if path is None:
        raise MissingExtraError(f"The file {Path(source.path).name}", source.extra)
    return path


def _in_package(source: PackageSource) -> Path | None:
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / source.path
    return path if path.is_file() else None


def _in_hub_cache(source: HubSource, filenames: tuple[str, ...] | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for filename in filenames or source.filenames:
        found = try_to_load_from_cache(source.repo_id, filename, revision=source.revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def _probe(source: HubSource, seconds: float, answers: list[int]) -> None:
    import requests

    try:
        answers.append(_head(source, source.filenames[0], seconds))
    except requests.RequestException:
        return


def _head(source: HubSource, filename: str, seconds: float) -> int:
    """Status of one HEAD request without a retry; a redirect counts as an answer."""
    import requests
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    url = hf_hub_url(source.repo_id, filename, revision=source.revision)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with requests.Session() as session:
        return session.head(url, timeout=seconds, allow_redirects=False, headers=headers).status_code


def _exists_on_hub(source: HubSource, filename: str) -> bool:
    import requests

    try:
        status = _head(source, filename, ANSWER_SECONDS)
    except requests.RequestException as error:
        raise DownloadError(
            f"{source} does not answer ({type(error).__name__}). Check the network, or choose a model that "
            "wn21k doctor shows as usable offline."
        ) from error
    if status in (401, 403):
        raise DownloadError(
            f"{source} refuses (HTTP {status}): no such repository, or its terms must be accepted on the Hub and a "
            "token given by hf auth login."
        )
    if status >= 400 and status != 404:
        raise DownloadError(f"{source} answers HTTP {status}; try again later.")
    return status < 400


def _hub_download(source: HubSource, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repo_id, filename, revision=source.revision))
    except Exception as error:  # the Hub's client, its transport and the file system all have their own
        raise DownloadError(f"{filename} of {source} could not be downloaded: {first_line(error)}") from error
