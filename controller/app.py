"""
The controller's loop: engines and files in, tables out.

For each engine: subscribe, list, and list again at each bell.  What the sources said last, taken
together, is planned; the router gets the result.

Rules of this file:

1. A failed list is not an empty list: what a source said last counts until it says otherwise.
2. A source that has said nothing yet in this process's life counts with what the router serves
   of it, so a controller that starts beside a dead engine drops nothing.
3. Each problem is logged once when it appears and once when it goes.

Tasks: `link`, `routes file` and one `engine NAME` for each engine; none depends on another.
"""

import asyncio
import time
from dataclasses import dataclass

import structlog

from controller.core.labels import is_labelled
from controller.core.plan import Container, addresses, carry, plan
from controller.core.problems import Code, Problem
from controller.core.routes import Route, RouteTable
from controller.core.wire import Message
from controller.link import Link, delays, is_to_end, reason
from controller.routesfile import SOURCE, RoutesFile
from controller.runtime import EngineAddress, Listing, Runtime, find_engines
from controller.settings import ControllerSettings

GATHER = 0.02
"""Seconds to wait after a bell that breaks a silence: a start alone makes three events."""

BURST = 0.25
"""Seconds between lists while the bell keeps ringing."""

AFTERTHOUGHT = 1.0
"""Seconds from a list that a bell caused to one more, since engines ring before their own list
is right: Docker sends `die` while it still lists the container."""

FILE_POLL = 0.25
"""Seconds between looks at the routes file, which is taken when two looks agree."""

log = structlog.get_logger()


