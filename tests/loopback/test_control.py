"""
The router's control socket: what is wrong is refused, and the table stays.
"""

import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.ends import NAME, PATIENCE, Backend, connection, read_exactly
from harness.operate import (
    LoneRouter,
    Talk,
    alive,
    ask,
    free_addresses,
    log_lines,
    lone_router,
    served,
    sniroute,
    table,
)
from harness.tools import wait_for

from controller.core.wire import MAX_GENERATION, MAX_LINE, VERSION, encode
from controller.router.router import ACCEPT_PAUSE

ADDRESS = ("198.51.100.2", 443)
ROUTES = {NAME: [ADDRESS]}
GENERATION = 5
STATUS = {"type": "status"}
DEEP = 200_000


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoneRouter]:
    """
    A router with a table.
    """
    with lone_router(tmp_path_factory.mktemp("router"), "--handoff", "relay") as router:
        ask(router.control, table(GENERATION, ROUTES))
        yield router


@pytest.fixture(autouse=True)
def table_stays(router: LoneRouter) -> Iterator[None]:
    """
    Whatever was said: the router answers others, with the table it had.
    """
    yield
    (status,) = ask(router.control, STATUS)
    assert (GENERATION, ROUTES) == (status["generation"], served(router.control))


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"hello\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b'"status"\n',
        b"\xff\xfe\x00\n",
        b'{"type": 7}\n',
        b'{"type": "tables"}\n',
        b'{"type": "status"\n',
        b'{"type": "hello"}\n',
        b'{"type": "hello", "version": "1"}\n',
        encode({"type": "hello", "version": VERSION + 1}),
        b'{"type": "report"}\n',
        b'{"type": "report", "engines": {}, "problems": []}\n',
        b'{"type": "report", "engines": [], "problems": [{"code": "x"}]}\n',
        b"[" * DEEP + b"\n",
        b'{"type": "status", "deep": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
        b'{"type": "table", "generation": ' + b"[" * 900 + b"]" * 900 + b', "routes": []}\n',
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=lambda data: data[:40].decode(errors="replace").strip(),
)
def test_what_is_no_message_ends_the_connection(data: bytes, router: LoneRouter) -> None:
    """
    Garbage, an unknown message and another version end the connection they came on.
    """
    with Talk(router.control) as talk:
        answer = talk.say(data)
        if answer is not None:
            assert answer["type"] == "nack"
            answer = talk.say(b"\n")

        assert answer is None


def test_a_line_without_end_ends_the_connection(router: LoneRouter) -> None:
    """
    A line beyond the limit is not kept.
    """
    with Talk(router.control) as talk:
        assert talk.say(b'"' + b"x" * (MAX_LINE + 1024 * 1024)) is None


def entry(**changes: Any) -> dict[str, Any]:
    (route,) = table(1, {"other.example.com": [("198.51.100.3", 443)]})["routes"]
    return route | {"backends": [route["backends"][0] | changes]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"generation": 0}, "table.generation"),
        ({"generation": True}, "table.generation"),
        ({"generation": "9"}, "table.generation"),
        ({"generation": MAX_GENERATION + 1}, "table.generation"),
        ({"generation": 2**70}, "table.generation"),
        ({"routes": None}, "routes: not a list"),
        ({"routes": [None]}, "routes[0]: not an object"),
        ({"routes": [entry(), {"host": "x.example.com"}]}, "routes[1]: missing"),
        ({"routes": [entry() | {"host": "A.example.com"}]}, "routes[0].host: not normalised"),
        ({"routes": [entry() | {"host": "a.*.com"}]}, "routes[0].host"),
        ({"routes": [entry() | {"host": "192.0.2.1"}]}, "routes[0].host"),
        ({"routes": [entry() | {"backends": []}]}, "routes[0].backends: empty"),
        ({"routes": [entry(), entry()]}, "a host occurs twice"),
        ({"routes": [entry(address="backend.example.com")]}, "routes[0].backends[0].address"),
        ({"routes": [entry(port=0)]}, "routes[0].backends[0].port"),
        ({"routes": [entry(port=65536)]}, "routes[0].backends[0].port"),
        ({"routes": [entry(port=True)]}, "routes[0].backends[0].port"),
        ({"routes": [entry(weight=3)]}, "weight"),
        ({"networks": ["198.51.100.0"]}, "networks[0]: not normalised"),
        ({"more": 1}, "more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_table_is_refused_whole(
    change: dict[str, Any], says: str, router: LoneRouter
) -> None:
    """
    A table with one thing wrong is answered with a nack that names it, and no route of it is taken.

    The connection stays.
    """
    good = table(GENERATION + 1, {}) | {"routes": [entry()]}
    before = router.product.counts("sniroute_table_updates_total", "result").get("nack", 0)
    with Talk(router.control) as talk:
        answer = talk.ask(good | change)
        status = talk.ask(STATUS)

    assert answer is not None
    assert ("nack", (good | change)["generation"]) == (answer["type"], answer["generation"])
    assert says in answer["error"]
    assert status is not None
    assert before + 1 == router.product.counts("sniroute_table_updates_total", "result")["nack"]


