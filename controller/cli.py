"""
The command `sniroute`: settings become flags, and each command is a few lines.
"""

import inspect
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from controller import supervise
from controller.check import check as check_labels
from controller.core import wire
from controller.doctor import doctor as examine
from controller.settings import (
    ENGINE_AUTO,
    ENGINE_NONE,
    CommonSettings,
    ControllerSettings,
    RouterSettings,
    RunSettings,
)

ANSWER_TIMEOUT = 10.0
"""Seconds that the router may take to answer; it answers from its own loop, in milliseconds."""

KILLS = 1000
"""Connections that one message ends: far fewer than take the router ANSWER_TIMEOUT."""

Kind = TypeVar("Kind", bound=CommonSettings)

app = typer.Typer(
    help="Route TLS connections to containers by SNI, with the bytes moved by the kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(*, show: Annotated[bool, typer.Option("--version", is_eager=True)] = False) -> None:
    if show:
        print(f"sniroute {version('sniroute')}")
        raise typer.Exit


def settings_command(settings: type[CommonSettings]) -> Callable[..., Any]:
    """
    Make a function of *settings* a command whose flags are the fields of the settings.

    What else the function takes are flags as well.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., Any]:
        _, *others = inspect.signature(function).parameters.values()

        def command(**flags: Any) -> None:
            rest = {other.name: flags.pop(other.name) for other in others}
            raise typer.Exit(function(_read(settings, flags), **rest))

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*(_parameter(name, info) for name, info in settings.model_fields.items()), *others]
        )
        return app.command()(command)

    return decorate


def _read(settings: type[Kind], flags: Mapping[str, Any]) -> Kind:
    """
    Read *flags*; one that is None or empty comes from elsewhere, and a bad one ends the command.
    """
    try:
        return settings(**{k: v for k, v in flags.items() if v not in (None, [], ())})
    except ValidationError as err:
        for error in err.errors():
            flag = "--" + str(error["loc"][0]).replace("_", "-")
            print(f"sniroute: {flag}: {error['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    default = info.get_default(call_default_factory=True, validated_data={})
    option = typer.Option(
        help=info.description,
        show_default=",".join(default) if isinstance(default, tuple) else str(default),
    )
    kind: Any = str
    if isinstance(default, tuple):
        kind = list[str]
    elif isinstance(default, bool):
        kind = bool
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


@settings_command(RunSettings)
def run(settings: RunSettings) -> int:
    """
    Start the router and the controller, and keep them running.
    """
    return supervise.run(settings)


@settings_command(ControllerSettings)
def controller(settings: ControllerSettings) -> int:
    """
    Run the controller alone.
    """
    return _become("controller", settings)


@settings_command(RouterSettings)
def router(settings: RouterSettings) -> int:
    """
    Run the router alone.
    """
    return _become("controller.router", settings)


def _become(module: str, settings: CommonSettings) -> int:
    environment = {**os.environ, **settings.environment()}
    # -P: what lies in the current directory is not ours to run
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], environment)  # noqa: S606 - ourselves


# --- looking ---

Json = Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")]
ControlPath = Annotated[Path | None, typer.Option(help="The router's control socket.")]
OfRoute = Annotated[str | None, typer.Option(help="Those of this route: its host pattern.")]
OfClient = Annotated[str | None, typer.Option(help="Those of this client: address or subnet.")]


@app.command()
def check(
    engine: Annotated[list[str] | None, typer.Option(help="As for `run`.")] = None,
    routes: Annotated[Path | None, typer.Option(help="A routes file to check.")] = None,
    compose: Annotated[list[Path] | None, typer.Option(help="A compose file to check.")] = None,
    network: Annotated[str | None, typer.Option(help="As for `run`.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """
    Check the labels of running containers, of compose files, and a routes file.

    Without --engine, and with a file to check, no engine is asked.  The exit status is 1 where
    there are problems.
    """
    engines = tuple(engine or ()) or ((ENGINE_NONE,) if routes or compose else (ENGINE_AUTO,))
    flags = {"engine": engines, "routes": routes, "network": network}
    settings = _read(ControllerSettings, flags)
    raise typer.Exit(check_labels(settings, compose or [], as_json))


@settings_command(RunSettings)
def doctor(settings: RunSettings, *, as_json: Json = False) -> int:
    """
    Say what works on this host, what does not, and how to mend it.

    The exit status is 0 if all is fine, 1 if something is degraded, 2 if something is broken.
    """
    return examine(settings, as_json=as_json)


@app.command()
def status(control: ControlPath = None, *, as_json: Json = False) -> None:
    """
    Show how the router is: table, hand-off, connections, engines, problems.
    """
    answer = _ask({"type": "status"}, control)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    handoff, connections = answer["handoff"], answer["connections"]
    client_ip, workers = answer["client_ip"], answer["workers"]
    working = "working" if client_ip["working"] else "not working"
    age = "none yet" if answer["table_age"] is None else f"{answer['table_age']:.0f} s old"
    state = "draining" if answer["draining"] else "ready" if answer["ready"] else "not ready"
    _table(
        [
            ("router", f"{answer['version']}, {state}"),
            ("table", f"generation {answer['generation']}, {answer['routes']} routes, {age}"),
            ("hand-off", f"{handoff['chosen']} ({handoff['reason']})"),
            ("client-ip", f"{client_ip['mode']}, {working} ({client_ip['reason']})"),
            (
                "connections",
                f"{connections['active']} of {connections['max']}, {connections['total']} ended",
            ),
            ("workers", f"{workers['running']} of {workers['of']} running"),
            ("controllers", str(answer["controllers"])),
        ]
    )
    if answer["engines"]:
        print()
        engines = [
            (e["name"], "connected" if e["connected"] else "lost", str(e["containers"]), e["url"])
            for e in answer["engines"]
        ]
        _table([("ENGINE", "EVENTS", "CONTAINERS", "URL"), *engines])
    if answer["problems"]:
        print()
        keys = ("severity", "code", "container", "label", "value", "detail")
        problems = [tuple(str(p[key]) for key in keys) for p in answer["problems"]]
        _table([tuple(key.upper() for key in keys), *problems])


@app.command()
def routes(control: ControlPath = None, *, as_json: Json = False) -> None:
    """
    Show the routing table that the router serves.
    """
    answer = _ask({"type": "routes"}, control)["routes"]
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    rows = [
        (
            route["host"],
            backend["name"],
            f"{backend['address']} {backend['port']}",
            backend["source"],
        )
        for route in answer
        for backend in route["backends"]
    ]
    _table([("HOST", "BACKEND", "ADDRESS", "SOURCE"), *rows])


@app.command()
def connections(
    control: ControlPath = None,
    route: OfRoute = None,
    client: OfClient = None,
    *,
    as_json: Json = False,
) -> None:
    """
    List the connections under way, by every hand-off and before it.
    """
    found = list(_under_way(control, route, client))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    head = "ID", "ROUTE", "CLIENT", "BACKEND", "ADDRESS", "HAND-OFF", "IN", "OUT", "AGE", "QUIET"
    rows = [
        (
            str(one["id"]),
            one["route"] or "-",
            f"{one['client']} {one['client_port']}",
            one["backend"] or "-",
            f"{one['backend_address']} {one['backend_port']}" if one["backend"] else "-",
            one["handoff"] or "-",
            str(one["bytes_in"]),
            str(one["bytes_out"]),
            f"{one['age']:.0f} s",
            "-" if one["quiet"] is None else f"{one['quiet']:.0f} s",
        )
        for one in found
    ]
    _table([head, *rows])


@app.command()
def kill(
    ids: Annotated[list[int] | None, typer.Argument(help="As `connections` shows them.")] = None,
    control: ControlPath = None,
    route: OfRoute = None,
    client: OfClient = None,
) -> None:
    """
    End connections with a reset to both sides: by their ids, or all of a route or of a client.

    The exit status is 1 where an id is not that of a connection under way.
    """
    if bool(ids) == (route is not None or client is not None):
        print("sniroute: kill: give either ids, or --route or --client", file=sys.stderr)
        raise typer.Exit(2)
    wanted = ids or [one["id"] for one in _under_way(control, route, client)]
    killed: set[int] = set()
    for i in range(0, len(wanted), KILLS):
        answer = _ask({"type": "kill", "ids": wanted[i : i + KILLS]}, control)
        killed.update(answer["killed"])
    print(f"{len(killed)} ended")
    if missing := sorted(set(ids or ()) - killed):
        print(f"sniroute: not under way: {', '.join(map(str, missing))}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def packet(
    state: Annotated[wire.PacketState, typer.Argument()] = wire.PacketState.STATUS,
    control: ControlPath = None,
    *,
    as_json: Json = False,
) -> None:
    """
    Switch the packet hand-off off for new connections, or on again, or show how it is.
    """
    answer = _ask({"type": "packet", "state": state.value}, control)
    if "error" in answer:
        print(f"sniroute: {answer['error']}", file=sys.stderr)
        raise typer.Exit(1)
    about = answer["packet"]
    if as_json:
        print(json.dumps(about, indent=2))
        return
    _table(
        [
            (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            for name, value in about.items()
        ]
    )


def _under_way(
    control: Path | None, route: str | None, client: str | None
) -> Iterator[dict[str, Any]]:
    """
    Ask for the connections under way, page by page, and give those of *route* and *client*.
    """
    try:
        clients = ipaddress.ip_network(client) if client is not None else None
    except ValueError as err:
        print(f"sniroute: --client: {err}", file=sys.stderr)
        raise typer.Exit(2) from None
    last, more = 0, True
    while more:
        answer = _ask({"type": "connections", "after": last}, control)
        for one in answer["connections"]:
            last = one["id"]
            address = ipaddress.ip_address(one["client"])
            if route in (None, one["route"]) and (clients is None or address in clients):
                yield one
        more = answer["more"]


def _ask(question: wire.Message, control: Path | None) -> wire.Message:
    path = control or CommonSettings().control
    decoder = wire.Decoder()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            connection.connect(str(path))
            connection.sendall(wire.encode(question))
            while data := connection.recv(1024 * 1024):
                for message in decoder.feed(data):
                    return message
        reason = "it hung up; is this user allowed to ask?"
    except OSError as err:
        reason = err.strerror or str(err)
    print(f"sniroute: no answer from the router at {path}: {reason}", file=sys.stderr)
    raise typer.Exit(1)


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def main() -> None:
    """
    Run the command line.
    """
    app()
