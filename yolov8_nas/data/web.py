"""Requests to web servers that anybody may have named, and that may lead anywhere.

A server that is asked for a dataset can answer "look there instead". Where it leads to, this machine goes with its own
rights: to the credentials that a cloud keeps at a link-local address, or to a service inside a network that trusts its
neighbours. So each hop is looked at before it is asked: encrypted, and public, except for the very server that the user
has named. Names are looked up once, and what they lead to is both checked and connected to.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from email.message import Message
from functools import partial
from typing import IO, Any, Final
from urllib.parse import urlsplit

from yolov8_nas.errors import InputError

MOST_HOPS: Final = 5

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_METADATA: Final = frozenset(
    map(ipaddress.ip_address, ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"))
)
"""Where clouds keep what only the machine itself may know, beside the link-local 169.254.169.254."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def opener(address: str) -> urllib.request.OpenerDirector:
    """What opens an address over HTTPS and follows where it leads, within bounds.

    What it opens raises an `InputError` where an address leads to what must not be asked, and what `urllib` raises
    otherwise.

    Args:
        address: The address that the user has named.

    Raises:
        InputError: It is none of HTTPS.
    """
    origin = _origin(address)
    made = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Hops(origin),
        _Https(origin),
        urllib.request.HTTPErrorProcessor(),
    ):
        made.add_handler(handler)
    return made


def inner(address: str) -> str | None:
    """What kind of address that is not public an IP address is, in a word; nothing for a public one."""
    meant = list(_meant(ipaddress.ip_address(address.partition("%")[0])))
    if any(one.is_link_local or one in _METADATA for one in meant):
        return "link-local"
    if any(one.is_unspecified for one in meant):
        return "unspecified"
    if any(one.is_loopback for one in meant):
        return "loopback"
    if any(one.is_multicast or one.is_reserved or not one.is_global for one in meant):
        return "private"
    return None


def _meant(address: _Address) -> Iterator[_Address]:
    """An address, and those that are written into it: one that leads there leads to them."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        written = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1):
            written.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        yield from (one for one in written if one is not None)


def _origin(address: str) -> tuple[str, int]:
    """Host and port of an address of HTTPS.

    Raises:
        InputError: It is none.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"an address that cannot be read ({error}); correct it") from None
    if parts.scheme != "https" or not host:
        raise InputError(f"{address}: not encrypted or no address of a server; give one of https://")
    return host.rstrip(".").lower(), port or 443


def _refuse(host: str, found: str, here: bool) -> None:
    """Refuse to connect to an IP address.

    Args:
        host: The name that it was found under.
        found: The IP address.
        here: Whether the user has named this very server.

    Raises:
        InputError: It is not to be asked.
    """
    kind = inner(found)
    if kind is None or (here and kind in ("loopback", "private")):
        return
    raise InputError(
        f"{host}: leads to the {kind} address {found}, which is not asked"
        + ("; give the address of a server" if here else " because a server leads there; give that address itself")
    )


class _Hops(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_HOPS

    def __init__(self, origin: tuple[str, int]) -> None:
        self.origin = origin

    def http_error_302(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message
    ) -> IO[bytes] | None:
        fp.read = lambda *_: b""  # nobody needs the page that comes with it, and it may have no end
        followed: IO[bytes] | None = super().http_error_302(req, fp, code, msg, headers)  # type: ignore[arg-type]
        return followed

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        try:
            hop = _origin(newurl)
        except InputError as error:
            raise InputError(f"{req.full_url}: leads to {error}") from None
        with_proxy = bool(urllib.request.getproxies().get("https")) and not urllib.request.proxy_bypass(hop[0])
        for found in _looked_up(*hop, patient=with_proxy):
            _refuse(hop[0], found[4][0], hop == self.origin)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, origin: tuple[str, int]) -> None:
        self.trusted = ssl.create_default_context()
        super().__init__(context=self.trusted)
        self.origin = origin

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        connection: Any = partial(_Connection, origin=self.origin)
        return self.do_open(connection, req, context=self.trusted)


class _Connection(http.client.HTTPSConnection):
    """Connects to what was checked, and not to what the name leads to a moment later."""

    def __init__(self, host: str, *, origin: tuple[str, int], **options: Any) -> None:
        super().__init__(host, **options)
        self.origin = origin
        self._create_connection = self._connect_to

    def _connect_to(self, place: tuple[str, int], timeout: float, source: Any = None) -> socket.socket:
        if getattr(self, "_tunnel_host", None):  # a proxy, which looks names up itself
            return socket.create_connection(place, timeout, source)
        host, port = place[0].strip("[]").rstrip(".").lower(), place[1]
        failure: OSError = OSError(f"{host}: no address")
        found = _looked_up(host, port)
        for *_, where in found:
            _refuse(host, where[0], (host, port) == self.origin)
        for family, kind, protocol, _, where in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout)
                connection.connect(where)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        raise failure


def _looked_up(host: str, port: int, patient: bool = False) -> list[Any]:
    """What a name leads to; with `patient`, nothing where this machine does not know it."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        if patient:
            return []
        raise
    except UnicodeError as error:
        raise InputError(f"{host}: no name of a server ({error}); correct the address") from None
