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
from harness.tools import wait_for

from controller.core.wire import Message

NAME = "app.test"
HELLO = client_hello(NAME)
WORKERS = 3
FLOWS = 12
STATUS: Message = {"type": "status"}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
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
