"""
The command line: its flags are the settings, and what is wrong is said by name.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness.values import OTHER
from typer.testing import CliRunner, Result

from controller import cli, supervise
from controller.settings import ControllerSettings, HandoffChoice, RouterSettings, RunSettings

COMMANDS = {"run": RunSettings, "controller": ControllerSettings, "router": RouterSettings}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Settings of the one who runs the tests do not count, and the terminal is wide.
    """
    for name in RunSettings.model_fields:
        monkeypatch.delenv(f"SNIROUTE_{name.upper()}", raising=False)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """
    Start nothing; note what would have been started.
    """
    notes: list[Any] = []

    def run(settings: RunSettings) -> int:
        notes.append(settings)
        return 0

    def execve(_: str, argv: list[str], environment: dict[str, str]) -> None:
        notes.append((argv[1:], environment))
        raise SystemExit(0)

    monkeypatch.setattr(supervise, "run", run)
    monkeypatch.setattr(os, "execve", execve)
    return notes


def sniroute(*words: str) -> Result:
    return CliRunner().invoke(cli.app, words)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags(name: str) -> list[str]:
    value = OTHER[name]
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{name.replace('_', '-')}"]
    values = value if isinstance(value, tuple) else [value]
    return [word for one in values for word in (flag(name), str(one))]


def test_every_setting_is_a_flag_of_run(started: list[Any]) -> None:
    """
    Each flag sets its field, all of them together.
    """
    result = sniroute("run", *(word for name in OTHER for word in flags(name)))

    assert (0, "") == (result.exit_code, result.output)
    assert [RunSettings(**OTHER)] == started


def test_without_flags_the_defaults_hold(started: list[Any]) -> None:
    """
    A flag that is not given leaves the default.
    """
    sniroute("run")

    assert [RunSettings()] == started


