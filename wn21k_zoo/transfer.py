"""Download one URL to one file: resumed, retried, verified, and in place only once it is complete.

Retries are urllib3's, redirects those of requests. Added here: a body that ends early is resumed, a body that stalls
is given up, and nothing gets its final name before its hash was compared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from wn21k_zoo.cache import PART_SUFFIX
from wn21k_zoo.errors import (
    AccessDeniedError,
    AuthenticationError,
    CacheError,
    ChecksumError,
    DownloadError,
    RemoteNotFoundError,
    causes_of,
    first_line,
)
from wn21k_zoo.files import replace, sha256_of

if TYPE_CHECKING:
    import requests

__all__ = [
    "BACKOFF_SECONDS",
    "RETRIED",
    "SOCKS",
    "STALL_SECONDS",
    "BrokenOffError",
    "Expected",
    "Patience",
    "RefusedError",
    "about_proxy",
    "asked_wait",
    "auth_of_address",
    "check_certificate",
    "difference",
    "head",
    "new_session",
    "number_of_bytes",
    "read_text",
    "require_success",
    "transfer",
]

CONNECT_SECONDS = 5.0
STALL_SECONDS = 8.0
STALL_BYTES = 16 * 1024  # fewer than these in STALL_SECONDS count as a stall
RETRY_AFTER_MAX_SECONDS = 60.0
MAX_REDIRECTS = 5
RETRIED = (408, 429, 500, 502, 503, 504)
BACKOFF_SECONDS = 0.25
ATTEMPTS_WITHOUT_PROGRESS = 5
ATTEMPTS = 100
CHUNK = 256 * 1024
TEXT_BYTES = 64 * 1024
SPARE_BYTES = 1024 * 1024

Report = Callable[[int, int | None], None]
SOCKS = "a SOCKS proxy needs two more libraries: pip install PySocks socksio."
_PROXY_LOGIN = "write USER:PASSWORD@ before its host in HTTPS_PROXY."


class RefusedError(DownloadError):
    """The server answers but refuses: a 4xx status that has no class of its own."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known about a file before it is fetched; None for what is not.

    Attributes:
        num_bytes: Its size.
        sha256: Its hash.
        sha256_prefix: The first digits of its sha256.
        git_sha1: Its hash as a Git blob (small files on the Hub have only that).
        etag: The server's name for this version of it.
        stated_by: Who states this.
    """

    num_bytes: int | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None
    git_sha1: str | None = None
    etag: str | None = None
    stated_by: str | None = None

    @property
    def hash(self) -> str | None:
        """The hash to compare its content with."""
        return self.sha256 or self.git_sha1 or self.sha256_prefix

    @property
    def version(self) -> str | None:
        """A name for this version of the file; without one, a partial download cannot be resumed."""
        name = self.hash or self.etag
        return hashlib.sha256(name.encode()).hexdigest()[:16] if name else None


@dataclass
class Patience:
    """Seconds that may pass without a byte, over all tries, so that a dead network is given up in bounded time."""

    seconds: float = 20.0
    spent: float = field(default=0.0, init=False)

    def timeout(self, at_most: float) -> float:
        """How long the next wait may last.

        Raises:
            DownloadError: No time is left.
        """
        left = self.seconds - self.spent
        if left < 1:
            raise DownloadError(
                f"No data came for {self.spent:.0f} s in total. Check the network and try again: the download will "
                "resume."
            )
        return min(at_most, left)


def transfer(
    url: str,
    target: Path,
    expected: Expected,
    *,
    headers: Mapping[str, str] | None = None,
    patience: Patience | None = None,
    report: Report | None = None,
) -> str:
    """Fetch a file; the caller must hold its lock.

    Args:
        url: Its address.
        target: Its final place; the folder must exist.
        expected: What is known about it.
        headers: Headers to send; ``Authorization`` to the host of ``url`` only.
        patience: Shared between tries that belong together.
        report: Called with the number of bytes so far and the total.

    Returns:
        The sha256 of the file.

    Raises:
        ChecksumError: The body is not the expected one; it was deleted.
        DownloadError: The server fails, stalls or refuses (subclasses say how), or sends a web page or nothing as a
            file whose hash is not known.
        CacheError: The file cannot be written, or the disk has too little space.
    """
    part = target.with_name(f"{target.name}.{expected.version or 'unknown'}{PART_SUFFIX}")
    with _in_cache(target):
        if expected.version is None or part.is_symlink():  # in a shared cache it may lead anywhere
            part.unlink(missing_ok=True)  # it may be a part of another file
        _require_space(part, expected.num_bytes)
    _fetch_body(url, part, expected, headers or {}, patience or Patience(), report or (lambda done, total: None))
    with _in_cache(target):
        sha256 = sha256_of(part)
        wrong = difference(part, sha256, expected)
        if wrong is not None:
            part.unlink()
            raise ChecksumError(f"{url} is not the published file, so it was deleted: {wrong}.")
        if expected.hash is None and (wrong := _no_file(part)):
            part.unlink()
            raise RefusedError(f"{url} sends {wrong} in place of the file: a login page or a proxy may be in the way.")
        replace(part, target)
    return sha256


def _no_file(path: Path) -> str | None:
    """What a body is that cannot be a file whose hash nobody states; None if it may be one."""
    with path.open("rb") as file:
        begin = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page"
    return None if begin else "nothing"


def difference(path: Path, sha256: str, expected: Expected) -> str | None:
    """What about a file is not as expected, None if all is."""
    if expected.sha256 is not None and sha256 != expected.sha256:
        return f"sha256 expected {expected.sha256}, got {sha256}"
    if expected.sha256_prefix is not None and not sha256.startswith(expected.sha256_prefix):
        return f"sha256 expected {expected.sha256_prefix}..., got {sha256}"
    if expected.num_bytes is not None and path.stat().st_size != expected.num_bytes:
        return f"{expected.num_bytes:,} bytes expected, got {path.stat().st_size:,}"
    if expected.git_sha1 is not None:
        found = hashlib.sha1(usedforsecurity=False)  # the Hub's name for small files; size and TLS are checked as well
        found.update(b"blob %d\0" % path.stat().st_size)
        found.update(path.read_bytes())
        if found.hexdigest() != expected.git_sha1:
            return f"Git sha1 expected {expected.git_sha1}, got {found.hexdigest()}"
    return None


def head(url: str, patience: Patience) -> Mapping[str, str]:
    """Fetch the headers of a file on a plain server; empty if it does not answer HEAD requests.

    Raises:
        DownloadError: As :func:`transfer`.
    """
    with new_session() as session, _typed_errors(url, patience):
        response = session.head(
            url,
            headers={"Accept-Encoding": "identity"},
            timeout=(patience.timeout(CONNECT_SECONDS), patience.timeout(STALL_SECONDS)),
            allow_redirects=True,
        )
        if response.status_code in (204, 405, 501):
            return {}
        require_success(response.status_code, url)
        found: requests.structures.CaseInsensitiveDict[str] = response.headers
        return found


def read_text(url: str, patience: Patience) -> str:
    """Fetch a text of at most 64 kB, in one try.

    Raises:
        DownloadError: As :func:`transfer`, or it is longer.
    """
    timeout = (patience.timeout(CONNECT_SECONDS), patience.timeout(STALL_SECONDS))
    with new_session() as session, _typed_errors(url, patience):
        response = session.get(url, headers={"Accept-Encoding": "identity"}, timeout=timeout, stream=True)
        require_success(response.status_code, url)
        content = bytearray()
        for chunk in _chunks(response, url, patience):
            content += chunk
            if len(content) > TEXT_BYTES:
                raise DownloadError(f"{url} has over {TEXT_BYTES:,} bytes.")
        return content.decode(errors="replace")


def require_success(status: int, url: str, hint: str = "") -> None:
    """Raise the error that an HTTP status stands for.

    Raises:
        AuthenticationError, AccessDeniedError, RemoteNotFoundError, DownloadError: Depending on the status.
    """
    if status in (200, 203, 206):
        return
    if status == 407:
        raise RefusedError(f"{url}: the proxy wants a login (HTTP 407); {_PROXY_LOGIN}")
    if status == 401:
        raise AuthenticationError(f"{url} requires a login (HTTP 401){hint or '; log in: hf auth login.'}")
    if status == 403:
        raise AccessDeniedError(f"{url} refuses access (HTTP 403){hint or '; accept its terms or ask for access.'}")
    if status in (404, 410):
        raise RemoteNotFoundError(f"{url} does not exist (HTTP {status}){hint or '; check the name and revision.'}")
    kind = RefusedError if status < 500 else DownloadError
    later = "try again later." if status >= 400 else "which is no file; check the address."
    raise kind(f"{url} answers HTTP {status}; {later}")


def _fetch_body(
    url: str, part: Path, expected: Expected, headers: Mapping[str, str], patience: Patience, report: Report
) -> None:
    fruitless = 0
    with new_session() as session:
        for _ in range(ATTEMPTS):
            before = part.stat().st_size if part.exists() else 0
            if before and before == expected.num_bytes:
                return
            try:
                with _typed_errors(url, patience):
                    _attempt(session, url, part, before, expected, headers, patience, report)
                return
            except BrokenOffError as error:
                after = part.stat().st_size if part.exists() else 0
                fruitless = 0 if after > before else fruitless + 1
                if fruitless >= ATTEMPTS_WITHOUT_PROGRESS or (fruitless > 1 and error.no_connection):
                    raise DownloadError(str(error)) from error
                time.sleep(min(BACKOFF_SECONDS * 2**fruitless, 4.0))
    raise DownloadError(f"{url} keeps breaking off; try again later, the download will resume.")


class BrokenOffError(DownloadError):
    """A try that ended early and can be resumed."""

    def __init__(self, message: str, no_connection: bool = False) -> None:
        super().__init__(message)
        self.no_connection = no_connection


def _attempt(
    session: requests.Session,
    url: str,
    part: Path,
    start: int,
    expected: Expected,
    headers: Mapping[str, str],
    patience: Patience,
    report: Report,
) -> None:
    sent = {"Accept-Encoding": "identity", **headers}
    if start:
        sent["Range"] = f"bytes={start}-"
        # A hash is compared at the end anyway. And the Hub's ETag is not that of the server it redirects to.
        if not expected.hash and expected.etag and not expected.etag.startswith("W/"):
            sent["If-Range"] = expected.etag
    timeout = (patience.timeout(CONNECT_SECONDS), patience.timeout(STALL_SECONDS))
    with session.get(url, headers=sent, stream=True, timeout=timeout) as response:
        if response.status_code == 416 and start:
            with _in_cache(part):
                if _is_whole(response, part, start, expected):
                    return
                part.unlink()  # not a part of that file
            raise BrokenOffError(f"{url} refuses to resume at byte {start:,}.")
        require_success(response.status_code, url)
        going_on = bool(start) and _goes_on(response, start, url)
        done = start if going_on else 0
        length = number_of_bytes(response.headers.get("Content-Length"))
        total = done + length if length is not None else None
        if total is not None and expected.num_bytes is not None and total != expected.num_bytes:
            part.unlink(missing_ok=True)
            raise ChecksumError(
                f"{url} is not the published file: {expected.num_bytes:,} bytes expected, got {total:,}."
            )
        with _writing(part, "ab" if going_on else "wb") as file:
            _require_space(part, total)
            for chunk in _chunks(response, url, patience):
                done += len(chunk)
                if done > (expected.num_bytes or done):  # it might never end
                    raise ChecksumError(f"{url} is not the published file: it has over {expected.num_bytes:,} bytes.")
                file.write(chunk)
                report(done, total or expected.num_bytes)
        if done != (total if total is not None else expected.num_bytes or done):
            raise BrokenOffError(f"{url} ended after {done:,} of {total or expected.num_bytes:,} bytes.")


def number_of_bytes(text: str | None) -> int | None:
    """Read the number in a header; None if it is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text or "") else None  # type: ignore[arg-type]


