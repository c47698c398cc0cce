"""
The programs on the devices: as kernels before TCX had them, and while one router follows another.
"""

import json
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from harness.lab import Lab
from harness.packet_lab import (
    ACTIVE,
    HANDOFF,
    QUARANTINE,
    VERSIONS,
    House,
    PacketLab,
    exchange,
    told,
    write_routes,
)
from harness.product import Sniroute
from harness.tools import run, wait_for

from bpfprog import Packet

DEVICES = ("br1", "out0")

NEW_DEVICES = 8


def filters(lab: Lab, device: str) -> str:
    """
    List what the qdisc clsact of a device runs.
    """
    hooks = ("ingress", "egress")
    return "".join(lab.host.run("tc", "filter", "show", "dev", device, hook) for hook in hooks)


@VERSIONS
def test_programs_need_no_tcx(version: int, lab: PacketLab) -> None:
    """
    Attached to clsact alone, they translate as ever; taken off, they leave no filter.
    """
    with House.running(lab) as house, house.joined(version) as ends:
        exchange(ends, 1000)
        wait_for("a note", lambda: lab.notes() == 1)
        house.sniroute.stop()
        (pins,) = (lab.bpffs / "sniroute").iterdir()
        with lab.host.network(), Packet(pins, 31, has_tcx=False) as packet:
            refused = packet.follow(map(socket.if_nametoindex, DEVICES))
            remove_links(pins)
            attached = [filters(lab, device) for device in DEVICES]
            exchange(ends, 1_000_000)
            packet.unpin()

    assert {} == refused
    assert all(text.count("bpf") for text in attached)
    assert ["", ""] == [filters(lab, device) for device in DEVICES]


def test_routers_share_a_qdisc(lab: PacketLab) -> None:
    """
    Without TCX, a router finds the filters of the one before it, and takes no other's off.
    """
    with House.running(lab) as house, house.joined() as ends:
        exchange(ends, 1000)
        house.sniroute.kill()
        (pins,) = (lab.bpffs / "sniroute").iterdir()
        other = pins.with_name("other")
        with lab.host.network():
            devices = {socket.if_nametoindex(name) for name in DEVICES}
            with Packet(pins, 31, has_tcx=False) as packet:
                packet.follow(devices)
                remove_links(pins)
            # as if killed: without a word to the kernel
            with Packet(other, 0, has_tcx=False) as packet:
                packet.follow(devices)
            both = [filters(lab, device).count("handle") for device in DEVICES]
            with Packet(other, 0, has_tcx=False) as packet:
                packet.follow(devices - {socket.if_nametoindex(DEVICES[0])})
                some = [filters(lab, device).count("handle") for device in DEVICES]
                exchange(ends, 1000)
                packet.unpin()
            one = [filters(lab, device).count("handle") for device in DEVICES]
            exchange(ends, 1000)
            # whoever follows no device takes them off, too
            with Packet(pins, 31) as packet:
                packet.unpin()

    assert ([4, 4], [2, 4], [2, 2]) == (both, some, one)
    assert ["", ""] == [filters(lab, device) for device in DEVICES]


def remove_links(pins: Path) -> None:
    """
    Take off what is attached to TCX.
    """
    for pin in pins.iterdir():
        if pin.name.startswith(("ingress-", "egress-")):
            pin.unlink()


@VERSIONS
def test_a_replacement_leaves_flows_alone(version: int, lab: PacketLab) -> None:
    """
    A flow goes on while one router takes the place of another; its end is told by the new one.
    """
    flags = ("--drain", "1", "--hello-timeout", "1")
    with House.running(lab, *flags) as house, house.joined(version) as ends:
        exchange(ends, 1000)
        wait_for("a note", lambda: lab.notes() == 1)
        old = house.sniroute
        old.put_log_aside()
        with lab.product(*flags, "--replace", routes=write_routes(house.app)) as new:
            while old.is_running():
                exchange(ends, 1000)
                time.sleep(0.1)
            adopted = wait_for("the flow", lambda: new.metric(ACTIVE, handoff=HANDOFF))
            exchange(ends, 1000)
            ends[0].close()
            ends[1].close()
            (line,) = wait_for("its end", lambda: told(new))

    assert 1 == adopted
    assert HANDOFF == line["handoff"]
    assert [] == told(old)


def test_a_replaced_router_follows_no_devices(lab: PacketLab) -> None:
    """
    A device that comes while the old router drains runs the programs of the new one.
    """
    flags = ("--drain", "30", "--hello-timeout", "1")
    with House.running(lab, *flags, handoff="relay") as house, house.joined() as ends:
        old = house.sniroute
        old.put_log_aside()
        with lab.product(*flags, "--replace", routes=write_routes(house.app)):
            wait_for("the switch", lambda: "replaced" in [line["event"] for line in old.log()])
            names = [f"late{number}" for number in range(NEW_DEVICES)]
            for name in names:
                lab.host.run("ip", "link", "add", name, "type", "bridge")
            with lab.host.network():
                numbers = [socket.if_nametoindex(name) for name in ("out0", *names)]
            programs = wait_for("its programs", lambda: attached(lab, numbers))
            exchange(ends, 1000)

            assert old.is_running()
            for end in ends:
                end.close()
            old.wait_for_end()

    assert 1 == len(programs)


def attached(lab: PacketLab, devices: Iterable[int]) -> set[int] | None:
    """
    Tell which programs are at the ingress hooks of *devices*; None where one has none yet.
    """
    pins = [pin for number in devices for pin in lab.bpffs.rglob(f"ingress-{number}")]
    links = [json.loads(run("bpftool", "--json", "link", "show", "pinned", pin)) for pin in pins]
    return {link["prog_id"] for link in links} if len(pins) == 1 + NEW_DEVICES else None


def test_off_is_for_a_successor_too(lab: PacketLab) -> None:
    """
    A router that takes another's place leaves packets switched off; one that starts anew does not.
    """
    flags = ("--hello-timeout", "1")

    def state(sniroute: Sniroute) -> str:
        return json.loads(sniroute.command("packet", "status", "--json"))["state"]

    with House.running(lab, *flags) as house:
        old = house.sniroute
        with house.joined() as ends:
            old.command("packet", "off")
            old.put_log_aside()
            with lab.product(*flags, "--replace", routes=write_routes(house.app)) as new:
                old.wait_for_end()
                before = state(new)
                exchange(ends, 1000)
                with house.joined() as others:
                    exchange(others, 1000)
                for end in ends:
                    end.close()
                wait_for("all taken down", lambda: state(new) == "detached", timeout=QUARANTINE)
                lines = told(new)
        with lab.product(*flags, routes=write_routes(house.app)) as anew:
            after = state(anew)

    assert ("off", "on") == (before, after)
    assert [HANDOFF, "sockmap"] == sorted(line["handoff"] for line in lines)
