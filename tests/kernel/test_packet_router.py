"""
What becomes of flows when the router, a container, or the operator ends something.
"""

import json
import random
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from harness.ends import (
    HELLO,
    PIECE,
    Sender,
    ended_by_reset,
    read_all,
    read_exactly,
    receive_digest,
    reset,
)
from harness.lab import CLIENT, FRONT, Container
from harness.packet_lab import (
    ACTIVE,
    HANDOFF,
    HELLOS,
    PATIENCE,
    QUARANTINE,
    VERSIONS,
    Ends,
    House,
    PacketLab,
    exchange,
    told,
    write_routes,
)
from harness.product import Sniroute
from harness.tools import HarnessError, run, wait_for
from harness.transfer_promises import BLOCK

from bpfprog import MAX_NOTE, MAX_OWNERS, Packet, State

AT_ONCE = 2.0
"""Seconds in which both ends hear of an end that neither has made."""


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """
    The product in front of a container.
    """
    with PacketLab() as lab, House.running(lab) as house:
        yield house


# --- the router ---


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("client_ip", ["auto", "nat"])
def test_flows_need_no_router(client_ip: str, how: str, lab: PacketLab) -> None:
    """
    Without the router all goes on; the next one knows the flows, and tells of their ends.

    Also of those that ended while there was none.
    """
    with ExitStack() as stack, House.running(lab, client_ip=client_ip) as house:
        pairs = [stack.enter_context(house.joined(version)) for version in (4, 6) * 4]
        for ends in pairs:
            exchange(ends, 1000)
        clients = sorted(client.getsockname()[:2] for client, _ in pairs)
        wait_for("all noted", lambda: lab.notes() == len(pairs))
        (house.sniroute.kill if how == "kill" else house.sniroute.stop)()
        for ends in pairs:
            exchange(ends, PIECE)
        closed, broken, *living = pairs
        for end in closed:
            end.close()
        reset(broken[0])

        assert ended_by_reset(broken[1])

        broken[1].close()
        with lab.product(routes=write_routes(house.app, client_ip=client_ip)) as next_one:
            adopted = next_one.metric(ACTIVE, handoff=HANDOFF)
            for ends in living:
                exchange(ends, PIECE)
                ends[0].shutdown(socket.SHUT_WR)

                assert b"" == read_all(ends[1])

                ends[1].close()
            with house.joined() as ends:
                exchange(ends, 1000)
            wait_for("all told of", lambda: len(told(next_one)) == len(pairs) + 1)
            # without the one that began with this router
            lines = sorted(told(next_one), key=lambda line: -line["bytes_in"])[: len(pairs)]

    assert len(living) == adopted
    assert clients == sorted((line["client"], line["client_port"]) for line in lines)
    assert {(HANDOFF, "app.example.com"), (HANDOFF, "app6.example.com")} == {
        (line["handoff"], line["route"]) for line in lines
    }
    assert Counter(client_fin=len(living) + 1, client_rst=1) == Counter(x["reason"] for x in lines)
    assert len(living) == sum(line["bytes_out"] == 1000 + 2 * PIECE for line in lines)
    # the next router has not seen their hellos
    assert not any("hello_bytes" in line or "tls_versions" in line for line in lines)


def test_a_note_that_is_not_understood_costs_no_start(lab: PacketLab) -> None:
    """
    Of a flow whose note another version wrote, less is known; it is taken over like the others.
    """
    with ExitStack() as stack, House.running(lab) as house:
        pairs = [stack.enter_context(house.joined()) for _ in range(2)]
        wait_for("all noted", lambda: lab.notes() == len(pairs))
        house.sniroute.kill()
        (pin,) = lab.bpffs.rglob("notes")
        first = json.loads(run("bpftool", "--json", "map", "dump", "pinned", pin))[0]["key"]
        other = b'{"version":2}'.ljust(MAX_NOTE, b"\0")
        values = ("value", "hex", *other.hex(" ").split())
        run("bpftool", "map", "update", "pinned", pin, "key", "hex", *first, *values)
        with lab.product(routes=write_routes(house.app)) as next_one:
            adopted = next_one.metric(ACTIVE, handoff=HANDOFF)
            for ends in pairs:
                exchange(ends, PIECE)
                for end in ends:
                    end.close()
            lines = wait_for(
                "both told of", lambda: len(told(next_one)) == len(pairs) and told(next_one)
            )

    assert len(pairs) == adopted
    assert {"unknown", "app.example.com"} == {line["route"] for line in lines}