def _chunks(response: requests.Response, url: str, patience: Patience) -> Iterator[bytes]:
    """Yield data as it arrives; raise an error when next to nothing does."""
    window_start, in_window = time.monotonic(), 0
    while chunk := response.raw.read1(CHUNK):
        yield chunk
        in_window += len(chunk)
        now = time.monotonic()
        if now - window_start > STALL_SECONDS:
            if in_window < STALL_BYTES:
                patience.spent += now - window_start
                raise BrokenOffError(f"{url} sent {in_window:,} bytes in {now - window_start:.0f} s.")
            window_start, in_window = now, 0


def _is_whole(response: requests.Response, part: Path, start: int, expected: Expected) -> bool:
    """Whether a server has nothing to send after ``start`` because the file ends there."""
    found = re.fullmatch(r"bytes \*/([0-9]{1,18})", response.headers.get("Content-Range", ""))
    if found:
        return int(found[1]) == start
    return expected.hash is not None and difference(part, sha256_of(part), expected) is None


def _goes_on(response: requests.Response, start: int, url: str) -> bool:
    if response.status_code != 206:
        return False
    found = re.match(r"bytes ([0-9]{1,18})-", response.headers.get("Content-Range", ""))
    if not found or int(found[1]) != start:
        raise DownloadError(f"{url} sends another range than requested; try again later.")
    return True


