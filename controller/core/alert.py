"""
TLS alerts: the last word to a client whose hello leads nowhere (RFC 8446, section 6).
"""

from functools import cache

HANDSHAKE_FAILURE = 40
ILLEGAL_PARAMETER = 47
DECODE_ERROR = 50
INTERNAL_ERROR = 80
UNRECOGNIZED_NAME = 112


@cache
def alert(code: int) -> bytes:
    """
    Write a fatal alert as one TLS record.

    No version is agreed on yet.  The record says 0x0303: RFC 8446, section 5.1, wants that of every
    record but a client's first.  OpenSSL, which writes the same or 0x0301 here, BoringSSL and Go
    read both, whatever version they offered: before a server has chosen, only the 3 counts.
    """
    return bytes((21, 3, 3, 0, 2, 2, code))
