"""
The documents tell what the code does: their tables are compared with it.
"""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from controller.router._native import ffi
from prometheus_client import Metric
from pydantic import ByteSize

from bpfprog.packet import _REASONS as REASONS
from controller import cli
from controller.core.clientip import Choice
from controller.core.labels import read_labels
from controller.core.problems import Code, Problem
from controller.core.proxyprotocol import Header
from controller.core.routes import Backend, Route, RouteTable
from controller.router.connection import Connection, Hello
from controller.router.control import Control, listen
from controller.router.flow import UNTOUCHED
from controller.router.loop import Loop
from controller.router.metrics import RouterCollector
from controller.router.relay import RelayFlow, RelayHandoff
from controller.router.router import Router
from controller.settings import CommonSettings, ControllerSettings, RouterSettings, RunSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")

Row = tuple[str, ...]


def section(heading: str) -> str:
    """
    Cut out what stands under a heading of the README, its subheadings not included.
    """
    parts = re.split(r"^#+ (.*)$", README, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading]


def table(heading: str) -> list[Row]:
    """
    Read the rows of the table under a heading, without its own head.
    """
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def words(cell: str) -> list[str]:
    """
    Take what a cell has in backquotes.
    """
    return re.findall(r"`([^`]+)`", cell)


# --- settings and commands ---


def default(value: Any) -> str:
    """
    Write a default as one would write it on the command line.
    """
    match value:
        case None | ():
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case ByteSize():
            return f"`{value.human_readable().replace('.0', '')}`"
        case tuple():
            return f"`{','.join(value)}`"
    return f"`{value}`"


def of(name: str) -> str:
    """
    Tell which process a setting is for.
    """
    if name in CommonSettings.model_fields:
        return "both"
    return "router" if name in RouterSettings.model_fields else "controller"


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The table of settings is that of the code: names, defaults (of root), meanings.
    """
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    kinds = (CommonSettings, ControllerSettings, RouterSettings)
    names = dict.fromkeys(name for kind in kinds for name in kind.model_fields)
    fields = RunSettings.model_fields
    expected = [
        (
            f"`--{name.replace('_', '-')}`",
            f"`SNIROUTE_{name.upper()}`",
            of(name),
            default(fields[name].get_default(call_default_factory=True, validated_data={})),
            fields[name].description,
        )
        for name in names
    ]

    assert expected == table("Settings")


def test_commands() -> None:
    """
    The commands are those that there are.
    """
    registered = [command.callback.__name__ for command in cli.app.registered_commands]  # type: ignore[union-attr]
    named = [words(row[0])[0].split()[1] for row in table("Commands")]

    assert sorted(registered) == sorted(named)


# --- labels and problems ---


def test_label_examples_are_read() -> None:
    """
    The examples of the label table are labels without a problem, all together.
    """
    examples = dict(words(row[-1])[0].split("=", 1) for row in table("Labels"))

    reading = read_labels("web", examples)

    assert () == reading.problems
    assert 1 == len(reading.specs)


def test_problem_codes() -> None:
    """
    Each problem code has its row, with its severity.
    """
    expected = [(f"`{code}`", Problem(code, "", "", "", "").severity.value) for code in Code]

    assert expected == [row[:2] for row in table("Problems")]


# --- metrics and log ---


@pytest.fixture
def router() -> Router:
    router = Router(RouterSettings(), Loop(), 8)
    router.ladder, router.ladder_reason = [RelayHandoff(router.loop)], "asked for"
    router.replace_table(RouteTable(1, ()))
    # a kernel is not needed to name what it would count
    router.packet = Mock(without_sockets=0, packet=Mock(numbers=list, lost_events=0))
    return router


def exposed(metric: Metric) -> Row:
    """
    Write a metric as its row has it.
    """
    suffix = {"counter": "_total", "info": "_info"}.get(metric.type, "")
    names = metric.samples[0].labels if metric.type == "info" else metric._labelnames  # type: ignore[attr-defined] # noqa: SLF001 - a family without samples tells its labels nowhere else
    labels = ", ".join(f"`{name}`" for name in names)
    return f"`{metric.name}{suffix}`", metric.type, labels, metric.documentation


def test_metrics(router: Router, tmp_path: Path) -> None:
    """
    The table of metrics is that of the collector: names, types, labels, meanings.
    """
    path = tmp_path / "router.sock"
    control = Control(router, listen(path), path, "0")
    collector = RouterCollector(router, control, "0")

    loop = threading.Thread(target=router.loop.run)
    loop.start()
    expected = [exposed(metric) for metric in collector.collect()]
    router.loop.ask(router.drain)
    loop.join()
    control.close()

    assert expected == table("Metrics")


def test_packet_refusals() -> None:
    """
    Each reason for which a connection is not handed over as packets has its row.
    """
    reasons = {*REASONS.values(), *WORDS_OF_THE_RUNG} - {"ok"}

    assert sorted(reasons) == sorted(
        word for row in table("Not every connection") for word in words(row[0])
    )


WORDS_OF_THE_RUNG = {"off"}
"""What refuses a connection before the kernel is asked."""


def test_access_log(router: Router) -> None:
    """
    The table of log fields names each field of a connection's line, and no other.
    """
    arrival = ffi.new("struct arrival *")
    arrival.peer.size = 4
    connection = Connection(router, -1, arrival, 0.0)
    connection.hello = Hello(server_name="a.example")
    connection.backend = Backend("web", "docker", "192.0.2.1", 443)
    connection.route = Route("a.example", (connection.backend,))
    connection.flow = RelayFlow(router.loop, (-1, -1), lambda _: None, UNTOUCHED)
    connection.choice = Choice(transparent=False, reason="nat")
    connection._header = Header(28)  # noqa: SLF001 - as a trusted sender's
    connection.refusals = ["sockmap: full"]

    expected = [*connection.record("client_fin")]

    assert sorted(expected) == sorted(word for row in table("Access log") for word in words(row[0]))


# --- links ---


def links() -> Iterator[tuple[str, str]]:
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                yield name, target


def test_links_lead_somewhere() -> None:
    """
    A link to a file of this repository has that file.
    """
    assert [] == [link for link in links() if not (ROOT / link[1]).exists()]
