"""
Host names and host patterns, in the one form that everything here compares.

Rules of this file:

1. A name is lower-cased, loses one trailing dot, and is A-labels only (RFC 5890): letters,
   digits, hyphens and, as real-world names have them, underscores.
2. A name is never an IP literal (RFC 6066, section 3), never empty, at most 253 bytes with labels
   of 1 to 63 bytes (RFC 1035, section 2.3.4).
3. A pattern is a name, `*.` before a name, or `*`.
"""

import ipaddress
import re

MAX_NAME = 253
"""Longest host name in bytes, without the trailing dot (RFC 1035, section 2.3.4)."""

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class HostnameError(ValueError):
    """
    Not a host name, or not a host pattern; the message names what is wrong with it.
    """


def read_hostname(text: str) -> str:
    """
    Normalise a host name.

    Raises:
        HostnameError: *text* is no host name.
    """
    name = text.removesuffix(".").lower() if text.isascii() else text
    if not name:
        raise HostnameError(f"empty host name {text!r}")
    if not name.isascii():
        raise HostnameError(f"host name {text!r} is not ASCII; write it with A-labels (xn--...)")
    if len(name) > MAX_NAME:
        raise HostnameError(f"host name {text[:32]!r}... is longer than {MAX_NAME} bytes")
    for label in name.split("."):
        if not _LABEL.fullmatch(label):
            raise HostnameError(f"host name {text!r} has a bad label {label!r}")
    if _is_address(name):
        raise HostnameError(f"{text!r} is an IP address, not a host name")
    return name


def read_pattern(text: str) -> str:
    """
    Normalise a host pattern: a host name, `*.` before one, or `*`.

    Raises:
        HostnameError: *text* is no host pattern.
    """
    if text == "*":
        return text
    if text.startswith("*."):
        return "*." + read_hostname(text[2:])
    if "*" in text:
        raise HostnameError(f"{text!r}: a wildcard stands only as the whole first label")
    return read_hostname(text)


def _is_address(name: str) -> bool:
    # a name whose last label is a number is an IPv4 address to resolvers and browsers
    # (WHATWG URL, "ends in a number"), however many parts it has; colons never get this far
    last = name.rpartition(".")[2]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
