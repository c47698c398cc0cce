"""
Every load: what it does to a contestant, what counts as its result, and what would be wrong.
"""

import contextlib
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import change, lab
from bench.contestants import (
    CONTESTANTS,
    SNIROUTE,
    Contestant,
    Job,
    command,
    handoff_of,
    seen_from,
)
from bench.lab import BACKEND, ROUTER, inside
from bench.values import BenchError, Sample
from prometheus_client.parser import text_string_to_metric_families

from controller.core.routes import Backend, Route, RouteTable

START_SECONDS = 30  # sniroute tests its kernel at start, and reads 100,000 routes
SPARE_SECONDS = 30  # over the measured time, until a generator is called stuck

Outcome = tuple[Sample, list[str]]
"""What was measured, and what went wrong meanwhile."""

Measure = Callable[["Bench", "Instance", "Load", float], Outcome]


@dataclass(frozen=True, slots=True)
class Load:
    """
    One kind of traffic; *number* is how many connections at once, or a second where paced.

    *cpu* names the machine's time for one unit, *scale* brings it to that; *lower* is better for
    times and sizes; *fresh* contestants are started for each measurement, since what they keep
    from earlier ones would count; *stretch* multiplies the time.
    """

    name: str
    title: str
    measure: Measure
    play: str = ""
    number: int = 0
    cpu: str = ""
    scale: float = 1e6
    lower: bool = False
    fresh: bool = False
    stretch: float = 1

    @property
    def host(self) -> str:
        """
        The server name that stands for this load's backend.
        """
        return f"{self.name}.example.com"


@dataclass(frozen=True, slots=True)
class Instance:
    """
    A contestant at work; *number* keeps its ports apart from the others'.
    """

    me: Contestant
    number: int
    job: Job
    pid: int | None = None

    def listen(self, load: Load) -> tuple[str, int]:
        """
        Where the client dials for *load*.
        """
        if self.me.name == "direct":
            return BACKEND, backend_port(self.number, load)
        nth = list(self.job.routes).index(load.host) if self.me.by_port else 0
        return self.job.address, self.job.port + nth

    def greeting(self, load: Load) -> str:
        """
        What only the right backend says.
        """
        return f"{self.me.name} {load.host} answered by the right backend".ljust(64)


def backend_port(number: int, load: Load) -> int:
    """
    Keep every contestant's backends on ports of their own, so that no TIME_WAIT is shared.
    """
    return 5000 + 32 * number + LOADS.index(load)


