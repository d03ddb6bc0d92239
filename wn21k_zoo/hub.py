"""What we use of huggingface_hub: metadata, tokens, addresses and its cache; the Hub's errors become ours."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from wn21k_zoo.checkpoints import HubSource
from wn21k_zoo.errors import DownloadError, first_line
from wn21k_zoo.transfer import (
    BACKOFF_SECONDS,
    RETRIED,
    SOCKS,
    STALL_SECONDS,
    Expected,
    Patience,
    about_proxy,
    asked_wait,
    auth_of_address,
    check_certificate,
    require_success,
)

__all__ = ["address", "answers", "expected_of_etag", "find_in_cache", "is_offline", "resolve"]

METADATA_ATTEMPTS = 5


def is_offline() -> bool:
    """Whether the network is switched off: ``HF_HUB_OFFLINE`` or ``--offline``."""
    from huggingface_hub import is_offline_mode

    # The library reads the variable once, when it is imported; --offline sets it later.
    return bool(is_offline_mode()) or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def expected_of_etag(etag: str, num_bytes: int | None = None) -> Expected:
    """What an ETag states: the sha256 of a large file, the Git hash of a small one, otherwise only a version."""
    sha256, git_sha1 = (bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", etag)) for digits in (64, 40))
    return Expected(
        num_bytes=num_bytes,
        sha256=etag if sha256 else None,
        git_sha1=etag if git_sha1 else None,
        etag=f'"{etag}"' if etag else None,
        stated_by="the Hub" if sha256 or git_sha1 else None,
    )


def answers(source: HubSource, seconds: float) -> bool:
    """Whether a repository answers one request within ``seconds``, including the name look-up."""
    statuses: list[int] = []
    # In a thread, because no timeout covers the name look-up.
    probe = threading.Thread(target=_probe, args=(source, seconds, statuses), daemon=True)
    probe.start()
    probe.join(seconds + 0.1)
    return bool(statuses) and statuses[0] < 400


def find_in_cache(source: HubSource, filename: str) -> Path | None:
    """Path of a file in the Hub's own cache, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    for revision in dict.fromkeys((source.revision, None if source.sha256 else source.revision)):
        found = try_to_load_from_cache(source.repo_id, filename, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def resolve(
    source: HubSource, filename: str, patience: Patience | None = None
) -> tuple[str, Expected, str | None, dict[str, str]]:
    """Return the address of a file on the Hub, what the Hub says about it, its commit, and request headers.

    Raises:
        AuthenticationError, AccessDeniedError, RemoteNotFoundError, DownloadError: The Hub does not say.
    """
    metadata = _hub_metadata(source, filename, patience or Patience())
    expected = expected_of_etag(metadata.etag or "", metadata.size)
    url, headers = address(source, filename, metadata.commit_hash or source.revision)
    return url, expected, metadata.commit_hash, headers


def address(source: HubSource, filename: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """Return the URL of a file on the Hub, and request headers with the user's token, if there is one."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return hf_hub_url(source.repo_id, filename, revision=revision), build_hf_headers(library_name="wn21k_zoo")


def _probe(source: HubSource, seconds: float, statuses: list[int]) -> None:
    """Add the status of one HEAD request, without a retry, to ``statuses``; a redirect counts as an answer."""
    import requests

    url, headers = address(source, source.filenames[0], source.revision)
    with contextlib.suppress(requests.RequestException), requests.Session() as session:
        answer = session.head(url, timeout=seconds, allow_redirects=False, headers=headers, auth=auth_of_address)
        statuses.append(answer.status_code)


def _hub_metadata(source: HubSource, filename: str, patience: Patience) -> Any:
    """Fetch the Hub's metadata of a file, retrying after 408, 429 and 5xx."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(source.repo_id, filename, revision=source.revision)
    for attempt in range(1, METADATA_ATTEMPTS + 1):
        begin = time.monotonic()
        try:
            return get_hf_file_metadata(url, timeout=patience.timeout(STALL_SECONDS), library_name="wn21k_zoo")
        except HfHubHTTPError as error:
            if error.response.status_code not in RETRIED or attempt == METADATA_ATTEMPTS:
                _raise_typed(error, source, filename)
            asked = asked_wait(error.response.headers.get("Retry-After"))
            time.sleep(BACKOFF_SECONDS * 2**attempt if asked is None else asked)
        except DownloadError:
            raise
        except Exception as error:  # the transport's errors are not part of huggingface_hub's interface
            check_certificate(error, source)
            patience.spent += time.monotonic() - begin
            if attempt >= 2:
                if type(error).__name__ == "ProxyError":  # httpx's
                    raise DownloadError(f"{source}: {about_proxy(error)}") from error
                if isinstance(error, ImportError) and "socks" in str(error).lower():
                    raise DownloadError(f"{source}: {SOCKS}") from error
                raise DownloadError(
                    f"{source} does not answer ({type(error).__name__}). Check the network, or choose a model that "
                    "wn21k doctor shows as usable offline."
                ) from error
            time.sleep(BACKOFF_SECONDS)
    raise AssertionError


def _raise_typed(error: Any, source: HubSource, filename: str) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    if isinstance(error, GatedRepoError) or status == 403:
        hint = f": accept its terms on its page on the Hub ({source.repo_id}), then hf auth login."
        status = 403
    elif status == 401:
        hint = ": there is no such repository, or it is private; check the name, or log in: hf auth login."
    elif isinstance(error, RevisionNotFoundError):
        hint = f": it has no revision {source.revision!r}; name one that exists."
    else:
        hint = f": no such repository, or it has no {filename}; check the name, or name a revision that has it."
    require_success(status, str(source), hint)
    raise DownloadError(f"{source}: {first_line(error)}")
