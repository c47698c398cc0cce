"""
The control socket's messages: exactly as written, or an error that says where.
"""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.routes import Backend, Route, RouteTable
from controller.core.wire import (
    MAX_LINE,
    VERSION,
    Decoder,
    WireError,
    dump_routes,
    dump_table,
    encode,
    read_hello,
    read_routes,
    read_table,
)

ROUTES = (
    Route(
        "*.example.com",
        (
            Backend("app", "docker", "198.51.100.2", 443),
            Backend("b", "file", "2001:db8::1", 8443, "transparent", "v2", "several_networks"),
            Backend("c", "podman", "198.51.100.4", 443, address6="2001:db8::4", handoff="relay"),
        ),
    ),
    Route("app.example.com", (Backend("app", "docker", "198.51.100.2", 443),)),
)


NETWORKS = ("198.51.100.0/24", "2001:db8::/64")
ALIVE = {"docker": frozenset({"198.51.100.2", "2001:db8::2"}), "podman": frozenset[str]()}


def table(**changes: Any) -> dict[str, Any]:
    return {"type": "table", **dump_table(RouteTable(7, ROUTES, NETWORKS, ALIVE)), **changes}


def test_routes_come_back_as_they_went() -> None:
    """
    Writing and reading a table changes nothing.
    """
    (message,) = Decoder().feed(encode(table()))
    read = read_table(message)

    assert (7, ROUTES) == (read.generation, read.routes)
    assert (NETWORKS, ALIVE) == (read.networks, read.alive)


@given(st.lists(st.integers(0, 10**6), max_size=5), st.data())
def test_cuts_of_the_stream_do_not_matter(numbers: list[int], data: st.DataObject) -> None:
    """
    Messages arrive whole and in order, however the bytes are cut.
    """
    messages = [{"type": "x", "n": n, "pad": "y" * (n % 50)} for n in numbers]
    stream = b"".join(map(encode, messages))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    decoder = Decoder()
    edges = [0, *cuts, len(stream)]

    got = [m for a, b in pairwise(edges) for m in decoder.feed(stream[a:b])]

    assert messages == got


@pytest.mark.parametrize(
    "line", [b"\n", b"{\n", b"[]\n", b"{}\n", b'{"type":1}\n', b"\xff\n", b'"x"\n']
)
def test_line_that_is_no_message_is_refused(line: bytes) -> None:
    """
    A line is a JSON object with a type, or an error.
    """
    with pytest.raises(WireError):
        list(Decoder().feed(line))


def test_line_without_end_is_refused() -> None:
    """
    A peer can not fill memory with a line that never ends.
    """
    decoder = Decoder()
    half = b"x" * (MAX_LINE // 2)

    assert [] == list(decoder.feed(half))
    assert [] == list(decoder.feed(half))
    with pytest.raises(WireError, match="longer"):
        list(decoder.feed(b"x"))


def test_old_backend_is_refused() -> None:
    """
    A backend that does not say how it wants its connections is refused, not guessed.
    """
    for member in ("address6", "client_ip", "proxy_protocol", "detour", "handoff"):
        routes = dump_routes(ROUTES)
        del routes[0]["backends"][0][member]

        with pytest.raises(WireError, match=rf"routes\[0\].backends\[0\]: missing.*{member}"):
            read_routes(routes)


def _broken(path: list[Any], value: Any) -> list[Any]:
    routes = json.loads(json.dumps(dump_routes(ROUTES)))
    at = routes
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return routes


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ([0], 5, "routes[0]"),
        ([1, "host"], "a..b", "routes[1].host"),
        ([1, "host"], "APP.example.com", "routes[1].host"),
        ([1, "host"], "*.example.com", "occurs twice"),
        ([1, "host"], None, "routes[1].host"),
        ([1, "weight"], 1, "weight"),
        ([0, "backends"], [], "routes[0].backends"),
        ([0, "backends"], {}, "routes[0].backends"),
        ([0, "backends", 1, "address"], "app", "routes[0].backends[1].address"),
        ([0, "backends", 1, "address6"], "2001:db8::2", "routes[0].backends[1].address6"),
        ([0, "backends", 2, "address6"], "198.51.100.5", "routes[0].backends[2].address6"),
        ([0, "backends", 2, "address6"], "app", "routes[0].backends[2].address6"),
        ([0, "backends", 2, "address6"], None, "routes[0].backends[2].address6"),
        ([0, "backends", 1, "port"], 0, "routes[0].backends[1].port"),
        ([0, "backends", 1, "port"], True, "routes[0].backends[1].port"),
        ([0, "backends", 1, "port"], "443", "routes[0].backends[1].port"),
        ([0, "backends", 1, "name"], 1, "routes[0].backends[1].name"),
        ([0, "backends", 1, "client_ip"], "off", "routes[0].backends[1].client_ip"),
        ([0, "backends", 1, "client_ip"], None, "routes[0].backends[1].client_ip"),
        ([0, "backends", 1, "proxy_protocol"], "", "routes[0].backends[1].proxy_protocol"),
        ([0, "backends", 1, "proxy_protocol"], 2, "routes[0].backends[1].proxy_protocol"),
        ([0, "backends", 1, "detour"], "mobius", "routes[0].backends[1].detour"),
        ([0, "backends", 1, "detour"], [], "routes[0].backends[1].detour"),
        ([0, "backends", 1, "handoff"], "", "routes[0].backends[1].handoff"),
        ([0, "backends", 1, "handoff"], "splice", "routes[0].backends[1].handoff"),
    ],
)
def test_bad_member_is_named(path: list[Any], value: Any, where: str) -> None:
    """
    One bad member refuses the whole table, and the error says which.
    """
    with pytest.raises(WireError) as refusal:
        read_routes(_broken(path, value))

    assert where in str(refusal.value)


