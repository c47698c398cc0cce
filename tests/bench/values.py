"""
What a run measures: samples, and how they compare.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median
from typing import Any

BEST = "best peer"


class BenchError(Exception):
    """
    The run cannot go on, or did not hold what it must.
    """


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One measurement: a rate, time or size, the machine's CPU time for a unit of it, and more.
    """

    value: float
    cpu: float = 0
    extra: dict[str, float] = field(default_factory=dict)

    def get(self, measure: str) -> float:
        """
        Return the value, the CPU time, or what else was measured.
        """
        if measure in ("value", "cpu"):
            return float(getattr(self, measure))
        return self.extra[measure]


@dataclass(slots=True)
class Results:
    """
    Every sample of a run, by load and contestant in order of rounds, and every error.

    *background* is the share of one CPU that was busy before the first round, with everyone up.
    """

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    background: float = 0

    def add(self, load: str, contestant: str, sample: Sample) -> None:
        """
        Append the sample of one round.
        """
        self.samples.setdefault(load, {}).setdefault(contestant, []).append(sample)

    def middle(self, load: str, contestant: str, measure: str = "value") -> float | None:
        """
        Return the median of all rounds.
        """
        samples = self.samples.get(load, {}).get(contestant)
        return median(x.get(measure) for x in samples) if samples else None

    def ratio(self, load: str, contestant: str, base: str, measure: str = "value") -> float | None:
        """
        Compare round by round, then take the median: noise that both met cancels out.
        """
        of = self.samples.get(load, {})
        if contestant not in of or base not in of:
            return None
        pairs = zip(of[contestant], of[base], strict=True)
        return median(_quotient(a.get(measure), b.get(measure)) for a, b in pairs)

    def best(self, load: str, peers: Collection[str], *, lower: bool, measure: str) -> str | None:
        """
        Name the one of *peers* with the best median.
        """
        medians = {
            name: value for name in peers if (value := self.middle(load, name, measure)) is not None
        }
        if not medians:
            return None
        return (min if lower else max)(medians, key=medians.__getitem__)


def _quotient(a: float, b: float) -> float:
    return a / b if b else 0


@dataclass(frozen=True, slots=True)
class Floor:
    """
    What a contestant must hold under a load.

    *relative_to* is another contestant, BEST, or nothing for the bare figure; one of *at_least*
    and *at_most* is given.
    """

    load: str
    contestant: str
    relative_to: str = ""
    measure: str = "value"
    at_least: float = 0
    at_most: float = float("inf")

    def compares(self, contestant: str, peers: Collection[str]) -> bool:
        """
        Tell whether a contestant has to be measured to know that this is held.
        """
        against = peers if self.relative_to == BEST else (self.relative_to,)
        return contestant == self.contestant or contestant in against

    def broken(self, results: Results, peers: Collection[str]) -> str:
        """
        Say how it is not held; what cannot be compared is not.
        """
        lower = self.at_most != float("inf") or self.measure == "cpu"
        base: str | None = self.relative_to
        if base == BEST:
            base = results.best(self.load, peers, lower=lower, measure=self.measure)
        got = None
        if base:
            got = results.ratio(self.load, self.contestant, base, self.measure)
        elif base is not None:
            got = results.middle(self.load, self.contestant, self.measure)
        if got is not None and self.at_least <= got <= self.at_most:
            return ""
        what = f"{self.load}: {self.contestant}"
        what += f" / {base or self.relative_to}" if self.relative_to else ""
        what += f" ({self.measure})" if self.measure != "value" else ""
        limit = f"at most {self.at_most}" if lower else f"floor {self.at_least}"
        return f"{what} = {'not measured' if got is None else f'{got:.3g}'}, {limit}"


def read_results(kept: dict[str, Any]) -> Results:
    """
    Read the results of a run from the JSON that it wrote.
    """
    samples = {
        load: {name: [Sample(**x) for x in samples] for name, samples in of.items()}
        for load, of in kept["samples"].items()
    }
    return Results(samples, kept["errors"], kept["background"])


def read_floors(entries: list[dict[str, Any]]) -> list[Floor]:
    """
    Read the floors of one kind of run from `floors.json`.
    """
    return [Floor(**entry) for entry in entries]
