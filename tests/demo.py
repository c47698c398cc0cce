"""
The product on an embedded example, from nothing to bytes in the kernel: `make demo`.

Two labelled containers with a web server each, sniroute in front of them, and a client that
fetches both by name; then one container moves.  Everything is gone afterwards.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
from harness import fetch
from harness.apps import App
from harness.engines import DOCKER, PODMAN, Daemon, Engine
from harness.machines import Here
from harness.product import HANDOFFS, Sniroute
from harness.tools import HarnessError, wait_for

from controller.runtime import find_engines
from controller.settings import ENGINE_AUTO

IN_KERNEL = ("packet", "sockmap")
"""The hand-offs that take no byte to user space."""

FAILURES = (HarnessError, docker.errors.DockerException, OSError)


def say(what: str, text: str) -> None:
    """
    Print one line of the story.
    """
    print(f"{what:>10}  {text}", flush=True)


def free_port() -> int:
    """
    Find a port of the loopback address that nobody listens on.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[dict[str, App]]:
    """
    Run the two labelled containers meanwhile.
    """
    with contextlib.ExitStack() as undo:
        apps = {}
        for colour in ("blue", "green"):
            host = f"{colour}.example.test"
            apps[host] = engine.run_app(f"sniroute-{colour}", {"sniroute.host": host})
            undo.callback(apps[host].remove)
        yield apps


@contextlib.contextmanager
def any_engine() -> Iterator[tuple[Engine, dict[str, App]]]:
    """
    Use the first engine here that can run the containers, else start one.
    """
    with contextlib.ExitStack() as undo:
        for address in find_engines((ENGINE_AUTO,)):
            if not address.present:
                continue
            share = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="sniroute-")))
            here = Here()
            attempt = contextlib.ExitStack()
            try:
                front = ("127.0.0.1", free_port())
                engine = attempt.enter_context(Engine(address.url, share, here, here, front))
                apps = attempt.enter_context(running(engine))
            except FAILURES as err:
                attempt.close()
                say("engine", f"{address.name} is here, but does not serve: {err}")
                continue
            undo.push(attempt)
            say("engine", f"{address.name} {engine.version} at {address.url}")
            yield engine, apps
            return
        kind = PODMAN if shutil.which("podman") and not shutil.which("dockerd") else DOCKER
        engine = undo.enter_context(undo.enter_context(Daemon(kind)).engine())
        name = "podman" if kind.podman else "docker"
        say("engine", f"{name} {engine.version}, started for this demo in a namespace of its own")
        apps = undo.enter_context(running(engine))
        yield engine, apps


def show_fetch(engine: Engine, host: str, app: App) -> None:
    """
    Fetch *host* through sniroute, once small and once 1 MiB, and tell who answered.
    """
    answer = fetch.fetch(engine.client, engine.front, host, app.root)
    with fetch.connect(engine.client, engine.front, host, app.root) as sock:
        blob = fetch.get(sock, host, "/blob")
    say("fetch", f"https://{host} -> {answer.app} at {answer.address}, and {len(blob):,} bytes")


def move(engine: Engine, host: str, app: App) -> App:
    """
    Restart *app* while another container takes its address; return that other one.
    """
    old = app.address
    app.container.stop(timeout=2)
    squatter = engine.run_app("sniroute-squatter", {}, sites=host, address=old, serve=False)
    app.container.start()
    app.wait_until_serving(host)
    say("restart", f"{app.name}: {old} -> {app.address}")
    return squatter


def show_outcome(sniroute: Sniroute, fetches: int) -> None:
    """
    Tell what was routed where, by which hand-off, and how many bytes the kernel moved.
    """

    def ended() -> list[dict[str, Any]]:
        lines = [line for line in sniroute.log() if line["event"] == "connection"]
        return lines if len(lines) == fetches else []

    lines = wait_for("the end of all connections", ended)
    places = itertools.groupby(lines, lambda x: (x["route"], x["backend"], x["backend_address"]))
    for (route, name, address), group in places:
        ways = sorted({line["handoff"] for line in group})
        say("routed", f"{route} -> {name} at {address}, by {' and '.join(ways)}")
    handoff = sniroute.status()["handoff"]
    say("hand-off", f"{handoff['chosen']}: {handoff['reason']}")
    in_kernel, total = (
        sum(line["bytes_in"] + line["bytes_out"] for line in lines if line["handoff"] in ways)
        for ways in (IN_KERNEL, HANDOFFS)
    )
    say("bytes", f"{in_kernel:,} of {total:,} stayed in the kernel")


def main() -> int:
    """
    Play the demo.
    """
    # a demo that is asked to end still cleans up
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with any_engine() as (engine, apps):
            for host, app in apps.items():
                say("container", f"{app.name} at {app.address}, labelled sniroute.host={host}")
            flags = ("--engine", engine.url)
            with Sniroute(engine, *flags, metrics_port=free_port()) as sniroute:
                say("sniroute", "listens on {}:{}".format(*engine.front))
                for host, app in apps.items():
                    sniroute.wait_for_route(host, app.address)
                    show_fetch(engine, host, app)
                host, app = next(iter(apps.items()))
                squatter = move(engine, host, app)
                try:
                    sniroute.wait_for_route(host, app.address)
                    show_fetch(engine, host, app)
                    show_outcome(sniroute, fetches=6)
                finally:
                    squatter.remove()
    except FAILURES as err:
        print(f"demo: {err}", *getattr(err, "__notes__", ()), sep="\n", file=sys.stderr)
        if os.geteuid() != 0:
            print("demo: as root it could start an engine of its own", file=sys.stderr)
        return 1
    say("done", "containers, network and image are gone again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
