"""
Many quick connections, by a program in C: `swarm.c` tells how they go.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.machines import Here
from harness.tools import CACHE, find_program, locked, run

AT_ONCE = 64
TIMEOUT = 90


@dataclass(frozen=True, slots=True)
class Tally:
    """
    How a backend saw its clients: by their own address and port, by another port, or wrongly.
    """

    same: int
    other_port: int
    wrong: int
    failed: int
    first_error: str


@contextmanager
def serving(machine: Here, address: str, port: int, *, closes_first: bool) -> Iterator[None]:
    """
    Run the server on *machine* meanwhile.
    """
    order = "first" if closes_first else "last"
    command = machine.outside(_program(), "serve", address, str(port), order)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.stdin.close()


def ask(
    machine: Here,
    to: tuple[str, int],
    hello: bytes,
    source: str,
    ports: range,
    *,
    resets: bool = False,
) -> Tally:
    """
    Connect from each of *ports* once, and tell how that went; with *resets*, end with a RST.
    """
    end = "reset" if resets else "close"
    where = (*map(str, to), source, str(ports.start), str(len(ports)), str(AT_ONCE), end)
    done = subprocess.run(
        machine.outside(_program(), "ask", *where),
        input=hello,
        capture_output=True,
        timeout=TIMEOUT,
        check=True,
    )
    return Tally(**json.loads(done.stdout))


@cache
def _program() -> Path:
    source = Path(__file__).with_suffix(".c")
    program = CACHE / "swarm"
    with locked("swarm"):
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            compiler = find_program("cc", "gcc")
            run(compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source)
    return program