@VERSIONS
def test_a_router_killed_before_the_acknowledgement_leaves_nothing(
    version: int, lab: PacketLab
) -> None:
    """
    A flow whose hello was under way goes on, and netfilter forgets it like every other.
    """
    patience = ("--connect-timeout", "30")
    with House.running(lab) as house, unacknowledged(house, version) as client:
        house.sniroute.kill()
        with lab.product(*patience, routes=write_routes(house.app)) as next_one:
            adopted = next_one.metric(ACTIVE, handoff=HANDOFF)
            before = tracked(lab)
            house.app.run("nft", "delete table inet deaf")
            with house.backends[version].accept() as end:
                end.settimeout(PATIENCE)
                exchange((client, end), 1000)
                wait_for("no entry", lambda: not tracked(lab))

    assert (1, 2) == (adopted, len(before))


@VERSIONS
def test_an_end_before_the_acknowledgement_leaves_nothing(version: int, lab: PacketLab) -> None:
    """
    A flow whose client resets while its hello is under way is forgotten by netfilter, too.
    """
    with House.running(lab) as house, unacknowledged(house, version) as client:
        name, before = client.getsockname()[:2], tracked(lab)
        reset(client)
        line = house.line(name)
        wait_for("no entry", lambda: not tracked(lab))

    assert (HANDOFF, "client_rst") == (line["handoff"], line["reason"])
    assert 2 == len(before)


@contextmanager
def unacknowledged(house: House, version: int) -> Iterator[socket.socket]:
    """
    Dial *house* for a flow whose hello does not come to the backend, by a table `deaf` there.
    """
    with house.dial(version) as client:
        house.app.run("nft", "add table inet deaf")
        house.app.run("nft", "add chain inet deaf in { type filter hook input priority 0; }")
        house.app.run("nft", "add rule inet deaf in tcp flags & psh == psh drop")
        client.sendall(HELLOS[version])
        wait_for("the flow", lambda: house.lab.flow_ends() == 2)
        yield client


def tracked(lab: PacketLab) -> list[str]:
    """
    List what netfilter knows of connections to the product, and to containers.
    """
    lines = lab.host.run("cat", "/proc/net/nf_conntrack").splitlines()
    return [line for line in lines if " dport=443 " in line]


@pytest.mark.parametrize("handoff", ["sockmap", "relay"])
def test_flows_are_seen_off_without_the_handoff(handoff: str, lab: PacketLab) -> None:
    """
    A router that is not to hand over as packets takes over what is under way, but no more.

    With the last flow all that is pinned goes.
    """
    with ExitStack() as stack, House.running(lab) as house:
        pairs = [stack.enter_context(house.joined(version)) for version in (4, 6)]
        wait_for("all noted", lambda: lab.notes() == len(pairs))
        house.sniroute.kill()
        with lab.product("--handoff", handoff, routes=write_routes(house.app)) as next_one:
            adopted = next_one.metric(ACTIVE, handoff=HANDOFF)
            lines = see_off(house, pairs, next_one, "not asked for")

    assert len(pairs) == adopted
    assert Counter({HANDOFF: len(pairs), handoff: 1}) == Counter(x["handoff"] for x in lines)


def see_off(house: House, pairs: list[Ends], router: Sniroute, reason: str) -> list[dict[str, Any]]:
    """
    Have *router*, which does not hand over as packets for *reason*, serve one more connection.

    Those of *pairs*, which an earlier one has left, go on, and end; then nothing is pinned.

    Returns:
        The lines of the log of all.
    """
    with house.joined() as ends:
        exchange(ends, 1000)
    for ends in pairs:
        exchange(ends, PIECE)
    with pytest.raises(HarnessError, match=f"not in use here: {reason}"):
        router.command("packet", "on")
    for ends in pairs:
        reset(ends[0])

        assert ended_by_reset(ends[1])

    wait_for("all told of", lambda: len(told(router)) == len(pairs) + 1)
    wait_for("nothing pinned", lambda: not pinned(house.lab), timeout=QUARANTINE)
    return told(router)


def pinned(lab: PacketLab) -> list[Path]:
    return list((lab.bpffs / "sniroute").iterdir())


MAX_PROBES = 1024
"""Places that a router looks at for a free one: from the first, if it is the first one's."""


def crowd_out(lab: PacketLab) -> None:
    """
    Have the next router find no room for its trial flow, until it takes over what others claimed.
    """
    (pins,) = pinned(lab)
    with Packet(pins, MAX_OWNERS - 1, joins=True) as packet:
        for number in range(MAX_PROBES):
            flow = packet.flow(number)
            if flow.state == State.FREE:
                flow.owner = packet.owner
                flow.state = State.CLAIMED


