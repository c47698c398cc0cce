"""
Say what works on this host, what does not, and how to mend it: `sniroute doctor`.

What needs the kernel is looked at by a process of the router's code; then every capability is
given up, as the controller does, and the engines are asked.
"""

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, TextIO

from aiodocker import Docker

from controller import privilege
from controller.core.finding import Finding, State, read_finding, worst
from controller.link import reason
from controller.runtime import EngineAddress, find_engines, is_rootless
from controller.settings import ENGINE_AUTO, RunSettings

ROUTER_TIMEOUT: Final = 60
"""Seconds for all that the router's part looks at; it takes about one."""

ENGINE_TIMEOUT: Final = 5
"""Seconds that an engine has to answer; it takes milliseconds."""

FIXES: Final = {
    errno.EACCES: "run as a user who may open the socket; Docker's belongs to the group docker",
    errno.ENOENT: "start the engine, or name its socket with --engine; in a container, mount it",
    errno.ECONNREFUSED: "start the engine; its socket is there, but nobody listens",
}


def doctor(settings: RunSettings, *, as_json: bool, out: TextIO | None = None) -> int:
    """
    Look at everything, and print it.

    Gives up every capability of the process on the way.

    Returns:
        The exit status: 0 if all is fine, 1 if something is degraded, 2 if something is broken.
    """
    findings = examine_host(settings)
    privilege.drop_to(())
    findings += asyncio.run(examine_engines(settings))
    _print(findings, as_json=as_json, out=out or sys.stdout)
    return list(State).index(worst(findings))


def examine_host(settings: RunSettings) -> list[Finding]:
    """
    Have the router's code look at this host.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "controller.router.doctor"],
            env={**os.environ, **settings.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ROUTER_TIMEOUT,
            check=False,
        )
        return [read_finding(fields) for fields in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        return [Finding("router", State.BROKEN, f"its checks take more than {ROUTER_TIMEOUT} s")]
    except (KeyError, TypeError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        detail = f"its code does not run here, exit status {done.returncode}: {last}"
        return [
            Finding("router", State.BROKEN, detail, "install sniroute anew, with its libraries")
        ]


async def examine_engines(settings: RunSettings) -> list[Finding]:
    """
    Ask every engine that a controller with these settings would ask.
    """
    engines = [e for e in find_engines(settings.engine) if e.asked or e.present]
    if engines:
        return list(await asyncio.gather(*map(_examine_engine, engines)))
    if settings.routes is not None:
        return [Finding("engine", State.FINE, f"none: the routes come from {settings.routes}")]
    auto = ENGINE_AUTO in settings.engine
    return [
        Finding(
            "engine",
            State.BROKEN,
            f"{'no socket in the usual places' if auto else 'none asked for'} and no routes file:"
            " there is nothing to route to",
            "start an engine, or name --engine or --routes; in a container, mount the socket",
        )
    ]


async def _examine_engine(engine: EngineAddress) -> Finding:
    check = f"engine {engine.name}"
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT):
            version, info = await _ask(engine)
    except Exception as err:  # noqa: BLE001 - whatever it is, this engine can not be used
        return Finding(check, State.BROKEN, f"{engine.url}: {reason(err)}", _fix(err))
    detail = describe(version)
    if is_rootless(info):
        return Finding(
            check,
            State.DEGRADED,
            f"{detail}, rootless: this host does not reach its containers by their addresses",
            "publish the containers' ports, or run sniroute as a container in a network of that"
            " engine",
        )
    return Finding(check, State.FINE, detail)


async def _ask(engine: EngineAddress) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    docker = Docker(url=engine.url, api_version="auto")
    try:
        return await docker.version(), await docker.system.info()
    finally:
        await docker.close()


def _fix(err: BaseException | None) -> str:
    """
    Find what to do in the system's own reason, which may be the cause of the cause.
    """
    while err is not None:
        if isinstance(err, OSError) and err.errno in FIXES:
            return FIXES[err.errno]
        err = err.__cause__ or err.__context__
    return "see whether the engine is up and answers, as with: docker version, podman version"


def describe(version: Mapping[str, Any]) -> str:
    """
    Name the engine that says this of its version.
    """
    components = version.get("Components") or [{}]
    name = "Podman" if "podman" in str(components[0].get("Name")).lower() else "Docker"
    return f"{name} {version.get('Version')}, API {version.get('ApiVersion')}"


def _print(findings: Iterable[Finding], *, as_json: bool, out: TextIO) -> None:
    findings = list(findings)
    if as_json:
        state = worst(findings)
        fields = [finding.fields() for finding in findings]
        print(json.dumps({"state": state, "findings": fields}, indent=2), file=out)
        return
    wide = max(len(finding.check) for finding in findings)
    for finding in findings:
        first, *more = finding.detail.splitlines()
        print(f"{finding.state.value:8}  {finding.check.ljust(wide)}  {first}", file=out)
        for line in [*more, *([f"fix: {finding.fix}"] if finding.fix else [])]:
            print(f"{'':8}  {'':{wide}}  {line}", file=out)
    print(f"\n{_verdict(findings)}", file=out)


def _verdict(findings: Iterable[Finding]) -> str:
    return {
        State.FINE: "All is fine.",
        State.DEGRADED: "sniroute works here, with what is degraded above.",
        State.BROKEN: "sniroute does not work here before what is broken above is mended.",
    }[worst(findings)]
