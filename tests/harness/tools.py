"""
Programs that the harness needs, and waiting with a deadline.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).parents[2]

CACHE = REPOSITORY / ".cache"
"""What is slow to make and never changes: system roots, the Go client."""

VENV = Path(sys.prefix)

CAPABILITIES = ("bpf", "perfmon", "net_admin", "net_bind_service")
"""All that the product is given."""

T = TypeVar("T")


class HarnessError(RuntimeError):
    """
    The harness can not do its part; the message says what is missing or what went wrong.
    """


def find_program(name: str, package: str) -> str:
    """
    Find the program *name*, which the system package *package* brings.

    Raises:
        HarnessError: It is not there; a test on it must fail, not skip.
    """
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
    if path is None:
        raise HarnessError(f"{name} not found: apt-get install {package}")
    return path


def limited(*capabilities: str) -> list[str]:
    """
    Write a prefix for a command that gets at most *capabilities*, and can gain no others.

    Who is not root has none to lose, and gets an empty prefix.
    """
    if os.geteuid():
        return []
    few = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    return ["setpriv", "--bounding-set", few, "--inh-caps=-all", "--ambient-caps=-all"]


def run(*command: str | Path, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """
    Run *command* and return what it printed.

    Raises:
        HarnessError: It failed; its output is in the message.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        check=False,
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise HarnessError(f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def wait_for(
    what: str, probe: Callable[[], T | None], *, timeout: float = 30, every: float = 0.05
) -> T:
    """
    Call *probe* until it returns something true, and return that.

    An OSError of *probe* is a "not yet", and the reason given when time is up.

    Raises:
        HarnessError: *timeout* seconds are over; *what* says for what it waited.
    """
    end = time.monotonic() + timeout
    while True:
        why = ""
        try:
            if value := probe():
                return value
        except OSError as err:
            why = f": {err}"
        if time.monotonic() > end:
            raise HarnessError(f"{what}: not within {timeout} s{why}")
        time.sleep(every)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """
    Keep other processes that use the same cache out of *name* meanwhile.
    """
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        flock(file, LOCK_EX)
        yield