def test_flows_are_seen_off_by_a_router_that_fails_its_trial(lab: PacketLab) -> None:
    """
    One whose self-test fails takes over what is under way, but no more, as the log says.

    With the last flow all that is pinned goes.
    """
    with ExitStack() as stack, House.running(lab) as house:
        pairs = [stack.enter_context(house.joined(version)) for version in (4, 6)]
        wait_for("all noted", lambda: lab.notes() == len(pairs))
        house.sniroute.kill()
        crowd_out(lab)
        with lab.product("--handoff", "auto", routes=write_routes(house.app)) as next_one:
            (ready,) = [line for line in next_one.log() if line["event"] == "router ready"]
            adopted = next_one.metric(ACTIVE, handoff=HANDOFF)
            lines = see_off(house, pairs, next_one, "self-test: refused: full")

    assert len(pairs) == adopted
    assert "sockmap" == ready["handoff"]
    assert "no packets: self-test: refused: full" in ready["reason"]
    assert Counter({HANDOFF: len(pairs), "sockmap": 1}) == Counter(x["handoff"] for x in lines)


def test_a_router_that_must_hand_over_and_can_not_leaves_flows_alone(lab: PacketLab) -> None:
    """
    It does not start, and the one that does knows what was under way before.
    """
    with House.running(lab) as house, house.joined() as ends:
        exchange(ends, 1000)
        house.sniroute.kill()
        crowd_out(lab)
        with pytest.raises(HarnessError, match="ended with 1"):
            lab.product(routes=write_routes(house.app))
        exchange(ends, PIECE)
        with lab.product("--handoff", "sockmap", routes=write_routes(house.app)) as next_one:
            adopted = next_one.metric(ACTIVE, handoff=HANDOFF)
            exchange(ends, PIECE)

    assert 1 == adopted


# --- killed at any instant ---

PLAYERS = 32
KILLS_SECONDS = 60.0
INSTANTS = 300
"""Connections that are to be under way, in whatever state, when a router is killed."""

SPEECH = 48 * 1024
LASTING = 8 * PIECE
LASTING_RATE = PIECE
"""Bytes, and bytes a second, of a connection that lives longer than some routers."""

AT_MOST = 60
"""Routers that are killed."""

LIVES = (0.05, 0.6)
"""Seconds that a router lives, at least and at most, once it listens."""


