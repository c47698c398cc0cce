"""
The router dials from ports that nobody else has, as far as it can tell.
"""

import socket

import pytest

from controller.router.ports import TRIES, Ports, choose_range

CLIENT = (socket.inet_aton("198.51.100.7"), 40000)
BACKEND = (socket.inet_aton("198.18.1.2"), 443)
MAPPED = bytes(10) + b"\xff\xff"


def entry(here: tuple[bytes, int], there: tuple[bytes, int]) -> bytes:
    """
    Write two endpoints as a `struct tuple`.
    """
    ports = here[1].to_bytes(2) + there[1].to_bytes(2)
    return MAPPED + here[0] + MAPPED + there[0] + ports


@pytest.mark.parametrize(
    ("kernel", "ours"),
    [
        ((32768, 60999), range(10240, 32768)),
        ((10240, 60999), range(61000, 65536)),
        ((1024, 65535), range(1024, 65536)),
    ],
)
def test_the_range_is_not_the_kernels(kernel: tuple[int, int], ours: range) -> None:
    """
    Of what the kernel leaves, the part below; else that above; if there is too little, its own.
    """
    assert ours == choose_range(kernel)


def test_no_port_of_a_flow_is_chosen_for_the_same_backend() -> None:
    """
    A port is passed over while a flow to that backend has it, from whatever address.
    """
    ports = Ports()
    first = ports.choose(BACKEND)
    for port in range(first + 2, first + 8, 2):
        ports.take(entry((CLIENT[0], port), BACKEND))
    other = ports.choose((BACKEND[0], 8443))
    next_one = ports.choose(BACKEND)

    assert first + 2 == other
    assert first + 8 == next_one


def test_a_clients_own_port_is_free_unless_it_has_a_flow_there() -> None:
    """
    The whole of the addresses counts: another client may have the same port.
    """
    ports = Ports()
    ports.take(entry(CLIENT, BACKEND))
    neighbour = (socket.inet_aton("198.51.100.8"), CLIENT[1])
    taken = ports.is_free(CLIENT, BACKEND)
    beside = ports.is_free(neighbour, BACKEND), ports.is_free(CLIENT, (BACKEND[0], 8443))
    ports.give_back(entry(CLIENT, BACKEND))

    assert not taken
    assert (True, True) == beside
    assert ports.is_free(CLIENT, BACKEND)


def test_a_search_ends() -> None:
    """
    With all ports that are looked at in use, there is none: the kernel is left to choose.
    """
    ports = Ports()
    first = ports.choose(BACKEND)
    for port in range(first, first + 2 * TRIES + 2):
        ports.take(entry((CLIENT[0], port), BACKEND))

    assert 0 == ports.choose(BACKEND)


def test_routers_and_workers_choose_from_different_ports() -> None:
    """
    None knows what the others have chosen: two workers, and those that take their place.
    """
    several = [Ports(half, worker, 2) for half in (0, 1) for worker in (0, 1)]
    chosen = [{ports.choose(BACKEND) for _ in range(1000)} for ports in several]

    assert 4000 == len(set().union(*chosen))