def test_messages_may_come_in_any_pieces(router: LoneRouter) -> None:
    """
    Byte by byte or many at once: each question gets its answer, in order.
    """
    questions = [{"type": "hello", "version": VERSION}, STATUS, {"type": "routes"}] * 3
    data = b"".join(map(encode, questions))
    with Talk(router.control) as talk:
        talk.socket.sendall(data)
        at_once = [talk.hear() for _ in questions]
        for byte in data:
            talk.socket.send(bytes((byte,)))
        in_pieces = [talk.hear() for _ in questions]

    kinds = [question["type"] for question in questions]
    assert [kinds, kinds] == [[a and a["type"] for a in heard] for heard in (at_once, in_pieces)]


def test_a_peer_that_does_not_read_costs_nothing(tmp_path: Path) -> None:
    """
    Answers that nobody reads are not made: memory stays, others are served, and none is lost.
    """
    asked = 2000
    routes = {f"host-{n}.example.com": [ADDRESS] for n in range(300)}
    with lone_router(tmp_path, "--handoff", "relay") as router, Talk(router.control) as talk:
        ask(router.control, table(1, routes))
        ask(router.control, {"type": "routes"})
        memory = psutil.Process(router.process.pid).memory_info
        before = memory().rss
        talk.socket.sendall(encode({"type": "routes"}) * asked)
        answers = [ask(router.control, STATUS) for _ in range(20)]
        after = memory().rss
        heard = sum(talk.hear() is not None for _ in range(asked))

    assert len(answers) == 20
    assert after - before < 16 * 1024 * 1024
    assert asked == heard


def test_too_many_peers_are_refused(router: LoneRouter) -> None:
    """
    A crowd on the control socket is turned away, and when it has gone all is well again.
    """
    talks = [Talk(router.control) for _ in range(40)]
    for talk in talks:
        try:
            talk.socket.sendall(encode(STATUS))
        except OSError:
            assert talk is not talks[0]
    answers = [talk.hear() for talk in talks]
    for talk in talks:
        talk.socket.close()

    assert all(answers[:20])
    assert answers[-1] is None
    wait_for("an answer again", lambda: sniroute("status", *control(router)).returncode == 0)


def control(router: LoneRouter) -> tuple[str, str]:
    return "--control", str(router.control)


def test_the_socket_is_not_for_everyone(router: LoneRouter) -> None:
    """
    Others on the machine may not even connect.
    """
    mode = stat.S_IMODE(router.control.stat().st_mode)

    assert mode & 0o007 == 0


def refused(*options: str) -> str:
    """
    Start a router that can not start, and return what it says.
    """
    done = sniroute("router", "--handoff", "relay", "--client-ip", "off", *options)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return line


def test_a_second_router_on_the_same_control_socket_is_refused(router: LoneRouter) -> None:
    """
    A control socket that is in use stays with its router; the second one says why it ends.
    """
    (listen,) = free_addresses(1)
    says = refused(*control(router), "--listen", f"{listen[0]}:{listen[1]}", "--metrics", "off")

    assert f"sniroute router: control socket {router.control}: another router listens here" == says


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """
    What a killed router left behind does not keep the next one from starting.
    """
    with LoneRouter(tmp_path, "--handoff", "relay") as killed:
        killed.process.kill()
        killed.process.wait()
    left = killed.control.is_socket()
    (tmp_path / "log").unlink()
    with lone_router(tmp_path, "--handoff", "relay") as router:
        (status,) = ask(router.control, STATUS)

    assert left
    assert status["generation"] == 0
    assert not router.control.exists()


def test_a_file_is_not_taken_for_a_stale_socket(tmp_path: Path) -> None:
    """
    A control path that is some other file is refused, and the file is as it was.
    """
    path = tmp_path / "precious"
    path.write_text("data")

    says = refused("--control", str(path), "--listen", "127.0.0.1:0", "--metrics", "off")

    assert f"sniroute router: control socket {path}: Address already in use" == says
    assert path.read_text() == "data"


