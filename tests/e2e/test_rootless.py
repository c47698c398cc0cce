"""
A user's own engine: its containers are on networks that this host is not on.
"""

import copy
import subprocess
import time
from collections.abc import Iterator

import pytest
from harness import fetch
from harness.apps import App, RunApp
from harness.engines import PODMAN_ROOTLESS, SUBNET, Daemon, Engine
from harness.lab import PROMPT, access_line
from harness.product import SNIROUTE, Sniroute

HOST = "app.example.test"

OUTSIDE = "127.0.0.1", 8443
"""Where the host has what a container publishes."""

PUBLISHED = {"443/tcp": OUTSIDE}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """
    Run a rootless Podman on a host that has, by chance, a network of the same addresses.
    """
    with Daemon(PODMAN_ROOTLESS) as daemon, daemon.engine() as engine:
        twin = SUBNET.replace(".0/", ".1/")
        for command in (
            ("link", "add", "twin", "type", "bridge"),
            ("addr", "add", twin, "dev", "twin"),
            ("link", "set", "twin", "up"),
        ):
            engine.host.run("ip", *command)
        yield engine


def fetch_app(engine: Engine, app: App) -> tuple[str, int]:
    """
    Fetch the page of *app* from the world outside, and return the client's address and port.
    """
    began = time.monotonic()
    with fetch.connect(engine.client, engine.front, HOST, app.root) as sock:
        answer = fetch.get(sock, HOST).decode()
        client = sock.getsockname()[:2]

    assert app.name == answer.split()[0]
    assert time.monotonic() - began < PROMPT
    return client


@pytest.mark.parametrize("network", [{}, {"network_mode": "slirp4netns"}], ids=["bridge", "slirp"])
def test_a_published_port_is_served(
    engine: Engine, run_app: RunApp, sniroute: Sniroute, network: dict[str, str]
) -> None:
    """
    The label leads to where the engine publishes the port, in either kind of network that it has.

    A connection there is an ordinary one; the reason is counted each time and logged once.
    """
    app = run_app("app", {"sniroute.host": HOST}, at=OUTSIDE, ports=PUBLISHED, **network)
    sniroute.wait_for_route(HOST, OUTSIDE[0])
    lines = [access_line(sniroute, fetch_app(engine, app)) for _ in range(2)]

    for line in lines:
        assert ("nat", "rootless") == (line["client_ip"], line["client_ip_reason"])
        assert OUTSIDE == (line["backend_address"], line["backend_port"])
    labels = {"client_ip": "nat", "reason": "rootless"}
    assert 2 == sniroute.metric("sniroute_backend_connects_total", **labels)
    told = [x for x in sniroute.log() if x["event"] == "client address not passed on"]
    assert [("app", "rootless")] == [(x["backend"], x["reason"]) for x in told]
    assert [] == sniroute.status()["problems"]


@pytest.mark.parametrize("wish", [{}, {"sniroute.network": "sniroute-test"}], ids=["free", "named"])
def test_what_is_not_published_is_refused_and_told(
    engine: Engine, run_app: RunApp, sniroute: Sniroute, wish: dict[str, str]
) -> None:
    """
    Its name is unknown to clients, at once, although the host has a network like the container's.

    `status` and `check` say why, and what would help.
    """
    app = run_app("app", {"sniroute.host": HOST, **wish}, serve=False)
    sniroute.wait_for_status("a problem", lambda status: status["problems"])
    began = time.monotonic()
    with pytest.raises(fetch.RefusedError, match="UNRECOGNIZED_NAME"):
        fetch.fetch(engine.client, engine.front, HOST, app.root)

    assert time.monotonic() - began < PROMPT
    (problem,) = sniroute.status()["problems"]
    assert ("no-network", "app") == (problem["code"], problem["container"])
    assert "rootless" in problem["detail"]
    assert problem["detail"].endswith("publish port 443")
    assert 1 == sniroute.metric("sniroute_problems", code="no-network", severity="error")
    check = engine.host.outside(SNIROUTE, "check", "--json", "--engine", engine.url)
    done = subprocess.run(check, capture_output=True, text=True, timeout=30, check=False)
    assert 1 == done.returncode, done.stderr
    assert problem["detail"] in done.stdout


def test_a_published_port_where_nothing_listens_is_refused(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    The engine accepts for a container that does not; its client gets an end all the same, at once.
    """
    app = run_app(
        "app",
        {"sniroute.host": HOST, "sniroute.port": "444"},
        ports={"444/tcp": OUTSIDE},
        serve=False,
    )
    sniroute.wait_for_route(HOST, OUTSIDE[0])
    began = time.monotonic()
    with pytest.raises(fetch.RefusedError):
        fetch.fetch(engine.client, engine.front, HOST, app.root)

    assert time.monotonic() - began < PROMPT


def test_the_hosts_own_network_is_served(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A container of Podman's that is in the host's network is where any engine's would be.
    """
    labels = {"sniroute.host": HOST, "sniroute.port": "8443"}
    app = run_app("app", labels, sites=f"{HOST}:8443", at=OUTSIDE, network_mode="host")
    sniroute.wait_for_route(HOST, OUTSIDE[0])
    line = access_line(sniroute, fetch_app(engine, app))

    assert ("nat", "host_network") == (line["client_ip"], line["client_ip_reason"])


def test_on_the_engines_own_network_the_address_is_served(engine: Engine, run_app: RunApp) -> None:
    """
    Run in a network of the engine, the product reaches its containers there, published or not.
    """
    own = run_app("own", {}, sites="own.example.test", serve=False)
    app = run_app("app", {"sniroute.host": HOST}, serve=False)
    there = copy.copy(engine)
    there.host, there.client = engine.inside(own.container), engine.inside(app.container)
    there.front = own.address, 8443
    with Sniroute(there, "--engine", engine.url) as sniroute:
        sniroute.wait_for_route(HOST, app.address)
        line = access_line(sniroute, fetch_app(there, app))

    assert (app.address, 443) == (line["backend_address"], line["backend_port"])
