"""
Pools and changing routes: whose turn it is, who is passed over, and what a change leaves alone.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from harness.echoes import Echoes, Speech, greeting
from harness.ends import HELLO, NAME, Backend, connection, dial, read_all, read_exactly
from harness.loopback import LOOPBACK, Address, Product, router
from harness.operate import ask, put_routes, served, sniroute, write_routes
from harness.tools import HarnessError, wait_for

from controller.core.alert import INTERNAL_ERROR, alert

ERRORS = "sniroute_backend_connect_errors_total"
CONNECT_TIMEOUT = 0.5


@pytest.fixture(scope="module")
def echoes() -> Iterator[Echoes]:
    """
    Three backends that say who they are.
    """
    with Echoes("abc") as echoes:
        yield echoes


@pytest.fixture(scope="module")
def product(echoes: Echoes) -> Iterator[Product]:
    """
    A router whose routes each test writes for itself.
    """
    first = {NAME: echoes.addresses["a"]}
    with router("relay", first, "--connect-timeout", str(CONNECT_TIMEOUT)) as product:
        yield product


@pytest.fixture
def dead() -> Address:
    """
    An address where nobody listens.
    """
    with socket.create_server((LOOPBACK, 0)) as gone:
        return gone.getsockname()


@contextmanager
def silent() -> Iterator[Address]:
    """
    Listen with a backlog that is full: the kernel drops what else would connect.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        for _ in range(8):
            try:
                stack.enter_context(socket.create_connection(listener.getsockname(), 0.2))
            except TimeoutError:
                break
        else:
            raise HarnessError("the backlog does not fill")
        yield listener.getsockname()


def who(product: Product, echoes: Echoes, count: int, ends: int = len(HELLO) + 2) -> str:
    """
    Connect *count* times, one after the other, and tell who answers.
    """
    names = ""
    for _ in range(count):
        (heard,) = echoes.say(product.listen, Speech((HELLO,), ends_after=ends))
        names += heard[:1].decode()
        assert greeting(names[-1]) + HELLO == heard
    return names


def errors(product: Product) -> dict[str, float]:
    return product.counts(ERRORS, "error")


def grown(product: Product, error: str, before: dict[str, float]) -> float:
    return errors(product).get(error, 0) - before.get(error, 0)


def test_backends_take_turns(product: Product, echoes: Echoes) -> None:
    """
    Connections go to the backends of a pool in turn, in the order of the route.
    """
    write_routes(product, {NAME: [echoes.addresses[name] for name in "abc"]})

    names = {address: name for name, address in echoes.addresses.items()}
    order = "".join(names[address] for address in served(product.control)[NAME])

    heard = who(product, echoes, 7)

    assert heard in order * 4


def test_a_dead_backend_is_passed_over(product: Product, echoes: Echoes, dead: Address) -> None:
    """
    No client notices a backend that refuses; each time that it was its turn is counted.
    """
    before = errors(product)
    write_routes(product, {NAME: [dead, echoes.addresses["b"], echoes.addresses["c"]]})

    heard = who(product, echoes, 6)

    assert set(heard) == {"b", "c"}
    assert grown(product, "econnrefused", before) == 2


def test_a_silent_backend_is_passed_over_in_time(product: Product, echoes: Echoes) -> None:
    """
    A backend that does not answer at all is given up after --connect-timeout, for the next one.
    """
    before = errors(product)
    with silent() as address:
        write_routes(product, {NAME: [address, echoes.addresses["b"]]})

        assert who(product, echoes, 2) == "bb"
        assert grown(product, "etimedout", before) == 1


def test_no_backend_is_an_internal_error(product: Product, dead: Address) -> None:
    """
    When each backend of the pool was tried once, the client gets internal_error, and the end.
    """
    before = errors(product)
    with silent() as address:
        write_routes(product, {NAME: [dead, address]})
        with dial(product.listen) as client:
            assert read_all(client) == alert(INTERNAL_ERROR)

    assert (1, 1) == tuple(grown(product, e, before) for e in ("econnrefused", "etimedout"))


def test_a_change_leaves_open_connections_alone(product: Product, echoes: Echoes) -> None:
    """
    After a change new connections go the new way; an old one keeps its backend.

    So it does when its route is gone.
    """
    with Backend() as old:
        write_routes(product, {NAME: [old.address]})
        with connection(product.listen, old) as (client, end):
            write_routes(product, {NAME: [echoes.addresses["b"]]})
            first = who(product, echoes, 1)
            write_routes(product, {"other.example.com": [echoes.addresses["b"]]})
            client.sendall(b"still there?")
            heard = read_exactly(end, 12)
            end.sendall(b"yes")

            assert (first, heard, read_exactly(client, 3)) == ("b", b"still there?", b"yes")
            active = product.counts("sniroute_connections_active", "route")
            assert {NAME: 1} == active


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[route]\n", "routes.toml"),
        ('[[route]]\nhost = ["a.example.com"]\n', "backends"),
        ('[[route]]\nhost = ["a.*.com"]\nbackends = ["198.51.100.2:443"]\n', "a.*.com"),
    ],
    ids=["no TOML", "no backends", "no host pattern"],
)
def test_a_bad_routes_file_changes_nothing(
    text: str, says: str, product: Product, echoes: Echoes
) -> None:
    """
    The old routes stay as they are, the problem is told, and is over with the next good file.
    """
    good = {NAME: [echoes.addresses["c"]], "b.example.com": [echoes.addresses["b"]]}
    write_routes(product, good)

    put_routes(product, text)
    wait_for("the problem", lambda: says in problems(product))

    assert good == served(product.control)
    assert who(product, echoes, 1) == "c"

    write_routes(product, good)
    wait_for("no problem", lambda: problems(product) == "[]")


def problems(product: Product) -> str:
    (status,) = ask(product.control, {"type": "status"})
    return str(status["problems"])


def test_the_commands_show_what_is_served(product: Product, echoes: Echoes) -> None:
    """
    `sniroute routes` and `sniroute status` tell of the real router.
    """
    address = echoes.addresses["a"]
    write_routes(product, {NAME: [address]})

    routes = sniroute("routes", "--control", str(product.control))
    status = sniroute("status", "--control", str(product.control))

    assert (0, 0) == (routes.returncode, status.returncode)
    assert routes.stdout.splitlines()[1].startswith(f"{NAME}  {LOOPBACK}:{address[1]}")
    assert "hand-off     relay (asked for)" in status.stdout.splitlines()
    assert "controllers  1" in status.stdout.splitlines()
