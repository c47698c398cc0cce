"""
What each of the two processes may do.
"""

from harness.product import Sniroute, privileges
from harness.tools import CAPABILITIES

_BITS = {"net_bind_service": 10, "net_admin": 12, "perfmon": 38, "bpf": 39}
"""Numbers of capabilities (linux/capability.h)."""

FOUR = sum(1 << _BITS[name] for name in CAPABILITIES)


def test_the_controller_has_no_capability(sniroute: Sniroute) -> None:
    """
    The process that holds the engine's socket can do nothing else, and can not gain anything.
    """
    sets = privileges(sniroute.controller())

    assert (0, 0, 0, 0) == tuple(sets[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"))
    assert 1 == sets["NoNewPrivs"]


def test_the_router_has_at_most_the_four_it_was_given(sniroute: Sniroute) -> None:
    """
    The router uses packets with CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_NET_BIND_SERVICE.

    It can not gain more.
    """
    sets = privileges(sniroute.router())

    assert "packet" == sniroute.status()["handoff"]["chosen"]
    for name in ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd"):
        assert 0 == sets[name] & ~FOUR
    assert 1 == sets["NoNewPrivs"]