@dataclass(frozen=True, slots=True)
class Bench:
    """
    A built network with its generators, ready to measure.
    """

    work: Path
    traffic: Path
    tls: Path

    def prepare(self) -> None:
        """
        Write what the generators send.
        """
        for load in LOADS:
            (self.work / load.host).write_bytes(lab.client_hello(load.host))
        lab.make_certificate(TLS.host, self.work)

    @contextlib.contextmanager
    def running(
        self, me: Contestant, loads: list[Load], *, again: bool = False
    ) -> Iterator[Instance]:
        """
        Start a contestant in the router's namespace and wait until it routes every name.

        *again* is for one that already runs: the second has other ports.
        """
        number = CONTESTANTS.index(me) + len(CONTESTANTS) * again
        name = me.name.replace(" ", "-") + "-2" * again
        routes = {x.host: (BACKEND, backend_port(number, x)) for x in loads}
        for filler in range(me.routes - len(loads)):
            routes[f"n{filler}.filler.example.net"] = (BACKEND, 9)
        seen = seen_from(me, self.work)
        job = Job(name, ROUTER, 10000 + 32 * number, routes, self.work, seen, me.workers)
        with contextlib.ExitStack() as stack:
            if me.program == SNIROUTE:
                stack.enter_context(lab.bpffs(job.bpffs))
            if not (words := command(me, job)):
                yield Instance(me, number, job)
                return
            log = self.work / f"{name}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(words, stdout=out, stderr=out, cwd=self.work)
            stack.enter_context(lab.ended(process, SPARE_SECONDS))
            instance = Instance(me, number, job, process.pid)
            self._wait_for_routes(instance, loads, process, log)
            if me.handoff and handoff_of(job) != me.handoff:
                raise BenchError(f"{me.name}: runs as {handoff_of(job)}")
            yield instance

    def _wait_for_routes(
        self, at: Instance, loads: list[Load], process: subprocess.Popen[bytes], log: Path
    ) -> None:
        deadline = time.monotonic() + START_SECONDS
        for load in loads:
            while wrong := self.probe(at, load):
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise BenchError(f"{at.me.name} does not route: {wrong}\n{tail}")
                time.sleep(0.1)

    def guard(self, at: Instance, load: Load) -> list[str]:
        """
        Ask one of ours whether the rung that is measured has moved the bytes; say if not.
        """
        if not at.me.handoff:
            return []
        metrics = lab.fetch("router", f"http://{at.job.metrics}/metrics")
        return not_carried(at.me.handoff, load.host, metrics)

    def probe(self, at: Instance, load: Load) -> str:
        """
        Make one connection; say what is wrong with it.
        """
        with self.ends(at, load, 0, play="fin", number=1) as (here, there):
            pass
        return str(here.get("first_error") or there.get("first_error", ""))

    @contextlib.contextmanager
    def ends(
        self, at: Instance, load: Load, seconds: float, *, play: str = "", number: int = 0
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """
        Run both ends of a load; the block runs while `hold` and `stall` hold.

        What they print is in the two dicts, client and backend, after the block.
        """
        play, number = play or load.play, number or load.number
        port, greeting = str(backend_port(at.number, load)), at.greeting(load)
        address, front = at.listen(load)
        if play == "tls":
            files = [str(self.work / x) for x in ("chain.pem", "key.pem", "ca.pem")]
            back = [str(self.tls), "backend", BACKEND, port, files[0], files[1], greeting]
            fore = [str(self.tls), "client", address, str(front), files[2], load.host, greeting]
        else:
            hello = str(self.work / load.host)
            back = [str(self.traffic), "backend", BACKEND, port, hello, greeting, play]
            back.append(str(seconds))
            fore = [str(self.traffic), "client", address, str(front), hello, greeting, play]
        fore += [str(seconds), str(number)]
        here: dict[str, Any] = {}
        there: dict[str, Any] = {}
        with _end("backend", back) as backend:
            _expect(backend, "ready", at, load)
            with _end("client", fore) as client:
                if play in ("hold", "stall"):
                    _expect(client, "held", at, load)
                yield here, there
                here |= _said(client, seconds, at, load)
            there |= _said(backend, seconds, at, load)


def _end(namespace: str, words: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(inside(namespace, *words), stdin=pipe, stdout=pipe, text=True)


def _expect(end: subprocess.Popen[str], word: str, at: Instance, load: Load) -> None:
    if not end.stdout or end.stdout.readline() != f"{word}\n":
        raise BenchError(f"{at.me.name} {load.name}: a generator did not get {word!r}")


def _said(end: subprocess.Popen[str], seconds: float, at: Instance, load: Load) -> dict[str, Any]:
    # for the backend, and for a client that holds, the end of stdin is the end
    try:
        said, _ = end.communicate(timeout=seconds + SPARE_SECONDS)
    except subprocess.TimeoutExpired:
        end.kill()
        said, _ = end.communicate()
    if end.returncode:
        raise BenchError(f"{at.me.name} {load.name}: a generator failed")
    return dict(json.loads(said))


def wrongs(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """
    Compare the two ends: every connection and every byte has to come out once.
    """
    wrong = [f"{x['first_error']} ({x['errors']} such)" for x in (here, there) if x["errors"]]
    if wrong:
        return wrong
    if there["ended"] != here["done"]:
        wrong.append(f"{here['done']} connections came out as {there['ended']}")
    wrong.extend(
        f"{sent} bytes came out as {got}"
        for sent, got in ((there["out"], here["in"]), (here["out"], there["in"]))
        if sent != got
    )
    return wrong


CARRIED = 0.99
"""The share of a load's bytes that a rung must move itself, to have its name in a table; the rest
is for a connection that the start of a contestant is tried with."""


def not_carried(handoff: str, host: str, metrics: str) -> list[str]:
    """
    Read in a router's metrics how the traffic for *host* was moved; say if not by *handoff*.
    """
    moved, refusals = Counter[str](), []
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "sniroute_forward_bytes_total" and labels["route"] == host:
                moved[labels["handoff"]] += int(sample.value)
            elif sample.name == "sniroute_handoff_refusals_total":
                refusals.append(f"{labels['handoff']}: {labels['reason']} {sample.value:.0f}")
    if moved[handoff] >= CARRIED * moved.total() > 0:
        return []
    why = f" ({', '.join(refusals)})" if refusals else ""
    return [f"{handoff} moved {moved[handoff]} of {moved.total()} bytes{why}"]


# --- how each is measured ---------------------------------------------------------------


def exchange(bench: Bench, at: Instance, load: Load, seconds: float) -> Outcome:
    """
    Let both ends run for so long, and count what came through in time.
    """
    with bench.ends(at, load, seconds) as (here, there):
        before = lab.busy_seconds()
    spent = lab.busy_seconds() - before
    bytes_moved = here["in"] + here["out"]
    if bytes_moved:
        units, value = bytes_moved, bytes_moved * 8e-9 / here["seconds"]
    elif load.play == "trips":
        units, value = here["count"], here["count"] / here["seconds"]
    else:
        units, value = here["done"], here["count"] / seconds
    extra = {}
    if load.play == "paced":
        extra = {name: here[key] * 1e6 for name, key in PERCENTILES.items()}
        value = extra["p99"]
    return Sample(value, spent / units if units else 0, extra), wrongs(here, there)


PERCENTILES = {"p50": "p50", "p99": "p99", "p99.9": "p999"}


def hold(bench: Bench, at: Instance, load: Load, seconds: float) -> Outcome:
    """
    Hold connections open; count the memory that they took, in process and kernel, per connection.

    The ends' own sockets are in it, alike for all: they are what `direct` shows.
    """
    process, kernel = lab.process_memory(at.pid), lab.kernel_memory()
    beside: Outcome | None = None
    with bench.ends(at, load, 0) as ends:
        busy = lab.busy_share(seconds)
        process = lab.process_memory(at.pid) - process
        kernel = lab.kernel_memory() - kernel
        if load.play == "stall":
            beside = exchange(bench, at, BURST, seconds)
    here, there = ends
    # what a stalled reader did not read, nobody compares
    wrong = wrongs(here | {"in": 0}, there | {"out": 0})
    kib = 1024 * load.number
    extra = {"process": process / kib, "kernel": kernel / kib, "CPU %": busy * 100}
    if beside:
        extra["burst beside"] = beside[0].value
        wrong += beside[1]
    return Sample((process + kernel) / kib, 0, extra), wrong


def find(_: Bench, at: Instance, __: Load, seconds: float) -> Outcome:
    """
    Look names up in a table of so many routes, in this process: exact names and wildcards.
    """
    backends = (Backend("b", "bench", BACKEND, 443),)
    count = at.me.routes // 2
    exact = [f"n{i}.example.com" for i in range(count)]
    below = [f"*.w{i}.example.com" for i in range(count)]
    table = RouteTable(1, (Route(host, backends) for host in exact + below))
    choose = random.Random(1)  # noqa: S311 - the same names for each contestant and round
    picks = [choose.randrange(count) for _ in range(1000)]
    names = [f"n{i}.example.com" if i % 2 else f"a.w{i}.example.com" for i in picks]
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        for name in names:
            table.find(name)
        done += len(names)
    wrong = [] if all(map(table.find, names)) else ["a name was not found"]
    return Sample(took / done * 1e9), wrong


PAUSES = {"now-and-then": (0.3, 1.5), "often": (0.02, 0.2)}
"""Seconds between changes of a container, the least and the most."""


def changes(bench: Bench, at: Instance, load: Load, seconds: float) -> Outcome:
    """
    Move a labelled container; time its event to the first connection on the new backend.
    """
    hello = (bench.work / load.host).read_bytes()
    said: list[dict[str, Any]] = []
    served = {}

    def hear(backend: subprocess.Popen[str]) -> None:
        said.append(_said(backend, 0, at, load))

    with contextlib.ExitStack() as stack:
        for port in (backend_port(at.number, x) for x in (load, BURST)):
            served[port] = f"{port} answered".ljust(64)
            words = [BACKEND, str(port), str(bench.work / load.host), served[port], "fin", "0"]
            backend = _end("backend", [str(bench.traffic), "backend", *words])
            stack.callback(hear, backend)
            _expect(backend, "ready", at, load)
        times, wrong = change.measure(
            at.me,
            at.job,
            load.host,
            hello=hello,
            served=served,
            pauses=PAUSES[load.play],
            seconds=seconds,
        )
    wrong += [x["first_error"] for x in said if x["errors"]]
    times.sort()
    extra = {"p50": times[len(times) // 2], "p99": times[int(0.99 * (len(times) - 1) + 0.5)]}
    return Sample(extra["p50"], 0, {**extra, "changes": len(times)}), wrong


# --- the loads --------------------------------------------------------------------------

BURST = Load("burst", "connections/s, 64 at once, FIN", exchange, "fin", 64, "CPU us each")
TLS = Load("tls", "TLS 1.3 handshakes/s, 64 at once", exchange, "tls", 64, "CPU us each")

LOADS = (
    BURST,
    Load("single", "connections/s, one after the other, FIN", exchange, "fin", 1, "CPU us each"),
    Load("burst-rst", "connections/s, 64 at once, RST", exchange, "reset", 64, "CPU us each"),
    Load(
        "single-rst", "connections/s, one after the other, RST", exchange, "reset", 1, "CPU us each"
    ),
    *(
        Load(f"{play}-{n}", f"Gbit/s, {n} {play}load{'s' * (n > 1)}", exchange, play, n, *gigabyte)
        for gigabyte in (("CPU s/GB", 1e9),)
        for play in ("down", "up")
        for n in (1, 8)
    ),
    *(
        Load(f"trips-{n}", f"round trips/s, {n} at once", exchange, "trips", n, "CPU us each")
        for n in (1, 32, 256)
    ),
    TLS,
    Load(
        "first-byte",
        "us to the first byte (p99), 200 connections/s",
        exchange,
        "paced",
        200,
        "CPU us each",
        lower=True,
        stretch=4,
    ),
    Load("idle", "KiB each, 5,000 idle", hold, "hold", 5000, lower=True, fresh=True),
    Load(
        "stalled",
        "KiB each, 200 stalled readers",
        hold,
        "stall",
        200,
        lower=True,
        fresh=True,
        stretch=2,
    ),
    Load(
        "change",
        "ms from a container's event to its first connection (p50)",
        changes,
        "now-and-then",
        lower=True,
        fresh=True,
        stretch=6,
    ),
    Load(
        "churn",
        "ms from an event to its first connection (p50), while a container keeps changing",
        changes,
        "often",
        lower=True,
        fresh=True,
        stretch=3,
    ),
    Load("routes", "connections/s, 64 at once", exchange, "fin", 64, "CPU us each"),
    Load("find", "ns for a look-up in the table", find, lower=True),
)


def named(names: list[str]) -> list[Load]:
    """
    Return the loads with these names, in their order.
    """
    return [x for x in LOADS if x.name in names]