@pytest.mark.parametrize("generation", [0, -1, True, "7", None, 7.0])
def test_generation_is_a_positive_number(generation: Any) -> None:
    """
    A table without a proper generation is refused.
    """
    with pytest.raises(WireError, match="generation"):
        read_table(table(generation=generation))


@pytest.mark.parametrize(
    ("networks", "where"),
    [
        (None, "networks: not a list"),
        ([7], "networks[0]: not a string"),
        (["198.51.100.0/24", "web"], "networks[1]: 'web'"),
        (["198.51.100.1/24"], "networks[0]: 198.51.100.1/24 has host bits"),
        (["198.51.100.0/255.255.255.0"], "networks[0]: not normalised"),
        (["2001:DB8::/64"], "networks[0]: not normalised"),
        ([*NETWORKS][::-1], "networks: not sorted"),
        ([NETWORKS[0], NETWORKS[0]], "occurs twice"),
    ],
)
def test_networks_are_written_in_one_way(networks: Any, where: str) -> None:
    """
    Subnets come in one spelling and order, or the table is refused.
    """
    with pytest.raises(WireError) as refusal:
        read_table(json.loads(json.dumps(table(networks=networks))))

    assert where in str(refusal.value)


@pytest.mark.parametrize(
    ("alive", "where"),
    [
        (None, "alive: not an object"),
        ([["docker", "198.51.100.2"]], "alive: not an object"),
        ({"docker": "198.51.100.2"}, "alive['docker']: not a list"),
        ({"docker": [2]}, "alive['docker'][0]: not a string"),
        ({"a": [], "docker": ["198.51.100.2", "web"]}, "alive['docker'][1]: 'web'"),
        ({"docker": ["2001:db8::2", "198.51.100.2"]}, "alive['docker']: not sorted"),
        ({"docker": ["198.51.100.2", "198.51.100.2"]}, "occurs twice"),
    ],
)
def test_who_is_alive_is_written_in_one_way(alive: Any, where: str) -> None:
    """
    Addresses come by source, in one order, or the table is refused.
    """
    with pytest.raises(WireError) as refusal:
        read_table(json.loads(json.dumps(table(alive=alive))))

    assert where in str(refusal.value)


@pytest.mark.parametrize("member", ["networks", "alive"])
def test_table_without_a_member_is_refused(member: str) -> None:
    """
    What is not told is not taken for none.
    """
    old = table()
    del old[member]

    with pytest.raises(WireError, match=f"table: missing.*{member}"):
        read_table(old)


def test_hello_tells_the_table_served() -> None:
    """
    The router's hello gives its table; generation 0 stands for none.
    """
    hello = {"type": "hello", "version": VERSION, "run": "", **dump_table(RouteTable(0, ()))}

    assert (0, ()) == (read_hello(hello).generation, read_hello(hello).routes)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": VERSION + 1},
        {"type": "ack"},
        {"run": 7},
        {"generation": -1},
        {"generation": True},
        {"x": 1},
    ],
)
def test_other_hello_is_refused(changes: dict[str, Any]) -> None:
    """
    Another version, or anything that is no hello of ours, is refused.
    """
    table = dump_table(RouteTable(1, ()))
    hello = {"type": "hello", "version": VERSION, "run": "", **table, **changes}

    with pytest.raises(WireError, match="hello"):
        read_hello(hello)
