"""
The product under test: `sniroute run` on an engine's machine, seen as its operator sees it.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from harness.engines import Engine
from harness.tools import CAPABILITIES, VENV, HarnessError, limited, run, wait_for

SNIROUTE = VENV / "bin/sniroute"

HANDOFFS = ("packet", "sockmap", "relay")
"""Every hand-off, fastest first."""

WITH_BPFFS = (
    *("unshare", "--mount", "--propagation=private", "--"),
    *("sh", "-ec", 'mount -t bpf bpf /sys/fs/bpf; exec "$@"', "with-bpffs"),
)
"""A prefix for a command that is to have a bpffs: what is left there goes with its last process."""


class Sniroute:
    """
    A running pair of router and controller, on the machine of *engine* and at its front.

    As root it gets exactly the capabilities that it documents, none else: not even to gain.
    """

    def __init__(self, engine: Engine, *flags: str, metrics_port: int = 9443) -> None:
        self._host = engine.host
        self._control = engine.share / "router.sock"
        self._log = engine.share / "sniroute.log"
        address, port = engine.front
        self._metrics = address, metrics_port
        command = [
            *(() if os.geteuid() else WITH_BPFFS),
            *(
                *limited(*CAPABILITIES),
                str(SNIROUTE),
                "run",
                "--listen",
                f"{address}:{port}",
                "--control",
            ),
            *(str(self._control), "--metrics", f"{address}:{metrics_port}", *flags),
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._host.outside(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_for("sniroute is ready", self._ready)
        except BaseException as err:
            self.kill()
            err.add_note(self._log.read_text()[-5000:])
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, err: BaseException | None, __: TracebackType | None
    ) -> None:
        """
        Stop it as a service manager does; a failed test gets the end of its log.
        """
        if err is not None:
            err.add_note(self._log.read_text()[-5000:])
            self.kill()
            return
        if self._process.returncode is None:
            self.stop()

    def is_running(self) -> bool:
        """
        Tell whether it has not ended.
        """
        return self._process.poll() is None

    def put_log_aside(self) -> None:
        """
        Leave the log's name to another product of the same engine.
        """
        self._log = self._log.rename(self._log.with_suffix(".old"))

    def stop(self) -> None:
        """
        Ask it to end and wait until it has.

        Raises:
            HarnessError: It did not end well.
        """
        self._process.send_signal(signal.SIGTERM)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """
        Wait until it has ended by itself.

        Raises:
            HarnessError: It did not end well.
        """
        try:
            code = self._process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            self.kill()
            raise HarnessError("sniroute does not stop") from None
        if code:
            raise HarnessError(f"sniroute ended with {code}\n{self._log.read_text()[-5000:]}")

    def kill(self) -> None:
        """
        End it and all its processes without a warning.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            # the supervisor last: at its end the router would drain, and clean up
            for process in [*main.children(recursive=True), main]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait(timeout=30)

    def _ready(self) -> bool:
        if self._process.poll() is not None:
            raise HarnessError(f"sniroute ended with {self._process.returncode}")
        return self._get("/healthz")[0] == http.client.OK

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(*self._metrics, timeout=10)
        with contextlib.closing(connection):
            with self._host.network():
                connection.connect()
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """
        Sum up the samples called *name* that have all of *labels*.
        """
        return sum(
            sample.value
            for family in text_string_to_metric_families(self._get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def status(self) -> dict[str, Any]:
        """
        Return what `sniroute status --json` prints.
        """
        return json.loads(self._ask("status"))

    def routes(self) -> dict[str, set[str]]:
        """
        Return the addresses behind each host, as `sniroute routes --json` prints them.
        """
        routes = json.loads(self._ask("routes"))
        return {r["host"]: {b["address"] for b in r["backends"]} for r in routes}

    def _ask(self, command: str) -> str:
        return self.command(command, "--json")

    def command(self, *words: str) -> str:
        """
        Run one command of `sniroute` on the product, and return what it prints.

        Raises:
            HarnessError: It failed.
        """
        return run(SNIROUTE, *words, "--control", self._control)

    def wait_for_route(self, host: str, *addresses: str) -> None:
        """
        Wait until *host* leads to exactly *addresses*; to none if there are none.
        """
        wanted = set(addresses)
        wait_for(f"{host} leads to {wanted}", lambda: self.routes().get(host, set()) == wanted)

    def wait_for_status(self, what: str, probe: Callable[[dict[str, Any]], bool]) -> None:
        """
        Wait until *probe* accepts the status.
        """
        wait_for(what, lambda: probe(self.status()))

    def log(self) -> Iterator[dict[str, Any]]:
        """
        Read the log, line by line; what is not JSON there raises ValueError.
        """
        for line in self._log.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def router(self) -> psutil.Process:
        """
        Find the router process, which may be just starting.
        """
        return wait_for("a router process", lambda: self._child("controller.router"))

    def controller(self) -> psutil.Process:
        """
        Find the controller process, which may be just starting.
        """
        return wait_for("a controller process", lambda: self._child("controller"))

    def _child(self, module: str) -> psutil.Process | None:
        for process in psutil.Process(self._process.pid).children():
            # one that has just ended has no command line, or is no more
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in process.cmdline():
                    return process
        return None


def privileges(process: psutil.Process) -> dict[str, int]:
    """
    Read the privileges of *process* from /proc: CapPrm, CapEff and so on, and NoNewPrivs.
    """
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    fields = (line.split(":\t") for line in lines)
    return {f[0]: int(f[1], 16) for f in fields if f[0].startswith(("Cap", "NoNewPrivs"))}
