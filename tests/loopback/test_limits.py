"""
Limits on time and number: a slow hello, and more clients than are allowed at once.
"""

import socket
import time
from contextlib import ExitStack

import pytest
from harness.echoes import Echoes, Speech, greeting
from harness.ends import HELLO, NAME, PATIENCE, Backend, connection, dial, read_all
from harness.loopback import Product, router
from harness.tools import wait_for
from harness.transfer_promises import active

from controller.core.alert import HANDSHAKE_FAILURE, alert

RESULTS = "sniroute_connections_total"
PAUSES = "sniroute_accept_pauses_total"
HELLO_TIMEOUT = 0.5


def counted(product: Product, result: str, count: int) -> None:
    wait_for(result, lambda: product.counts(RESULTS, "result").get(result) == count)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [(b"", b""), (HELLO[:100], alert(HANDSHAKE_FAILURE))],
    ids=["silence", "half a hello"],
)
def test_a_hello_that_does_not_come_is_given_up(sent: bytes, answer: bytes) -> None:
    """
    A client that does not finish its hello in time gets an alert, if it has begun, and the end.
    """
    with (
        Backend() as backend,
        router("relay", {NAME: backend.address}, "--hello-timeout", str(HELLO_TIMEOUT)) as product,
        socket.create_connection(product.listen, PATIENCE) as client,
    ):
        client.sendall(sent)

        assert answer == read_all(client)
        client.close()
        counted(product, "hello_timeout", 1)


def test_dribbling_does_not_buy_time() -> None:
    """
    The time is for the whole hello: a byte now and then does not extend it.
    """
    with (
        Backend() as backend,
        router("relay", {NAME: backend.address}, "--hello-timeout", str(HELLO_TIMEOUT)) as product,
        socket.create_connection(product.listen, PATIENCE) as client,
    ):
        client.settimeout(0.05)
        began, heard = time.monotonic(), b""
        for byte in HELLO:
            client.sendall(bytes((byte,)))
            try:
                heard = client.recv(100)
                break
            except TimeoutError:
                pass

        assert alert(HANDSHAKE_FAILURE) == heard
        assert HELLO_TIMEOUT - 0.1 < time.monotonic() - began < 4 * HELLO_TIMEOUT


def test_too_many_clients_wait_their_turn() -> None:
    """
    A client beyond --max-connections is not served until one of the others has ended.
    """
    with (
        Backend() as backend,
        router("relay", {NAME: backend.address}, "--max-connections", "2") as product,
        ExitStack() as stack,
    ):
        (first, first_end), _ = [
            stack.enter_context(connection(product.listen, backend)) for _ in range(2)
        ]
        third = stack.enter_context(dial(product.listen))
        wait_for("a pause", lambda: product.counts(PAUSES, "reason") == {"max_connections": 1})

        assert active(product) == 2

        first.close()
        first_end.close()
        third_end = stack.enter_context(backend.accept())
        third_end.sendall(b"welcome")

        assert third.recv(7) == b"welcome"
        assert active(product) == 2


def test_all_of_a_crowd_are_served() -> None:
    """
    With far more clients than are allowed at once, each is served in the end.
    """
    with (
        Echoes({NAME}) as echoes,
        router("relay", {NAME: echoes.addresses[NAME]}, "--max-connections", "3") as product,
    ):
        whole = greeting(NAME) + HELLO
        heard = echoes.say(product.listen, *[Speech((HELLO,), ends_after=len(whole))] * 40)

        assert [whole] * 40 == heard
        counted(product, "forwarded", 40)
