"""
The kernel keeps the router from the engine's socket and from starting programs.
"""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from harness.ends import NAME, Backend, connection
from harness.loopback import router
from harness.transfer_promises import router_pid

FILTER: Final = "2"
"""SECCOMP_MODE_FILTER, as /proc writes it."""

BEGIN: Final = "import os, socket, threading; from controller.router._native import lib\n"

CONFINE: Final = "assert lib.confine() == 0\n"


def python(program: str) -> str:
    """
    Run *program*; return the last line of what it said on standard error.
    """
    command = [sys.executable, "-c", BEGIN + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    "deed",
    [
        "socket.socket(socket.AF_UNIX)",
        "os.execv('/bin/true', ['true'])",
        "os.execve(os.open('/bin/true', os.O_RDONLY), ['true'], {})",
    ],
)
def test_what_is_refused(deed: str) -> None:
    """
    It works before and fails with EPERM after.
    """
    assert python(deed) == ""
    assert "PermissionError" in python(CONFINE + deed)


def test_threads_that_run_already_are_confined_too() -> None:
    """
    A thread from before is no way around.
    """
    program = """
go, error = threading.Event(), []
def late():
    go.wait()
    try: socket.socket(socket.AF_UNIX)
    except OSError as err: error.append(err)
thread = threading.Thread(target=late); thread.start()
assert lib.confine() == 0
go.set(); thread.join()
raise error[0]
"""

    assert "PermissionError" in python(program)


def test_what_is_needed_still_works() -> None:
    """
    Sockets to clients and backends, netlink, and a reset of capabilities are not touched.
    """
    deeds = "socket.socket(socket.AF_INET6); socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"

    assert python(CONFINE + deeds) == ""


def test_a_serving_router_is_confined() -> None:
    """
    Every thread of a router that serves has the filter.
    """
    with Backend() as backend, router("sockmap", {NAME: backend.address}) as product:
        with connection(product.listen, backend) as (client, end):
            end.sendall(b"x")

            assert client.recv(1) == b"x"

        tasks = Path(f"/proc/{router_pid(product)}/task").iterdir()
        modes = {
            line.split()[1]
            for task in tasks
            for line in (task / "status").read_text().splitlines()
            if line.startswith("Seccomp:")
        }

        assert modes == {FILTER}
        with socket.socket(socket.AF_UNIX) as asker:
            asker.connect(str(product.control))
