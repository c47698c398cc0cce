"""
The product reads hellos with OpenSSL; a parser that shares nothing with it must agree.
"""

import random
import socket
from collections.abc import Iterator

import pytest
from controller.router._native import ffi, lib
from harness import hellos
from harness.hellos import Hello
from harness.loopback import LOOPBACK

from controller.core.hello import HelloError, read_server_name

LIMIT = 64 * 1024
MUTANTS = 400


class Reader:
    """
    The product's reader, on a real connection for each hello.
    """

    def __init__(self) -> None:
        assert lib.hello_init() == 0
        self._listener = socket.create_server((LOOPBACK, 0))
        self._arrivals = ffi.new("struct arrival[1]")
        self._error = ffi.new("int *")

    def close(self) -> None:
        """
        Stop listening.
        """
        self._listener.close()

    def read(self, data: bytes) -> dict[int, bytes] | None:
        """
        Return the extension bodies of the hello in *data*, None without a whole good hello.
        """
        with socket.create_connection(self._listener.getsockname()) as client:
            client.sendall(data)
            # loopback delivers before sendall returns, so that the first look sees it all
            listener, arrivals = self._listener.fileno(), self._arrivals
            assert lib.accept_clients(listener, LIMIT, arrivals, 1, self._error) == 1
            arrival = arrivals[0]
            socket.close(arrival.fd)
            if arrival.hello != ffi.NULL:
                lib.hello_free(arrival.hello)
            reading = arrival.reading
            if reading.status != lib.HELLO_COMPLETE:
                return None
            return {
                kind: ffi.buffer(body.body, body.size)[:]
                for kind, body in enumerate(reading.extensions)
                if body.body != ffi.NULL
            }

    def server_name(self, data: bytes) -> str | None:
        """
        Return the name that the product would route *data* by.
        """
        bodies = self.read(data) or {}
        try:
            return read_server_name(bodies[lib.EXT_SERVER_NAME])
        except (KeyError, HelloError):
            return None


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def mutants(data: bytes) -> Iterator[bytes]:
    """
    Change *data* in a few places, most of them lengths and names: the same in every run.
    """
    chance = random.Random(data)  # noqa: S311 - no secret
    name = data.index(b"example") - 10
    for _ in range(MUTANTS):
        mutant = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            where = chance.choice((range(50), range(name - 10, name + 30), range(len(data))))
            kind = chance.randrange(4)
            at = chance.choice(where) % len(mutant)
            if kind == 0:
                mutant[at] = chance.randrange(256)
            elif kind == 1:
                mutant[at] = (mutant[at] + chance.choice((-1, 1))) % 256
            elif kind == 2:
                del mutant[at : at + chance.randint(1, 8)]
            else:
                mutant[at:at] = chance.randbytes(chance.randint(1, 8))
        yield bytes(mutant)


@pytest.mark.parametrize("hello", [*hellos.good(), *hellos.odd()], ids=lambda h: h.name)
def test_both_read_a_good_hello_alike(reader: Reader, hello: Hello) -> None:
    """
    The name of a good hello is the same to both.
    """
    assert hello.server_name == reader.server_name(hello.data)
    assert hello.server_name == hellos.independent_server_name(hello.data)


@pytest.mark.parametrize("hello", hellos.good(), ids=lambda h: h.name)
def test_ech_is_seen(reader: Reader, hello: Hello) -> None:
    """
    The product sees whether a client sent encrypted_client_hello, in earnest or as GREASE.
    """
    bodies = reader.read(hello.data) or {}

    assert hello.ech == (lib.EXT_ECH in bodies)


@pytest.mark.parametrize("hello", hellos.good(), ids=lambda h: h.name)
def test_no_mutant_gets_another_name(reader: Reader, hello: Hello) -> None:
    """
    Whatever is done to a hello, it is routed only by the name that the other parser finds.
    """
    differing = [
        (mutant.hex(), name, other)
        for mutant in mutants(hello.data)
        if (name := reader.server_name(mutant)) is not None
        and name != (other := hellos.independent_server_name(mutant))
    ]

    assert not differing
