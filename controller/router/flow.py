"""
A connection after its hello: two sockets, a session, and whatever moves the bytes between.

`Flow` carries out what the session says and is the same for every hand-off; a hand-off says when
a side has ended, whether it is drained, and how many bytes went.  A hand-off refuses a connection
by raising `Refused`, and leaves both sockets as they were, or says what it has left.
"""

import errno
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from controller.core.session import (
    BACKEND,
    CLIENT,
    Abort,
    Command,
    Drain,
    HalfClose,
    Session,
    Side,
)
from controller.router._native import lib
from controller.router.loop import Loop

ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLET
"""
The events of a socket whose bytes the kernel moves.  With EPOLLIN every segment would wake the
loop; edge-triggered, since an end that is noted stays true.
"""

FIRST_RETRY: Final = 0.001
"""Seconds before the first look whether the kernel's backlog is written; epoll's resolution."""

LAST_RETRY: Final = 0.016
"""Seconds that looks are apart at most, after doubling."""


@dataclass(frozen=True, slots=True)
class Prelude:
    """
    What has passed between two sockets before a hand-off takes them.

    *taken* bytes were read from the client and *given* written to the backend, *moved* of these
    from the client.
    """

    taken: int = 0
    given: int = 0
    moved: int = 0


UNTOUCHED: Final = Prelude()


class Refused(Exception):  # noqa: N818 - a refusal is no error: the next hand-off takes it
    """
    A hand-off does not take this connection; the message is the reason, a word.

    *leave*, if there is one, is to be called when the connection's sockets are given up; *prelude*,
    if there is one, is what has passed by now.
    """

    def __init__(
        self,
        reason: str,
        leave: Callable[[], None] | None = None,
        prelude: Prelude | None = None,
    ) -> None:
        super().__init__(reason)
        self.leave = leave
        self.prelude = prelude


class Offer(NamedTuple):
    """
    Two connected sockets, the hello still unread in the client's, for a hand-off to take.

    *over* hears of the end, when both sockets are given up and the counts still stand.
    """

    client: int
    backend: int
    over: "Callable[[Flow], None]"
    prelude: Prelude = UNTOUCHED


class Handoff:
    """
    One rung of the ladder.
    """

    name: ClassVar[str]

    def take_all(self, offers: "Sequence[Offer]") -> "list[Flow | Exception]":
        """
        Take pairs of sockets and move their bytes.

        Returns:
            For each a flow; or a `Refused`, if another hand-off is needed; or an OSError, if the
            backend takes nothing, and the client's socket is as it was; or a fault of ours, after
            which nothing but the two sockets is left.
        """
        taken: list[Flow | Exception] = []
        for offer in offers:
            try:
                taken.append(self.take(offer))
            except Exception as err:  # noqa: BLE001 - told to whose pair it is
                taken.append(err)
        return taken

    def take(self, offer: Offer) -> "Flow":
        """
        Take one pair.

        Raises:
            Refused, OSError: as `take_all` says.
        """
        raise NotImplementedError


def forgotten(_: "Flow") -> None:
    """
    Stand in for a listener that has heard of the end: it and the flow no longer hold each other.
    """


class Flow:
    """
    One connection under way.
    """

    handoff: ClassVar[str]

    outlives_sockets: ClassVar[bool] = False
    """Whether bytes move without the two sockets, which then can not tell of an end."""

    __slots__ = ("_over", "fds", "loop", "session")

    def __init__(self, loop: Loop, fds: tuple[int, int], over: "Callable[[Flow], None]") -> None:
        self.loop = loop
        self.fds = fds
        self.session = Session()
        self._over = over

    @property
    def holds_sockets(self) -> bool:
        """
        Whether there are sockets yet, with which the connection would end.
        """
        return True

    def on_client(self, events: int) -> None:
        """
        Hear of the client's socket.
        """
        self._hear(CLIENT, events)

    def on_backend(self, events: int) -> None:
        """
        Hear of the backend's socket.
        """
        self._hear(BACKEND, events)

    def _hear(self, side: Side, events: int) -> None:
        if events & select.EPOLLERR:
            self.failed(side, lib.socket_error(self.fds[side]))
        else:
            self.on(side, events)

    @staticmethod
    def watch(loop: Loop, flows: "Sequence[Flow]", events: int) -> None:
        """
        Have *flows* hear of *events* of their sockets; of what holds already, and is queued, too.
        """
        for flow in flows:
            client, backend = flow.fds
            loop.handlers[client] = flow.on_client
            loop.handlers[backend] = flow.on_backend
        lib.watch_pairs(loop.epoll_fd, [fd for f in flows for fd in f.fds], len(flows), events)

    def on(self, side: Side, events: int) -> None:
        """
        Act on *events* of the socket of *side*, which has met no error.
        """
        raise NotImplementedError

    def bytes(self, side: Side) -> int:
        """
        Count the bytes that came from *side* and were moved on.
        """
        raise NotImplementedError

    def moved(self, side: Side) -> int:
        """
        Count those of them that went in this router's time.
        """
        return self.bytes(side)

    def quiet(self) -> float | None:
        """
        Seconds since anything came from either side; None where nobody knows.
        """
        return None

    def drain(self, side: Side) -> None:
        """
        See to it that `drained` is said for *side* once that is so.
        """
        raise NotImplementedError

    def release(self) -> None:
        """
        Give back what the hand-off holds, after the sockets are given up.
        """
        raise NotImplementedError

    def run(self, commands: tuple[Command, ...]) -> None:
        """
        Carry out what the session says.
        """
        for command in commands:
            if isinstance(command, Drain):
                self.drain(command.side)
            elif isinstance(command, HalfClose):
                lib.half_close(self.fds[command.side])
            else:
                reset = isinstance(command, Abort)
                for fd in self.fds:
                    self.loop.close(fd, reset=reset)
                over, self._over = self._over, forgotten
                over(self)
                self.release()

    def failed(self, side: Side, error: int) -> None:
        """
        Take note that the socket of *side* met *error*, an errno.
        """
        reset = error in (errno.ECONNRESET, errno.EPIPE, 0)
        word = "rst" if reset else errno.errorcode.get(error, str(error)).lower()
        self.run(self.session.failed(f"{side.name.lower()}_{word}"))

    def cut(self, reason: str) -> None:
        """
        End the connection now, for *reason*.
        """
        self.run(self.session.failed(reason))
