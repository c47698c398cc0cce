"""
What is read out of extension bodies: names, protocols, versions; and the words for refusals.
"""

import struct

import pytest
from harness import hellos
from harness.hellos import SERVER_NAME, Hello, server_name, vector
from hypothesis import given
from hypothesis import strategies as st

from controller.core import alert, hello
from controller.core.hello import HelloError, read_alpn, read_server_name, read_versions

ALPN = 16
SUPPORTED_VERSIONS = 43
TLS12, TLS13 = 0x0303, 0x0304


def bodies(data: bytes) -> dict[int, bytes]:
    return dict(hellos.take_apart(data).extensions)


@pytest.mark.parametrize("recorded", hellos.good(), ids=lambda h: h.name)
def test_reads_what_the_client_was_asked_to_say(recorded: Hello) -> None:
    """
    The name and the protocols of every recorded hello are those that the client was given.
    """
    found = bodies(recorded.data)

    name, alpn = read_server_name(found[SERVER_NAME]), found.get(ALPN)

    assert recorded.server_name == name
    assert recorded.alpn == (read_alpn(alpn) if alpn is not None else ())


@pytest.mark.parametrize("recorded", hellos.good(), ids=lambda h: h.name)
def test_reads_the_versions_that_clients_offer(recorded: Hello) -> None:
    """
    Clients of TLS 1.3 offer it, and older ones have no such list.
    """
    body = bodies(recorded.data).get(SUPPORTED_VERSIONS)

    modern = "tls12" not in recorded.name and "tls10" not in recorded.name
    assert modern == (body is not None and TLS13 in read_versions(body))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (b"app.example.com", "app.example.com"),
        (b"APP.Example.COM", "app.example.com"),
        (b"app.example.com.", "app.example.com"),
        (b"_acme.example.com", "_acme.example.com"),
        (b"xn--bcher-kva.example.com", "xn--bcher-kva.example.com"),
        (b"a" * 63 + b".example.com", "a" * 63 + ".example.com"),
        (b"localhost", "localhost"),
    ],
)
def test_reads_a_name_in_its_one_form(said: bytes, read: str) -> None:
    """
    However a client writes a name, it is read in the form that routes have.
    """
    assert read == read_server_name(server_name(said))


@pytest.mark.parametrize("name", hellos.BAD_NAMES)
def test_refuses_what_is_no_host_name(name: str) -> None:
    """
    A well-framed server_name that is no host name is refused as unrecognized.
    """
    with pytest.raises(HelloError) as caught:
        read_server_name(server_name(hellos.BAD_NAMES[name]))

    assert (caught.value.result, caught.value.alert) == ("bad_name", alert.UNRECOGNIZED_NAME)


NAME = server_name(b"app.example.com")


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_server_name, b""),
        (read_server_name, b"\0"),
        (read_server_name, vector(b"")),
        (read_server_name, vector(b"\0")),
        (read_server_name, NAME[:-1]),
        (read_server_name, NAME + b"x"),
        (read_server_name, b"\0\xff" + NAME[2:]),
        (read_server_name, NAME[:3] + b"\0\xff" + NAME[5:]),
        (read_server_name, NAME[:3] + b"\0\x05" + NAME[5:]),
        (read_server_name, server_name(b"app.example.com", b"b.example.com")),
        (read_server_name, server_name(b"app.example.com", kind=1)),
        (read_alpn, b""),
        (read_alpn, b"\0"),
        (read_alpn, vector(b"")),
        (read_alpn, vector(b"\0")),
        (read_alpn, vector(b"\2h2\0")),
        (read_alpn, vector(b"\2h2\x08http")),
        (read_alpn, b"\0\x05\2h2"),
        (read_alpn, b"\0\x02\2h2"),
        (read_alpn, vector(b"\2h2") + b"x"),
        (read_alpn, vector(b"\2h2" * 100 + b"\0")),
        (read_versions, b""),
        (read_versions, vector(b"", 1)),
        (read_versions, vector(b"\3", 1)),
        (read_versions, vector(b"\3\4\3", 1)),
        (read_versions, b"\4\3\4"),
        (read_versions, b"\2\3\4\3\3"),
    ],
)
def test_refuses_a_body_that_is_not_well_formed(read, body) -> None:  # noqa: ANN001 - three types
    """
    A body that is not exactly one list of its kind is a decode error.
    """
    with pytest.raises(HelloError) as caught:
        read(body)

    assert (caught.value.result, caught.value.alert) == ("hello_invalid", alert.DECODE_ERROR)


@given(st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=64))
def test_reads_protocols_back(protocols: list[bytes]) -> None:
    """
    Every list of protocols that can be written is read as it was, remembered or not.
    """
    body = vector(b"".join(vector(protocol, 1) for protocol in protocols))

    assert tuple(protocols) == read_alpn(body)


@given(st.binary(max_size=300))
def test_any_bytes_are_protocols_or_an_error(body: bytes) -> None:
    """
    What is read as protocols is the one way to write them.
    """
    try:
        protocols = read_alpn(body)
    except HelloError:
        return

    assert body == vector(b"".join(vector(protocol, 1) for protocol in protocols))


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=127))
def test_reads_versions_back(versions: list[int]) -> None:
    """
    Every list of versions that can be written is read as it was.
    """
    body = vector(struct.pack(f"!{len(versions)}H", *versions), 1)

    assert tuple(versions) == read_versions(body)


def test_large_lists_are_not_remembered() -> None:
    """
    A stranger's 64 KiB of protocols are read, and nothing of them is kept.
    """
    body = vector(b"\1a" * 32767)
    before = hello._cached_alpn.cache_info().currsize  # noqa: SLF001 - the promise is about it

    protocols = read_alpn(body)

    assert protocols == (b"a",) * 32767
    assert before == hello._cached_alpn.cache_info().currsize  # noqa: SLF001


def test_an_alert_is_one_record() -> None:
    """
    An alert is a fatal one, in a record of seven bytes.
    """
    assert bytes.fromhex("15030300020270") == alert.alert(alert.UNRECOGNIZED_NAME)


@pytest.mark.parametrize("case", [*hellos.good(), *hellos.odd()], ids=lambda h: h.name)
def test_the_second_opinion_knows_good_hellos(case: Hello) -> None:
    """
    The independent parser, which the product is compared with, reads every good hello.
    """
    assert case.server_name == hellos.independent_server_name(case.data)


@pytest.mark.parametrize("recorded", hellos.good(), ids=lambda h: h.name)
def test_the_second_opinion_wants_all_of_it(recorded: Hello) -> None:
    """
    The independent parser finds no name in a part of a hello.
    """
    parts = [recorded.data[:cut] for cut in range(len(recorded.data))]

    assert {None} == {hellos.independent_server_name(part) for part in parts}
