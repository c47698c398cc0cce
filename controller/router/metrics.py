"""
/metrics and /healthz, in a thread of their own: read when asked, nothing is kept for them.
"""

import platform
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from bpfprog import MAX_FLOWS, Packet
from controller.router.control import Control
from controller.router.listen import bind
from controller.router.numbers import Numbers
from controller.router.router import ACCEPT_PAUSE, Router

CLIENT_PATIENCE: Final = 10.0
"""Seconds that a scraper may take for its request."""

LOOP_PATIENCE: Final = 5.0
"""Seconds that the loop may take to answer; it takes the rest of a round, far below one."""

MAX_SCRAPERS: Final = 8
"""Scrapers at once, each with a thread and a descriptor; more wait in the listen queue."""


class RouterCollector(Collector):
    """
    The router's numbers as metric families.
    """

    def __init__(self, router: Router, control: Control, version: str) -> None:
        self._router = router
        self._control = control
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """
        Read everything, now.
        """
        numbers = self._control.numbers(LOOP_PATIENCE)
        yield from self._about_router(numbers)
        yield from self._about_workers()
        yield from _about_connections(numbers)
        if self._router.packet is not None:
            yield from _about_packets(self._router.packet.packet, numbers)
        yield from self._about_controller()

    def _about_workers(self) -> Iterator[Metric]:
        workers = self._control.workers
        yield GaugeMetricFamily(
            "sniroute_workers",
            "Workers that run.",
            value=1 + self._control.running_workers,
        )
        yield CounterMetricFamily(
            "sniroute_worker_ends",
            "Workers that ended unasked, and were started again.",
            value=workers.ends if workers is not None else 0,
        )

    def _about_router(self, numbers: Numbers) -> Iterator[Metric]:
        router = self._router
        build = {"version": self._version, "kernel": platform.release()}
        yield InfoMetricFamily("sniroute_build", "What runs here.", value=build)
        chosen = GaugeMetricFamily(
            "sniroute_handoff",
            "1 for the hand-off that connections take first, with the reason for the choice.",
            labels=["handoff", "reason"],
        )
        chosen.add_metric([router.ladder[0].name, router.ladder_reason], 1)
        yield chosen
        yield GaugeMetricFamily(
            "sniroute_transparency_working",
            "Whether backends can be dialled from clients' addresses.",
            value=router.transparency.working,
        )
        yield GaugeMetricFamily(
            "sniroute_max_connections",
            "Connections allowed at once.",
            value=numbers.counts["max_connections"].total(),
        )
        yield GaugeMetricFamily(
            "sniroute_table_generation",
            "Generation of the routing table, 0 for none yet.",
            value=router.table.generation,
        )
        if router.table.generation:
            yield GaugeMetricFamily(
                "sniroute_table_age_seconds",
                "Time since the routing table was replaced.",
                value=time.monotonic() - router.table_since,
            )
        yield GaugeMetricFamily(
            "sniroute_routes", "Routes in the table.", value=len(router.table.routes)
        )
        yield _counter(
            "sniroute_table_updates",
            "Tables pushed by a controller.",
            ["result"],
            router.stats.table_updates,
        )
        yield CounterMetricFamily(
            "sniroute_internal_errors",
            "Faults of the router's own, each of which cost at most one connection.",
            value=numbers.counts["faults"].total(),
        )
        yield CounterMetricFamily(
            "sniroute_log_lines_dropped",
            "Lines of the log that found its queue full, since nobody read it, or its disk.",
            value=numbers.counts["dropped_lines"].total(),
        )

    def _about_controller(self) -> Iterator[Metric]:
        control = self._control
        yield GaugeMetricFamily(
            "sniroute_controller_connected",
            "Whether a controller is connected to the control socket.",
            value=control.controllers,
        )
        report = control.report
        connected = GaugeMetricFamily(
            "sniroute_event_stream_connected",
            "Whether the engine's event stream is open.",
            labels=["engine"],
        )
        listed = GaugeMetricFamily(
            "sniroute_last_list_timestamp_seconds",
            "Unix time of the engine's last full list.",
            labels=["engine"],
        )
        counters = {
            name: CounterMetricFamily(f"sniroute_engine_{name}", text, labels=["engine"])
            for name, text in (
                ("events", "Events that could change a route."),
                ("lists", "Full lists of containers."),
                ("failed_lists", "Lists that failed and changed nothing."),
            )
        }
        for engine in report["engines"]:
            label = [str(engine["name"])]
            connected.add_metric(label, float(engine["connected"] and control.controllers > 0))
            if engine["last_list"]:
                listed.add_metric(label, engine["last_list"])
            for name, family in counters.items():
                family.add_metric(label, engine[name])
        yield from (connected, listed, *counters.values())
        problems: Counter[tuple[str, ...]] = Counter(
            (str(problem["code"]), str(problem["severity"])) for problem in report["problems"]
        )
        yield _gauge(
            "sniroute_problems",
            "Problems with labels, routes and networks that stand now.",
            ["code", "severity"],
            problems,
        )


