"""
A disk that is full: no connection waits for it, and what can not be written is lost in whole lines.
"""

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.ends import read_exactly
from harness.packet_lab import Ends, House, PacketLab, told
from harness.product import HANDOFFS
from harness.tools import run, wait_for

ROUNDS = 20

DROPPED = "sniroute_log_lines_dropped_total"


class Disk:
    """
    A small one, with the product's log, its control socket and its bpffs.
    """

    def __init__(self, mounted_at: Path) -> None:
        self._filling = mounted_at / "filling"

    def fill(self) -> None:
        """
        Leave room for nothing.
        """
        with self._filling.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as err:
                if err.errno != errno.ENOSPC:
                    raise

    def clear(self) -> None:
        """
        Make room.
        """
        self._filling.unlink()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """
    A disk for all that the lab keeps.
    """
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path)
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        yield Disk(tmp_path)
    finally:
        run("umount", "-l", tmp_path)


def talk(ends: Ends) -> None:
    """
    Have a word pass each way.
    """
    for near, far in (ends, ends[::-1]):
        near.sendall(b"word")

        assert b"word" == read_exactly(far, 4)


@pytest.mark.parametrize("handoff", HANDOFFS)
def test_a_full_disk_stops_nobody(handoff: str, disk: Disk) -> None:
    """
    Connections under way go on and new ones come, as many as before; the product ends in order.

    The log loses lines, which are counted; those that it has are whole.
    """
    with PacketLab() as lab, House.running(lab, handoff=handoff) as house:
        with house.joined() as before:
            disk.fill()
            for _ in range(ROUNDS):
                talk(before)
                with house.joined() as ends:
                    talk(ends)
            wait_for("lines lost", lambda: house.sniroute.metric(DROPPED))
            disk.clear()
            name = before[0].getsockname()[:2]
            talk(before)

        assert handoff == house.line(name)["handoff"]
        assert ROUNDS + 1 == len(told(house.sniroute)) + house.sniroute.metric(DROPPED)
