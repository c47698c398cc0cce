"""
Backends that say who they are and then echo, and clients that speak to them byte by byte.

All of it lives in one event loop, which runs only while a test awaits something.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from harness.loopback import LOOPBACK, Address

DEADLINE = 10
AT_ONCE = 32


class Echoes:
    """
    One backend for each host; *accepted* counts their connections.
    """

    def __init__(self, hosts: Iterable[str], address: str = LOOPBACK) -> None:
        self.accepted: Counter[str] = Counter()
        self.addresses: dict[str, Address] = {}
        self._servers: list[asyncio.Server] = []
        self._runner = asyncio.Runner()
        self._runner.run(self._start(set(hosts), address))

    async def _start(self, hosts: set[str], address: str) -> None:
        loop = asyncio.get_running_loop()
        for host in sorted(hosts):
            # the default argument: each server greets as its own host
            server = await loop.create_server(lambda h=host: _Echo(self, h), address, 0)
            self._servers.append(server)
            self.addresses[host] = server.sockets[0].getsockname()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stop())
        self._runner.close()

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
            await server.wait_closed()

    def say(self, to: Address, *speeches: "Speech") -> list[bytes]:
        """
        Give all *speeches*, some of them at once, and return all that was answered to each.
        """
        return self._runner.run(_say(to, speeches))


class _Echo(asyncio.Protocol):
    def __init__(self, echoes: Echoes, host: str) -> None:
        self._echoes = echoes
        self._host = host

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._echoes.accepted[self._host] += 1
        self._transport = transport
        transport.write(greeting(self._host))

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def greeting(host: str) -> bytes:
    """
    What the backend of *host* says first.
    """
    return f"{host}\n".encode()


@dataclass(frozen=True, slots=True)
class Speech:
    """
    What a client sends: *parts* of one segment each, with a *pause* before the next.

    It ends its side when it has heard *ends_after* bytes; at once if 0, never if None.
    """

    parts: tuple[bytes, ...]
    pause: float = 0
    ends_after: int | None = None

    async def give(self, to: Address) -> bytes:
        """
        Connect, send, and return what is heard until the other side ends.
        """
        heard = b""
        reader, writer = await asyncio.open_connection(*to)
        try:
            for part in self.parts:
                # asyncio has set TCP_NODELAY
                writer.write(part)
                await asyncio.sleep(self.pause)
            if self.ends_after is not None:
                try:
                    heard = await reader.readexactly(self.ends_after)
                except asyncio.IncompleteReadError as err:
                    heard = err.partial
                writer.write_eof()
            return heard + await reader.read()
        finally:
            writer.transport.abort()


async def _say(to: Address, speeches: Iterable[Speech]) -> list[bytes]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def give(speech: Speech) -> bytes:
        async with slots, asyncio.timeout(DEADLINE):
            return await speech.give(to)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(give(speech)) for speech in speeches]
    return [task.result() for task in tasks]
