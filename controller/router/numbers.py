"""
What a router counts, as one value that can be sent and added up: the counts of its workers.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controller.core.wire import Message, WireError
from controller.log import dropped_lines
from controller.router.router import Router
from controller.router.stats import SECONDS, SIZES, Histogram

Key = tuple[str, ...]

BOUNDS: Final = {"hello_size": SIZES, "hello_seconds": SECONDS, "connect_seconds": SECONDS}

STANDING: Final = frozenset({"active", "pending", "max_connections", "lost_events"})
"""Counts of what is now, and of what the kernel itself adds up; all others only grow."""


@dataclass(slots=True)
class Numbers:
    """
    Counts by name and labels; histograms by name and route, which is empty for those without.
    """

    counts: dict[str, Counter[Key]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)

    def add(self, other: "Numbers") -> None:
        """
        Add what *other* counts.
        """
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counter()).update(counts)
        for name, histograms in other.histograms.items():
            ours = self.histograms.setdefault(name, {})
            for route, histogram in histograms.items():
                ours.setdefault(route, Histogram(histogram.bounds)).add(histogram)

    def grown(self) -> "Numbers":
        """
        Leave out what only was so while it lasted.
        """
        return Numbers(
            {name: counts for name, counts in self.counts.items() if name not in STANDING},
            self.histograms,
        )


def read_numbers(router: Router) -> Numbers:
    """
    Count, now; to be called in the router's loop, so that no connection counts twice or never.
    """
    stats, traffic = router.stats, router.traffic()
    return Numbers(
        {
            "connections": _labelled(stats.connections),
            "ends": _labelled(stats.reasons),
            "active": _labelled(traffic.active),
            "pending": Counter({(): traffic.pending}),
            "max_connections": Counter({(): router.max_connections}),
            "bytes": _labelled(traffic.moved),
            "connect_errors": _labelled(stats.connect_errors),
            "connects": _labelled(router.transparency.connects),
            "refusals": _labelled(stats.handoff_refusals),
            "pauses": _labelled(stats.accept_errors),
            "faults": Counter({(): router.loop.faults}),
            "lost_events": Counter({(): router.packet.packet.lost_events if router.packet else 0}),
            "dropped_lines": Counter({(): dropped_lines()}),
        },
        {
            "hello_size": {"": stats.hello_size},
            "hello_seconds": {"": stats.hello_seconds},
            "connect_seconds": dict(stats.connect_seconds),
        },
    )


def _labelled(counts: Mapping[Any, int]) -> Counter[Key]:
    return Counter({key if isinstance(key, tuple) else (key,): n for key, n in counts.items()})


def dump_numbers(numbers: Numbers) -> Message:
    """
    Write *numbers* as a message.
    """
    return {
        "type": "numbers",
        "counts": {name: [*counts.items()] for name, counts in numbers.counts.items()},
        "histograms": {
            name: [(route, one.counts, one.sum) for route, one in histograms.items()]
            for name, histograms in numbers.histograms.items()
        },
    }


def load_numbers(message: Message) -> Numbers:
    """
    Read what `dump_numbers` has written.

    Raises:
        WireError: it is not that.
    """
    try:
        return Numbers(
            {
                name: Counter({tuple(map(str, key)): int(value) for key, value in counts})
                for name, counts in message["counts"].items()
            },
            {
                name: {str(route): _histogram(BOUNDS[name], *one) for route, *one in histograms}
                for name, histograms in message["histograms"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise WireError(f"no numbers: {err!r}") from None


def _histogram(bounds: tuple[float, ...], counts: list[Any], total: Any) -> Histogram:
    histogram = Histogram(bounds)
    for i, count in zip(range(len(bounds) + 1), counts, strict=True):
        histogram.counts[i] = int(count)
    histogram.sum = float(total)
    return histogram