def _about_connections(numbers: Numbers) -> Iterator[Metric]:
    counts = numbers.counts
    yield _counter(
        "sniroute_connections",
        "Connections that have ended, by what became of them.",
        ["route", "result"],
        counts["connections"],
    )
    yield _counter(
        "sniroute_connection_ends",
        "Ends of connections that were handed over, by who or what ended them.",
        ["reason"],
        counts["ends"],
    )
    yield _gauge(
        "sniroute_connections_active",
        "Connections handed over and not ended.",
        ["route", "handoff"],
        counts["active"],
    )
    yield GaugeMetricFamily(
        "sniroute_connections_pending",
        "Connections that wait for their hello, their backend or their end.",
        value=counts["pending"].total(),
    )
    yield _counter(
        "sniroute_forward_bytes",
        "Bytes moved from clients (in) and from backends (out).",
        ["route", "direction", "handoff"],
        counts["bytes"],
    )
    yield _counter(
        "sniroute_backend_connect_errors",
        "Backends that did not accept.",
        ["route", "error"],
        counts["connect_errors"],
    )
    yield _counter(
        "sniroute_backend_connects",
        "Backends that accepted, by whose address they see, and why if not the client's.",
        ["client_ip", "reason"],
        counts["connects"],
    )
    yield _counter(
        "sniroute_handoff_refusals",
        "Connections that a hand-off left to the next one.",
        ["handoff", "reason"],
        counts["refusals"],
    )
    yield _counter(
        "sniroute_accept_pauses",
        "Times that accepting paused, for want of descriptors, memory or connections.",
        ["reason"],
        counts["pauses"],
    )
    size, seconds = (numbers.histograms[name][""] for name in ("hello_size", "hello_seconds"))
    yield HistogramMetricFamily(
        "sniroute_client_hello_size_bytes",
        "Bytes received when the hello was complete, or refused.",
        buckets=size.buckets(),
        sum_value=size.sum,
    )
    yield HistogramMetricFamily(
        "sniroute_client_hello_duration_seconds",
        "Time from accept to the complete hello.",
        buckets=seconds.buckets(),
        sum_value=seconds.sum,
    )
    connects = HistogramMetricFamily(
        "sniroute_backend_connect_duration_seconds",
        "Time until a backend accepted.",
        labels=["route"],
    )
    for route, histogram in numbers.histograms["connect_seconds"].items():
        connects.add_metric([route], histogram.buckets(), histogram.sum)
    yield connects


def _about_packets(packet: Packet, numbers: Numbers) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "sniroute_packet_flows",
        "Places in the table of flows that are taken; ended flows keep theirs for up to 10 s.",
        value=len(packet.numbers()),
    )
    yield GaugeMetricFamily(
        "sniroute_packet_max_flows",
        "Places that there are: without a free one a connection takes the next hand-off.",
        value=MAX_FLOWS,
    )
    yield CounterMetricFamily(
        "sniroute_packet_lost_events",
        "Events that found no room in the ring, after which the router looks at every flow.",
        value=numbers.counts["lost_events"].total(),
    )


def _add(family: Any, counts: Any) -> Metric:
    for key, value in tuple(counts.items()):
        family.add_metric(list(key) if isinstance(key, tuple) else [key], value)
    return family  # type: ignore[no-any-return]


def _counter(name: str, text: str, labels: list[str], counts: Any) -> Metric:
    return _add(CounterMetricFamily(name, text, labels=labels), counts)


def _gauge(name: str, text: str, labels: list[str], counts: Any) -> Metric:
    return _add(GaugeMetricFamily(name, text, labels=labels), counts)


class Server(ThreadingHTTPServer):
    """
    An HTTP server with a bound on its threads and descriptors.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = listener.family
        self._free = threading.BoundedSemaphore(MAX_SCRAPERS)
        super().__init__(listener.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        """
        Accept; after a failure not at once again, since whoever waits goes on waiting.
        """
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """
        Start a thread for *request* when there may be one more.
        """
        self._free.acquire()
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # no thread to be had
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """
        Answer *request*, and let the next one in.
        """
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


def serve(
    address: str, router: Router, control: Control, version: str, beside: Collection[str] = ()
) -> ThreadingHTTPServer:
    """
    Serve /metrics and /healthz on *address*, `ADDR:PORT`; *beside* as for `bind`.

    Raises:
        ValueError: *address* is not written so.
        OSError: it can not be listened on; the message names the address.
    """
    registry = CollectorRegistry()
    registry.register(RouterCollector(router, control, version))

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_PATIENCE

        def do_GET(self) -> None:
            if self.path == "/metrics":
                try:
                    page = generate_latest(registry)
                except TimeoutError:
                    self._answer(503, "text/plain; charset=utf-8", b"the router is busy\n")
                else:
                    self._answer(200, CONTENT_TYPE_LATEST, page)
            elif self.path == "/healthz":
                ready = router.is_ready
                text = b"ready\n" if ready else b"not ready: no routing table, or draining\n"
                self._answer(200 if ready else 503, "text/plain; charset=utf-8", text)
            else:
                self._answer(404, "text/plain; charset=utf-8", b"/metrics or /healthz\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """
            Scrapes are no news.
            """

    try:
        server = Server(bind(address, beside), Handler)
    except OSError as err:
        raise OSError(err.errno, f"metrics address {address}: {err.strerror}") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
