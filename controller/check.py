"""
What `sniroute check` finds in the labels of running containers, compose files and routes files.

Rules of this file:

1. It plans with the very code that serves; only where the facts come from differs.
2. What can not be known from here, such as the ports that an image exposes, is a note, no problem.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml

from controller.core.labels import PREFIX, is_labelled
from controller.core.plan import Container, Network, plan
from controller.core.problems import Code, Problem, Severity
from controller.core.routes import Route
from controller.core.wire import dump_routes
from controller.link import reason
from controller.routesfile import RoutesFile
from controller.runtime import EngineAddress, Runtime, find_engines
from controller.settings import ControllerSettings

_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+)|(\$))")
_NO_ADDRESS_YET = "192.0.2.1"
"""Stands for the address that a container of a compose file will get (RFC 5737)."""

_UNKNOWN = {
    Code.NO_PORT: ("", "no port in the file; it must be one that the image exposes"),
    Code.NO_NETWORK: ("container:", "in the network of a container that is not in the file"),
}
"""What a compose file can not tell, by code and start of the value."""


@dataclass(slots=True)
class Findings:
    """
    What one place was found to hold; *place* is an engine or a file.
    """

    place: str
    containers: int = 0
    routes: tuple[Route, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """
        Write the findings as `--json` shows them.
        """
        return {
            "place": self.place,
            "containers": self.containers,
            "routes": dump_routes(self.routes),
            "problems": [problem.fields() for problem in self.problems],
            "notes": self.notes,
        }


def check(
    settings: ControllerSettings,
    compose: Iterable[Path],
    as_json: bool,  # noqa: FBT001 - the command's flag, as it comes
    out: TextIO | None = None,
) -> int:
    """
    Look at all engines, the routes file and the *compose* files; return the exit code.

    It is 0 without errors, 1 with any, and 2 if there was nothing to look at.
    """
    engines = [e for e in find_engines(settings.engine) if e.asked or e.present]
    findings = asyncio.run(_check_engines(engines, settings.network))
    if settings.routes is not None:
        reading = RoutesFile(settings.routes).read()
        place = str(settings.routes)
        findings.append(Findings(place, 0, reading.routes, list(reading.problems)))
    findings += [check_compose(path, settings.network) for path in compose]
    _print(findings, as_json=as_json, out=out or sys.stdout)
    if not findings:
        return 2
    problems = (problem for found in findings for problem in found.problems)
    return int(any(problem.severity is Severity.ERROR for problem in problems))


def check_compose(path: Path, network: str | None = None) -> Findings:
    """
    Check the services of the compose file at *path*.
    """
    found = Findings(str(path))
    try:
        data = yaml.safe_load(path.read_text())
        containers = list(_read_compose(data, found))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        detail = " ".join(str(err).split())
        found.problems.append(Problem(Code.BAD_COMPOSE_FILE, str(path), "", "", detail))
        return found
    planned = plan(containers, (), network)
    found.containers = sum(is_labelled(container.labels) for container in containers)
    found.routes = planned.routes
    for problem in planned.problems:
        if (unknown := _UNKNOWN.get(problem.code)) and problem.value.startswith(unknown[0]):
            found.notes.append(f"{problem.container}: {unknown[1]}")
        else:
            found.problems.append(problem)
    return found


async def _check_engines(engines: Iterable[EngineAddress], network: str | None) -> list[Findings]:
    return list(await asyncio.gather(*(_check_engine(engine, network) for engine in engines)))


async def _check_engine(engine: EngineAddress, network: str | None) -> Findings:
    found = Findings(engine.name)
    try:
        async with Runtime(engine) as runtime:
            containers = (await runtime.look()).containers
    except Exception as err:  # noqa: BLE001 - whatever it is, the other places are still looked at
        found.problems.append(
            Problem(Code.ENGINE_UNREACHABLE, engine.name, "", engine.url, reason(err))
        )
        return found
    planned = plan(containers, (), network)
    found.containers = sum(is_labelled(container.labels) for container in containers)
    found.routes, found.problems = planned.routes, list(planned.problems)
    return found


def _read_compose(data: Any, found: Findings) -> Iterator[Container]:
    services = data.get("services") if isinstance(data, dict) else None
    if not isinstance(services, dict):
        detail = "no services: not a compose file"
        found.problems.append(Problem(Code.BAD_COMPOSE_FILE, found.place, "services", "", detail))
        return
    networks = data.get("networks") or {}
    for name, service in services.items():
        if isinstance(service, dict):
            yield _read_service(str(name), service, networks, found)


def _read_service(
    name: str, service: Mapping[str, Any], networks: Mapping[str, Any], found: Findings
) -> Container:
    values = {
        label: _substitute(text)
        for label, text in _pairs(service.get("labels"))
        if label.startswith(PREFIX)
    }
    unset = [label for label, value in values.items() if value is None]
    if unset:
        names = ", ".join(unset)
        found.notes.append(f"{name}: not checked: a variable is not set here, in {names}")
    mode = str(service.get("network_mode") or "")
    # a service's name is its id here, so that service:NAME leads to the service
    mode = re.sub("^service:", "container:", mode)
    own = {} if mode else dict(_pairs(service.get("networks"))) or {"default": ""}
    return Container(
        id=name,
        name=str(service.get("container_name") or name),
        source=found.place,
        labels={} if unset else {label: value or "" for label, value in values.items()},
        ports=frozenset(_ports(service)),
        networks=tuple(_read_network(str(key), networks) for key in own),
        mode=mode,
    )


def _read_network(name: str, networks: Mapping[str, Any]) -> Network:
    settings = networks.get(name) or {}
    driver = str(settings.get("driver") or "bridge")
    name = str(settings.get("name") or name)
    return Network(
        name,
        _NO_ADDRESS_YET,
        "",
        driver,
        reachable=driver == "bridge",
        internal=settings.get("internal") is True,
        gateway=_NO_ADDRESS_YET,
    )


def _pairs(value: Any) -> Iterator[tuple[str, str]]:
    # compose takes a map, or a list of NAME or NAME=VALUE
    if not isinstance(value, dict):
        value = {k: v for k, _, v in (str(item).partition("=") for item in value or ())}
    for key, item in value.items():
        text = str(item).lower() if isinstance(item, bool) else "" if item is None else str(item)
        yield str(key), text


def _ports(service: Mapping[str, Any]) -> Iterator[int]:
    for item in (*(service.get("expose") or ()), *(service.get("ports") or ())):
        if isinstance(item, dict):
            text, protocol = str(item.get("target", "")), str(item.get("protocol", "tcp"))
        else:
            text, _, protocol = str(item).rpartition(":")[2].partition("/")
        first, _, last = text.partition("-")
        if protocol in ("", "tcp") and first.isdigit() and (last or first).isdigit():
            yield from range(int(first), int(last or first) + 1)


def _substitute(text: str) -> str | None:
    unset = False

    def value(match: re.Match[str]) -> str:
        nonlocal unset
        if match[4]:
            return "$"
        found = os.environ.get(match[1] or match[3], match[2])
        unset = unset or found is None
        return found or ""

    result = _VARIABLE.sub(value, text)
    return None if unset else result


def _print(findings: Iterable[Findings], *, as_json: bool, out: TextIO) -> None:
    if as_json:
        print(json.dumps([found.fields() for found in findings], indent=2), file=out)
        return
    for found in findings:
        counts = f"{found.containers} labelled, " if found.containers else ""
        print(
            f"{found.place}: {counts}{len(found.routes)} routes, {len(found.problems)} problems",
            file=out,
        )
        for problem in found.problems:
            where = " ".join(filter(None, (problem.container, problem.label)))
            value = f"={problem.value!r}" if problem.value else ""
            print(
                f"  {problem.severity.value:7} {problem.code.value}: {where}{value}:"
                f" {problem.detail}",
                file=out,
            )
        for note in found.notes:
            print(f"  note    {note}", file=out)
    if not findings:
        print("nothing to check: no engine socket found, and no file given", file=out)