@pytest.mark.parametrize("what", ["listen", "metrics"])
def test_a_port_in_use_is_told(what: str, tmp_path: Path) -> None:
    """
    A router that can not have its address says which one, and exits with 1.
    """
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = f"127.0.0.1:{holder.getsockname()[1]}"
        options = {"listen": "127.0.0.1:0", "metrics": "off", what: taken}
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        says = refused("--control", str(tmp_path / "sock"), *flags)

    assert says.startswith("sniroute router: ")
    assert f"{taken}: Address already in use" in says


@pytest.mark.parametrize("address", ["443", "127.0.0.1:https", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_told(address: str, tmp_path: Path) -> None:
    """
    A listen address that is not written as one is told as it was given.
    """
    says = refused("--control", str(tmp_path / "sock"), "--metrics", "off", "--listen", address)

    assert says.startswith("sniroute router: ")
    assert repr(address) in says


def test_more_connections_than_descriptors_is_told(tmp_path: Path) -> None:
    """
    A limit that the machine can not hold is refused at start, not met in service.
    """
    says = refused("--control", str(tmp_path / "sock"), "--max-connections", "100000000")

    assert "max-connections 100000000: the descriptor limit allows " in says


def test_drain_is_a_message_too(tmp_path: Path) -> None:
    """
    A router that is told to drain answers, and ends as after a SIGTERM.
    """
    with (
        Backend() as backend,
        LoneRouter(tmp_path, "--handoff", "relay", "--drain", "20") as router,
    ):
        ask(router.control, table(1, {NAME: [backend.address]}))
        with connection(router.listen, backend) as (client, end):
            (answer,) = ask(router.control, {"type": "drain"})
            (status,) = ask(router.control, STATUS)
            client.sendall(b"still here")

            assert read_exactly(end, 10) == b"still here"
            assert {"type": "drain"} == answer
            assert (True, False) == (status["draining"], status["ready"])
            assert alive(psutil.Process(router.process.pid))

        assert router.process.wait(10) == 0


def test_drain_is_answered_by_a_router_that_ends_at_once(tmp_path: Path) -> None:
    """
    Without connections the end comes with the answer, not before it.
    """
    with LoneRouter(tmp_path, "--handoff", "relay") as router, Talk(router.control) as talk:
        answer = talk.ask({"type": "drain"})

        assert {"type": "drain"} == answer
        assert router.process.wait(10) == 0
        assert not router.control.exists()


def test_a_large_table_holds_nobody_up(tmp_path: Path) -> None:
    """
    While a table is read, which takes a while, connections go on.
    """
    large = table(2, {f"host-{n}.example.com": [ADDRESS] for n in range(30_000)})
    with (
        Backend() as backend,
        lone_router(tmp_path, "--handoff", "relay") as router,
        Talk(router.control) as talk,
    ):
        ask(router.control, table(1, {NAME: [backend.address]}))
        with connection(router.listen, backend) as (client, end):
            talk.socket.sendall(encode(large))
            talk.socket.setblocking(False)
            echoes = 0
            while not heard(talk):
                client.sendall(b"x")
                read_exactly(end, 1)
                echoes += 1

    assert echoes > 50


def heard(talk: Talk) -> bool:
    try:
        return bool(talk.socket.recv(1024))
    except BlockingIOError:
        return False


def test_without_descriptors_the_router_waits(tmp_path: Path) -> None:
    """
    Who can not be accepted, for control or metrics, costs no time, and is when that is possible.
    """
    with lone_router(tmp_path, "--handoff", "relay") as router:
        ask(router.control, table(1, {}))
        process = psutil.Process(router.process.pid)
        limits = process.rlimit(psutil.RLIMIT_NOFILE)
        # what is open stays so; there is no number below this for anything new
        process.rlimit(psutil.RLIMIT_NOFILE, (3, limits[1]))
        before, start = sum(process.cpu_times()[:2]), time.monotonic()
        with (
            Talk(router.control) as talk,
            socket.create_connection(router.metrics, PATIENCE) as scraper,
        ):
            wait_for("some tries", lambda: len(refusals(router)) > 4)
            tries, seconds = len(refusals(router)), time.monotonic() - start
            spent = sum(process.cpu_times()[:2]) - before
            process.rlimit(psutil.RLIMIT_NOFILE, limits)
            status = talk.ask(STATUS)
            scraper.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")

            assert status is not None
            assert scraper.recv(1024).startswith(b"HTTP/1.0 200")
        assert tries <= seconds / ACCEPT_PAUSE + 1
        assert spent < seconds / 2


def refusals(router: LoneRouter) -> list[dict[str, Any]]:
    event = "control connection not accepted"
    return [line for line in log_lines(router.log) if line["event"] == event]
