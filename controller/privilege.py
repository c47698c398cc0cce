"""
Give up privileges, for good.
"""

from collections.abc import Iterable

import pyprctl


def holds(names: Iterable[str]) -> bool:
    """
    Whether the process has all capabilities *names* (without `CAP_`).
    """
    return {pyprctl.Cap[name] for name in names} <= pyprctl.CapState.get_current().permitted


def shut() -> None:
    """
    Keep other processes of the same user out of this one's memory and descriptors.

    Without a capability on either side uid 0 is a user like any other, and may trace its own.
    """
    pyprctl.set_dumpable(False)


def drop_to(keep: Iterable[str]) -> frozenset[str]:
    """
    Keep at most the capabilities *keep* (names without `CAP_`), in every set, and never gain more.

    Returns:
        Those of *keep* that the process really has.
    """
    wanted = {pyprctl.Cap[name] for name in keep}
    pyprctl.set_no_new_privs()
    pyprctl.cap_ambient.clear()
    had = pyprctl.CapState.get_current()
    if pyprctl.Cap.SETPCAP in had.effective:
        pyprctl.capbset.limit(*wanted)
    left = wanted & had.permitted
    pyprctl.CapState(effective=left, permitted=left, inheritable=set()).set_current()
    return frozenset(cap.name for cap in left)
