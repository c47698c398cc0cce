"""
/metrics and /healthz: their names are an interface, and their numbers are exact.
"""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    Backend,
    client_hello,
    connection,
    read_all,
    read_exactly,
    reset,
)
from harness.loopback import LOOPBACK, Product
from harness.operate import LoneRouter, Talk, ask, lone_router, table
from harness.tools import REPOSITORY, wait_for
from prometheus_client.parser import text_string_to_metric_families

from controller.core.wire import encode
from controller.router.metrics import MAX_SCRAPERS

ROW = re.compile(r"\| `(sniroute_\w+)` \| \w+ \| (.*?) ?\| ")
"""A metric in the README's table: its name, its kind, its labels."""

REPORT = {
    "type": "report",
    "engines": [
        {
            "name": "docker",
            "url": "unix:///run/docker.sock",
            "connected": True,
            "containers": 3,
            "last_list": 1700000000.5,
            "events": 7,
            "lists": 4,
            "failed_lists": 1,
        }
    ],
    "problems": [
        {
            "code": "bad_host",
            "severity": "error",
            "container": "web",
            "label": "sniroute.host",
            "value": "a.*.org",
            "detail": "no such host",
        }
    ]
    * 2,
}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


@pytest.fixture
def router(tmp_path: Path) -> Iterator[LoneRouter]:
    with lone_router(tmp_path, "--handoff", "relay", "--hello-timeout", "0.5") as router:
        yield router


@pytest.fixture
def product(router: LoneRouter, backend: Backend) -> Product:
    """
    The router, with a route to the backend and one to nobody.
    """
    with socket.create_server((LOOPBACK, 0)) as gone:
        dead = gone.getsockname()
    ask(router.control, table(3, {NAME: [backend.address], "dead.example.com": [dead]}))
    return router.product


def samples(product: Product, *families: str) -> dict[tuple[str, ...], float]:
    """
    Read the samples of *families* as name and label values, the labels in the order of their names.

    Histograms come without their buckets.
    """
    return {
        (
            sample.name.removeprefix("sniroute_"),
            *dict(sorted(sample.labels.items())).values(),
        ): sample.value
        for family in text_string_to_metric_families(product.get("/metrics"))
        for sample in family.samples
        if family.name in families and not sample.name.endswith("_bucket")
    }


def status_of(product: Product, path: str) -> tuple[int, str]:
    url = f"http://{product.metrics[0]}:{product.metrics[1]}{path}"
    try:
        with urlopen(url, timeout=PATIENCE) as answer:
            return answer.status, answer.headers["Content-Type"]
    except HTTPError as err:
        with err:
            return err.code, err.headers["Content-Type"]


def test_ready_only_with_a_table(router: LoneRouter) -> None:
    """
    /healthz is 503 before a table came and 200 after, and other paths do not exist.
    """
    before = status_of(router.product, "/healthz")
    ask(router.control, table(1, {}))

    text = "text/plain; charset=utf-8"
    assert (503, text) == before
    assert (200, text) == status_of(router.product, "/healthz")
    assert (404, text) == status_of(router.product, "/")
    assert status_of(router.product, "/metrics")[0] == 200
    assert status_of(router.product, "/metrics")[1].startswith("text/plain; version=")


def test_not_ready_while_draining(router: LoneRouter, product: Product, backend: Backend) -> None:
    """
    /healthz is 503 from the first moment of a drain, for a balancer to look elsewhere.
    """
    with connection(product.listen, backend):
        ready = status_of(product, "/healthz")[0]
        ask(product.control, {"type": "drain"})

        assert (200, 503) == (ready, status_of(product, "/healthz")[0])
    assert router.process.wait(PATIENCE) == 0


