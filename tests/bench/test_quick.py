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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import quick
from bench.quick import LOADS, Results, Sample

HOST = "127.0.0.1"
DEADLINE = 20

Meet = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def traffic() -> str:
    return str(quick.compile_traffic())


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    path = tmp_path / "hello"
    path.write_bytes(quick.client_hello("name.example.com"))
    return path


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def meet(traffic: str, hello: Path) -> Meet:
    def meet(
        *verb: str, sent: Path = hello, heard: str = "right", bulk: str = "0"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        where = HOST, str(free_port())
        with subprocess.Popen(
            [traffic, "backend", *where, str(hello), "right", bulk],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as backend:
            assert backend.stdout is not None
            assert backend.stdout.readline() == "ready\n"
            front = [traffic, verb[0], *where, str(sent), heard, *verb[1:]]
            client = subprocess.run(
                front, capture_output=True, text=True, check=True, timeout=DEADLINE
            )
            there, _ = backend.communicate(timeout=DEADLINE)
        return json.loads(client.stdout), json.loads(there)

    return meet


def test_every_connection_comes_out_once(meet: Meet) -> None:
    """
    Each connection that the client counts was accepted, answered and ended by FIN.
    """
    here, there = meet("client", "0.2", "8")

    assert here["errors"] == there["errors"] == 0
    assert here["done"] > 100
    assert here["done"] == there["accepted"] == there["ended"]


def test_the_whole_stream_comes_out(meet: Meet) -> None:
    """
    The client reads as many bytes as the backend wrote.
    """
    here, there = meet("stream", "0.2", bulk="0.2")

    assert here["errors"] == there["errors"] == 0
    assert here["bytes"] > 1_000_000
    assert here["bytes"] == there["bytes"]


@pytest.mark.parametrize("verb", [("client", "0.2", "8"), ("stream", "0.2")], ids=lambda v: v[0])
def test_another_backend_is_an_error(meet: Meet, verb: tuple[str, ...]) -> None:
    """
    An answer of the right length from the wrong backend never counts.
    """
    here, _ = meet(*verb, heard="wrong")

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
    here, there = meet("client", "0.2", "1", sent=changed)

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
            [traffic, "backend", HOST, str(port), str(hello), "right", "0.1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as backend,
        socket.create_server((HOST, front)) as server,
    ):
        assert backend.stdout is not None
        assert backend.stdout.readline() == "ready\n"
        with subprocess.Popen(
            [traffic, "stream", HOST, str(front), str(hello), "right", "1"],
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
    command = [traffic, "client", HOST, str(free_port()), str(hello), "right", "60", "8"]
    said = subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE).stdout

    assert json.loads(said)["errors"] >= 100
    assert json.loads(said)["done"] == 0


def results(**rates: list[float]) -> Results:
    made = Results()
    for name, values in rates.items():
        for value in values:
            made.add("bulk", name, Sample(value, 1e-9))
    return made


def test_ratios_are_taken_within_a_round() -> None:
    """
    Noise that slows a whole round cancels out; that of the medians would not.
    """
    made = results(haproxy=[10, 1, 4], sockmap=[5, 0.9, 2])

    assert made.ratio("bulk", "sockmap", "haproxy") == 0.5
    assert made.ratio("bulk", "sockmap", "nginx") is None


FLOOR = {"load": "bulk", "contestant": "sockmap", "relative_to": "haproxy", "floor": 0.7}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"haproxy": [10.0], "sockmap": [7.0]}, []),
        ({"haproxy": [10.0], "sockmap": [6.9]}, ["bulk: sockmap / haproxy = 0.69, floor 0.7"]),
        ({"haproxy": [10.0]}, ["bulk: sockmap / haproxy = not measured, floor 0.7"]),
    ],
)
def test_floors(rates: dict[str, list[float]], expected: list[str]) -> None:
    """
    A floor is held only by a measured ratio that reaches it.
    """
    assert expected == quick.below_floors(results(**rates), [FLOOR])


def test_the_floors_name_what_is_measured() -> None:
    """
    No floor names a load or contestant that does not exist.
    """
    names = {x.name for x in quick.CONTESTANTS}
    for floor in json.loads((quick.HERE / "floors.json").read_text()):
        assert floor["load"] in {x.name for x in LOADS}
        assert {floor["contestant"], floor["relative_to"]} <= names


def quick_run(*argv: str) -> list[str]:
    return [sys.executable, str(quick.HERE / "quick.py"), "--only", "direct", *argv]


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
    )
    report = json.loads(out.read_text())

    assert done.returncode == 1
    assert report["errors"] == []
    assert len(report["below_floors"]) == 2
    assert all(len(report["samples"][x.name]["direct"]) == 2 for x in LOADS)
    assert all(s["rate"] > 0 for x in LOADS for s in report["samples"][x.name]["direct"])
    assert all(x.title in done.stdout for x in LOADS)


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
        quick_run("--rounds", "1", "--seconds", "33"), env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as run:
        wait_for(lambda: sum(hello in x for x in lines_of_processes(tmp_path)) == 2)
        run.send_signal(number)
        killed = number == signal.SIGKILL

        assert run.wait(DEADLINE) == (-number if killed else 128 + number)
    wait_for(lambda: not lines_of_processes(tmp_path))
    assert killed or not list(tmp_path.iterdir())
