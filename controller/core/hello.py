"""
Read the extension bodies of a ClientHello.

Rules of this file:

1. The TLS library has framed records, handshake message and extensions; only what is inside one
   extension body is read here.
2. Framing is checked to the last byte, so that the name read here is the name that the backend
   will read.  Where the library has a rule for a body, this file has the same.
3. Only good bodies of bounded size are remembered: a cache is no place for a stranger's bytes.
"""

import struct
from functools import lru_cache

from controller.core import alert
from controller.core.hostname import HostnameError, read_hostname

_HOST_NAME = 0
_SERVER_NAME_HEAD = struct.Struct("!HBH")
_CACHE_SIZE = 4096
_MAX_CACHED_ALPN = 128
"""Longest ALPN body to remember; browsers send 14 bytes.  Others may fill 64 KiB each."""


class HelloError(Exception):
    """
    A hello that must not be routed.

    Attributes:
        result: The word that connections refused for this are counted under.
        alert: The TLS alert to answer, None to close without a word.
    """

    def __init__(self, result: str, alert: int | None, message: str) -> None:
        super().__init__(message)
        self.result = result
        self.alert = alert


@lru_cache(_CACHE_SIZE)
def read_server_name(body: bytes) -> str:
    """
    Read a server_name extension (RFC 6066, section 3) into a normalised host name.

    The list may hold other types of name by the letter; none was ever defined, and OpenSSL
    refuses them too.

    Raises:
        HelloError: the list is not exactly one host_name, or that is no host name.
    """
    size = len(body)
    if size < _SERVER_NAME_HEAD.size or _SERVER_NAME_HEAD.unpack_from(body) != (
        size - 2,
        _HOST_NAME,
        size - 5,
    ):
        raise _invalid("server_name", body)
    try:
        return read_hostname(body[5:].decode("ascii"))
    except (HostnameError, UnicodeDecodeError) as err:
        raise HelloError("bad_name", alert.UNRECOGNIZED_NAME, f"server_name: {err}") from None


def read_alpn(body: bytes) -> tuple[bytes, ...]:
    """
    Read an application_layer_protocol_negotiation extension (RFC 7301, section 3.1).

    Raises:
        HelloError: the list or one of its names is empty, or cut off.
    """
    return _cached_alpn(body) if len(body) <= _MAX_CACHED_ALPN else _read_alpn(body)


def _read_alpn(body: bytes) -> tuple[bytes, ...]:
    size = len(body)
    protocols = []
    start = 2
    while start < size:
        end = start + 1 + body[start]
        protocols.append(body[start + 1 : end])
        start = end
    # one rule for all ends: nothing cut off, no name empty, the list neither
    whole = start == size and int.from_bytes(body[:2], "big") == size - 2
    if not (whole and protocols and all(protocols)):
        raise _invalid("alpn", body)
    return tuple(protocols)


_cached_alpn = lru_cache(_CACHE_SIZE)(_read_alpn)


@lru_cache(_CACHE_SIZE)
def read_versions(body: bytes) -> tuple[int, ...]:
    """
    Read a supported_versions extension (RFC 8446, section 4.2.1), most wanted first.

    Raises:
        HelloError: the list is empty, cut off, or no list of 16-bit numbers.
    """
    count, odd = divmod(len(body) - 1, 2)
    if count < 1 or odd or body[0] != 2 * count:
        raise _invalid("supported_versions", body)
    return struct.unpack_from(f"!{count}H", body, 1)


def _invalid(name: str, body: bytes) -> HelloError:
    return HelloError(
        "hello_invalid", alert.DECODE_ERROR, f"{name}: not one well-formed list: {body[:32].hex()}"
    )
