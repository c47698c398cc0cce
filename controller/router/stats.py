"""
What the router counts, as plain numbers: the loop only adds, the collector reads at scrape time.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from controller.core.session import BACKEND, CLIENT

if TYPE_CHECKING:
    from controller.router.connection import Connection

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZES: Final = (256.0, 512.0, 1024.0, 1536.0, 2048.0, 3072.0, 4096.0, 8192.0, 16384.0, 65536.0)

GONE_ROUTES: Final = 1000
"""Routes that are no more whose counts are remembered; about 1 MB."""

NO_ROUTE: Final = ""
"""The route label of a connection that took none."""


class Histogram:
    """
    Counts of values up to each of *bounds*, and above.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """
        Count *value*.
        """
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: "Histogram") -> None:
        """
        Count what *other* has counted, up to the same bounds.
        """
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        """
        The cumulative counts under their bounds, as Prometheus has them.
        """
        total = 0
        buckets = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), tuple(self.counts), strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class Stats:
    """
    The counts of one router since its start.
    """

    def __init__(self) -> None:
        self.connections: Counter[tuple[str, str]] = Counter()  # route, result
        self.reasons: Counter[str] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()  # route, direction, handoff
        self.connect_errors: Counter[tuple[str, str]] = Counter()  # route, error
        self.handoff_refusals: Counter[tuple[str, str]] = Counter()  # handoff, reason
        self.accept_errors: Counter[str] = Counter()
        self.table_updates: Counter[str] = Counter()
        self.hello_size = Histogram(SIZES)
        self.hello_seconds = Histogram(SECONDS)
        self.connect_seconds: dict[str, Histogram] = {}
        self._gone: dict[str, None] = {}  # in the order in which they went

    def connected(self, route: str, seconds: float) -> None:
        """
        Count a backend that accepted.
        """
        histogram = self.connect_seconds.get(route)
        if histogram is None:
            histogram = self.connect_seconds[route] = Histogram(SECONDS)
        histogram.observe(seconds)

    def ended(self, connection: "Connection") -> None:
        """
        Count a connection at its end.
        """
        route = connection.route.host if connection.route is not None else NO_ROUTE
        self.connections[route, connection.result] += 1
        if connection.hello.size:
            self.hello_size.observe(connection.hello.size)
        if connection.hello.seconds:
            self.hello_seconds.observe(connection.hello.seconds)
        flow = connection.flow
        if flow is not None:
            self.reasons[flow.session.reason] += 1
            self.bytes[route, "in", flow.handoff] += flow.moved(CLIENT)
            self.bytes[route, "out", flow.handoff] += flow.moved(BACKEND)

    def keep_routes(self, hosts: Iterable[str]) -> None:
        """
        Remember the counts of *hosts*, and of the last GONE_ROUTES that are no more.

        A route whose only container restarts goes and comes back, and its counters go on; names
        that change for ever cost no memory.
        """
        present = {*hosts, NO_ROUTE}
        keyed = (self.connections, self.bytes, self.connect_errors)
        counted = {key[0] for counter in keyed for key in counter} | self.connect_seconds.keys()
        for host in present & self._gone.keys():
            del self._gone[host]
        self._gone.update(dict.fromkeys(sorted(counted - present - self._gone.keys())))
        while len(self._gone) > GONE_ROUTES:
            self._forget(next(iter(self._gone)))

    def _forget(self, host: str) -> None:
        del self._gone[host]
        self.connect_seconds.pop(host, None)
        for counter in (self.connections, self.bytes, self.connect_errors):
            for key in [key for key in counter if key[0] == host]:
                del counter[key]
