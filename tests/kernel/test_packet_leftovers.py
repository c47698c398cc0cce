"""
Flows and pins that a router of another version has left, in the place of one of this version.
"""

import fcntl
import json
import os
import socket
from pathlib import Path

import pytest
from harness.ends import PIECE
from harness.packet_lab import ACTIVE, HANDOFF, House, PacketLab, exchange, write_routes
from harness.product import Sniroute
from harness.tools import run, wait_for

from bpfprog import PACKET_ABI, KernelError, Packet
from bpfprog.packet import OBJECT
from controller.router.leftovers import LOOK

DEVICES = ("br1", "out0")

FOUND = "flows of another version"
GONE = "pins of another version taken down"


def aged(lab: PacketLab) -> Path:
    """
    Have what a killed router has pinned be of another version, and return where it is.
    """
    (pins,) = (lab.bpffs / "sniroute").iterdir()
    place = pins.name.partition("-")[2]
    return pins.rename(pins.with_name(f"{PACKET_ABI + 1}-{place}"))


def links(pins: Path) -> set[int]:
    """
    Tell the links to devices that are pinned.
    """
    shown = (
        run("bpftool", "--json", "link", "show", "pinned", pin)
        for hook in ("ingress", "egress")
        for pin in pins.glob(f"{hook}-*")
    )
    return {json.loads(text)["id"] for text in shown}


def all_links() -> set[int]:
    """
    Tell the links that there are, whoever has them.
    """
    return {link["id"] for link in json.loads(run("bpftool", "--json", "link", "show"))}


def filters(lab: PacketLab) -> int:
    """
    Count the filters that the qdiscs clsact of the devices have.
    """
    shown = (
        lab.host.run("tc", "filter", "show", "dev", device, hook)
        for device in DEVICES
        for hook in ("ingress", "egress")
    )
    return sum(text.count("handle") for text in shown)


def events(sniroute: Sniroute, event: str) -> list[dict[str, object]]:
    """
    Read the lines in the log of one kind.
    """
    return [line for line in sniroute.log() if line["event"] == event]


def test_flows_of_another_version_go_on(lab: PacketLab) -> None:
    """
    A router leaves them alone, beside its own; after the last has ended it takes all down.
    """
    with House.running(lab) as house, house.joined() as ends:
        exchange(ends, 1000)
        house.sniroute.kill()
        pins = aged(lab)
        old = links(pins)
        with lab.product(routes=write_routes(house.app)) as new:
            (found,) = events(new, FOUND)
            known = new.metric(ACTIVE, handoff=HANDOFF)
            with house.joined() as others:
                exchange(others, PIECE)
                exchange(ends, PIECE)
                beside = new.metric(ACTIVE, handoff=HANDOFF)
            standing = all_links()
            for end in ends:
                end.close()
            wait_for("the next look", lambda: not pins.exists(), timeout=LOOK + 10, every=0.5)
            left = all_links()
            with house.joined() as others:
                exchange(others, PIECE)
            (gone,) = events(new, GONE)

    assert (str(pins), 1) == (found["pins"], found["flows"])
    assert str(pins) == gone["pins"]
    assert (0, 1) == (known, beside)
    assert len(old) >= 2 * len(DEVICES)
    assert old <= standing
    assert set() == old & left


def test_filters_of_another_version_are_taken_off(lab: PacketLab) -> None:
    """
    Where there is no TCX too, by a router that hands nothing over as packets, when it starts.
    """
    handoff = ("--handoff", "relay", "--client-ip", "off")
    with House.running(lab) as house:
        with house.joined() as ends:
            exchange(ends, 1000)
            house.sniroute.kill()
            pins = aged(lab)
            with lab.host.network(), Packet(pins, 31, has_tcx=False) as packet:
                packet.follow(map(socket.if_nametoindex, DEVICES))
                for pin in (*pins.glob("ingress-*"), *pins.glob("egress-*")):
                    pin.unlink()
            with lab.product(*handoff, routes=write_routes(house.app)) as second:
                exchange(ends, PIECE)
                found = events(second, FOUND)
                standing = filters(lab)
        with lab.product(*handoff, routes=write_routes(house.app)) as third:
            gone = events(third, GONE)

    assert (1, 1) == (len(found), len(gone))
    assert 2 * len(DEVICES) == standing
    assert 0 == filters(lab)
    assert [] == list((lab.bpffs / "sniroute").iterdir())


# --- a loader that fails ---


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """
    Make an object that can not be loaded.
    """
    path = tmp_path / "packet.bpf.o"
    path.write_bytes(OBJECT.read_bytes().replace(b"\0license\0", b"\0silence\0"))
    return path


def test_a_loader_that_fails_leaves_no_folder(broken: Path, lab: PacketLab) -> None:
    """
    What it has made is gone; where another's pins are, they stay.
    """
    pins = lab.bpffs / "sniroute" / "one"

    with pytest.raises(KernelError, match="load the packet programs"):
        Packet(pins, 0, broken)
    assert not pins.exists()

    Packet(pins, 0).close()
    before = sorted(pins.iterdir())

    with pytest.raises(KernelError, match="load the packet programs"):
        Packet(pins, 0, broken)
    assert before == sorted(pins.iterdir())


def test_a_loader_that_fails_leaves_a_folder_that_is_in_use(broken: Path, lab: PacketLab) -> None:
    """
    One that has been locked, and is still empty, is about to be used.
    """
    pins = lab.bpffs / "sniroute" / "one"
    pins.mkdir(parents=True)
    fd = os.open(pins, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        with pytest.raises(KernelError, match="load the packet programs"):
            Packet(pins, 0, broken)
    finally:
        os.close(fd)

    assert pins.is_dir()