class Bell:
    """
    Events ring; `wait` says when it is time to act on them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rung = asyncio.Event()
        self._first: float | None = None
        self._last_act = -BURST

    def ring(self, when: float) -> None:
        """
        Ring for something that happened at *when*, in seconds since the epoch.
        """
        self.count += 1
        self._first = self._first or when
        self._rung.set()

    async def wait(self, timeout: float) -> float | None:  # noqa: ASYNC109 - a timeout is no error here
        """
        Wait for the bell, and for the right moment; return when the first of it happened.
        """
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(timeout):
                await self._rung.wait()
            await asyncio.sleep(max(GATHER, self._last_act + BURST - clock()))
            self._last_act = clock()
        except TimeoutError:
            pass
        self._rung.clear()
        first, self._first = self._first, None
        return first


@dataclass(slots=True)
class Engine:
    """
    What is known of one engine; *listing* is None until its first list.
    """

    address: EngineAddress
    bell: Bell
    listing: Listing | None = None
    connected: bool = False
    last_list: float | None = None
    lists: int = 0
    failed_lists: int = 0
    error: str = ""

    @property
    def containers(self) -> tuple[Container, ...]:
        """
        What it runs, as far as is known.
        """
        return self.listing.containers if self.listing is not None else ()

    @property
    def expected(self) -> bool:
        """
        Tell whether anyone would miss this engine: not so a usual place that never had one.
        """
        return self.address.asked or self.address.present or self.lists > 0

    def fields(self) -> Message:
        """
        Write the engine for the report.
        """
        return {
            "name": self.address.name,
            "url": self.address.url,
            "connected": self.connected,
            "containers": sum(is_labelled(c.labels) for c in self.containers),
            "last_list": self.last_list,
            "events": self.bell.count,
            "lists": self.lists,
            "failed_lists": self.failed_lists,
        }


class Controller:
    """
    The controller process, to be run once.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._engines = [Engine(address, Bell()) for address in find_engines(settings.engine)]
        self._file_routes: tuple[Route, ...] | None = None
        self._file_problems: tuple[Problem, ...] = ()
        self._served = RouteTable(0, ())
        self._refused: str | None = None
        self._problems: frozenset[Problem] = frozenset()
        self._link = Link(settings.control, self._on_served, self._on_refused)

    async def run(self) -> None:
        """
        Run until cancelled.
        """
        present = [engine.address.name for engine in self._engines if engine.address.present]
        log.info("controller started", engines=present, routes_file=str(self._settings.routes))
        if self._engines and not present:
            places = [engine.address.url for engine in self._engines]
            log.warning("no engine socket found; waiting for one", places=places)
        self._replan()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._link.run(), name="link")
            if self._settings.routes is not None:
                watch = self._watch_file(RoutesFile(self._settings.routes))
                tasks.create_task(watch, name="routes file")
            for engine in self._engines:
                tasks.create_task(self._keep(engine), name=f"engine {engine.address.name}")

    async def _keep(self, engine: Engine) -> None:
        name = engine.address.name
        waits = delays()
        while True:
            try:
                if engine.expected:
                    await self._follow(engine)
            except Exception as err:  # noqa: BLE001 - the root of the task
                if is_to_end():
                    return
                if engine.connected:
                    waits = delays()
                if engine.connected or engine.error != reason(err):
                    engine.error = reason(err)
                    log.warning("engine away", engine=name, error=engine.error)
                engine.connected = False
                self._replan()
            await asyncio.sleep(next(waits))

    async def _follow(self, engine: Engine) -> None:
        async with Runtime(engine.address) as runtime, asyncio.TaskGroup() as tasks:
            # subscribe, then list: what changes after the list rings
            tasks.create_task(_listen(runtime, engine.bell), name="events")
            since = None
            while True:
                try:
                    engine.listing = await runtime.look()
                except Exception:
                    engine.failed_lists += 1
                    raise
                engine.lists += 1
                engine.last_list = round(time.time(), 3)
                if not engine.connected:
                    engine.connected, engine.error = True, ""
                    fields = engine.fields()
                    log.info("engine connected", **{k: fields[k] for k in ("name", "containers")})
                self._replan(since)
                interval = self._settings.relist_interval
                since = await engine.bell.wait(
                    interval if since is None else min(AFTERTHOUGHT, interval)
                )

    async def _watch_file(self, file: RoutesFile) -> None:
        while True:
            if (reading := file.poll()) is not None:
                self._file_problems = reading.problems
                if not reading.problems:
                    self._file_routes = reading.routes
                    log.info("routes file read", routes=len(reading.routes))
                self._replan()
            await asyncio.sleep(FILE_POLL)

    def _on_served(self, table: RouteTable) -> None:
        # a router that has just started knows less than we do
        if table.generation:
            self._served = table
        self._replan()

    def _on_refused(self, error: str | None) -> None:
        if error != self._refused:
            self._refused = error
            self._replan()

    def _replan(self, since: float | None = None) -> None:
        silent = {e.address.name for e in self._engines if e.listing is None}
        heard = [e for e in self._engines if e.listing is not None]
        if self._settings.routes is not None and self._file_routes is None:
            silent.add(SOURCE)
        containers = [c for e in heard for c in e.containers]
        result = plan(containers, self._file_routes or (), self._settings.network)
        self._note(result.problems)
        # with nothing heard at all there is no table, which is not the same as an empty one
        if heard or self._file_routes is not None or not silent:
            routes = carry(result.routes, self._served.routes, silent)
            self._link.want((routes, self._networks(), self._alive(silent)), since)
        self._link.tell(
            {
                "type": "report",
                "engines": [e.fields() for e in self._engines if e.expected],
                "problems": [problem.fields() for problem in sorted(self._problems)],
            }
        )

    def _networks(self) -> tuple[str, ...]:
        found = {subnet for e in self._engines if e.listing for subnet in e.listing.subnets}
        # of whom the served ones are is not known; the next list of the missing engine clears them
        if any(e.expected and e.listing is None for e in self._engines):
            found.update(self._served.networks)
        return tuple(sorted(found))

    def _alive(self, silent: set[str]) -> dict[str, frozenset[str]]:
        kept = {s: alive for s, alive in self._served.alive.items() if s in silent}
        heard = {e.address.name: addresses(e.containers) for e in self._engines if e.listing}
        return kept | heard

    def _note(self, planned: tuple[Problem, ...]) -> None:
        problems = {*planned, *self._file_problems}
        if self._refused is not None:
            problems.add(Problem(Code.TABLE_REFUSED, "", "", "", self._refused))
        for problem in sorted(problems - self._problems):
            log.warning("problem", **problem.fields())
        for problem in sorted(self._problems - problems):
            log.info("problem gone", **problem.fields())
        self._problems = frozenset(problems)


async def _listen(runtime: Runtime, bell: Bell) -> None:
    await runtime.listen(bell.ring)
    raise ConnectionError("the event stream ended")
