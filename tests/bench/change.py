"""
A route's change: an engine that says what it is told, and a client that waits for the answer.

The engine is as much of Docker's API as its readers use, so that no container's own start is in
the time.
"""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web
from bench import lab
from bench.contestants import Contestant, Job, sniroute_command, traefik_command
from bench.lab import BACKEND, BRIDGE, inside
from bench.values import BenchError

API = "1.44"
NETWORK = "bridge"

START_SECONDS = 20
CHANGE_SECONDS = 10  # Traefik holds changes back for 2 s unless told not to


class Engine:
    """
    One labelled container, on a port of the backend's address; runs in a thread of its own.
    """

    def __init__(self, path: Path, host: str) -> None:
        self._path = path
        self._host = host
        self._count = 0
        self._port = 0
        self._streams: set[web.StreamResponse] = set()
        self._end = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine")

    @property
    def heard(self) -> bool:
        """
        Tell whether anyone listens for events.
        """
        return bool(self._streams)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """
        Answer until the block ends.
        """
        app = web.Application()
        for path, handler in (
            ("/_ping", self._ping),
            ("/version", self._version),
            ("/info", self._info),
            ("/containers/json", self._list),
            ("/containers/{id}/json", self._inspect),
            ("/networks", self._networks),
            ("/events", self._events),
        ):
            app.router.add_get(path, handler)
            app.router.add_get(f"/v{API}{path}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0)
        self._thread.start()
        try:
            self._do(runner.setup())
            self._do(web.UnixSite(runner, str(self._path)).start())
            yield
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
            self._do(runner.cleanup())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def move(self, port: int) -> float:
        """
        Replace the container by one on *port*; return the time of the event.
        """
        return float(self._do(self._move(port)))

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _move(self, port: int) -> float:
        old, self._port = self._id, port
        self._count += 1
        start = time.monotonic()
        for action, name in (("die", old), ("start", self._id)):
            actor = {"ID": name, "Attributes": {}}
            told = {"Type": "container", "Action": action, "status": action, "id": name}
            line = json.dumps({**told, "Actor": actor, "timeNano": time.time_ns()}) + "\n"
            for stream in tuple(self._streams):
                await stream.write(line.encode())
        return start

    @property
    def _id(self) -> str:
        return f"{self._count:064x}"

    def _labels(self) -> dict[str, str]:
        port, tcp = str(self._port), "traefik.tcp"
        return {
            "sniroute.host": self._host,
            "sniroute.port": port,
            f"{tcp}.routers.r.rule": f"HostSNI(`{self._host}`)",
            f"{tcp}.routers.r.tls.passthrough": "true",
            f"{tcp}.services.s.loadbalancer.server.port": port,
        }

    async def _ping(self, _: web.Request) -> web.Response:
        return web.Response(text="OK", headers={"Api-Version": API})

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": API, "Version": "26.1.5"})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def _networks(self, _: web.Request) -> web.Response:
        return web.json_response([{"Name": NETWORK, "Driver": "bridge"}])

    async def _list(self, _: web.Request) -> web.Response:
        entry = {"Id": self._id, "Names": ["/app"], "Labels": self._labels(), "State": "running"}
        return web.json_response([entry] if self._count else [])

    async def _inspect(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != self._id:
            return web.json_response({"message": "no such container"}, status=404)
        network = {"IPAddress": BACKEND, "IPPrefixLen": 24, "Gateway": BRIDGE}
        return web.json_response(
            {
                "Id": self._id,
                "Name": "/app",
                "State": {"Status": "running", "Running": True},
                "Config": {"Labels": self._labels()},
                "HostConfig": {"NetworkMode": NETWORK},
                "NetworkSettings": {"Networks": {NETWORK: network}, "Ports": {}},
            }
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        self._streams.add(stream)
        try:
            await self._end.wait()
        finally:
            self._streams.discard(stream)
        return stream


def labels(job: Job, engine: Path) -> list[str]:
    """
    Run sniroute beside an engine, as it is run.
    """
    return sniroute_command(job, "--client-ip", "off", "--engine", f"unix://{engine}")


def traefik_labels(job: Job, engine: Path) -> list[str]:
    """
    Run Traefik beside an engine; its own throttle of 2 s would be all that is measured.
    """
    provider = f"--providers.docker.endpoint=unix://{engine}"
    return [*traefik_command(job), provider, "--providers.providersThrottleDuration=0.01s"]


COMMANDS = {"labels": labels, "traefik labels": traefik_labels}


def wait_for_answer(at: tuple[str, int], hello: bytes, greeting: str, seconds: float) -> float:
    """
    Dial until the backend that says *greeting* answers; return the time when it did, or 0.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        # not yet, or no route between two: that is what the time is taken for
        with contextlib.suppress(OSError), socket.create_connection(at, timeout=1) as sock:
            sock.sendall(hello)
            if sock.recv(len(greeting), socket.MSG_WAITALL) == greeting.encode():
                return time.monotonic()
        time.sleep(0.001)
    return 0


def measure(
    me: Contestant,
    job: Job,
    host: str,
    *,
    hello: bytes,
    served: dict[int, str],
    pauses: tuple[float, float],
    seconds: float,
) -> tuple[list[float], list[str]]:
    """
    Move the container from one of the ports *served* to the other, after *pauses*, for so long.

    Returns the milliseconds of each move, and what went wrong.
    """
    path = job.work / f"{job.name}.engine"
    path.unlink(missing_ok=True)
    engine = Engine(path, host)
    log = job.work / f"{job.name}.log"
    at = (job.address, job.port)
    here, there = served.items()
    choose = random.Random(1)  # noqa: S311 - the same pauses for each contestant and round
    times: list[float] = []
    with (
        engine.serving(),
        log.open("wb") as out,
        ThreadPoolExecutor(1, initializer=lab.enter, initargs=("client",)) as client,
    ):
        engine.move(here[0])
        words = inside("router", *COMMANDS[me.name](job, path))
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=job.work)
        with lab.ended(process, CHANGE_SECONDS):
            first = client.submit(wait_for_answer, at, hello, here[1], START_SECONDS)
            if not first.result() or not engine.heard:
                tail = log.read_text(errors="replace")[-2000:]
                raise BenchError(f"{me.name} does not route: {tail}")
            end = time.monotonic() + seconds
            while not times or time.monotonic() < end:
                here, there = there, here
                # each at another moment of whatever windows there are
                time.sleep(choose.uniform(*pauses))
                answer = client.submit(wait_for_answer, at, hello, here[1], CHANGE_SECONDS)
                start = engine.move(here[0])
                if not answer.result():
                    return times or [CHANGE_SECONDS * 1e3], ["a change was never seen"]
                times.append((answer.result() - start) * 1e3)
    return times, []
