"""
Counting: histograms as Prometheus reads them, and routes that are forgotten.
"""

import threading
from functools import partial
from pathlib import Path

import pytest

from controller.core.routes import Backend, Route
from controller.core.session import Session
from controller.router.connection import Connection, Hello
from controller.router.control import Control, listen
from controller.router.flow import Flow
from controller.router.loop import Loop
from controller.router.metrics import RouterCollector
from controller.router.relay import RelayHandoff
from controller.router.router import Router
from controller.router.stats import NO_ROUTE, Histogram, Stats
from controller.settings import RouterSettings

ROUTE = Route("app.example.com", (Backend("app", "docker", "198.51.100.2", 443),))


class StillFlow(Flow):
    """
    A flow that has moved 3 bytes in and 5 out, and has ended.
    """

    handoff = "relay"

    def __init__(self) -> None:
        self.session = Session()
        self.session.failed("client_rst")

    def bytes(self, side: int) -> int:  # noqa: D102 - as the base class's
        return (3, 5)[side]


class WatchedFlow(StillFlow):
    """
    A flow under way, which takes note of the threads that read it.
    """

    def __init__(self) -> None:
        self.session = Session()
        self.readers: set[int] = set()

    def bytes(self, side: int) -> int:  # noqa: D102 - as the base class's
        self.readers.add(threading.get_ident())
        return super().bytes(side)


def ended_connection(result: str, route: Route | None, flow: Flow | None) -> Connection:
    connection = Connection.__new__(Connection)
    connection.result, connection.route, connection.flow = result, route, flow
    connection.hello = Hello(size=517, seconds=0.002)
    return connection


def test_a_histogram_is_cumulative() -> None:
    """
    A value on a bound is counted below it, and each bucket holds all smaller ones.
    """
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)

    assert [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)] == histogram.buckets()
    assert histogram.sum == 102.0


def test_a_connection_is_counted_by_route_and_result() -> None:
    """
    A handed-over connection counts its result, the reason of its end, and its bytes each way.
    """
    stats = Stats()

    stats.ended(ended_connection("forwarded", ROUTE, StillFlow()))

    assert {("app.example.com", "forwarded"): 1} == stats.connections
    assert {"client_rst": 1} == stats.reasons
    assert stats.bytes == {
        ("app.example.com", "in", "relay"): 3,
        ("app.example.com", "out", "relay"): 5,
    }
    assert stats.hello_size.sum == 517


def test_a_connection_without_a_route_has_an_empty_one() -> None:
    """
    What was refused before it had a route is counted under the empty route, and moved no bytes.
    """
    stats = Stats()

    stats.ended(ended_connection("no_sni", None, None))

    assert {(NO_ROUTE, "no_sni"): 1} == stats.connections
    assert {} == stats.bytes


def test_a_route_that_comes_back_counts_on() -> None:
    """
    While its only container restarts a route is gone; its counts are not.
    """
    stats = Stats()
    stats.connections["app.example.com", "forwarded"] += 5

    stats.keep_routes([])
    stats.keep_routes(["app.example.com"])

    assert {("app.example.com", "forwarded"): 5} == stats.connections


def test_routes_that_are_no_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Names that come and go cost no memory: the longest gone are forgotten.
    """
    monkeypatch.setattr("controller.router.stats.GONE_ROUTES", 0)
    stats = Stats()
    for host in ("kept.example.com", "gone.example.com", NO_ROUTE):
        stats.connections[host, "forwarded"] += 1
        stats.bytes[host, "in", "relay"] += 1
        stats.connect_errors[host, "econnrefused"] += 1
        stats.connected(host, 0.001)

    stats.keep_routes(["kept.example.com"])

    kept = {"kept.example.com", NO_ROUTE}
    counters = (stats.connections, stats.bytes, stats.connect_errors)
    assert [kept] * 3 == [{key[0] for key in counter} for counter in counters]
    assert kept == set(stats.connect_seconds)


def test_a_scrape_reads_between_two_handlers(tmp_path: Path) -> None:
    """
    All bytes are read in the loop's thread, so no flow ends between those counted and those moving.
    """
    router = Router(RouterSettings(), Loop(), 8)
    router.ladder = [RelayHandoff(router.loop)]
    flow = WatchedFlow()
    router.connections[1] = ended_connection("forwarded", ROUTE, flow)
    router.stats.ended(ended_connection("forwarded", ROUTE, StillFlow()))
    path = tmp_path / "router.sock"
    control = Control(router, listen(path), path, "0")
    collector = RouterCollector(router, control, "0")
    loop = threading.Thread(target=router.loop.run)
    loop.start()
    samples = [
        (sample.name, sample.labels.get("direction"), sample.value)
        for family in collector.collect()
        for sample in family.samples
        if family.name == "sniroute_forward_bytes"
    ]
    router.loop.ask(partial(setattr, router.loop, "stopping", True))
    loop.join()
    control.close()

    assert {loop.ident} == flow.readers
    name = "sniroute_forward_bytes_total"
    assert [(name, "in", 6), (name, "out", 10)] == samples
