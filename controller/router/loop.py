"""
The router's event loop: descriptors, timers, and the order of things at the end of a round.

Rules of this file:

1. One thread.  A handler never blocks.  Other threads `ask`.
2. A descriptor is closed only after the round in which it was given up: until then its number
   can not come back as another connection's, so a late event meets nobody.
"""

import contextlib
import errno
import heapq
import os
import select
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, TypeVar

import structlog

from controller.router._native import lib

ONE_SHOT_EVENTS: Final = 256
"""Events taken from the kernel at once; a round stays well under a millisecond."""

log = structlog.get_logger()

Handler = Callable[[int], None]

T = TypeVar("T")


class Timer:
    """
    A call that is due; `cancel` it when it is not wanted any more.
    """

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Callable[[], None]) -> None:
        self.due = due
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """
        Do not call.
        """
        self.action = None

    def __lt__(self, other: "Timer") -> bool:
        return self.due < other.due


class Loop:
    """
    An epoll loop; `handlers` maps a descriptor to who hears of its events.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # for native steps that register a socket
        self.epoll_fd = self._epoll.fileno()
        self._timers: list[Timer] = []
        self._soon: list[Callable[[], None]] = []
        self._given_up: dict[int, int] = {}
        self._asked: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.handlers: dict[int, Handler] = {}
        self.round_ends: list[Callable[[], None]] = []
        self.now = time.monotonic()
        self.stopping = False
        self.faults = 0
        self.watch(self._bell, select.EPOLLIN, self._on_bell)

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """
        Have *handler* hear of *events* of *fd*, known or not; of what holds already too.
        """
        self.handlers[fd] = handler
        lib.watch(self.epoll_fd, fd, events)

    def rearm(self, fd: int, events: int) -> None:
        """
        Hear of other *events* of *fd*, which is known; of what holds already too.
        """
        lib.watch(self.epoll_fd, fd, events)

    def forget(self, fd: int) -> None:
        """
        Hear no more of *fd*, which stays open.
        """
        self.handlers.pop(fd, None)
        self._epoll.unregister(fd)

    def close(self, fd: int, *, reset: bool = False) -> None:
        """
        Close *fd* at the end of this round, with a RST if *reset*.
        """
        self._give_up(fd, lib.CLOSE_RESET if reset else lib.CLOSE)

    def vanish(self, fd: int) -> None:
        """
        Close *fd* at the end of this round, and send nothing.
        """
        self._give_up(fd, lib.CLOSE_SILENT)

    def _give_up(self, fd: int, how: int) -> None:
        self.handlers.pop(fd, None)
        # who is cut by a fault may have given it up before
        self._given_up.setdefault(fd, how)

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """
        Call *action* in *seconds*.
        """
        timer = Timer(self.now + seconds, action)
        heapq.heappush(self._timers, timer)
        return timer

    def soon(self, action: Callable[[], None]) -> None:
        """
        Call *action* in the next round.
        """
        self._soon.append(action)

    def ask(self, question: Callable[[], T], patience: float | None = None) -> T:
        """
        Have *question* answered between two handlers; for other threads than the loop's.

        Raises:
            TimeoutError: there is no answer within *patience* seconds.
            Exception: whatever *question* raises.
        """
        answer: Future[T] = Future()
        self._asked.append(partial(_answer, question, answer))
        os.eventfd_write(self._bell, 1)
        return answer.result(patience)

    def _on_bell(self, _: int) -> None:
        os.eventfd_read(self._bell)
        while self._asked:
            self._asked.popleft()()

    def run(self) -> None:
        """
        Go on until `stopping`.
        """
        while not self.stopping:
            self.turn(None)

    def turn(self, patience: float | None) -> None:
        """
        Wait up to *patience* seconds for anything to do, and do it.
        """
        try:
            events = self._epoll.poll(self._wait(patience), ONE_SHOT_EVENTS)
        except InterruptedError:
            events = []
        self.now = time.monotonic()
        handlers = self.handlers
        for fd, event in events:
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(event)
                except Exception as err:  # noqa: BLE001 - the root of all that handlers do
                    self.fault(handler, err)
        if self._soon:
            actions, self._soon = self._soon, []
            for action in actions:
                self.guard(action)
        while self._timers and self._timers[0].due <= self.now:
            due = heapq.heappop(self._timers).action
            if due is not None:
                self.guard(due)
        self._end_round()

    def guard(self, action: Callable[..., None], *args: Any) -> bool:
        """
        Call *action*, one of many: a fault costs the connection that it is a method of.

        Returns:
            Whether there was none.
        """
        try:
            action(*args)
        except Exception as err:  # noqa: BLE001 - as above
            self.fault(action, err)
            return False
        return True

    def fault(self, action: Callable[..., None], error: Exception) -> None:
        """
        Have a fault of ours cost the connection that met it, and no other.
        """
        self.faults += 1
        log.error("internal error", exc_info=error)
        method = action.func if isinstance(action, partial) else action
        cut = getattr(getattr(method, "__self__", None), "cut", None)
        if cut is not None:
            with contextlib.suppress(Exception):
                cut("internal_error")

    def _wait(self, patience: float | None) -> float | None:
        if self._soon:
            return 0
        while self._timers and self._timers[0].action is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return patience
        wait = max(0.0, self._timers[0].due - time.monotonic())
        return wait if patience is None else min(wait, patience)

    def _end_round(self) -> None:
        given_up, self._given_up = self._given_up, {}
        for how in set(given_up.values()):
            fds = [fd for fd in given_up if given_up[fd] == how]
            # a descriptor that is none was closed twice: the number may be another's by now
            if (error := -lib.close_all(fds, len(fds), how)) == errno.EBADF:
                raise OSError(error, os.strerror(error))
            if error:
                log.error("sockets not silenced", error=os.strerror(error))
        for action in self.round_ends:
            self.guard(action)


def _answer(question: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(question())
    except Exception as err:  # noqa: BLE001 - it is the asker's
        answer.set_exception(err)
