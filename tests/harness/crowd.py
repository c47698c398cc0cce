"""
A crowd of clients that come without a break, each in its own way, and a backend that echoes.

All of it lives in one event loop, in a thread of its own.
"""

import asyncio
import itertools
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Final, Self

from harness.ends import HELLO
from harness.loopback import LOOPBACK, Address
from harness.tools import HarnessError, wait_for

DEADLINE: Final = 30
"""Seconds that a client may take for all it does."""

PAUSE: Final = 0.004
"""Seconds between two clients."""

PAYLOAD: Final = bytes(range(256)) * 64


@dataclass(frozen=True, slots=True)
class Manner:
    """
    How a client comes: silent how long, its hello in how many pieces, to stay how long.
    """

    silent: float = 0
    pieces: int = 1
    stays: float = 0


MANNERS: Final = {
    "prompt": Manner(),
    "slow hello": Manner(pieces=8),
    "silent": Manner(silent=0.5),
    "long silent": Manner(silent=1.8),
    "stays": Manner(stays=2),
}

PIECE_PAUSE: Final = 0.15
"""Seconds between the pieces of a hello."""


class Crowd:
    """
    Clients of *at*; `failures` says what ever went wrong, `done` counts those that were served.
    """

    def __init__(self, at: Address | None = None) -> None:
        self.at = at
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self._came = 0
        self._begun = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="crowd")

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait_for_more(self, clients: int) -> None:
        """
        Wait until *clients* more have come and been served, some in each manner.

        Raises:
            HarnessError: something went wrong for one of them.
        """
        before = self.done.copy()

        def enough() -> bool:
            if self.failures:
                raise HarnessError(f"of a crowd of {self._came}: {self.failures[:5]}")
            now = self.done - before
            return now.total() >= clients and set(now) == set(MANNERS)

        wait_for(f"{clients} more clients", enough)

    def leave(self) -> None:
        """
        Let nobody come any more, and wait for those who are there.
        """
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        server = await asyncio.start_server(_echo, LOOPBACK, 0, backlog=1024)
        self.backend: Address = server.sockets[0].getsockname()
        self._begun.set()
        # of four clients three are prompt
        others = itertools.cycle([name for name in MANNERS if name != "prompt"])
        async with asyncio.TaskGroup() as tasks:
            while not self._over.is_set():
                await asyncio.sleep(PAUSE)
                if self.at is not None:
                    self._came += 1
                    name = "prompt" if self._came % 4 else next(others)
                    tasks.create_task(self._visit(self.at, name))
        server.close()
        await server.wait_closed()

    async def _visit(self, at: Address, name: str) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                await _talk(at, MANNERS[name])
            self.done[name] += 1
        except Exception as err:  # noqa: BLE001 - whatever it is, it is what the test looks for
            self.failures.append(f"{name}: {err!r}")


async def _talk(at: Address, manner: Manner) -> None:
    reader, writer = await asyncio.open_connection(*at)
    try:
        await asyncio.sleep(manner.silent)
        size = -(-len(HELLO) // manner.pieces)
        for start in range(0, len(HELLO), size):
            writer.write(HELLO[start : start + size])
            await writer.drain()
            if manner.pieces > 1:
                await asyncio.sleep(PIECE_PAUSE)
        for _ in range(2):
            writer.write(PAYLOAD)
            await asyncio.sleep(manner.stays / 2)
        writer.write_eof()
        got = await reader.read(-1)
        if got != HELLO + 2 * PAYLOAD:
            raise HarnessError(f"wrong bytes: {len(got)}")
    finally:
        writer.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
