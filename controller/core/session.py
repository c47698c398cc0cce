"""
The life of one handed-over connection: events in, commands out, whatever moves the bytes.

Rules of this file:

1. A FIN is passed on only after every byte that came before it: `ended` asks to drain, and only
   `drained` half-closes.
2. A reset, or any failure, is passed on at once as a reset: the other side must see that bytes
   may be missing.
3. Every play ends in exactly one `Close` or `Abort`, and nothing comes after it.
"""

from dataclasses import dataclass
from enum import IntEnum


class Side(IntEnum):
    """
    The two ends of a connection; also the name of the direction that begins there.
    """

    CLIENT = 0
    BACKEND = 1

    @property
    def other(self) -> "Side":
        """
        The opposite end.
        """
        return _OTHER[self]


CLIENT, BACKEND = Side
"""The same, for where it counts: a member is found ten times faster by a name of its own."""

_OTHER = (BACKEND, CLIENT)


@dataclass(frozen=True, slots=True)
class Drain:
    """
    Say `drained` once all bytes from *side* are written to the other.
    """

    side: Side


@dataclass(frozen=True, slots=True)
class HalfClose:
    """
    Send a FIN to *side*.
    """

    side: Side


@dataclass(frozen=True, slots=True)
class Close:
    """
    Close both sockets; a FIN that is still due goes with it.
    """


@dataclass(frozen=True, slots=True)
class Abort:
    """
    Reset both sockets.
    """


Command = Drain | HalfClose | Close | Abort

_DRAIN = (Drain(CLIENT),), (Drain(BACKEND),)
_HALF_CLOSE = (HalfClose(CLIENT),), (HalfClose(BACKEND),)
_FIN = "client_fin", "backend_fin"
_BOTH = 0b11

_CLOSE = (Close(),)
_ABORT = (Abort(),)


class Session:
    """
    What is known of a connection's ends.

    *reason* says why it ended, or is going to: who sent the first FIN, or what failed.
    """

    __slots__ = ("_drained", "_ended", "over", "reason")

    def __init__(self) -> None:
        self._ended = 0
        self._drained = 0
        self.over = False
        self.reason = ""

    def ended(self, side: Side) -> tuple[Command, ...]:
        """
        Take note of a FIN from *side*.
        """
        if self.over or self._ended & (1 << side):
            return ()
        self._ended |= 1 << side
        if not self.reason:
            self.reason = _FIN[side]
        return _DRAIN[side]

    def drained(self, side: Side) -> tuple[Command, ...]:
        """
        Take note that all bytes from *side*, which has ended, are written.
        """
        if self.over or self._drained & (1 << side) or not self._ended & (1 << side):
            return ()
        self._drained |= 1 << side
        if self._drained == _BOTH:
            self.over = True
            return _CLOSE
        return _HALF_CLOSE[side.other]

    def waits_to_drain(self, side: Side) -> bool:
        """
        Whether *side* has ended and its bytes are not all written.
        """
        return bool(self._ended & ~self._drained & (1 << side))

    def failed(self, reason: str) -> tuple[Command, ...]:
        """
        Take note that one end was reset or failed, or that the connection is to be cut.
        """
        if self.over:
            return ()
        self.over = True
        self.reason = reason
        return _ABORT
