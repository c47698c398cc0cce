"""
Parts that die under load: nobody outside notices.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.apps import App, RunApp
from harness.cable import Cable
from harness.engines import Daemon, Engine
from harness.load import Load
from harness.product import Sniroute
from harness.tools import wait_for

HOSTS = ("one.example.test", "two.example.test")


@pytest.fixture
def apps(run_app: RunApp) -> dict[str, App]:
    """
    Two containers, by host.
    """
    return {host: run_app(host.split(".")[0], {"sniroute.host": host}) for host in HOSTS}


@contextlib.contextmanager
def load(engine: Engine, sniroute: Sniroute, apps: dict[str, App]) -> Iterator[Load]:
    """
    Put *sniroute* under load meanwhile, and check that nothing at all went wrong.
    """
    addresses = {host: {app.address} for host, app in apps.items()}
    for host, app in apps.items():
        sniroute.wait_for_route(host, app.address)
    with Load(engine.client, engine.front, apps) as load:
        yield load
        load.wait_for_progress()

    assert [] == load.failures
    assert addresses.items() <= sniroute.routes().items()


def replace_controller(sniroute: Sniroute) -> None:
    """
    Kill the controller without a warning and wait for the one that takes its place.
    """
    killed = sniroute.controller()
    killed.kill()
    wait_for("a new controller", lambda: sniroute.controller() != killed)


def test_a_killed_controller_changes_nothing(
    engine: Engine, sniroute: Sniroute, apps: dict[str, App], run_app: RunApp
) -> None:
    """
    The controller is killed without a warning: connections and routes stay.

    Another takes its place and sees what changes then.
    """
    with load(engine, sniroute, apps) as running:
        replace_controller(sniroute)
        running.wait_for_progress()

        late = run_app("late", {"sniroute.host": "late.example.test"})
        sniroute.wait_for_route("late.example.test", late.address)
        late.remove()
        sniroute.wait_for_route("late.example.test")


def test_a_killed_engine_changes_nothing(
    daemon: Daemon, engine: Engine, apps: dict[str, App], run_app: RunApp, tmp_path: Path
) -> None:
    """
    The engine's daemon is killed and started again: connections and routes stay.

    So they do with a controller that starts while the engine is away, but hears another source.
    """
    file = tmp_path / "routes.toml"
    file.write_text('[[route]]\nhost = ["static.example.test"]\nbackends = ["192.0.2.9:443"]\n')
    with (
        Sniroute(engine, "--engine", engine.url, "--routes", str(file)) as sniroute,
        load(engine, sniroute, apps) as running,
    ):
        daemon.kill()
        sniroute.wait_for_status("engine away", lambda s: not s["engines"][0]["connected"])
        running.wait_for_progress()

        replace_controller(sniroute)
        file.write_text(file.read_text().replace("static", "changed"))
        sniroute.wait_for_route("changed.example.test", "192.0.2.9")
        running.wait_for_progress()

        daemon.start()
        sniroute.wait_for_status(
            "engine back", lambda s: s["engines"] and s["engines"][0]["connected"]
        )
        late = run_app("late", {"sniroute.host": "late.example.test"})
        sniroute.wait_for_route("late.example.test", late.address)
        late.remove()
        sniroute.wait_for_route("late.example.test")


def test_a_cut_event_stream_changes_nothing(
    daemon: Daemon, engine: Engine, apps: dict[str, App], run_app: RunApp
) -> None:
    """
    The connection to the engine is cut again and again: no route is lost.

    What changed while nobody listened is seen after.
    """
    with (
        Cable(engine.share / "cable.sock", daemon.socket) as cable,
        Sniroute(engine, "--engine", f"unix://{cable.path}") as sniroute,
        load(engine, sniroute, apps) as running,
    ):
        for _ in range(3):
            cable.cut()
            running.wait_for_progress()

        cable.unplug()
        late = run_app("late", {"sniroute.host": "late.example.test"})
        running.wait_for_progress()

        assert {*HOSTS} == sniroute.routes().keys()

        cable.plug()
        sniroute.wait_for_route("late.example.test", late.address)
        late.remove()
        sniroute.wait_for_route("late.example.test")
