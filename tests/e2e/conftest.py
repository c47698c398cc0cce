"""
Each engine once for all tests on it; containers and the product for each test.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from harness.apps import App, RunApp
from harness.engines import KINDS, Daemon, Engine
from harness.product import Sniroute


@pytest.fixture(scope="session", params=KINDS, ids=lambda kind: kind.name)
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """
    A running engine's daemon, on a machine of its own.
    """
    with Daemon(request.param) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def engine(daemon: Daemon) -> Iterator[Engine]:
    """
    The engine, ready for labelled containers.
    """
    kind = daemon.kind
    with daemon.engine() as engine:
        if not engine.version.startswith(kind.version):
            pytest.fail(f"{kind.name} is to be version {kind.version}*, is {engine.version}")
        yield engine


@pytest.fixture
def run_app(engine: Engine) -> Iterator[RunApp]:
    """
    Run containers that are gone after the test.
    """
    apps = []

    def run(name: str, labels: dict[str, str], **options: Any) -> App:
        apps.append(engine.run_app(name, labels, **options))
        return apps[-1]

    yield run
    for app in apps:
        app.remove()


@pytest.fixture
def sniroute(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Sniroute]:
    """
    The product on the engine's machine; a parameter is the hand-off that it is to use.
    """
    handoff = getattr(request, "param", "auto")
    with Sniroute(engine, "--engine", engine.url, "--handoff", handoff) as sniroute:
        yield sniroute
