"""
What `sniroute doctor` says of one thing: how it is, why, and what would mend it.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """
    From good to bad; the place in this order is the doctor's exit status.
    """

    FINE = "fine"
    DEGRADED = "degraded"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One check's result: *detail* is a fact, *fix* what to do about it, or nothing.
    """

    check: str
    state: State
    detail: str
    fix: str = ""

    def fields(self) -> dict[str, Any]:
        """
        Write the finding as `--json` shows it.
        """
        return asdict(self)


def read_finding(fields: dict[str, Any]) -> Finding:
    """
    Read what `fields` wrote.
    """
    return Finding(**{**fields, "state": State(fields["state"])})


def worst(findings: Iterable[Finding]) -> State:
    """
    Sum up *findings*: as bad as the worst of them.
    """
    states = {finding.state for finding in findings}
    return max(states, key=list(State).index, default=State.FINE)
