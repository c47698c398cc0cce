"""
The routes file: all of it or nothing, and seen whenever it changes.
"""

from pathlib import Path

import pytest

from controller.core.routes import Backend, Route
from controller.routesfile import Reading, RoutesFile, read_backend, read_routes_file

GOOD = """
[[route]]
host = ["A.example.com", "*.b.example.com"]
backends = ["198.51.100.2:443", "[2001:db8::1]:8443"]

[[route]]
host = ["a.example.com"]
backends = ["198.51.100.3:443"]
"""


def hosts(reading: Reading | None) -> list[str] | None:
    return None if reading is None else [route.host for route in reading.routes]


def one(host: str) -> str:
    return f'[[route]]\nhost = ["{host}"]\nbackends = ["198.51.100.2:443"]\n'


def test_file_gives_its_routes() -> None:
    """
    Hosts of several tables form one pool.
    """
    v4 = Backend("198.51.100.2:443", "file", "198.51.100.2", 443)
    v6 = Backend("[2001:db8::1]:8443", "file", "2001:db8::1", 8443)
    third = Backend("198.51.100.3:443", "file", "198.51.100.3", 443)

    reading = read_routes_file(GOOD, "routes.toml")

    assert () == reading.problems
    assert (Route("*.b.example.com", (v4, v6)), Route("a.example.com", (v4, third, v6))) == (
        reading.routes
    )


def test_settings_are_those_of_their_route() -> None:
    """
    The backends of one host keep the settings of the route that they stand in.
    """
    proxied = one("a").replace(".2:", ".3:") + 'client-ip = "nat"\nproxy-protocol = "v2"\n'
    proxied += 'handoff = "relay"\n'

    (route,) = read_routes_file(one("a") + proxied, "routes.toml").routes

    assert [("198.51.100.2", "", "off", "auto"), ("198.51.100.3", "nat", "v2", "relay")] == [
        (backend.address, backend.client_ip, backend.proxy_protocol, backend.handoff)
        for backend in route.backends
    ]


@pytest.mark.parametrize(
    ("text", "key", "detail"),
    [
        ("[[route]]\nhost = ]", "", "line 2"),
        ("", "route", "missing"),
        ("route = 1", "route", "not a list"),
        ("route = [1]", "route[0]", "not a table"),
        ("routes = []\nroute = []", "routes", "no such key"),
        (one("a") + 'port = "1"', "route[0].port", "no such key"),
        ('[[route]]\nbackends = ["198.51.100.2:1"]', "route[0].host", "missing"),
        ('[[route]]\nhost = ["a"]', "route[0].backends", "missing"),
        ('[[route]]\nhost = "a"\nbackends = []', "route[0].host", "not a list"),
        (one("a..b"), "route[0].host[0]", "bad label"),
        (one("a").replace('"a"', "true"), "route[0].host[0]", "not a string"),
        (one("a") + one("a").replace(":443", ""), "route[1].backends[0]", "ADDRESS:PORT"),
        (one("a") + 'client-ip = "off"', "route[0].client-ip", "auto, transparent, nat"),
        (one("a") + "proxy-protocol = 2", "route[0].proxy-protocol", "off, v1, v2"),
        (one("a") + 'proxy-protocol = ["v2"]', "route[0].proxy-protocol", "off, v1, v2"),
        (one("a") + 'handoff = "splice"', "route[0].handoff", "auto, packet, sockmap, relay"),
        (one("a") + one("a") + 'proxy-protocol = "v1"', "route[1].host", "other settings"),
        (one("a") + one("a") + 'handoff = "relay"', "route[1].host", "other settings"),
    ],
)
def test_problem_names_line_or_key_and_stops_the_file(text: str, key: str, detail: str) -> None:
    """
    One mistake keeps the whole file out and says where it is.
    """
    reading = read_routes_file(text, "routes.toml")

    assert () == reading.routes
    problem = next(problem for problem in reading.problems if problem.label == key)
    assert ("bad-routes-file", "routes.toml") == (problem.code, problem.container)
    assert detail in problem.detail


def test_no_routes_can_be_said() -> None:
    """
    An empty list is a file without routes, not a mistake.
    """
    assert Reading((), ()) == read_routes_file("route = []", "routes.toml")


@pytest.mark.parametrize(
    "text",
    [
        *("198.51.100.2", "198.51.100.2:0", "198.51.100.2:65536", "app:443", "2001:db8::1:443"),
        *("[198.51.100.2]:443", "[app]:443", ":443", "198.51.100.2:-1", ""),
    ],
)
def test_backend_is_an_address_and_a_port(text: str) -> None:
    """
    Names, missing ports and unbracketed IPv6 are refused.
    """
    with pytest.raises(ValueError, match=r"(?i)not|expected|at least"):
        read_backend(text)


def test_first_look_reads_and_then_only_a_change_does(tmp_path: Path) -> None:
    """
    The file is read at once, and not again while nothing happens.
    """
    path = tmp_path / "routes.toml"
    path.write_text(one("a"))
    file = RoutesFile(path)

    assert [["a"], None, None] == [hosts(file.poll()) for _ in range(3)]


@pytest.mark.parametrize("rename", [False, True], ids=["written", "renamed over"])
def test_change_is_taken_when_two_looks_agree(tmp_path: Path, rename: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """
    A change is read once it has kept still, whether written in place or renamed over.
    """
    path = tmp_path / "routes.toml"
    path.write_text(one("a"))
    file = RoutesFile(path)
    file.poll()
    if rename:
        (tmp_path / "new").write_text(one("b"))
        (tmp_path / "new").rename(path)
    else:
        path.write_text(one("bb"))

    looks = [hosts(file.poll()) for _ in range(3)]

    assert [None, ["b" if rename else "bb"], None] == looks


def test_file_still_being_written_is_left_alone(tmp_path: Path) -> None:
    """
    A file that differs at each look is not read.
    """
    path = tmp_path / "routes.toml"
    path.write_text(one("a"))
    file = RoutesFile(path)
    file.poll()

    for n in range(2, 5):
        path.write_text(one("a" * n))

        assert None is file.poll()


def test_missing_file_is_a_problem_until_it_comes(tmp_path: Path) -> None:
    """
    A file that is not there is a problem once, and is read when it is there.
    """
    path = tmp_path / "routes.toml"
    file = RoutesFile(path)

    reading = file.poll()
    assert reading is not None
    assert ["bad-routes-file"] == [problem.code.value for problem in reading.problems]
    assert None is file.poll()
    path.write_text(one("a"))
    assert [None, ["a"]] == [hosts(file.poll()) for _ in range(2)]
