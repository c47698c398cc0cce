"""
Addresses and ports in the forms that they take: text, packed, and the kernel's.
"""

import socket
import sys
from functools import lru_cache
from typing import Any

from controller.core.proxyprotocol import Address
from controller.router._native import ffi

Endpoint = tuple[bytes, int]
"""A packed IPv4 or IPv6 address, and a port."""

_IPV4_SIZE = 4
_MAX_PORT = 65535


def read_endpoint(native: Any) -> Endpoint:
    """
    Read a `struct endpoint`.
    """
    return ffi.buffer(native.address, native.size)[:], native.port


def readable(endpoint: Endpoint) -> Address:
    """
    Write the address as text.
    """
    packed, port = endpoint
    family = socket.AF_INET if len(packed) == _IPV4_SIZE else socket.AF_INET6
    return socket.inet_ntop(family, packed), port


@lru_cache(4096)
def pack(address: Address) -> Endpoint:
    """
    Read an IP literal.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.inet_pton(family, address[0]), address[1]


def ip_version(packed: bytes) -> int:
    """
    Tell whether an address is of IPv4 or IPv6.
    """
    return 4 if len(packed) == _IPV4_SIZE else 6


def socket_address(packed: bytes, port: int) -> bytes:
    """
    Write an endpoint as a `struct sockaddr_in` or `sockaddr_in6`.
    """
    if len(packed) == _IPV4_SIZE:
        return socket.AF_INET.to_bytes(2, sys.byteorder) + port.to_bytes(2) + packed + bytes(8)
    family = socket.AF_INET6.to_bytes(2, sys.byteorder)
    return family + port.to_bytes(2) + bytes(4) + packed + bytes(4)


@lru_cache(4096)
def backend_address(address: str, port: int) -> bytes:
    """
    Write an IP literal and a port as a `struct sockaddr_in` or `sockaddr_in6`.
    """
    return socket_address(*pack((address, port)))


def read_listen(text: str) -> tuple[str, int]:
    """
    Read an address to listen on: `ADDR:PORT`, `[ADDR]:PORT`, or `:PORT`, of which ADDR is empty.

    Raises:
        ValueError: *text* is not written so.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ValueError(f"address {text!r}: not ADDR:PORT, [ADDR]:PORT or :PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