class Echo(socketserver.ThreadingTCPServer):
    """
    A backend that repeats whatever comes behind the hello.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, container: Container) -> None:
        self.strange = 0
        with container.network():
            super().__init__((container.address[4], 443), _Repeat)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Repeat(socketserver.BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        self.request.settimeout(HUNG)
        try:
            if (hello := read_exactly(self.request, len(HELLO))) != HELLO:
                # of a connection that was reset in its hello nothing more may come
                self.server.strange += not HELLO.startswith(hello)
                return
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except OSError:
            return


HUNG = 25
"""Seconds after which a connection that neither goes on nor ends is stuck."""


class Player:
    """
    A thread that has one connection after the other, and tells how they ended.
    """

    def __init__(self, lab: PacketLab, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.under_way = False
        self._lab = lab
        self._chance = random.Random(seed)  # noqa: S311 - noise
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> Counter[str]:
        """
        Stop after the connection under way.
        """
        self._over.set()
        self._thread.join(2 * HUNG)
        return self.outcomes

    def _run(self) -> None:
        while not self._over.is_set():
            outcome = self._play()
            self.under_way = False
            self.outcomes[outcome] += 1
            if outcome == "refused":
                self._over.wait(0.02)

    def _play(self) -> str:
        speech, heard = self._chance.randbytes(SPEECH), b""
        with self._lab.world.network():
            client = socket.socket()
        with client:
            client.settimeout(HUNG)
            try:
                client.connect((FRONT[4], 443))
                self.under_way = True
                client.sendall(HELLO)
                for start in range(0, SPEECH, SPEECH // 4):
                    part = speech[start : start + SPEECH // 4]
                    client.sendall(part)
                    heard += (got := read_exactly(client, len(part)))
                    if len(got) < len(part):
                        break
            except ConnectionRefusedError:
                return "refused"
            except TimeoutError:
                return "hung"
            except OSError:
                return "reset" if speech.startswith(heard) else "mixed"
        if heard == speech:
            return "whole"
        # closed by a router that had not begun to read
        return "mixed" if heard else "ended"


@contextmanager
def players(lab: PacketLab) -> Iterator[list[Player]]:
    """
    Have connections come and go meanwhile.
    """
    playing = [Player(lab, seed) for seed in range(PLAYERS)]
    try:
        yield playing
    finally:
        for player in playing:
            player.end()


def test_a_router_may_be_killed_at_any_instant(lab: PacketLab) -> None:
    """
    Whatever a connection has come to, it goes on or is reset; none hangs, and none is mixed up.

    Those that were handed over go on over all the kills, and arrive whole.  What is left is freed.
    """
    chance, instants = random.Random(7), 0  # noqa: S311 - noise
    until = time.monotonic() + KILLS_SECONDS
    lasting: list[tuple[Sender, Future[tuple[int, str]]]] = []
    app = lab.container(2)
    routes = write_routes(app)
    with Echo(app) as echo, players(lab) as playing, ExitStack() as stack:
        readers = stack.enter_context(ThreadPoolExecutor(AT_MOST))
        while instants < INSTANTS and time.monotonic() < until and len(lasting) < AT_MOST:
            sniroute = lab.product(routes=routes)
            try:
                with lab.world.network():
                    client = stack.enter_context(socket.create_connection(lab.front, HUNG))
                client.sendall(HELLO + b"!")

                assert b"!" == read_exactly(client, 1)

                sender = Sender(client, LASTING, BLOCK, LASTING_RATE)
                lasting.append((sender, readers.submit(receive_digest, client)))
                time.sleep(chance.uniform(*LIVES))  # until an instant that nothing chooses
                instants += sum(player.under_way for player in playing)
            finally:
                sniroute.kill()
        for sender, received in lasting:
            assert (LASTING, sender.join()) == received.result()
        for player in playing:
            player.end()
        strange = echo.strange
        with lab.product(routes=routes) as last:
            wait_for("all freed", lambda: last.metric("sniroute_packet_flows") == 0, timeout=30)
            left = lab.flow_ends()
    outcomes = sum((player.outcomes for player in playing), Counter())

    assert (0, 0) == (strange, left)
    assert {"mixed": 0, "hung": 0} == {kind: outcomes[kind] for kind in ("mixed", "hung")}, outcomes
    assert outcomes["whole"] > 0
    assert instants >= INSTANTS


# --- replaced ---

CROWD = 200
"""Connections that come and go while one router takes the place of another, at least."""


def test_a_crowd_does_not_notice_a_replacement(lab: PacketLab) -> None:
    """
    No connection is refused, broken or lost, neither one that comes meanwhile nor one that lasts.
    """
    app = lab.container(2)
    flags = ("--drain", "20", "--hello-timeout", "2")
    routes = write_routes(app)
    with Echo(app), ExitStack() as stack:
        old = stack.enter_context(lab.product(*flags, routes=routes))
        with lab.world.network():
            client = stack.enter_context(socket.create_connection(lab.front, HUNG))
        client.sendall(HELLO + b"!")

        assert b"!" == read_exactly(client, 1)

        sender = Sender(client, LASTING, BLOCK, LASTING_RATE)
        received = stack.enter_context(ThreadPoolExecutor(1)).submit(receive_digest, client)
        playing = stack.enter_context(players(lab))

        def wait_for_more() -> None:
            whole = sum(player.outcomes["whole"] for player in playing)
            wait_for(
                "more connections",
                lambda: sum(player.outcomes["whole"] for player in playing) >= whole + CROWD // 2,
            )

        wait_for_more()
        old.put_log_aside()
        with lab.product(*flags, "--replace", routes=routes) as new:
            wait_for_more()
            old.wait_for_end()
            wait_for_more()
            outcomes = sum((player.end() for player in playing), Counter())
            lasted = (LASTING, sender.join()) == received.result()
            wait_for("all over", lambda: not new.metric(ACTIVE))
            # the log is written a little later
            wait_for(
                "all told of",
                lambda: len(told(old)) + len(told(new)) == 1 + outcomes.total(),
            )

    assert lasted
    assert {"whole"} == set(outcomes), outcomes


# --- a container ---


@VERSIONS
def test_a_container_that_is_gone_is_told_of(version: int, lab: PacketLab) -> None:
    """
    When a container is no more, and its network with it, its clients hear so at once.
    """
    with House.running(lab) as house:
        house.tell()
        with house.joined(version) as ends:
            exchange(ends, 1000)
            name = ends[0].getsockname()[:2]
            lab.host.run("ip", "link", "del", "port2")
            house.tell(alive=False)
            began = time.monotonic()

            assert ended_by_reset(ends[0])
            assert time.monotonic() - began < AT_ONCE
        line = house.line(name)

        assert (HANDOFF, "backend_gone") == (line["handoff"], line["reason"])


@VERSIONS
def test_a_container_that_is_cut_off_is_told_of_its_end(version: int, lab: PacketLab) -> None:
    """
    One that its engine has given up, but that can still hear, is reset too.
    """
    with House.running(lab) as house:
        house.tell()
        with house.joined(version) as ends:
            exchange(ends, 1000)
            house.tell(alive=False)
            began = time.monotonic()

            assert [True, True] == [ended_by_reset(end) for end in ends]
            assert time.monotonic() - began < AT_ONCE


# --- the operator ---


def listed(house: House) -> list[dict[str, Any]]:
    """
    Ask for the connections under way.
    """
    return json.loads(house.sniroute.command("connections", "--json"))


@VERSIONS
def test_connections_are_listed(version: int, house: House) -> None:
    """
    A flow is listed with who, whither, by what, and the bytes of each way as they come.
    """
    with house.spliced(version) as (client, end):
        name = client.getsockname()[:2]
        client.sendall(BLOCK[:1000])
        read_exactly(end, 1000)
        end.sendall(BLOCK[:5000])
        read_exactly(client, 5000)
        wait_for("one flow", lambda: len(listed(house)) == 1)
        (one,) = listed(house)

    assert name == (one["client"], one["client_port"])
    assert (house.app.address[version], 443) == (one["backend_address"], one["backend_port"])
    assert HANDOFF == one["handoff"]
    assert house.line(name)["hello_bytes"] + 1000 == one["bytes_in"]
    assert 5000 == one["bytes_out"]
    assert 0 <= one["quiet"] < 3


@VERSIONS
@pytest.mark.parametrize("by", ["id", "client", "route"])
def test_a_flow_is_killed(by: str, version: int, house: House) -> None:
    """
    Both ends of a flow that an operator kills are reset at once, and no other flow is.
    """
    with house.joined(10 - version) as others, house.joined(version) as ends:
        name = ends[0].getsockname()[:2]
        exchange(ends, 1000)
        (one,) = (c for c in listed(house) if (c["client"], c["client_port"]) == name)
        which = {
            "id": (str(one["id"]),),
            "client": ("--client", CLIENT[version]),
            "route": ("--route", one["route"]),
        }
        house.sniroute.command("kill", *which[by])
        began = time.monotonic()

        assert [True, True] == [ended_by_reset(end) for end in ends]
        assert time.monotonic() - began < AT_ONCE

        exchange(others, 1000)
    line = house.line(name)

    assert (HANDOFF, "killed") == (line["handoff"], line["reason"])


@VERSIONS
def test_an_idle_flow_is_killed(version: int, house: House) -> None:
    """
    Also where neither end has said anything for so long that the host has forgotten where it is.
    """
    with house.joined(version) as ends:
        wait_for("one flow", lambda: len(listed(house)) == 1)
        house.lab.host.run("ip", "neigh", "flush", "all")
        house.sniroute.command("kill", str(listed(house)[0]["id"]))

        assert [True, True] == [ended_by_reset(end) for end in ends]


def test_packets_may_be_switched_off(lab: PacketLab) -> None:
    """
    Off is for new connections; those under way go on, and with the last one all is taken down.
    """
    with House.running(lab) as house:
        with house.spliced() as ends:
            house.sniroute.command("packet", "off")
            with house.joined() as others:
                name = others[0].getsockname()[:2]
                exchange(others, 1000)
            exchange(ends, 1000)
        off = house.refused(name)
        house.sniroute.command("packet", "on")
        with house.spliced() as ends:
            exchange(ends, 1000)
        house.sniroute.command("packet", "off")
        state = wait_for("all taken down", lambda: taken_down(house), timeout=30)

        assert "off" == off
        assert [] == state["devices"]
        assert [] == list(lab.bpffs.rglob("ends"))
        with pytest.raises(HarnessError, match="detached"):
            house.sniroute.command("packet", "on")
        with house.joined() as ends:
            exchange(ends, 1000)


def taken_down(house: House) -> dict[str, Any] | None:
    state = json.loads(house.sniroute.command("packet", "status", "--json"))
    return state if state["state"] == "detached" else None