def test_a_flag_beats_the_environment(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The environment sets what no flag sets.
    """
    monkeypatch.setenv("SNIROUTE_DRAIN", "3")
    monkeypatch.setenv("SNIROUTE_HANDOFF", "relay")

    sniroute("run", "--drain", "4")

    assert [(4, HandoffChoice.RELAY)] == [(s.drain, s.handoff) for s in started]


@pytest.mark.parametrize(
    ("command", "module"), [("router", "controller.router"), ("controller", "controller")]
)
def test_one_process_alone_gets_its_settings(
    command: str, module: str, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    `router` and `controller` become their process, with its own settings in the environment.
    """
    kind = COMMANDS[command]
    wanted = {name: OTHER[name] for name in kind.model_fields}

    sniroute(command, *(word for name in wanted for word in flags(name)))
    ((argv, environment),) = started
    for name in kind.model_fields:
        monkeypatch.setenv(f"SNIROUTE_{name.upper()}", environment[f"SNIROUTE_{name.upper()}"])

    assert ["-P", "-m", module] == argv
    assert kind(**wanted) == kind()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_flag(command: str) -> None:
    """
    `--help` has each flag and what it is for.
    """
    words = sniroute(command, "--help").output.split()

    assert [] == [n for n in COMMANDS[command].model_fields if flag(n) not in words]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("hello_timeout", "0", "greater than 0"),
        ("hello_timeout", "soon", "valid number"),
        ("hello_limit", "1", "4096"),
        ("handoff", "packets", "sockmap"),
        ("log_level", "loud", "warning"),
        ("max_connections", "-1", "greater than or equal to 0"),
        ("drain", "inf", "1000000"),
        ("backlog_limit", "much", "byte"),
        ("listen", ",", "at least 1"),
        ("engine", "dokcer", "'dokcer': neither auto nor none"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_a_bad_value_is_told_by_its_flag(
    source: str, name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A bad value exits with 2 and one line, which names the flag and what would be right.
    """
    words = ["run"]
    if source == "flag":
        words += [flag(name), value]
    else:
        monkeypatch.setenv(f"SNIROUTE_{name.upper()}", value)

    result = sniroute(*words)

    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2
    assert line.startswith(f"sniroute: {flag(name)}: ")
    assert says in line


def test_check_refuses_a_bad_engine_too() -> None:
    """
    A mistyped engine is no traceback of `check`, and nothing is looked at.
    """
    result = sniroute("check", "--engine", "dokcer")

    assert (2, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("sniroute: --engine: 'dokcer'")


@pytest.mark.parametrize(
    "words", [("run", "--max-connections", "all"), ("run", "--nonsense"), ("nonsense",)]
)
def test_what_is_no_command_line_exits_with_2(words: tuple[str, ...]) -> None:
    """
    A word that means nothing is named, and nothing is started.
    """
    result = sniroute(*words)

    assert result.exit_code == 2
    assert words[-2 if "all" in words else -1] in result.stderr


@pytest.mark.parametrize("command", ["status", "routes", "connections", "kill 7", "packet"])
def test_no_router_is_told_with_its_path(command: str, tmp_path: Path) -> None:
    """
    Without a router the command exits with 1 and names the socket it tried.
    """
    path = tmp_path / "router.sock"

    result = sniroute(*command.split(), "--control", str(path))

    assert (1, "") == (result.exit_code, result.stdout)
    assert f"no answer from the router at {path}: No such file or directory\n" in result.stderr


STATUS = {
    "type": "status",
    "version": "1.2.3",
    "ready": True,
    "draining": False,
    "generation": 7,
    "routes": 2,
    "table_age": 12.4,
    "handoff": {"chosen": "sockmap", "reason": "self-test passed"},
    "client_ip": {"mode": "auto", "working": True, "reason": "proven for IPv4 and IPv6"},
    "connections": {"active": 3, "total": 40, "max": 9000},
    "workers": {"running": 1, "of": 2},
    "controllers": 1,
    "engines": [
        {"name": "docker", "connected": False, "containers": 5, "url": "unix:///run/docker.sock"}
    ],
    "problems": [
        {
            "severity": "error",
            "code": "bad_host",
            "container": "web",
            "label": "sniroute.host",
            "value": "a.*.org",
            "detail": "no such host",
        }
    ],
}


def test_status_is_a_table_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    `status` tells the router, its engines and the problems, in columns.
    """
    monkeypatch.setattr(cli, "_ask", lambda *_: STATUS)

    lines = sniroute("status").output.splitlines()

    assert [
        "router       1.2.3, ready",
        "table        generation 7, 2 routes, 12 s old",
        "hand-off     sockmap (self-test passed)",
        "client-ip    auto, working (proven for IPv4 and IPv6)",
        "connections  3 of 9000, 40 ended",
        "workers      1 of 2 running",
        "controllers  1",
        "",
        "ENGINE  EVENTS  CONTAINERS  URL",
        "docker  lost    5           unix:///run/docker.sock",
        "",
        "SEVERITY  CODE      CONTAINER  LABEL          VALUE    DETAIL",
        "error     bad_host  web        sniroute.host  a.*.org  no such host",
    ] == lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ready": False, "table_age": None, "generation": 0}, "router       1.2.3, not ready"),
        ({"ready": False, "draining": True}, "router       1.2.3, draining"),
        ({"table_age": None}, "table        generation 7, 2 routes, none yet"),
    ],
)
def test_status_tells_what_is_not_as_it_should_be(
    change: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A router without a table, or one that drains, does not look ready.
    """
    monkeypatch.setattr(cli, "_ask", lambda *_: STATUS | change)

    assert line in sniroute("status").output.splitlines()


def test_status_for_programs_is_the_answer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    `status --json` is one JSON object, with all that the router tells.
    """
    monkeypatch.setattr(cli, "_ask", lambda *_: STATUS)

    assert STATUS == json.loads(sniroute("status", "--json").output)


def test_routes_are_a_line_for_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    `routes` shows each backend with the host it is for.
    """
    backend = {"name": "web-1", "source": "docker", "address": "198.51.100.2", "port": 443}
    other = backend | {"name": "web-2", "address": "2001:db8::2"}
    routes = [{"host": "*.example.com", "backends": [backend, other]}]
    monkeypatch.setattr(cli, "_ask", lambda *_: {"routes": routes})

    assert [
        "HOST           BACKEND  ADDRESS           SOURCE",
        "*.example.com  web-1    198.51.100.2 443  docker",
        "*.example.com  web-2    2001:db8::2 443   docker",
    ] == sniroute("routes").output.splitlines()
    assert routes == json.loads(sniroute("routes", "--json").output)


class FakeRouter:
    """
    A router's answers about connections, two to a page, and what it was asked.
    """

    def __init__(self, *connections: dict[str, Any]) -> None:
        self.connections = connections
        self.asked: list[dict[str, Any]] = []

    def ask(self, question: dict[str, Any], _: Path | None) -> dict[str, Any]:
        """
        Answer *question*.
        """
        self.asked.append(question)
        if question["type"] == "kill":
            under_way = {one["id"] for one in self.connections}
            return {"killed": [i for i in question["ids"] if i in under_way]}
        rest = [one for one in self.connections if one["id"] > question["after"]]
        return {"connections": rest[:2], "more": len(rest) > 2}

    @property
    def kills(self) -> list[list[int]]:
        """
        Give the ids of each kill.
        """
        return [question["ids"] for question in self.asked if question["type"] == "kill"]


def under_way(number: int, client: str, route: str | None) -> dict[str, Any]:
    backend = {"backend": "web", "backend_address": "192.0.2.9", "backend_port": 443}
    handed = {"handoff": "packet", "bytes_in": 517, "bytes_out": 9000, "quiet": 2.6}
    none = {**dict.fromkeys((*backend, *handed)), "bytes_in": 0, "bytes_out": 0}
    own = {"id": number, "route": route, "client": client, "client_port": 50000 + number}
    return {**own, **(backend | handed if route else none), "age": 61.7}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRouter:
    """
    Five connections, of two routes and none.
    """
    fake = FakeRouter(
        under_way(3, "192.0.2.1", "*.a.org"),
        under_way(7, "2001:db8::1", "*"),
        under_way(8, "192.0.2.1", None),
        under_way(9, "192.0.2.77", "*.a.org"),
        under_way(20, "192.0.2.1", "*"),
    )
    monkeypatch.setattr(cli, "_ask", fake.ask)
    return fake


def test_connections_are_a_line_each(fake: FakeRouter) -> None:
    """
    `connections` shows all pages in one table, and a dash for what is not known.
    """
    assert [
        "ID  ROUTE    CLIENT             BACKEND  ADDRESS        HAND-OFF  IN   OUT   AGE   QUIET",
        "3   *.a.org  192.0.2.1 50003    web      192.0.2.9 443  packet    517  9000  62 s  3 s",
        "7   *        2001:db8::1 50007  web      192.0.2.9 443  packet    517  9000  62 s  3 s",
        "8   -        192.0.2.1 50008    -        -              -         0    0     62 s  -",
    ] == sniroute("connections").output.splitlines()[:4]
    assert list(fake.connections) == json.loads(sniroute("connections", "--json").output)


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (("--route", "*"), [7, 20]),
        (("--client", "192.0.2.1"), [3, 8, 20]),
        (("--client", "192.0.2.64/26"), [9]),
        (("--client", "2001:db8::/32"), [7]),
        (("--client", "192.0.2.1", "--route", "*.a.org"), [3]),
        (("--route", "a.org"), []),
    ],
)
def test_connections_are_listed_and_killed_by_route_and_client(
    words: tuple[str, ...], ids: list[int], fake: FakeRouter
) -> None:
    """
    The same flags choose the same connections for both commands, on whatever page they are.
    """
    listed = [one["id"] for one in json.loads(sniroute("connections", *words, "--json").output)]
    result = sniroute("kill", *words)

    assert ids == listed
    assert (0, f"{len(ids)} ended\n") == (result.exit_code, result.output)
    assert ([ids] if ids else []) == fake.kills


def test_connections_are_killed_by_their_ids(fake: FakeRouter) -> None:
    """
    One that is not under way is named, and the others are ended nevertheless.
    """
    good, bad = sniroute("kill", "3", "9"), sniroute("kill", "8", "4", "21")

    assert (0, "2 ended\n") == (good.exit_code, good.output)
    assert (1, "1 ended\n") == (bad.exit_code, bad.stdout)
    assert "sniroute: not under way: 4, 21\n" == bad.stderr
    assert [[3, 9], [8, 4, 21]] == fake.kills


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("kill",), "kill: give either ids, or --route or --client"),
        (("kill", "3", "--route", "*"), "kill: give either ids, or --route or --client"),
        (("kill", "--client", "web"), "--client: 'web' does not appear to be"),
        (("kill", "--client", "192.0.2.1/24"), "--client: 192.0.2.1/24 has host bits set"),
        (("connections", "--client", ""), "--client: "),
        (("kill", "--route", "*", "--client", ""), "--client: "),
        (("kill", "all"), "'ids'"),
        (("packet", "maybe"), "'maybe' is not one of"),
    ],
)
def test_what_is_to_be_killed_is_never_guessed(
    words: tuple[str, ...], says: str, fake: FakeRouter
) -> None:
    """
    Without a choice, or with one that can not be read, nothing is asked of the router.
    """
    result = sniroute(*words)

    assert 2 == result.exit_code
    assert says in result.stderr
    assert [] == fake.asked


def test_the_packet_hand_off_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    `packet` asks how it is, switches if it is told to, and shows what the router says.
    """
    asked = []
    about = {"state": "off", "flows": 3, "devices": ["eth0", "br0"], "pins": "/sys/fs/bpf/x"}

    def ask(question: dict[str, Any], _: Path | None) -> dict[str, Any]:
        asked.append(question["state"])
        return {"type": "packet", "packet": about}

    monkeypatch.setattr(cli, "_ask", ask)

    assert [
        "state    off",
        "flows    3",
        "devices  eth0, br0",
        "pins     /sys/fs/bpf/x",
    ] == sniroute("packet").output.splitlines()
    assert about == json.loads(sniroute("packet", "off", "--json").output)
    sniroute("packet", "on")
    assert ["status", "off", "on"] == asked


def test_why_there_is_no_packet_hand_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A router without it has the command exit with 1, and say why.
    """
    error = "the packet hand-off is not in use here: not asked for"
    monkeypatch.setattr(cli, "_ask", lambda *_: {"type": "packet", "error": error})

    result = sniroute("packet", "off")

    assert (1, "", f"sniroute: {error}\n") == (result.exit_code, result.stdout, result.stderr)


def test_version_is_told() -> None:
    """
    `--version` prints the name and the version, and starts nothing.
    """
    result = sniroute("--version")

    assert result.exit_code == 0
    assert result.output.startswith("sniroute ")
