"""
What becomes of folders of pins that a router of another version has left.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bpfprog import PACKET_ABI
from controller.router import pins
from controller.router.leftovers import Leftovers
from controller.router.loop import Loop
from controller.settings import RouterSettings


@pytest.fixture
def settings(tmp_path: Path) -> RouterSettings:
    return RouterSettings(control=tmp_path / "router.sock", bpffs=tmp_path)


def left(settings: RouterSettings, abi: int = PACKET_ABI + 1, place: str = "") -> Path:
    """
    Make the folder of a router of the version *abi*, in the place of ours or another.
    """
    own = pins.own(settings)
    folder = own.with_name(f"{abi}-{place or own.name.partition('-')[2]}")
    folder.mkdir(parents=True)
    return folder


@contextmanager
def used(folder: Path) -> Iterator[None]:
    """
    Use what is pinned, as a router that runs does.
    """
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("pin", ["flows", "flights"])
def test_what_is_not_understood_is_left_alone(pin: str, settings: RouterSettings) -> None:
    """
    It is named once, and costs nothing that is understood.
    """
    folder, other = left(settings), left(settings, PACKET_ABI + 2)
    (folder / pin).write_bytes(bytes(4096))
    leftovers = Leftovers(Loop(), settings)

    with capture_logs() as told:
        leftovers.look()
        leftovers.look()

    warnings = [line["pins"] for line in told if line["log_level"] == "warning"]
    assert [str(folder)] == warnings
    assert [folder / pin] == list(folder.iterdir())
    assert not other.exists()


def test_what_is_in_use_is_left_alone(settings: RouterSettings) -> None:
    """
    The pins of a router that is about to make some are its own, until it ends.
    """
    folder = left(settings)
    leftovers = Leftovers(Loop(), settings)

    with capture_logs() as told, used(folder):
        leftovers.look()

        assert folder.is_dir()
    assert [] == told

    leftovers.look()

    assert not folder.exists()


def test_pins_of_another_place_are_left_alone(settings: RouterSettings) -> None:
    """
    Those of another network, of another control socket, and our own are others' to see to.
    """
    cookie, control = pins.own(settings).name.split("-")[1:]
    folders = [
        left(settings, place=f"{cookie}-0123456789abcdef"),
        left(settings, place=f"f{cookie}-{control}"),
        left(settings, PACKET_ABI),
        left(settings, place=f"{cookie}"),
    ]

    Leftovers(Loop(), settings).look()

    assert all(folder.is_dir() for folder in folders)


def test_where_nobody_may_look_nothing_is_found(settings: RouterSettings) -> None:
    """
    A router that has no bpf filesystem, or may not read it, starts all the same.
    """
    (settings.bpffs / pins.FOLDER).write_bytes(b"")

    with capture_logs() as told:
        Leftovers(Loop(), settings).look()

    assert [] == told