def test_names_and_labels_are_as_documented(product: Product, backend: Backend) -> None:
    """
    The page has the families of the README and no others, and their samples those labels.
    """
    rows = ROW.findall((REPOSITORY / "README.md").read_text())
    # some are there only while packets are handed over
    rows = [row for row in rows if not row[0].startswith("sniroute_packet_")]
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    everything_happens(product, backend)
    with connection(product.listen, backend), Talk(product.control) as talk:
        talk.socket.sendall(encode(REPORT))
        wait_for("the report", lambda: product.counts("sniroute_problems", "code"))
        page = product.get("/metrics")
    suffix = {"counter": "_total"}
    found = {
        family.name.removesuffix("_total") + suffix.get(family.type, ""): {
            frozenset(sample.labels) - {"le"} for sample in family.samples
        }
        for family in text_string_to_metric_families(page)
    }

    assert set(documented) == set(found)
    labelled = {name: labels for name, labels in found.items() if labels}
    assert {name: {frozenset(documented[name])} for name in labelled} == labelled


def everything_happens(product: Product, backend: Backend) -> None:
    """
    Have one connection of each kind, and wait until all have ended.
    """
    with connection(product.listen, backend) as (client, end):
        client.sendall(b"up")
        client.shutdown(socket.SHUT_WR)
        read_all(end)
        end.sendall(b"down!")
        end.shutdown(socket.SHUT_WR)
        read_all(client)
    with connection(product.listen, backend) as (client, end):
        reset(client)
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    for host in ("dead.example.com", "unknown.example.com"):
        with socket.create_connection(product.listen, PATIENCE) as client:
            client.sendall(client_hello(host))
            read_all(client)
    with socket.create_connection(product.listen, PATIENCE) as client:
        client.sendall(HELLO[:99])
        read_all(client)
    wait_for(
        "every end",
        lambda: sum(product.counts("sniroute_connections_total", "result").values()) == 5,
    )


def test_every_connection_is_counted_once(product: Product, backend: Backend) -> None:
    """
    Results, ends and connect errors are counted under their route and their reason.
    """
    everything_happens(product, backend)

    assert {
        ("connections_total", "forwarded", NAME): 2,
        ("connections_total", "connect_failed", "dead.example.com"): 1,
        ("connections_total", "no_route", ""): 1,
        ("connections_total", "hello_timeout", ""): 1,
        ("backend_connect_errors_total", "econnrefused", "dead.example.com"): 1,
    } == samples(product, "sniroute_connections", "sniroute_backend_connect_errors")
    ends = product.counts("sniroute_connection_ends_total", "reason")
    assert {"client_fin": 1, "client_rst": 1} == ends
    connects = samples(product, "sniroute_backend_connect_duration_seconds")
    assert connects["backend_connect_duration_seconds_count", NAME] == 2


def test_bytes_are_exact_while_they_flow_and_after(product: Product, backend: Backend) -> None:
    """
    The bytes of a route are those that its two ends sent, the hello among them, at any time.
    """
    up, down = 300_000, 123_457
    expected = {
        ("forward_bytes_total", "in", "relay", NAME): len(HELLO) + up,
        ("forward_bytes_total", "out", "relay", NAME): down,
    }
    with connection(product.listen, backend) as (client, end):
        client.sendall(bytes(up))
        end.sendall(bytes(down))
        read_exactly(end, up)
        read_exactly(client, down)

        assert expected == samples(product, "sniroute_forward_bytes")
        assert {("connections_active", "relay", NAME): 1} == samples(
            product, "sniroute_connections_active"
        )
        assert {} == samples(product, "sniroute_connections")

    wait_for("the end", lambda: samples(product, "sniroute_connections"))
    assert expected == samples(product, "sniroute_forward_bytes")
    assert {} == samples(product, "sniroute_connections_active")


def test_hellos_are_measured(product: Product, backend: Backend) -> None:
    """
    Size and time of each hello are in their histograms, in the right bucket.
    """
    with connection(product.listen, backend) as (client, _):
        reset(client)
    wait_for("the end", lambda: samples(product, "sniroute_connections"))

    sizes = samples(product, "sniroute_client_hello_size_bytes")
    times = samples(product, "sniroute_client_hello_duration_seconds")
    assert sizes[("client_hello_size_bytes_count",)] == 1
    assert sizes[("client_hello_size_bytes_sum",)] == len(HELLO)
    assert times[("client_hello_duration_seconds_count",)] == 1
    assert 0 < times[("client_hello_duration_seconds_sum",)] < 1
    buckets = product.counts("sniroute_client_hello_size_bytes_bucket", "le")
    assert {bound: float(len(HELLO) <= float(bound)) for bound in buckets} == buckets


