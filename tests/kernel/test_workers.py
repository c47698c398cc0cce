"""
Several workers and the packet hand-off: flows are all workers' to see and to end, and outlive each.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
from harness.ends import client_hello, ended_by_reset, read_exactly
from harness.lab import FRONT, Container, Lab, route
from harness.operate import ask, kill
from harness.packet_lab import PacketLab
from harness.product import Sniroute
from harness.tools import wait_for

from controller.core.wire import Message

NAME = "app.test"
HELLO = client_hello(NAME)
WORKERS = 3
FLOWS = 12
PORTS = 60
KILLS = 5
STATUS: Message = {"type": "status"}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def packet_lab() -> Iterator[PacketLab]:
    """
    A lab whose routers, one after the other, find what is pinned.
    """
    with PacketLab() as lab:
        yield lab


def serve_echoes(stack: ExitStack, container: Container) -> None:
    """
    Have *container* echo whatever comes to its port 443.
    """
    with container.network():
        listener = stack.enter_context(socket.create_server((container.address[4], 443)))

    def serve() -> None:
        with suppress(OSError):
            while True:
                end, _ = listener.accept()
                threading.Thread(target=echo, args=(end,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    stack.callback(listener.shutdown, socket.SHUT_RDWR)


def echo(end: socket.socket) -> None:
    with end, suppress(OSError):
        while data := end.recv(65536):
            end.sendall(data)


def talks(client: socket.socket, word: bytes) -> bool:
    client.sendall(word)
    return read_exactly(client, len(word)) == word


def test_flows_outlive_their_worker(lab: Lab) -> None:
    """
    A killed worker's flows go on, and the next one has them: to list, to end and to count.

    Switched off, the packet hand-off leaves the devices when the flows of all workers have ended.
    """
    app = lab.container(2)
    control = lab.share / "router.sock"

    def answer(message: Message) -> Message:
        return ask(control, message)[0]

    def packet(state: str = "status") -> Message:
        told: Message = answer({"type": "packet", "state": state})["packet"]
        return told

    def ids() -> list[int]:
        listed = answer({"type": "connections", "after": 0})
        return [connection["id"] for connection in listed["connections"]]

    with ExitStack() as stack:
        serve_echoes(stack, app)
        options = ("--workers", str(WORKERS), "--handoff", "packet")
        sniroute = stack.enter_context(lab.product(*options, routes=route(NAME, app.address[4])))

        def dial() -> socket.socket:
            with lab.world.network():
                client = socket.create_connection((FRONT[4], 443), 10)
            assert talks(stack.enter_context(client), HELLO)
            return client

        clients = [dial() for _ in range(FLOWS)]
        wait_for("flows", lambda: packet()["flows"] == FLOWS)
        before = ids()
        (nursery,) = sniroute.router().children()
        workers: list[psutil.Process] = nursery.children()
        for worker in workers:
            kill(worker)

        assert all(talks(client, b"while they are away") for client in clients)

        wait_for("workers", lambda: answer(STATUS)["workers"]["running"] == WORKERS)
        wait_for("the same flows", lambda: packet()["flows"] == FLOWS)
        clients += [dial() for _ in range(FLOWS)]
        now = ids()
        killed = answer({"type": "kill", "ids": now})["killed"]

        assert (FLOWS, 2 * FLOWS) == (len(before), len(set(now)))
        assert sorted(now) == sorted(killed)
        assert all(map(ended_by_reset, clients))
        assert 0 == packet("off")["flows"]
        wait_for("no devices", lambda: not packet()["devices"])
        # of what is switched off a worker that comes back takes nothing
        kill(nursery.children()[0])
        wait_for("workers", lambda: answer(STATUS)["workers"]["running"] == WORKERS)
        assert ("detached", 0) == (packet()["state"], packet()["flows"])


def keep_down(sniroute: Sniroute) -> None:
    """
    Kill the workers until they are not started again for some seconds.
    """
    (nursery,) = sniroute.router().children()
    for _ in range(KILLS):
        for worker in wait_for(
            "workers", lambda: len(w := nursery.children()) == WORKERS - 1 and w
        ):
            kill(worker)


@pytest.mark.parametrize("heirs", [1, WORKERS])
def test_workers_of_a_replaced_router_may_be_killed(heirs: int, packet_lab: PacketLab) -> None:
    """
    While the old router drains, its killed workers' flows go on; then the new one has them all.

    So it does if it is without workers of its own at that moment, for they were killed, too.
    """
    app = packet_lab.container(2)
    control = packet_lab.share / "router.sock"
    slow = "slow.test"
    routes = route(NAME, app.address[4]) + route(slow, app.address[4], handoff="relay")
    options = ("--drain", "30", "--hello-timeout", "1")

    def flows() -> int:
        return ask(control, {"type": "packet", "state": "status"})[0]["packet"]["flows"]

    with ExitStack() as stack:
        serve_echoes(stack, app)

        def dial(hello: bytes = HELLO) -> socket.socket:
            with packet_lab.world.network():
                client = socket.create_connection((FRONT[4], 443), 10)
            assert talks(stack.enter_context(client), hello)
            return client

        old = stack.enter_context(
            packet_lab.product(*options, "--workers", str(WORKERS), routes=routes)
        )
        clients = [dial() for _ in range(FLOWS)]
        holding = [dial(client_hello(slow)) for _ in range(FLOWS)]
        wait_for("flows", lambda: flows() == FLOWS)
        (nursery,) = old.router().children()
        old.put_log_aside()
        flags = (*options, "--workers", str(heirs), "--replace")
        new = stack.enter_context(packet_lab.product(*flags, routes=routes))
        wait_for("the switch", lambda: "replaced" in [line["event"] for line in old.log()])
        for worker in nursery.children():
            kill(worker)
        clients += [dial() for _ in range(FLOWS)]

        assert all(talks(client, b"while both are here") for client in clients)
        assert old.is_running()

        if heirs > 1:
            keep_down(new)
        for client in holding:
            client.close()
        old.wait_for_end()
        wait_for("all flows", lambda: flows() == 2 * FLOWS)

        assert all(talks(client, b"with one of them gone") for client in clients)

        listed = ask(control, {"type": "connections", "after": 0})[0]["connections"]
        killed = ask(control, {"type": "kill", "ids": [c["id"] for c in listed]})[0]["killed"]

        assert 2 * FLOWS == len(killed)
        assert all(map(ended_by_reset, clients))
        new.stop()


def test_workers_dial_from_different_ports(lab: Lab) -> None:
    """
    No two flows to one backend have one port of the host's, whichever workers they are of.
    """
    app = lab.container(2)
    with ExitStack() as stack:
        with app.network():
            listener = stack.enter_context(socket.create_server((app.address[4], 443)))
        options = ("--workers", str(WORKERS), "--handoff", "packet", "--client-ip", "off")
        stack.enter_context(lab.product(*options, routes=route(NAME, app.address[4])))
        control, ports = lab.share / "router.sock", []
        for _ in range(PORTS):
            with lab.world.network():
                client = stack.enter_context(socket.create_connection((FRONT[4], 443), 10))
            client.sendall(HELLO)
            end, peer = listener.accept()
            stack.enter_context(end)
            ports.append(peer[1])
        status: Message = {"type": "packet", "state": "status"}
        wait_for("flows", lambda: ask(control, status)[0]["packet"]["flows"] == PORTS)
        listed = ask(control, {"type": "connections", "after": 0})[0]["connections"]
        workers = {connection["id"] % WORKERS for connection in listed}

    assert WORKERS == len(workers)
    assert PORTS == len(set(ports))
