"""
The demo, as `make demo` starts it.
"""

import contextlib
import sys
from pathlib import Path

import docker
import pytest
from harness.engines import DOCKER, PODMAN, Daemon, Kind
from harness.machines import Machine
from harness.tools import run

DEMO = Path(__file__).parents[1] / "demo.py"
TIMEOUT = 120


def story(text: str) -> dict[str, list[str]]:
    """
    Sort what the demo printed by the first word of each line.
    """
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        what, told = line.split(maxsplit=1)
        lines.setdefault(what, []).append(told)
    return lines


def check_story(told: dict[str, list[str]], handoff: str) -> None:
    """
    Check that everything happened: three fetches, a move, and bytes in the kernel by *handoff*.
    """
    old, new = told["restart"][0].removeprefix("sniroute-blue: ").split(" -> ")
    places = [("blue", old), ("green", told["container"][1].split()[2].rstrip(",")), ("blue", new)]

    assert old != new
    assert [
        f"https://{name}.example.test -> sniroute-{name} at {address}, and 1,048,576 bytes"
        for name, address in places
    ] == told["fetch"]
    assert [
        f"{name}.example.test -> sniroute-{name} at {address}, by {handoff}"
        for name, address in places
    ] == told["routed"]
    moved, _, total, *_ = told["bytes"][0].split()
    assert moved == total
    assert int(moved.replace(",", "")) > 3 * 1024 * 1024


def test_the_demo_starts_an_engine_where_there_is_none(tmp_path: Path) -> None:
    """
    On a machine without an engine the demo brings its own, and all of it is gone afterwards.
    """
    with Machine(tmp_path) as machine:
        told = story(run(*machine.inside(sys.executable, DEMO), timeout=TIMEOUT))
        left = run(*machine.inside("ps", "-e", "-o", "args=")).splitlines()

    assert told["engine"][0].endswith("started for this demo in a namespace of its own")
    check_story(told, "packet")
    assert ["sleep infinity", "ps -e -o args="] == left


@pytest.mark.parametrize("kind", [DOCKER, PODMAN], ids=lambda kind: kind.name)
def test_the_demo_uses_the_engine_that_is_there(kind: Kind) -> None:
    """
    An engine that is there is used, and left as it was.
    """
    with (
        Daemon(kind) as daemon,
        contextlib.closing(docker.DockerClient(daemon.url, version="auto")) as api,
    ):
        networks = {network.name for network in api.networks.list()}
        demo = ("env", f"DOCKER_HOST={daemon.url}", sys.executable, DEMO)
        told = story(run(*daemon.host.outside(*demo), timeout=TIMEOUT))

        assert told["engine"][0].endswith(f" at {daemon.url}")
        # the client is on the engine's own machine
        check_story(told, "sockmap")
        assert [] == api.containers.list(all=True)
        assert [] == api.images.list()
        assert networks == {network.name for network in api.networks.list()}