@contextlib.contextmanager
def _typed_errors(url: str, patience: Patience) -> Iterator[None]:
    import requests
    import urllib3

    begin = time.monotonic()
    try:
        yield
    except (requests.exceptions.ProxyError, urllib3.exceptions.ProxyError) as error:
        raise DownloadError(f"{url}: {about_proxy(error)}") from error
    except requests.exceptions.InvalidSchema as error:
        if "SOCKS" not in str(error):
            raise DownloadError(f"{url}: {first_line(error)}") from error
        raise DownloadError(f"{url}: {SOCKS}") from error
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.MissingSchema,
        urllib3.exceptions.LocationParseError,
    ) as error:
        names = "HF_ENDPOINT, WN21K_MIRROR and HTTPS_PROXY"
        raise DownloadError(f"{url} or the proxy's address is not a URL; check {names}.") from error
    except requests.TooManyRedirects as error:
        raise DownloadError(f"{url} redirects more than {MAX_REDIRECTS} times.") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        check_certificate(error, url)
        if "timed out" in str(error).lower():
            patience.spent += min(time.monotonic() - begin, STALL_SECONDS)
            raise BrokenOffError(f"{url} stalls: no answer or no data for {STALL_SECONDS:.0f} s.") from error
        if isinstance(error, requests.ConnectionError):
            raise BrokenOffError(f"{url} cannot be reached; check the network.", no_connection=True) from error
        raise BrokenOffError(f"{url} breaks off ({type(error).__name__}).") from error
    except ValueError as error:  # of a header that is none
        raise DownloadError(f"{url} answers what is no HTTP ({first_line(error)}).") from error