def test_the_table_and_the_controller_are_told(product: Product) -> None:
    """
    Generation, age and number of routes, refused tables, and what the controller reports.
    """
    ask(product.control, table(4, {NAME: [("198.51.100.2", 443)]}))
    ask(product.control, table(5, {}) | {"routes": [None]})
    with Talk(product.control) as talk:
        talk.socket.sendall(encode(REPORT))
        wait_for("the report", lambda: product.counts("sniroute_problems", "code"))
        about = samples(
            product,
            *("sniroute_table_generation", "sniroute_routes", "sniroute_table_updates"),
            *("sniroute_controller_connected", "sniroute_event_stream_connected"),
            *("sniroute_last_list_timestamp_seconds", "sniroute_problems"),
            *("sniroute_engine_events", "sniroute_engine_lists", "sniroute_engine_failed_lists"),
        )
        age = samples(product, "sniroute_table_age_seconds")

    assert {
        ("table_generation",): 4,
        ("routes",): 1,
        ("table_updates_total", "ack"): 2,
        ("table_updates_total", "nack"): 1,
        ("controller_connected",): 1,
        ("event_stream_connected", "docker"): 1,
        ("last_list_timestamp_seconds", "docker"): 1700000000.5,
        ("engine_events_total", "docker"): 7,
        ("engine_lists_total", "docker"): 4,
        ("engine_failed_lists_total", "docker"): 1,
        ("problems", "bad_host", "error"): 2,
    } == about
    assert 0 <= age[("table_age_seconds",)] < 30


def test_a_lost_controller_is_told(product: Product) -> None:
    """
    Without a controller no event stream counts as connected, whatever the last report said.
    """
    with Talk(product.control) as talk:
        talk.socket.sendall(encode(REPORT))
        stream = "sniroute_event_stream_connected"
        wait_for("the report", lambda: product.counts(stream, "engine") == {"docker": 1})
    wait_for("the loss", lambda: product.counts("sniroute_controller_connected", "") == {"": 0})

    assert {"docker": 0} == product.counts(stream, "engine")


def test_a_report_of_other_types_does_not_break_the_page(product: Product) -> None:
    """
    A report that is no report is refused, and /metrics still answers.
    """
    for change in ({"last_list": "yesterday"}, {"events": None}, {"containers": []}, {"name": 1}):
        report = REPORT | {"engines": [REPORT["engines"][0] | change]}
        with Talk(product.control) as talk:
            assert talk.say(encode(report)) is None
        assert status_of(product, "/metrics")[0] == 200


def test_counts_survive_a_route_that_comes_back(product: Product, backend: Backend) -> None:
    """
    A route that goes and comes back, as with a restart, goes on with its counts.
    """
    with connection(product.listen, backend) as (client, _):
        reset(client)
    wait_for("the end", lambda: samples(product, "sniroute_connections"))
    before = samples(product, "sniroute_connections", "sniroute_forward_bytes")
    ask(product.control, table(4, {}), table(5, {NAME: [backend.address]}))

    assert before == samples(product, "sniroute_connections", "sniroute_forward_bytes")


def test_scrapers_are_so_many_at_once(product: Product) -> None:
    """
    One more than may be waits until another has gone, and takes neither thread nor descriptor.
    """
    idle = [socket.create_connection(product.metrics, PATIENCE) for _ in range(MAX_SCRAPERS)]
    with socket.create_connection(product.metrics, PATIENCE) as late:
        late.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        late.settimeout(0.5)
        with pytest.raises(TimeoutError):
            late.recv(1024)
        late.settimeout(PATIENCE)
        idle.pop().close()

        assert late.recv(1024).startswith(b"HTTP/1.0 200")
    for scraper in idle:
        scraper.close()


def test_off_serves_neither(tmp_path: Path) -> None:
    """
    With `--metrics off` the router serves, and nothing listens for metrics.
    """
    with lone_router(tmp_path, "--metrics", "off", "--handoff", "relay") as router:
        ask(router.control, table(1, {}))

        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(router.metrics, PATIENCE)
