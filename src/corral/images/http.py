"""HTTP for downloads, and the only file that knows httpx2.

A URL comes from a user, and this process sits inside the operator's network. So: https only; the name is resolved once,
every address must be global, and exactly the address that was checked is connected (TLS still verifies the name); every
redirect goes through the same. http and loopback addresses need a permission (tests, a mirror on this machine).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeAlias

import httpx2

from corral.errors import Refused, Unavailable

CONNECT_S, SILENCE_S = 15.0, 30.0
"""Longest wait for a connection, and for the next piece of an answer."""
MAX_REDIRECTS = 8
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Answer:
    """A response whose body has not been read."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code

    def header(self, name: str) -> str:
        """A header's value, or empty."""
        return str(self._response.headers.get(name, ""))

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as sent (never decompressed). Raises Unavailable when it breaks off before its stated length."""
        try:
            async for piece in self._response.aiter_raw():
                yield piece
        except httpx2.HTTPError as error:
            raise Unavailable(f"the download broke off: {_words(error)}") from error


class Http:
    """GET requests to the outside."""

    def __init__(self, *, allow_loopback: bool = False) -> None:
        self._allow_loopback = allow_loopback

    @asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Answer]:
        """Open ``url``, following redirects. Raises Refused for one that is not allowed."""
        timeout = httpx2.Timeout(SILENCE_S, connect=CONNECT_S)
        verify = ssl.create_default_context()
        async with httpx2.AsyncClient(
            verify=verify, timeout=timeout, trust_env=False, follow_redirects=False
        ) as client:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._send(client, url, headers or {})
                try:
                    if response.status_code not in (301, 302, 303, 307, 308):
                        yield Answer(response)
                        return
                    target = response.headers.get("location", "")
                    url = str(_parse(url).join(target))
                finally:
                    await response.aclose()
        raise Refused(f"more than {MAX_REDIRECTS} redirects", code="bad-image", field="url")

    async def _send(self, client: httpx2.AsyncClient, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        parsed = _parse(url)
        addresses = await self._addresses(parsed)
        name = parsed.raw_host.decode("ascii")
        host = parsed.netloc.decode("ascii")
        failure: Exception | None = None
        for address in addresses:
            request = client.build_request(
                "GET",
                parsed.copy_with(host=str(address)),
                headers={**headers, "Host": host, "Accept-Encoding": "identity", "User-Agent": "corral"},
                extensions={"sni_hostname": name},
            )
            try:
                return await client.send(request, stream=True)
            except httpx2.ConnectError as error:
                failure = error  # the next address may answer
            except httpx2.HTTPError as error:
                raise Unavailable(f"{name} does not answer: {_words(error)}") from error
        assert failure is not None
        raise Unavailable(f"{name} cannot be reached: {_words(failure)}") from failure

    async def _addresses(self, url: httpx2.URL) -> list[Address]:
        """Where the URL leads, checked. Raises Refused or Unavailable."""
        if url.scheme not in ("https", "http") or not url.host:
            raise _refused(f"a URL must begin with https://, not {url.scheme[:20]!a}")
        if url.scheme == "http" and not self._allow_loopback:
            raise _refused("only https is accepted")
        if url.userinfo:
            raise _refused("a URL must not hold a user name or password")
        name = url.raw_host.decode("ascii")
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(name.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unavailable(f"{name} cannot be resolved: {error.strerror}") from error
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        loopback = bool(addresses) and all(address.is_loopback for address in addresses)
        if loopback and self._allow_loopback:
            return addresses
        if url.scheme != "https":
            raise _refused("only https is accepted")
        for address in addresses:
            if not is_public(address):
                raise _refused(f"{name} leads to {address}, which is not a public address")
        return addresses


def is_public(address: Address) -> bool:
    """Anybody on the Internet could be asked there: not this machine, not its network, not a tunnel to either."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _parse(url: str) -> httpx2.URL:
    try:
        return httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise _refused("this is not a URL") from error


def _refused(message: str) -> Refused:
    return Refused(message, code="denied", field="url", hint="images are fetched by https from public servers only")


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