def about_proxy(error: BaseException) -> str:
    """Say what is wrong between this machine and its proxy."""
    refused = re.search(r"\b(4\d\d|5\d\d)\b [A-Z][A-Za-z ]*", str(error))
    if refused is None:
        return "the proxy does not answer; check HTTPS_PROXY and NO_PROXY."
    advice = _PROXY_LOGIN if refused[1] == "407" else "check HTTPS_PROXY and NO_PROXY."
    return f"the proxy refuses ({refused[0]}); {advice}"


def check_certificate(error: BaseException, url: object) -> None:
    """Say so if an error comes from a certificate; the Hub's own library reads the second variable.

    Raises:
        DownloadError: It does.
    """
    # Any other TLS error is a broken connection.
    if fault := next((each for each in causes_of(error) if isinstance(each, ssl.SSLCertVerificationError)), None):
        raise DownloadError(
            f"{url}: its certificate cannot be verified ({fault}); check the clock, and set REQUESTS_CA_BUNDLE and "
            "SSL_CERT_FILE to the file of your certificate authority."
        ) from error


@contextlib.contextmanager
def _in_cache(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"{target} cannot be written ({error.strerror}); set WN21K_CACHE.") from error


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextlib.contextmanager
def _writing(part: Path, mode: str) -> Iterator[IO[Any]]:
    try:
        with open(part, mode, opener=_no_link) as file:
            yield file
    except OSError as error:
        if type(error).__module__ != "builtins" or isinstance(error, (ConnectionError, TimeoutError)):
            raise  # the network's
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            part.unlink(missing_ok=True)
            raise CacheError(f"The disk of {part.parent} is full; free some space or set WN21K_CACHE.") from error
        raise CacheError(f"{part} cannot be written ({error.strerror}); set WN21K_CACHE.") from error


def _require_space(part: Path, num_bytes: int | None) -> None:
    if num_bytes is None:
        return
    have = part.stat().st_size if part.exists() else 0
    needed, free = num_bytes - have + SPARE_BYTES, shutil.disk_usage(part.parent).free
    if needed > free:
        raise CacheError(
            f"{part.parent} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed; free some space or "
            "set WN21K_CACHE to a folder on another disk."
        )


def auth_of_address(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """For requests' ``auth``: use name and password in the URL; ~/.netrc must not replace our token."""
    from requests.auth import HTTPBasicAuth
    from requests.utils import get_auth_from_url

    name, password = get_auth_from_url(request.url or "")
    return HTTPBasicAuth(name, password)(request) if name or password else request


def asked_wait(retry_after: str | None) -> float | None:
    """Seconds that a server asks to wait before the next try, at most 60; None if it does not."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    with contextlib.suppress(InvalidHeader):
        return min(Retry().parse_retry_after(retry_after), RETRY_AFTER_MAX_SECONDS) if retry_after else None
    return None


def new_session() -> requests.Session:
    """Create a session that retries after 408, 429 and 5xx, waiting as long as the server says, up to 60 s."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    class BoundedRetry(Retry):
        def get_retry_after(self, response: Any) -> float | None:
            return asked_wait(response.headers.get("Retry-After"))

    class Session(requests.Session):
        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:
            """As requests does on a redirect, but without ~/.netrc."""
            if cast(Any, self).should_strip_auth(response.request.url, prepared_request.url):
                prepared_request.headers.pop("Authorization", None)

    retry = BoundedRetry(
        total=None,
        connect=0,
        read=0,
        other=0,
        status=4,
        backoff_factor=BACKOFF_SECONDS,
        status_forcelist=RETRIED,
        raise_on_status=False,
    )
    session = Session()
    session.max_redirects = MAX_REDIRECTS
    session.auth = auth_of_address
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session
