"""Fetch images from the public internet: bounded in size, time and redirects, and never from a private address."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from queue import Empty, Queue
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection

from wn21k_zoo.errors import ImageTooLargeError, ImageURLError, Wn21kError, causes_of

__all__ = ["fetch_url"]

MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
MAX_REDIRECTS = 5
ANSWER_SECONDS = 10.0
USER_AGENT = "wn21k-zoo (image fetch)"
_of_thread = threading.local()


def fetch_url(url: str) -> bytes:
    """Fetch the body of a URL: at most 50 MB, 30 s, 5 redirects, from public addresses only; proxies are not used.

    The address that counts is the one the socket is connected to, so neither a redirect nor a name that resolves
    differently the second time leads to a private network.

    Raises:
        ImageURLError: Not http or https, not public, not answered in time, or answered with an error.
        ImageTooLargeError: More than 50 MB.
    """
    answers: Queue[bytes | Wn21kError] = Queue()
    connections: list[HTTPConnection] = []

    def fetch() -> None:
        _of_thread.connections = connections
        answers.put(_fetch(url))

    # In a thread, because a server that sends byte by byte can put off any socket timeout for as long as it likes.
    threading.Thread(target=fetch, daemon=True, name="wn21k-url").start()
    try:
        answer = answers.get(timeout=MAX_SECONDS)
    except Empty:
        for connection in connections:  # which ends the thread
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        raise ImageURLError(f"{url} took more than {MAX_SECONDS:.0f} s.") from None
    if isinstance(answer, Wn21kError):
        raise answer
    return answer


def _fetch(url: str) -> bytes | Wn21kError:
    try:
        with requests.Session() as session:
            session.trust_env = False
            session.mount("http://", _PublicAdapter())
            session.mount("https://", _PublicAdapter())
            return _follow(session, url)
    except Wn21kError as error:
        return error
    except Exception as error:  # requests, urllib3, the socket and the body decoders all have their own
        private = next((each.address for each in causes_of(error) if isinstance(each, _PrivateAddressError)), None)
        if private is not None:
            return ImageURLError(f"{url} leads to {private}, which is not a public address; it was not fetched.")
        return ImageURLError(f"{url} could not be fetched ({type(error).__name__}).")


def _follow(session: requests.Session, url: str) -> bytes:
    current = url
    for _ in range(MAX_REDIRECTS + 1):
        if urlsplit(current).scheme not in ("http", "https"):
            raise ImageURLError(f"{url} leads to {current}; only http and https are fetched.")
        headers = {"user-agent": USER_AGENT, "accept": "image/*"}
        with session.get(
            current, stream=True, timeout=ANSWER_SECONDS, allow_redirects=False, headers=headers
        ) as answer:
            if answer.is_redirect:
                current = urljoin(current, answer.headers["location"])
                continue
            if answer.status_code >= 400:
                raise ImageURLError(f"{url} answers HTTP {answer.status_code}.")
            return _read_body(answer, url)
    raise ImageURLError(f"{url} redirects more than {MAX_REDIRECTS} times.")


def _read_body(answer: requests.Response, url: str) -> bytes:
    announced = answer.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BYTES:
        raise ImageTooLargeError(f"{url} has {int(announced) / 1e6:.0f} MB; at most {MAX_BYTES // 10**6} are fetched.")
    body = bytearray()
    begin = time.monotonic()
    while chunk := answer.raw.read1(65_536, decode_content=True):
        body += chunk
        if len(body) > MAX_BYTES:
            raise ImageTooLargeError(f"{url} has over {MAX_BYTES // 10**6} MB.")
        if time.monotonic() - begin > MAX_SECONDS:  # nobody waits for it any more
            raise ImageURLError(f"{url} took more than {MAX_SECONDS:.0f} s.")
    return bytes(body)


# IPv6 addresses that lead to an embedded IPv4 address.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_TUNNELS = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "::ffff:0:0:0/96")))
# Not public, although not every version of Python knows it.
_NOT_PUBLIC = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "fec0::/10", "3fff::/20", "5f00::/16"))
)


class _PrivateAddressError(OSError):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


def _refuse_private(addresses: set[str]) -> None:
    for address in addresses:
        if not _is_public(address):
            raise _PrivateAddressError(address)


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        elif parsed in _NAT64:
            parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        elif any(parsed in network for network in _TUNNELS):
            return False
    return parsed.is_global and not parsed.is_multicast and not any(parsed in network for network in _NOT_PUBLIC)


class _PublicMixin:
    """Checks the addresses before it connects, and the connected one before it sends."""

    def _new_conn(self) -> Any:
        host, port = self._dns_host, self.port  # type: ignore[attr-defined]
        _refuse_private({str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        connected = super()._new_conn()  # type: ignore[misc]
        _of_thread.connections.append(self)
        try:
            _refuse_private({connected.getpeername()[0]})
        except OSError:
            connected.close()
            raise
        return connected


class _PublicHTTPConnection(_PublicMixin, HTTPConnection):
    pass


class _PublicHTTPSConnection(_PublicMixin, HTTPSConnection):
    pass


class _PublicHTTPPool(HTTPConnectionPool):
    ConnectionCls = _PublicHTTPConnection


class _PublicHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicHTTPSConnection


class _PublicAdapter(HTTPAdapter):
    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        self.poolmanager = PoolManager(num_pools=connections, maxsize=maxsize, block=block, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PublicHTTPPool, "https": _PublicHTTPSPool}
