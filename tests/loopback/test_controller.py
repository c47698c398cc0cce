"""
The controller between an engine's API and a router's control socket, both real sockets.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Self

import pytest
import structlog
from aiohttp import web
from harness.tools import HarnessError, limited, run

from controller.app import Controller
from controller.core.routes import Backend, Route, RouteTable
from controller.core.wire import VERSION, Decoder, dump_table, encode, read_table
from controller.link import delays
from controller.settings import ControllerSettings

DEADLINE = 10.0


async def until(condition: Callable[[], object], what: str) -> None:
    """
    Wait for *condition*; fail when it does not come.
    """
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not seen in {DEADLINE} s: {what}"
        await asyncio.sleep(0.005)


class Engine:
    """
    As much of an engine's HTTP API as the controller uses, on a UNIX socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.containers: dict[str, dict[str, Any]] = {}
        self.networks: list[dict[str, Any]] = [{"Name": "bridge", "Driver": "bridge"}]
        self.info: dict[str, Any] | None = {}
        self.infos = 0
        self.broken = False
        self.lists: list[float] = []
        self.inspected: list[str] = []
        self.since: list[int] = []
        self._streams: set[web.StreamResponse] = set()
        self._cut = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """
        Name the socket as settings do.
        """
        return f"unix://{self.path}"

    def run(self, name: str, address: str, **changes: Any) -> None:
        """
        Have a container run, without a word to anyone.
        """
        self.containers[name] = {
            "labels": {"sniroute.host": f"{name}.example.com"},
            "address": address,
            "status": "running",
            "mode": "bridge",
            "ports": None,
            "network": {},
            "networks": {},
            **changes,
        }

    async def start(self) -> None:
        """
        Listen.
        """
        self.path.unlink(missing_ok=True)
        app = web.Application()
        app.add_routes(
            [
                web.get("/version", self._version),
                web.get("/v1.41/info", self._info),
                web.get("/v1.41/containers/json", self._list),
                web.get("/v1.41/containers/{id}/json", self._inspect),
                web.get("/v1.41/networks", self._networks),
                web.get("/v1.41/events", self._events),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    async def stop(self) -> None:
        """
        Go away, with the socket and every connection.
        """
        if self._runner is not None:
            self.cut()
            await self._runner.cleanup()
            self._runner = None
        self.path.unlink(missing_ok=True)

    def cut(self) -> None:
        """
        End every event stream.
        """
        self._cut.set()
        self._cut = asyncio.Event()

    async def event(self, action: str, kind: str = "container") -> None:
        """
        Tell everyone who listens.
        """
        line = json.dumps({"Type": kind, "Action": action, "timeNano": time.time_ns()})
        for stream in tuple(self._streams):
            await stream.write(line.encode() + b"\n")

    @property
    def heard(self) -> bool:
        """
        Tell whether anyone listens.
        """
        return bool(self._streams)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.41"})

    async def _info(self, _: web.Request) -> web.Response:
        self.infos += 1
        if self.info is None:
            return web.json_response({"message": "forbidden"}, status=403)
        return web.json_response(self.info)

    async def _list(self, _: web.Request) -> web.Response:
        self.lists.append(time.monotonic())
        if self.broken:
            return web.json_response({"message": "broken"}, status=500)
        return web.json_response(
            [{"Id": name, "Labels": c["labels"]} for name, c in self.containers.items()]
        )

    async def _networks(self, _: web.Request) -> web.Response:
        return web.json_response(self.networks)

    async def _inspect(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        self.inspected.append(name)
        container = self.containers.get(name)
        if container is None:
            return web.json_response({"message": "no such container"}, status=404)
        bridge = {
            "IPAddress": container["address"],
            "IPPrefixLen": 8,
            "Gateway": "127.0.0.1",
            "GlobalIPv6Address": "",
            "IPv6Gateway": "",
            **container["network"],
        }
        return web.json_response(
            {
                "Id": name,
                "Name": f"/{name}",
                "State": {"Status": container["status"]},
                "Config": {"Labels": container["labels"], "ExposedPorts": {"443/tcp": {}}},
                "HostConfig": {"NetworkMode": container["mode"]},
                "NetworkSettings": {
                    "Networks": {"bridge": bridge, **container["networks"]}
                    if container["address"]
                    else {},
                    "Ports": container["ports"],
                },
            }
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.since.append(int(request.query["since"]))
        stream = web.StreamResponse()
        await stream.prepare(request)
        self._streams.add(stream)
        try:
            await self._cut.wait()
        finally:
            self._streams.discard(stream)
        return stream


class Router:
    """
    The router's end of the control socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self.routes: tuple[Route, ...] = ()
        self.networks: tuple[str, ...] = ()
        self.alive: dict[str, frozenset[str]] = {}
        self.tables: list[tuple[Route, ...]] = []
        self.report: dict[str, Any] = {"engines": [], "problems": []}
        self.refuse = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """
        Listen.
        """
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """
        Go away, with the socket and every connection.
        """
        if self._server is not None:
            self._server.close()
            for writer in tuple(self._writers):
                writer.close()
            self._server = None
        self.path.unlink(missing_ok=True)

    @property
    def pools(self) -> dict[str, list[str]]:
        """
        Give the table served, as addresses by host.
        """
        return {route.host: [b.address for b in route.backends] for route in self.routes}

    @property
    def detours(self) -> dict[str, str]:
        """
        Give the detours of all backends by name.
        """
        return {b.name: b.detour for route in self.routes for b in route.backends}

    def codes(self) -> list[str]:
        """
        Give the codes of the problems last reported.
        """
        return [problem["code"] for problem in self.report["problems"]]

    def connected(self) -> dict[str, bool]:
        """
        Tell of each engine last reported whether it is connected.
        """
        return {engine["name"]: engine["connected"] for engine in self.report["engines"]}

    def engine(self) -> dict[str, Any]:
        """
        Give the only engine last reported.
        """
        (engine,) = self.report["engines"]
        return dict(engine)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        decoder = Decoder()
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                for message in decoder.feed(data):
                    if (answer := self._answer(message)) is not None:
                        writer.write(encode(answer))
        self._writers.discard(writer)
        writer.close()

    def _answer(self, message: dict[str, Any]) -> dict[str, Any] | None:
        match message["type"]:
            case "hello":
                served = RouteTable(self.generation, self.routes, self.networks, self.alive)
                return {"type": "hello", "version": VERSION, "run": "", **dump_table(served)}
            case "table":
                table = read_table(message)
                self.tables.append(table.routes)
                if self.refuse:
                    return {"type": "nack", "generation": table.generation, "error": "no room"}
                assert table.generation > self.generation
                self.generation, self.routes = table.generation, table.routes
                self.networks, self.alive = table.networks, table.alive
                return {"type": "ack", "generation": table.generation}
            case _:
                self.report = message
                return None


class House:
    """
    One engine, one router, and controllers between them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine(folder / "engine.sock")
        self.router = Router(folder / "router.sock")

    def settings(self, **changes: Any) -> ControllerSettings:
        """
        Make the settings of a controller in this house.
        """
        given = {"engine": (self.engine.url,), "control": self.router.path, **changes}
        return ControllerSettings(**given)

    @asynccontextmanager
    async def controller(self, **changes: Any) -> AsyncIterator[None]:
        """
        Have a controller run.
        """
        task = asyncio.create_task(Controller(self.settings(**changes)).run())
        try:
            yield
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.wait([task])


def play(folder: Path, scene: Callable[[House], Awaitable[None]]) -> list[Any]:
    """
    Run *scene* with engine and router up; return what was logged.
    """

    async def run() -> None:
        house = House(folder)
        await house.engine.start()
        await house.router.start()
        try:
            async with asyncio.timeout(3 * DEADLINE):
                await scene(house)
        finally:
            await house.engine.stop()
            await house.router.stop()

    with structlog.testing.capture_logs() as lines:
        asyncio.run(run())
    return lines


def test_label_becomes_a_route(tmp_path: Path) -> None:
    """
    What runs with a label is served, what runs without is not even inspected.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        house.engine.run("b", "127.0.0.3", labels=None)
        async with house.controller():
            await until(lambda: house.router.pools, "a table")

        (route,) = house.router.routes
        backend = Backend("a", house.engine.url, "127.0.0.2", 443)
        assert Route("a.example.com", (backend,)) == route
        assert "b" not in house.engine.inspected

    play(tmp_path, scene)


def test_wish_for_the_client_address_reaches_the_router(tmp_path: Path) -> None:
    """
    How a container wants the client's address is in the table, and one bad wish is no route.
    """

    async def scene(house: House) -> None:
        for name, version in (("a", "v2"), ("b", "v9")):
            wishes = {"sniroute.client-ip": "nat", "sniroute.proxy-protocol": version}
            own = {"sniroute.host": f"{name}.example.com", **wishes}
            house.engine.run(name, "127.0.0.2", labels=own)
        async with house.controller():
            await until(house.router.codes, "the problem")

            backend = Backend("a", house.engine.url, "127.0.0.2", 443, "nat", "v2")
            assert (Route("a.example.com", (backend,)),) == house.router.routes
            assert ["bad-proxy-protocol"] == house.router.codes()

    play(tmp_path, scene)


def test_ways_around_this_host_are_told(tmp_path: Path) -> None:
    """
    Several default routes, internal networks and the host's network are seen where they are.
    """

    async def scene(house: House) -> None:
        engine = house.engine
        engine.networks += [
            {"Name": "front", "Driver": "bridge", "Internal": False},
            {"Name": "inner", "Driver": "bridge", "Internal": True},
        ]
        front = {"front": {"IPAddress": "203.0.113.2", "Gateway": "203.0.113.1"}}
        inner = {"inner": {"IPAddress": "203.0.113.2", "Gateway": "203.0.113.1"}}
        own = {"sniroute.host": "inside.example.com", "sniroute.network": "inner"}
        engine.run("plain", "127.0.0.2", networks=inner)
        engine.run("two", "127.0.0.3", networks=front)
        engine.run("preferred", "127.0.0.4", networks=front, network={"GwPriority": 1})
        engine.run("inside", "127.0.0.5", networks=inner, labels=own)
        engine.run("host", "", mode="host")
        async with house.controller():
            await until(lambda: house.router.pools, "a table")

        assert {
            "plain": "",
            "two": "several_networks",
            "preferred": "",
            "inside": "internal_network",
            "host": "host_network",
        } == house.router.detours

    play(tmp_path, scene)


def test_networks_whose_containers_may_be_clients_are_told(tmp_path: Path) -> None:
    """
    The engine's bridges on this host, whether or not a container there has a label, and no other.
    """

    def network(name: str, driver: str, *subnets: str) -> dict[str, Any]:
        config = [{"Subnet": subnet} for subnet in subnets]
        return {"Name": name, "Driver": driver, "IPAM": {"Config": config or None}}

    async def scene(house: House) -> None:
        house.engine.networks = [
            network("bridge", "bridge", "2001:db8::/64", "127.0.0.0/8"),
            network("elsewhere", "bridge", "203.0.113.0/24"),
            network("unsettled", "bridge", "", "invalid Prefix"),
            network("lan", "macvlan", "127.1.0.0/16"),
            network("host", "host"),
            {"Name": "none", "Driver": "null", "IPAM": None},
        ]
        async with house.controller():
            await until(lambda: house.router.tables, "a table")

        assert ("127.0.0.0/8", "2001:db8::/64") == house.router.networks

    play(tmp_path, scene)


IN_NETWORK = "127.0.0.2", 443, ""
AT_HOST = "127.0.0.1", 8443, "rootless"


@pytest.mark.parametrize(
    ("info", "place"),
    [
        ({"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}, AT_HOST),
        ({"Rootless": True, "SecurityOptions": []}, AT_HOST),
        ({"Rootless": False, "SecurityOptions": None}, IN_NETWORK),
        (None, IN_NETWORK),
    ],
    ids=["Docker", "Podman", "root", "forbidden"],
)
def test_engine_is_asked_once_whether_it_is_rootless(
    tmp_path: Path, info: dict[str, Any] | None, place: tuple[str, int, str]
) -> None:
    """
    The answer holds for a connection; without one the routes are served nevertheless.

    A rootless engine's containers are not where this host has a network that looks like theirs.
    """

    async def scene(house: House) -> None:
        house.engine.info = info
        places = [{"HostIp": "0.0.0.0", "HostPort": "8443"}, {"HostIp": "::", "HostPort": "8443"}]
        house.engine.run("a", "127.0.0.2", ports={"80/tcp": None, "443/tcp": places})
        async with house.controller(relist_interval=0.05):
            await until(lambda: len(house.engine.lists) > 3, "several lists")
            await until(lambda: house.router.pools, "a table")

            ((backend,),) = (route.backends for route in house.router.routes)
            assert place == (backend.address, backend.port, backend.detour)
            assert 1 == house.engine.infos

    play(tmp_path, scene)


def test_event_becomes_a_table_in_time(tmp_path: Path) -> None:
    """
    From the engine's event to the router's ack takes less than 500 ms, and the log says how long.
    """

    async def scene(house: House) -> None:
        async with house.controller():
            await until(lambda: house.engine.heard and house.router.tables, "the first table")
            house.engine.run("a", "127.0.0.2")
            await house.engine.event("start")
            await until(lambda: house.router.pools, "the route")
            house.engine.run("a", "127.0.0.9")
            await house.engine.event("die")
            await house.engine.event("start")
            await until(lambda: house.router.pools == {"a.example.com": ["127.0.0.9"]}, "the move")

    lines = [line for line in play(tmp_path, scene) if line["event"] == "table acknowledged"]

    assert [[], ["a.example.com"], []] == [line["added"] for line in lines]
    assert [[], [], ["a.example.com"]] == [line["changed"] for line in lines]
    assert [True, False, False] == [line["event_ms"] is None for line in lines]
    assert all(line["event_ms"] < 500 for line in lines[1:])


def test_first_bell_acts_at_once_and_a_burst_slowly(tmp_path: Path) -> None:
    """
    The first event after quiet makes a list within 50 ms, further ones one every 250 ms.
    """

    async def scene(house: House) -> None:
        async with house.controller():
            await until(lambda: house.engine.heard and house.router.tables, "the first table")
            lists, waits = house.engine.lists, []
            for _ in range(3):
                await asyncio.sleep(0.3)  # the quiet, by definition of the test
                seen, start = len(lists), time.monotonic()
                while time.monotonic() < start + 0.6:
                    await house.engine.event("start")
                    await asyncio.sleep(0.01)
                await until(lambda seen=seen: len(lists) >= seen + 3, "the lists of the burst")
                waits.append(lists[seen] - start)

                assert all(b - a > 0.2 for a, b in pairwise(lists[seen:]))
            # the best of three is the design, the others may be the machine
            assert min(waits) < 0.05

    play(tmp_path, scene)


def test_a_list_that_nobody_rang_for_holds_no_event_up(tmp_path: Path) -> None:
    """
    An event right behind the afterthought's list is acted on as one after quiet.
    """

    async def scene(house: House) -> None:
        async with house.controller():
            await until(lambda: house.engine.heard and house.router.tables, "the first table")
            lists, waits = house.engine.lists, []
            for _ in range(3):
                seen = len(lists)
                await house.engine.event("start")
                await until(lambda seen=seen: len(lists) >= seen + 2, "the afterthought")
                start = time.monotonic()
                await house.engine.event("start")
                await until(lambda seen=seen: len(lists) >= seen + 3, "the list of the event")
                waits.append(lists[seen + 2] - start)
            # the best of three is the design, the others may be the machine
            assert min(waits) < 0.1

    play(tmp_path, scene)


def test_noise_rings_no_bell(tmp_path: Path) -> None:
    """
    Health checks, exec, attach and top cause no list.
    """

    async def scene(house: House) -> None:
        async with house.controller():
            await until(lambda: house.engine.heard and house.router.tables, "the first table")
            before = len(house.engine.lists)
            for action in ("exec_create: true", "exec_start: true", "exec_die", "attach", "top"):
                await house.engine.event(action)
            await house.engine.event("health_status: healthy")
            await house.engine.event("create", "volume")
            # the bell that does ring is behind the noise, so the noise has been read
            await house.engine.event("connect", "network")
            await until(lambda: len(house.engine.lists) > before, "the list of the real event")
            await until(lambda: house.router.engine()["lists"] == before + 1, "the report")

            assert 1 == house.router.engine()["events"]

    play(tmp_path, scene)


def test_engine_is_listed_once_more_after_an_event(tmp_path: Path) -> None:
    """
    An engine whose own list lags behind its event is not believed for a minute.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        async with house.controller():
            await until(lambda: house.engine.heard and house.router.pools, "the first table")
            before = len(house.engine.lists)
            await house.engine.event("die")
            await until(lambda: len(house.engine.lists) > before, "the list of the event")
            del house.engine.containers["a"]
            await until(lambda: not house.router.pools, "the second look")

    play(tmp_path, scene)


def test_failed_list_changes_nothing(tmp_path: Path) -> None:
    """
    An engine that answers with an error has not said that nothing runs.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        async with house.controller():
            await until(lambda: house.router.pools and house.engine.heard, "a table")
            house.engine.broken = True
            del house.engine.containers["a"]
            await house.engine.event("die")
            await until(lambda: house.router.engine()["failed_lists"] > 1, "failed lists")
            assert not house.router.engine()["connected"]
            assert {"a.example.com": ["127.0.0.2"]} == house.router.pools
            assert 1 == len(house.router.tables)

            house.engine.broken = False
            await until(lambda: not house.router.pools, "the truth, once it is told")

    lines = [line["event"] for line in play(tmp_path, scene)]

    assert 1 == lines.count("engine away")
    assert 2 == lines.count("engine connected")


def test_engine_restart_changes_no_route(tmp_path: Path) -> None:
    """
    An engine that goes away and comes back with the same containers causes no table.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        async with house.controller():
            await until(lambda: house.router.pools and house.engine.heard, "a table")
            await house.engine.stop()
            await until(lambda: not house.router.engine()["connected"], "the loss")
            await house.engine.start()
            await until(lambda: house.router.engine()["connected"], "the return")

            assert 1 == len(house.router.tables)
            assert {"a.example.com": ["127.0.0.2"]} == house.router.pools

    play(tmp_path, scene)


def test_cut_stream_loses_no_event(tmp_path: Path) -> None:
    """
    What changes while nobody listens is seen, and the new stream starts before the new list.
    """

    async def scene(house: House) -> None:
        async with house.controller():
            await until(lambda: house.engine.heard and house.router.tables, "the first table")
            house.engine.run("a", "127.0.0.2")
            house.engine.cut()
            await until(lambda: house.router.pools, "the route")

            assert 2 == len(house.engine.since)
            assert all(abs(time.time() - since) < DEADLINE for since in house.engine.since)

    play(tmp_path, scene)


def test_relist_finds_what_no_event_told(tmp_path: Path) -> None:
    """
    An event that the engine lost costs at most the relist interval.
    """

    async def scene(house: House) -> None:
        async with house.controller(relist_interval=0.1):
            await until(lambda: house.engine.heard and house.router.tables, "the first table")
            house.engine.run("a", "127.0.0.2")
            await until(lambda: house.router.pools, "the route")

    play(tmp_path, scene)


def test_router_restarts_get_the_table_again(tmp_path: Path) -> None:
    """
    A router that knows nothing is told all, under a generation that has grown.

    The sixth of them waits no longer than the first, and each loss is logged.
    """
    restarts, took = 6, 0.0

    async def scene(house: House) -> None:
        nonlocal took
        house.engine.run("a", "127.0.0.2")
        async with house.controller():
            await until(lambda: house.router.pools, "a table")
            for _ in range(restarts):
                generation = house.router.generation
                await house.router.stop()
                fresh = house.router = Router(house.router.path)
                await fresh.start()
                start = time.monotonic()
                await until(lambda: fresh.pools == {"a.example.com": ["127.0.0.2"]}, "the table")  # noqa: B023 - awaited in its round
                took = time.monotonic() - start
                await until(fresh.connected, "the report, which follows the answer to the table")

                assert fresh.generation > generation

    lines = play(tmp_path, scene)

    assert took < sum(islice(delays(), 3))
    assert restarts == [line["event"] for line in lines].count("router away")


def test_router_that_serves_the_table_is_left_alone(tmp_path: Path) -> None:
    """
    A restarted controller that finds the same containers pushes nothing.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        async with house.controller():
            await until(lambda: house.router.connected() == {house.engine.url: True}, "a report")
        house.router.report = {"engines": [], "problems": []}
        async with house.controller():
            await until(lambda: house.router.connected() == {house.engine.url: True}, "a report")

            assert 1 == len(house.router.tables)

    play(tmp_path, scene)


def test_controller_beside_a_dead_engine_drops_nothing(tmp_path: Path) -> None:
    """
    Until a source has spoken, what the router serves of it counts; then what it says.
    """
    routes = tmp_path / "routes.toml"
    routes.write_text('[[route]]\nhost = ["s.example"]\nbackends = ["127.0.0.8:443"]\n')

    async def scene(house: House) -> None:
        gone = Backend("x", "unix:///no/longer/asked/for", "127.0.0.7", 443)
        known = Backend("a", house.engine.url, "127.0.0.2", 443)
        house.router.generation = 41
        house.router.routes = (Route("a.example.com", (known,)), Route("x.example", (gone,)))
        house.router.networks = ("127.0.0.0/8",)
        house.router.alive = {
            house.engine.url: frozenset({"127.0.0.2"}),
            gone.source: frozenset({"127.0.0.7"}),
        }
        await house.engine.stop()
        async with house.controller(routes=routes):
            await until(lambda: "s.example" in house.router.pools, "the file's route")
            assert {"a.example.com", "s.example"} == house.router.pools.keys()
            assert 42 == house.router.generation
            assert ("127.0.0.0/8",) == house.router.networks
            assert {house.engine.url: {"127.0.0.2"}} == house.router.alive

            fresh = Router(house.router.path)
            await house.router.stop()
            house.router = fresh
            await fresh.start()
            await until(lambda: "a.example.com" in fresh.pools, "the same for a fresh router")

            house.engine.run("b", "127.0.0.3")
            await house.engine.start()
            expected = {"b.example.com", "s.example"}
            await until(lambda: fresh.pools.keys() == expected, "what the engine says")
            assert () == fresh.networks
            assert {house.engine.url: {"127.0.0.3"}} == fresh.alive

    play(tmp_path, scene)


def test_nothing_heard_is_no_table(tmp_path: Path) -> None:
    """
    A router without a table gets none from a controller that has heard of nothing.
    """

    async def scene(house: House) -> None:
        await house.engine.stop()
        async with house.controller():
            await until(lambda: house.router.report["engines"], "the report")

            assert [] == house.router.tables

    play(tmp_path, scene)


def test_dead_engine_does_not_hold_up_another(tmp_path: Path) -> None:
    """
    Each engine is followed on its own.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        dead = f"unix://{tmp_path}/dead.sock"
        async with house.controller(engine=(dead, house.engine.url)):
            await until(lambda: house.router.pools, "the living engine's route")
            expected = {dead: False, house.engine.url: True}
            await until(lambda: house.router.connected() == expected, "the report of both")

    play(tmp_path, scene)


def test_refused_table_is_a_problem_and_is_not_sent_again(tmp_path: Path) -> None:
    """
    The router's no is reported until a table is taken.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        house.router.refuse = True
        async with house.controller(relist_interval=0.05):
            await until(lambda: house.router.codes() == ["table-refused"], "the problem")
            lists = len(house.engine.lists)
            await until(lambda: len(house.engine.lists) > lists + 3, "more lists")
            assert 1 == len(house.router.tables)

            house.router.refuse = False
            house.engine.run("b", "127.0.0.3")
            await until(lambda: house.router.codes() == [], "the end of the problem")
            assert 2 == len(house.router.pools)

    play(tmp_path, scene)


def test_problem_is_logged_once_when_it_comes_and_once_when_it_goes(tmp_path: Path) -> None:
    """
    A bad label breaks no other route, is reported, and does not fill the log.
    """
    labels = {"sniroute.host": "b.example.com,b..", "sniroute.hots": "x"}

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        house.engine.run("b", "127.0.0.3", labels=labels)
        async with house.controller(relist_interval=0.05):
            await until(lambda: house.router.codes() == ["bad-host", "unknown-label"], "problems")
            assert {"a.example.com", "b.example.com"} == house.router.pools.keys()
            lists = len(house.engine.lists)
            await until(lambda: len(house.engine.lists) > lists + 3, "more lists")
            del house.engine.containers["b"]
            await until(lambda: house.router.codes() == [], "the end of the problems")

    lines = play(tmp_path, scene)

    for event in ("problem", "problem gone"):
        codes = sorted(line["code"] for line in lines if line["event"] == event)
        assert ["bad-host", "unknown-label"] == codes
    assert {"b"} == {line["container"] for line in lines if line["event"] == "problem"}


class LeavingRuntime:
    """
    An engine whose list fails, and whose event stream takes a moment to leave.
    """

    leaving: asyncio.Event

    def __init__(self, _: object) -> None:
        type(self).leaving = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def listen(self, _: object) -> None:
        """
        Listen until cancelled, and tell then.
        """
        try:
            await asyncio.Event().wait()
        finally:
            self.leaving.set()
            await asyncio.sleep(0.05)

    async def look(self) -> None:
        """
        Fail, once the other task has begun.
        """
        await asyncio.sleep(0.01)
        raise OSError("broken")


def test_controller_ends_also_while_an_engine_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A cancellation that comes in the middle of a failure is not lost with it.
    """
    monkeypatch.setattr("controller.app.Runtime", LeavingRuntime)

    async def scene(house: House) -> None:
        task = asyncio.create_task(Controller(house.settings()).run())
        await asyncio.sleep(0)
        await until(lambda: getattr(LeavingRuntime, "leaving", None), "the engine's first try")
        await LeavingRuntime.leaving.wait()
        task.cancel()
        await asyncio.wait([task], timeout=1)

        assert task.cancelled()

    play(tmp_path, scene)


def test_only_what_runs_is_routed(tmp_path: Path) -> None:
    """
    Paused and restarting containers get no connections; one that just ended is no error.
    """

    async def scene(house: House) -> None:
        house.engine.run("paused", "127.0.0.2", status="paused")
        house.engine.run("restarting", "", status="restarting")
        house.engine.run("joined", "", mode="container:owner")
        house.engine.run("owner", "127.0.0.4", labels={})
        house.engine.run("orphan", "", mode="container:gone")
        async with house.controller():
            await until(lambda: house.router.pools, "a table")

            assert {"joined.example.com": ["127.0.0.4"]} == house.router.pools
            assert {house.engine.url: {"127.0.0.2", "127.0.0.4"}} == house.router.alive
            await until(lambda: house.router.codes() == ["no-network"], "the orphan's problem")

    play(tmp_path, scene)


def test_end_of_a_container_is_told_also_where_no_route_changes(tmp_path: Path) -> None:
    """
    A labelled container that no route leads to is told alive, and its end alone is a table.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        house.engine.run("b", "127.0.0.3", labels={"sniroute.enable": "false"})
        async with house.controller(relist_interval=0.05):
            both = {house.engine.url: {"127.0.0.2", "127.0.0.3"}}
            await until(lambda: house.router.alive == both, "both addresses")
            tables = len(house.router.tables)
            del house.engine.containers["b"]
            one = {house.engine.url: {"127.0.0.2"}}
            await until(lambda: house.router.alive == one, "one address")

            assert tables + 1 == len(house.router.tables)
            house.engine.broken = True
            lists = len(house.engine.lists)
            await until(lambda: len(house.engine.lists) > lists + 1, "lists that fail")
            assert one == house.router.alive

    play(tmp_path, scene)


def test_bad_routes_file_keeps_the_old_routes(tmp_path: Path) -> None:
    """
    A mistake in the file is reported with its place, and costs no route.
    """
    path = tmp_path / "routes.toml"
    good = '[[route]]\nhost = ["s.example"]\nbackends = ["127.0.0.8:443"]\n'
    path.write_text(good)

    async def scene(house: House) -> None:
        async with house.controller(engine=("none",), routes=path):
            await until(lambda: house.router.pools, "the file's route")
            path.write_text(good.replace("s.example", "s..example"))
            await until(lambda: house.router.codes() == ["bad-routes-file"], "the problem")
            assert {"s.example": ["127.0.0.8"]} == house.router.pools
            path.write_text(good.replace("s.example", "t.example"))
            await until(lambda: "t.example" in house.router.pools, "the new route")
            await until(lambda: house.router.codes() == [], "the end of the problem")

    play(tmp_path, scene)


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def test_process_has_no_privilege_and_ends_cleanly(tmp_path: Path) -> None:
    """
    `python -m controller` holds no capability, can gain none, and ends with 0 on SIGTERM.

    Its memory, and so its descriptors, are closed to other processes of its user.
    """

    async def scene(house: House) -> None:
        house.engine.run("a", "127.0.0.2")
        environ = house.settings(log_level="info").environment()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controller"),
            env={**os.environ, **environ},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await until(lambda: house.router.pools, "a table")
            status = read_status(process.pid)
            assert {"0" * 16} == {status[f"Cap{which}"] for which in ("Eff", "Prm", "Inh", "Amb")}
            assert "1" == status["NoNewPrivs"]
            with pytest.raises(HarnessError, match="Permission denied"):
                run(*limited(), "cat", f"/proc/{process.pid}/environ")
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = await process.communicate()
        assert 0 == process.returncode
        lines = [json.loads(line) for line in err.splitlines()]
        assert {"controller"} == {line["process"] for line in lines}
        assert "controller stopped" == lines[-1]["event"]

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "environ", [{"SNIROUTE_ENGINE": "dokcer"}, {"SNIROUTE_RELIST_INTERVAL": "soon"}]
)
def test_bad_setting_ends_the_process_with_a_word(environ: dict[str, str]) -> None:
    """
    A setting that can not be is an error at start, with exit code 2.
    """

    async def run() -> tuple[int | None, bytes]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controller"),
            env={**os.environ, **environ},
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(3 * DEADLINE):
            _, err = await process.communicate()
        return process.returncode, err

    code, err = asyncio.run(run())

    assert 2 == code
    assert err.startswith(b"sniroute controller: ")
    assert b"Traceback" not in err
