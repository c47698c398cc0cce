"""
What the doctor says, and how: the sum of the findings, engines, versions, other people's marks.
"""

import asyncio
import http.server
import io
import json
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controller import doctor, privilege
from controller.core.finding import Finding, State, read_finding, worst
from controller.router import doctor as router_doctor
from controller.router.plumbing import HOOK
from controller.settings import RunSettings

FINE = Finding("kernel", State.FINE, "Linux 6.18")
DEGRADED = Finding("capabilities", State.DEGRADED, "missing\nBPF: slower", "cap_add: [BPF]")
BROKEN = Finding("listen :443", State.BROKEN, "in use by nginx (process 7)", "stop it")


def settings(**fields: Any) -> RunSettings:
    return RunSettings(**fields)


def diagnose(monkeypatch: pytest.MonkeyPatch, *findings: Finding, as_json: bool) -> tuple[int, str]:
    """
    Run the doctor on a host with *findings*; nothing is given up, since this is the tests' process.
    """
    monkeypatch.setattr(doctor, "examine_host", lambda _: list(findings))
    monkeypatch.setattr(privilege, "drop_to", lambda _: frozenset())
    out = io.StringIO()
    told = settings(engine="none", routes=Path("routes.toml"))
    return doctor.doctor(told, as_json=as_json, out=out), out.getvalue()


# --- the whole ---


@pytest.mark.parametrize(
    ("findings", "status", "state"),
    [
        ((), 0, "fine"),
        ((FINE,), 0, "fine"),
        ((DEGRADED, FINE), 1, "degraded"),
        ((BROKEN, DEGRADED, FINE), 2, "broken"),
    ],
)
def test_the_worst_finding_is_the_answer(
    findings: tuple[Finding, ...], status: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The exit status and the state of the whole are those of the worst finding.
    """
    code, text = diagnose(monkeypatch, *findings, as_json=True)

    assert (status, state) == (code, json.loads(text)["state"])


def test_json_has_each_finding_with_its_four_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A program gets check, state, detail and fix of each finding, in order.
    """
    _, text = diagnose(monkeypatch, DEGRADED, FINE, as_json=True)

    first, second, _engine = json.loads(text)["findings"]
    assert {
        "check": "capabilities",
        "state": "degraded",
        "detail": "missing\nBPF: slower",
        "fix": "cap_add: [BPF]",
    } == first
    assert {"check": "kernel", "state": "fine", "detail": "Linux 6.18", "fix": ""} == second


def test_people_get_a_line_for_each_finding_and_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Each finding is a line, further lines and the fix stand below its detail, the sum at the end.
    """
    _, text = diagnose(monkeypatch, FINE, DEGRADED, as_json=False)

    assert [
        "fine      kernel        Linux 6.18",
        "degraded  capabilities  missing",
        "                        BPF: slower",
        "                        fix: cap_add: [BPF]",
        "fine      engine        none: the routes come from routes.toml",
        "",
        "sniroute works here, with what is degraded above.",
    ] == text.splitlines()


def test_a_finding_reads_back() -> None:
    """
    What one process writes the other reads as the same.
    """
    assert DEGRADED == read_finding(json.loads(json.dumps(DEGRADED.fields())))
    assert worst([FINE, BROKEN, DEGRADED]) is State.BROKEN


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo Traceback >&2; echo 'ImportError: libbpf.so.1' >&2; exit 1", "libbpf.so.1"),
        ("exit 3", "exit status 3: it says nothing"),
        ('echo \'[{"check": "kernel"}]\'', "exit status 0"),
    ],
)
def test_a_router_that_does_not_even_run_is_told(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where the router's code can not run, its last word is the finding.
    """
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    (finding,) = doctor.examine_host(settings())

    assert ("router", State.BROKEN) == (finding.check, finding.state)
    assert says in finding.detail


# --- engines ---


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """
    HTTP on a socket with a path; threads end with the test.
    """

    daemon_threads = True


@contextmanager
def engine(path: Path, answers: dict[str, Any]) -> Iterator[str]:
    """
    Serve *answers* as an engine would, by the last word of the path; give the URL.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers[self.path.rpartition("/")[2]]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: Any) -> None:
            pass

    with UnixServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"unix://{path}"
        finally:
            server.shutdown()
            thread.join()


VERSION = {
    "Version": "26.1.5",
    "ApiVersion": "1.45",
    "Components": [{"Name": "Engine", "Version": "26.1.5"}],
}
PODMAN = {**VERSION, "Version": "5.4.2", "Components": [{"Name": "Podman Engine"}]}


def examine(**fields: Any) -> tuple[Finding, ...]:
    return tuple(asyncio.run(doctor.examine_engines(settings(**fields))))


@pytest.mark.parametrize(
    ("version", "options", "state", "says"),
    [
        (VERSION, ["name=seccomp,profile=builtin"], State.FINE, "Docker 26.1.5, API 1.45"),
        (VERSION, ["name=seccomp", "name=rootless"], State.DEGRADED, "rootless"),
        (PODMAN, [], State.FINE, "Podman 5.4.2, API 1.45"),
        (PODMAN, ["name=rootless"], State.DEGRADED, "Podman 5.4.2, API 1.45, rootless"),
    ],
)
def test_an_engine_that_answers(
    version: dict[str, Any], options: list[str], state: State, says: str, tmp_path: Path
) -> None:
    """
    An engine is told by name and version; a rootless one is degraded, with what to do.
    """
    info = {"SecurityOptions": options}
    with engine(tmp_path / "engine.sock", {"version": version, "info": info}) as url:
        (finding,) = examine(engine=url)

    assert (state, state is State.DEGRADED) == (finding.state, bool(finding.fix))
    assert says in finding.detail


def test_an_engine_without_a_socket_is_broken(tmp_path: Path) -> None:
    """
    An engine that was asked for and is not there is broken, and the fix is to start it.
    """
    (finding,) = examine(engine=f"unix://{tmp_path}/none.sock")

    assert (State.BROKEN, doctor.FIXES[2]) == (finding.state, finding.fix)
    assert f"unix://{tmp_path}/none.sock" in finding.detail


def test_a_socket_where_nobody_listens_is_broken(tmp_path: Path) -> None:
    """
    A socket that an engine left behind is told from one that is missing.
    """
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    (finding,) = examine(engine=str(path))

    assert (State.BROKEN, doctor.FIXES[111]) == (finding.state, finding.fix)


def test_an_engine_that_hangs_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An engine that takes the question and never answers does not hold the doctor up.
    """
    monkeypatch.setattr(doctor, "ENGINE_TIMEOUT", 0.05)
    path = tmp_path / "hangs.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        (finding,) = examine(engine=str(path))

    assert (State.BROKEN, True) == (finding.state, bool(finding.fix))


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"engine": "none"}, State.BROKEN),
        ({"engine": "none", "routes": Path("routes.toml")}, State.FINE),
    ],
)
def test_without_an_engine_there_must_be_a_file(fields: dict[str, Any], state: State) -> None:
    """
    No engine is fine with a routes file; with neither there is nothing to route to.
    """
    assert [state] == [finding.state for finding in examine(**fields)]


