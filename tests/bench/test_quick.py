"""
The benchmark's own promises: it sees what goes wrong, compares fairly, and leaves nothing behind.

The generator is run on loopback without a router between; one whole run needs root.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from xml.dom.minidom import parseString

import pytest
from bench import lab
from bench.__main__ import FEW_ROUNDS, FULL, Kind, Part, measure, parse, plan, turns
from bench.contestants import CONTESTANTS, PEERS
from bench.loads import LOADS, Bench, named, not_carried
from bench.quick import QUICK
from bench.report import plot, table
from bench.values import BEST, BenchError, Floor, Results, Sample, read_floors

HOST = "127.0.0.1"
DEADLINE = 20

Meet = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def traffic() -> str:
    return str(lab.compile_end("traffic"))


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    path = tmp_path / "hello"
    path.write_bytes(lab.client_hello("name.example.com"))
    return path


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def meet(traffic: str, hello: Path) -> Meet:
    def meet(
        play: str, seconds: str, number: str, *, sent: Path = hello, heard: str = "right"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        where = HOST, str(free_port())
        with subprocess.Popen(
            [traffic, "backend", *where, str(hello), "right", play, seconds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as backend:
            assert backend.stdout is not None
            assert backend.stdout.readline() == "ready\n"
            front = [traffic, "client", *where, str(sent), heard, play, seconds, number]
            client = subprocess.run(
                front, capture_output=True, text=True, check=True, timeout=DEADLINE, input=""
            )
            there, _ = backend.communicate(timeout=DEADLINE)
        return json.loads(client.stdout.removeprefix("held\n")), json.loads(there)

    return meet


@pytest.mark.parametrize("play", ["fin", "reset", "paced", "trips", "hold", "stall"])
def test_every_connection_comes_out_once(meet: Meet, play: str) -> None:
    """
    Each connection that the client counts was accepted, answered and ended.
    """
    here, there = meet(play, "0.2", "50")

    assert here["errors"] == there["errors"] == 0
    assert here["done"] >= 10
    assert here["done"] == there["accepted"] == there["ended"]


@pytest.mark.parametrize("number", ["1", "8"])
@pytest.mark.parametrize(("play", "sent", "got"), [("down", 1, 0), ("up", 0, 1)])
def test_every_stream_comes_out_whole(
    meet: Meet, play: str, number: str, sent: int, got: int
) -> None:
    """
    One side reads as many bytes as the other wrote, on every stream to its end.
    """
    ends = meet(play, "0.2", number)

    assert ends[0]["errors"] == ends[1]["errors"] == 0
    assert ends[sent]["out"] > 1_000_000
    assert ends[sent]["out"] == ends[got]["in"]
    assert ends[1]["ended"] == int(number)


def test_the_first_byte_is_timed(meet: Meet) -> None:
    """
    A paced client opens so many connections as were asked for, and orders its percentiles.
    """
    here, _ = meet("paced", "0.5", "100")

    assert here["done"] == 50
    assert 0 < here["p50"] <= here["p99"] <= here["p999"] < 1


@pytest.mark.parametrize("play", ["fin", "reset", "paced", "down", "up", "trips", "hold", "stall"])
def test_another_backend_is_an_error(meet: Meet, play: str) -> None:
    """
    An answer of the right length from the wrong backend never counts.
    """
    here, _ = meet(play, "0.2", "8", heard="wrong")

    assert here["errors"] > 0
    assert here["done"] == 0
    assert "not the greeting of the right backend" in here["first_error"]


def test_a_changed_hello_is_an_error(meet: Meet, hello: Path, tmp_path: Path) -> None:
    """
    The backend refuses a hello that differs in its last byte.
    """
    changed = tmp_path / "changed"
    data = hello.read_bytes()
    changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    here, there = meet("fin", "0.2", "1", sent=changed)

    assert here["errors"] > 0
    assert there["errors"] > 0
    assert "strange bytes" in there["first_error"]


@pytest.mark.parametrize("offset", [0, 200_000, 3_000_000])
def test_a_lost_byte_is_an_error(traffic: str, hello: Path, offset: int) -> None:
    """
    A byte missing anywhere in a stream is noticed although the stream ends well.
    """
    port, front = free_port(), free_port()
    with (
        subprocess.Popen(
            [traffic, "backend", HOST, str(port), str(hello), "right", "down", "0.1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as backend,
        socket.create_server((HOST, front)) as server,
    ):
        assert backend.stdout is not None
        assert backend.stdout.readline() == "ready\n"
        with subprocess.Popen(
            [traffic, "client", HOST, str(front), str(hello), "right", "down", "0.1", "1"],
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            server.settimeout(DEADLINE)
            one, _ = server.accept()
            with one, socket.create_connection((HOST, port), DEADLINE) as two:
                one.settimeout(DEADLINE)
                two.sendall(one.recv(65536))
                data = b"".join(iter(lambda: two.recv(1 << 20), b""))
                at = len("right") + offset
                # The client may have seen enough before the end.
                with contextlib.suppress(ConnectionError):
                    one.sendall(data[:at] + data[at + 1 :])
            said, _ = client.communicate(timeout=DEADLINE)
        backend.communicate(timeout=DEADLINE)

    assert json.loads(said)["errors"] > 0


def test_a_dead_port_ends_soon(traffic: str, hello: Path) -> None:
    """
    A contestant that refuses every connection yields errors, not an endless run.
    """
    command = [traffic, "client", HOST, str(free_port()), str(hello), "right"]
    command += ["fin", "60", "8"]
    said = subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE).stdout

    assert json.loads(said)["errors"] >= 100
    assert json.loads(said)["done"] == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    lab.make_certificate("name.example.com", folder)
    return folder


@pytest.mark.parametrize("name", ["name.example.com", "other.example.com"])
def test_a_handshake_counts_only_with_the_right_certificate(certificate: Path, name: str) -> None:
    """
    The TLS client counts what it has verified against the CA and the name, and nothing else.
    """
    tls, where = str(lab.compile_end("tls", "-lssl", "-lcrypto")), (HOST, str(free_port()))
    chain, key, ca = (str(certificate / x) for x in ("chain.pem", "key.pem", "ca.pem"))
    with subprocess.Popen(
        [tls, "backend", *where, chain, key, "right"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as backend:
        assert backend.stdout is not None
        assert backend.stdout.readline() == "ready\n"
        front = [tls, "client", *where, ca, name, "right", "0.2", "4"]
        client = subprocess.run(front, capture_output=True, text=True, check=True, timeout=DEADLINE)
        there, _ = backend.communicate(timeout=DEADLINE)
    here = json.loads(client.stdout)
    right = name == "name.example.com"

    assert (here["done"] > 10) == right
    assert (here["errors"] == 0) == right
    assert here["done"] == json.loads(there)["ended"]


def results(**rates: list[float]) -> Results:
    made = Results()
    for name, values in rates.items():
        for value in values:
            made.add("down-1", name, Sample(value, 1e-9, {"p99": value * 10}))
    return made


def test_ratios_are_taken_within_a_round() -> None:
    """
    Noise that slows a whole round cancels out; that of the medians would not.
    """
    made = results(haproxy=[10, 1, 4], sockmap=[5, 0.9, 2])

    assert made.ratio("down-1", "sockmap", "haproxy") == 0.5
    assert made.ratio("down-1", "sockmap", "nginx") is None


def test_the_best_peer_is_the_least_where_less_is_better() -> None:
    """
    The best of the peers is told by its median, and nobody else is asked.
    """
    made = results(haproxy=[10, 1, 4], nginx=[5, 5, 5], sockmap=[100])

    assert made.best("down-1", PEERS, lower=False, measure="value") == "nginx"
    assert made.best("down-1", PEERS, lower=True, measure="value") == "haproxy"
    assert made.best("up-1", PEERS, lower=True, measure="value") is None


FLOOR = {"load": "down-1", "contestant": "sockmap", "relative_to": "haproxy", "at_least": 0.7}
CEILING = {"load": "down-1", "contestant": "sockmap", "relative_to": BEST, "at_most": 1}
BARE = {"load": "down-1", "contestant": "sockmap", "measure": "p99", "at_most": 100}


@pytest.mark.parametrize(
    ("entry", "rates", "expected"),
    [
        (FLOOR, {"haproxy": [10.0], "sockmap": [7.0]}, ""),
        (FLOOR, {"haproxy": [10.0], "sockmap": [6.9]}, "sockmap / haproxy = 0.69, floor 0.7"),
        (FLOOR, {"haproxy": [10.0]}, "sockmap / haproxy = not measured, floor 0.7"),
        (CEILING, {"haproxy": [10.0], "nginx": [8.0], "sockmap": [8.0]}, ""),
        (
            CEILING,
            {"haproxy": [10.0], "nginx": [8.0], "sockmap": [9.0]},
            "sockmap / nginx = 1.12, at most 1",
        ),
        (CEILING, {"sockmap": [9.0]}, "sockmap / best peer = not measured, at most 1"),
        (BARE, {"sockmap": [10.0]}, ""),
        (BARE, {"sockmap": [10.1]}, "sockmap (p99) = 101, at most 100"),
    ],
)
def test_floors(entry: dict[str, Any], rates: dict[str, list[float]], expected: str) -> None:
    """
    A floor is held only by a measured figure that reaches it.
    """
    said = read_floors([entry])[0].broken(results(**rates), PEERS)

    assert expected == said.removeprefix("down-1: ")


def floors_in(kind: Kind) -> list[Floor]:
    return read_floors(json.loads((lab.HERE / "floors.json").read_text())[kind.floors])


@pytest.mark.parametrize("kind", [QUICK, FULL], ids=lambda x: x.floors)
def test_the_floors_name_what_is_measured(kind: Kind) -> None:
    """
    Each floor is of a load and of contestants that its kind of run measures.
    """
    chosen = {x.name: x for x in CONTESTANTS if x.name in kind.contestants}
    for floor in floors_in(kind):
        assert floor.load in kind.loads
        assert chosen[floor.contestant].fits(floor.load)
        assert floor.relative_to in {"", BEST, *chosen}


@pytest.mark.parametrize("kind", [QUICK, FULL], ids=lambda x: x.floors)
def test_only_what_has_a_floor_is_all_that_the_floors_need(kind: Kind) -> None:
    """
    With --floors-only every floor's two sides are measured, in all rounds, and no other load is.
    """
    parts = {x.load.name: x for x in plan(kind, parse(kind, ["--floors-only", "--rounds", "9"]))}
    floors = floors_in(kind)

    assert parts.keys() == {x.load for x in floors}
    assert all(x.rounds == 9 for x in parts.values())
    for floor in floors:
        names = {x.name for x in parts[floor.load].contestants}
        assert {floor.contestant, floor.relative_to} - {"", BEST} <= names
    assert {x.name for x in parts["burst"].contestants} == {"packet", "sockmap", "haproxy"}


def test_a_load_without_a_floor_has_fewer_rounds() -> None:
    """
    The hour goes where a figure decides something, and each round starts with another contestant.
    """
    parts = plan(QUICK, parse(QUICK, ["single", "burst", "--only", "direct", "haproxy"]))

    assert [(turn, load.name, me.name) for turn, load, me in turns(parts)][:6] == [
        (0, "burst", "direct"),
        (0, "burst", "haproxy"),
        (0, "single", "direct"),
        (0, "single", "haproxy"),
        (1, "burst", "haproxy"),
        (1, "burst", "direct"),
    ]
    assert [(x.load.name, x.rounds) for x in parts] == [("burst", 5), ("single", FEW_ROUNDS)]


METRICS = """
sniroute_handoff_refusals_total{handoff="packet",reason="full"} 7.0
sniroute_forward_bytes_total{direction="in",handoff="packet",route="a.example.com"} 985.0
sniroute_forward_bytes_total{direction="out",handoff="packet",route="a.example.com"} 10.0
sniroute_forward_bytes_total{direction="in",handoff="relay",route="a.example.com"} 5.0
sniroute_forward_bytes_total{direction="in",handoff="relay",route="b.example.com"} 5.0
"""


@pytest.mark.parametrize(
    ("handoff", "host", "expected"),
    [
        ("packet", "a.example.com", []),
        ("packet", "b.example.com", ["packet moved 0 of 5 bytes (packet: full 7)"]),
        ("packet", "c.example.com", ["packet moved 0 of 0 bytes (packet: full 7)"]),
        ("relay", "a.example.com", ["relay moved 5 of 1000 bytes (packet: full 7)"]),
    ],
)
def test_a_rung_has_its_name_on_its_own_work_only(
    handoff: str, host: str, expected: list[str]
) -> None:
    """
    What another rung has moved is an error, with whatever reasons the router tells.
    """
    assert not_carried(handoff, host, METRICS) == expected


def test_every_contestant_fits_a_load_and_every_load_has_one() -> None:
    """
    No name in the lists of loads is misspelt, and no two are alike.
    """
    names = [x.name for x in LOADS]
    fitted = {load for x in CONTESTANTS for load in names if x.fits(load)}

    assert len({x.name for x in CONTESTANTS}) == len(CONTESTANTS)
    assert fitted == set(names)
    assert all(any(x.fits(load) for load in names) for x in CONTESTANTS)


def test_a_plot_is_drawn_to_scale() -> None:
    """
    A plot is a whole SVG, and twice the median is twice the bar.
    """
    made = results(haproxy=[5.0, 5.0], sockmap=[10.0, 10.0])
    drawn = plot(made, named(["down-1"])[0])
    parsed = parseString(drawn)  # noqa: S318 - our own
    bars = [float(x.getAttribute("width")) for x in parsed.getElementsByTagName("rect")]

    assert len(bars) == 2
    assert bars[1] == pytest.approx(2 * bars[0])


def test_a_table_has_every_ratio() -> None:
    """
    A table compares with direct and with the best peer.
    """
    made = results(direct=[20.0], haproxy=[10.0], sockmap=[5.0])
    lines = [x.split() for x in table(made, named(["down-1"])[0]).splitlines()]

    assert lines[1][:5] == ["median", "min", "max", "/direct", "/haproxy"]
    assert lines[4][:6] == ["sockmap", "5", "5", "5", "0.25", "0.5"]


class Broken:
    """
    A bench on which everything starts, and nothing can be measured.
    """

    @contextlib.contextmanager
    def running(self, *_: object, **__: object) -> Iterator[None]:
        """
        Start.
        """
        yield

    def ends(self, *_: object) -> None:
        """
        Break down.
        """
        raise BenchError("a generator failed")


def test_who_cannot_be_measured_is_left_out_and_fails_the_run() -> None:
    """
    A contestant that breaks down is an error once, and has no figure; the run goes on.
    """
    parts = [Part(load, [CONTESTANTS[0]], 3) for load in named(["burst", "single"])]
    made = measure(cast("Bench", Broken()), parts, 0.1)

    assert made.errors == [
        "round 1, burst, direct: a generator failed",
        "round 1, single, direct: a generator failed",
    ]
    assert not any(made.samples.values())


ENVIRONMENT = os.environ | {"PYTHONPATH": str(lab.ROOT / "tests")}


def quick_run(*argv: str) -> list[str]:
    return [sys.executable, "-m", "bench.quick", *argv, "--only", "direct"]


def test_a_whole_run_without_contestants_to_install(tmp_path: Path) -> None:
    """
    A run prints its tables, writes every sample, and holds no floor it did not measure.
    """
    out = tmp_path / "out.json"
    done = subprocess.run(
        quick_run("--rounds", "2", "--seconds", "0.2", "--check", "--json", str(out)),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=ENVIRONMENT,
    )
    report = json.loads(out.read_text())
    again = [sys.executable, "-m", "bench.report", str(out), "--plots", str(tmp_path / "plots")]
    shown = subprocess.run(again, capture_output=True, check=True, text=True, env=ENVIRONMENT)

    assert done.returncode == 1
    assert done.stdout == shown.stdout
    assert {x.stem for x in (tmp_path / "plots").iterdir()} == set(QUICK.loads)
    assert report["errors"] == []
    assert len(report["below_floors"]) == len(floors_in(QUICK))
    assert report["samples"].keys() == set(QUICK.loads)
    assert all(len(of["direct"]) == 2 for of in report["samples"].values())
    assert all(s["value"] > 0 for of in report["samples"].values() for s in of["direct"])
    assert all(x.title in done.stdout for x in named(list(QUICK.loads)))


def lines_of_processes(working_in: Path) -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended meanwhile
    return [x for x in lines if str(working_in) in x]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """
    A signal in the middle of a measurement ends the generators; all but SIGKILL remove the files.
    """
    hello = f"/{LOADS[0].host} direct"
    with subprocess.Popen(
        quick_run("--rounds", "1", "--seconds", "33"), env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    ) as run:
        wait_for(lambda: sum(hello in x for x in lines_of_processes(tmp_path)) == 2)
        run.send_signal(number)
        killed = number == signal.SIGKILL

        assert run.wait(DEADLINE) == (-number if killed else 128 + number)
    wait_for(lambda: not lines_of_processes(tmp_path))
    assert killed or not list(tmp_path.iterdir())
