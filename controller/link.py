"""
The controller's end of the control socket: keep the router at the table that is wanted.

Rules of this file:

1. Always the whole table, and only one that differs from what the router serves.
2. The generation only grows, over restarts of either process.
3. A table that the router refused is not sent again before it has changed.
4. Under `sniroute run`, only the router of that run is spoken to: beside it there may be one whose
   place it takes, or one that takes its place.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from controller.core.plan import diff
from controller.core.routes import Route, RouteTable
from controller.core.wire import (
    VERSION,
    Decoder,
    Message,
    WireError,
    dump_table,
    encode,
    read_hello,
)
from controller.settings import RUN

ANSWER_TIMEOUT = 30
"""Seconds that the router has to check a table: the largest takes it one or two."""

_CHUNK = 1 << 16
_NAMED = 20
"""Hosts that a log line names; of more it tells the number."""

Content = tuple[tuple[Route, ...], tuple[str, ...], dict[str, frozenset[str]]]
"""Routes, networks, and who is alive: a table but for its generation."""

log = structlog.get_logger()


def delays() -> Iterator[float]:
    """
    Give the seconds to wait before each further try: soon at first, never more than 5.
    """
    return (min(0.1 * 2**n, 5.0) for n in itertools.count())


def reason(err: BaseException) -> str:
    """
    Say why something failed, without the groups that tasks wrap around it.
    """
    while isinstance(err, BaseExceptionGroup):
        err = err.exceptions[0]
    return str(err) or type(err).__name__


def is_to_end() -> bool:
    """
    Tell whether this task was cancelled: a failing group tells of its failures and not of that.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Link:
    """
    The connection to the router, kept up for as long as `run` runs.

    *on_served* is called with the router's own table at each connect; *on_refused* with the
    router's error when it refuses a table, and with None when that is over.
    """

    def __init__(
        self,
        path: Path,
        on_served: Callable[[RouteTable], None],
        on_refused: Callable[[str | None], None],
    ) -> None:
        self._path = path
        self._run = os.environ.get(RUN, "")
        self._on_served = on_served
        self._on_refused = on_refused
        self._wanted: Content | None = None
        self._since: float | None = None
        self._report: Message | None = None
        self._news = asyncio.Event()
        self._generation = 0
        self._delays, self._lost = delays(), ""

    def want(self, content: Content, since: float | None = None) -> None:
        """
        Have the router serve a table of this *content*.

        *since* is when that which changed it happened.
        """
        if content != self._wanted:
            self._wanted = content
            self._since = self._since or since
            self._news.set()

    def tell(self, report: Message) -> None:
        """
        Have the router know *report*.
        """
        if report != self._report:
            self._report = report
            self._news.set()

    async def run(self) -> None:
        """
        Connect, and connect again whenever the router was away.
        """
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    await self._hello(reader, writer)
                finally:
                    writer.close()
            except Exception as err:  # noqa: BLE001 - the root of the task
                if is_to_end():
                    return
                if (why := reason(err)) != self._lost:
                    log.warning("router away", control=str(self._path), error=why)
                    self._lost = why
            await asyncio.sleep(next(self._delays))

    async def _hello(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_receive(reader, inbox), name="receive")
            await _send(writer, {"type": "hello", "version": VERSION})
            hello = await _answer(inbox)
            served = read_hello(hello)
            if self._run and hello["run"] != self._run:
                raise WireError("this router is of another `sniroute run`")
            self._generation = max(self._generation, served.generation)
            log.info("router connected", generation=served.generation, routes=len(served.routes))
            self._on_served(served)
            content = served.routes, served.networks, served.alive
            await self._push(writer, inbox, content if served.generation else None)

    async def _push(
        self,
        writer: asyncio.StreamWriter,
        inbox: asyncio.Queue[Message],
        acked: Content | None,
    ) -> None:
        refused: Content | None = None
        told: Message | None = None
        while True:
            self._news.clear()
            wanted, since = self._wanted, self._since
            self._since = None
            if wanted is not None and wanted not in (acked, refused):
                self._generation += 1
                table = RouteTable(self._generation, *wanted)
                await _send(writer, {"type": "table", **dump_table(table)})
                error = self._verdict(await _answer(inbox))
                if error is None:
                    self._log_change(acked[0] if acked else (), wanted[0], since)
                    acked, refused = wanted, None
                else:
                    refused = wanted
                self._on_refused(error)
            elif wanted == acked:
                self._on_refused(None)
            if (report := self._report) is not None and report != told:
                await _send(writer, report)
                told = report
            # not before: a router that hangs up at each table is not asked ever faster
            self._delays, self._lost = delays(), ""
            await self._news.wait()

    def _verdict(self, answer: Message) -> str | None:
        if answer.get("generation") == self._generation:
            if answer["type"] == "ack":
                return None
            if answer["type"] == "nack":
                return str(answer.get("error"))
        raise WireError(f"not an answer to table {self._generation}: {str(answer)[:200]}")

    def _log_change(
        self, old: tuple[Route, ...], new: tuple[Route, ...], since: float | None
    ) -> None:
        changes = diff(old, new)
        log.info(
            "table acknowledged",
            generation=self._generation,
            routes=len(new),
            event_ms=None if since is None else round((time.time() - since) * 1000, 1),
            added=_some(changes.added),
            removed=_some(changes.removed),
            changed=_some(changes.changed),
        )


def _some(hosts: tuple[str, ...]) -> list[str]:
    more = len(hosts) - _NAMED
    return [*hosts[:_NAMED], *([f"and {more} more"] if more > 0 else [])]


async def _send(writer: asyncio.StreamWriter, message: Message) -> None:
    writer.write(encode(message))
    await writer.drain()


async def _answer(inbox: asyncio.Queue[Message]) -> Message:
    async with asyncio.timeout(ANSWER_TIMEOUT):
        return await inbox.get()


async def _receive(reader: asyncio.StreamReader, inbox: asyncio.Queue[Message]) -> None:
    decoder = Decoder()
    while data := await reader.read(_CHUNK):
        for message in decoder.feed(data):
            inbox.put_nowait(message)
    raise ConnectionError("the router closed the connection")
