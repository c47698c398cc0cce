"""
Flows while one router takes the place of another, and whatever becomes of either.
"""

from contextlib import ExitStack

from harness.ends import ended_by_reset, reset
from harness.packet_lab import (
    ACTIVE,
    HANDOFF,
    House,
    PacketLab,
    exchange,
    told,
    write_routes,
)
from harness.product import Sniroute
from harness.tools import wait_for

FLAGS = ("--drain", "30", "--hello-timeout", "1")


def flows(sniroute: Sniroute) -> float | None:
    """
    Count the flows that a router knows of.
    """
    return sniroute.metric(ACTIVE, handoff=HANDOFF)


def switch(sniroute: Sniroute, state: str) -> None:
    """
    Switch the packet hand-off.
    """
    sniroute.command("packet", state)


def replaced(sniroute: Sniroute) -> bool:
    """
    Tell whether another router has taken the place.
    """
    return "replaced" in [line["event"] for line in sniroute.log()]


def test_nobody_to_replace(lab: PacketLab) -> None:
    """
    A router with --replace that has found no other leaves what it pinned if it has flows.

    Without any it leaves nothing, as one that was started without.
    """
    with House.running(lab, "--replace") as house, house.joined() as ends:
        exchange(ends, 1000)
        house.sniroute.stop()
        with lab.product("--replace", routes=write_routes(house.app)) as second:
            adopted = flows(second)
            exchange(ends, 1000)
            reset(ends[0])

            assert ended_by_reset(ends[1])

            wait_for("its end", lambda: told(second))

        assert 1 == adopted
        assert [] == list((lab.bpffs / "sniroute").iterdir())


def test_a_successor_may_be_killed(lab: PacketLab) -> None:
    """
    The old router goes on to drain; the next one has the flows of both when that has ended.
    """
    with ExitStack() as stack, House.running(lab, *FLAGS) as house:
        old = house.sniroute
        of_old = stack.enter_context(house.joined())
        switch(old, "off")
        by_sockets = stack.enter_context(house.joined())
        switch(old, "on")
        wait_for("a note", lambda: lab.notes() == 1)
        old.put_log_aside()
        routes = write_routes(house.app)
        second = lab.product(*FLAGS, "--replace", routes=routes)
        try:
            wait_for("the switch", lambda: replaced(old))
            of_second = stack.enter_context(house.joined())
            wait_for("both noted", lambda: lab.notes() == 2)
        finally:
            second.kill()
        wait_for("no listener", lambda: not lab.host.run("ss", "-Hltn", "sport = :443"))
        every = [of_old, by_sockets, of_second]
        for ends in every:
            exchange(ends, 1000)
        with lab.product(*FLAGS, "--replace", routes=routes) as third:
            at_first = flows(third)
            every.append(stack.enter_context(house.joined()))
            for ends in every:
                exchange(ends, 1000)

            assert old.is_running()
            for end in by_sockets:
                end.close()
            every.remove(by_sockets)
            old.wait_for_end()
            wait_for("all flows", lambda: flows(third) == len(every))
            for ends in every:
                exchange(ends, 1000)
                for end in ends:
                    end.close()
            lines = wait_for("their ends", lambda: len(told(third)) == len(every) and told(third))

    assert 1 == at_first
    assert {("app.example.com", "client_fin")} == {(x["route"], x["reason"]) for x in lines}
