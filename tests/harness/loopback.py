"""
The product on loopback, with static routes and no engine.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from harness.tools import CAPABILITIES, VENV, HarnessError, limited, wait_for

Address = tuple[str, int]

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Product:
    """
    The running product: its addresses, its control socket and its process.
    """

    listen: Address
    metrics: Address
    control: Path
    pid: int
    log: Path = Path(os.devnull)

    def get(self, path: str) -> str:
        """
        Fetch *path* of the metrics address; an HTTP error is an OSError.
        """
        url = f"http://{self.metrics[0]}:{self.metrics[1]}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()

    def lines(self) -> list[dict[str, Any]]:
        """
        Read the log as far as it is written.
        """
        text = self.log.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def counts(self, metric: str, label: str) -> dict[str, float]:
        """
        Sum the samples of *metric* by *label*.
        """
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                if sample.name == metric:
                    key = sample.labels.get(label, "")
                    sums[key] = sums.get(key, 0) + sample.value
        return sums


@contextmanager
def router(
    handoff: str,
    routes: Mapping[str, Address],
    *options: str,
    keys: Mapping[str, str] | None = None,
    address: str = LOOPBACK,
    metrics: str = LOOPBACK,
) -> Iterator[Product]:
    """
    Run the product with *routes*, from host pattern to backend, until the block ends.

    As root it gets exactly the capabilities that it documents.

    *keys* are further keys of each route; *address* is where it listens, *metrics* where it tells
    of itself.

    Raises:
        HarnessError: It does not become ready, or does not end in order.
    """
    with tempfile.TemporaryDirectory(prefix="sniroute-") as name:
        folder = Path(name)
        listen, told = _free_addresses(address, metrics)
        control, log = folder / "router.sock", folder / "log"
        (folder / "routes.toml").write_text(_routes_file(routes, keys or {}))
        command = [
            *limited(*CAPABILITIES),
            *(str(VENV / "bin" / "sniroute"), "run", "--engine", "none", "--drain", "1"),
            *("--client-ip", "off"),
            *("--routes", str(folder / "routes.toml"), "--control", str(control)),
            *("--listen", f"{listen[0]}:{listen[1]}", "--metrics", f"{told[0]}:{told[1]}"),
            *("--handoff", handoff, *options),
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        product = Product(listen, told, control, process.pid, log)
        try:
            wait_for("a ready router", lambda: _ready(process, product))
            yield product
            _stop(process)
        except BaseException as err:
            err.add_note(log.read_text()[-5000:])
            raise
        finally:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], product: Product) -> bool:
    if process.poll() is not None:
        raise HarnessError(f"sniroute ended with {process.returncode}")
    product.get("/healthz")
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        raise HarnessError("sniroute does not stop") from None
    if code:
        raise HarnessError(f"sniroute ended with {code}")


def _routes_file(routes: Mapping[str, Address], keys: Mapping[str, str]) -> str:
    more = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    return "".join(
        f'[[route]]\nhost = ["{host}"]\nbackends = ["{address}:{port}"]\n{more}\n'
        for host, (address, port) in routes.items()
    )


def _free_addresses(*hosts: str) -> list[Address]:
    # all held at once, or the kernel may give one out twice
    sockets = [socket.create_server((host, 0)) for host in hosts]
    addresses = [s.getsockname() for s in sockets]
    for s in sockets:
        s.close()
    return addresses