# --- what the kernel is told by ---


@pytest.mark.parametrize(
    ("release", "mended"),
    [
        ("5.15.0-130-generic", False),
        ("6.1.141", False),
        ("6.1.142-amd64", True),
        ("6.3.9", False),
        ("6.12.34", False),
        ("6.12.48+deb13-amd64", True),
        ("6.15.4", True),
        ("6.16", True),
        ("6.18.44", True),
        ("7.0.1", True),
    ],
)
def test_a_kernel_with_a_known_fault_is_only_noted(
    release: str,
    mended: bool,  # noqa: FBT001 - a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A version below the mended one of its series is noted and stays fine: the self-test decides.
    """
    monkeypatch.setattr("platform.release", lambda: release)

    finding = router_doctor.kernel(router_doctor.Host(settings(), None, {}, {}))

    assert (State.FINE, mended) == (finding.state, "lost or doubled" not in finding.detail)


MARK = {"meta": {"key": "mark"}}


@pytest.mark.parametrize(
    ("hook", "priority", "value", "found"),
    [
        ("prerouting", HOOK, 7, True),
        ("prerouting", HOOK + 100, {"ct": {"key": "mark"}}, True),
        ("prerouting", HOOK - 1, 7, False),
        ("postrouting", HOOK + 100, 7, False),
        ("prerouting", HOOK, {"|": [MARK, 7]}, False),
        ("prerouting", HOOK, {"|": [{"&": [MARK, 0xFF]}, 7]}, False),
    ],
)
def test_only_what_takes_our_mark_away_is_told(
    hook: str,
    priority: int,
    value: Any,
    found: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """
    A rule conflicts if it runs between ours and routing, and keeps no bit of the mark.
    """
    place = {"family": "ip", "table": "vpn"}
    chain = {**place, "name": "pre", "hook": hook, "prio": priority}
    expr = [{"counter": {"packets": 0}}, {"mangle": {"key": MARK, "value": value}}]
    ruleset = [
        {"metainfo": {}},
        {"chain": chain},
        {"rule": {**place, "chain": "pre", "expr": expr}},
    ]

    told = list(router_doctor._mark_setters(ruleset))  # noqa: SLF001 - needs no kernel to be told

    assert (["nftables table ip vpn, chain pre: sets the mark"] if found else []) == told


def test_a_check_that_fails_is_a_finding() -> None:
    """
    A check that fails in a way nobody thought of does not keep the others from telling.
    """

    def odd(_: router_doctor.Host) -> Finding:
        raise ZeroDivisionError(os.sep)

    finding = router_doctor._guarded(odd, router_doctor.Host(settings(), None, {}, {}))  # noqa: SLF001 - the seam

    assert Finding("odd", State.DEGRADED, "check failed: ZeroDivisionError('/')") == finding
