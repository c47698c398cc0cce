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

BEGIN: Final = """
import ctypes, os, socket, threading
from controller.router._native import lib
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *words):
    if function(*words) < 0:
        raise OSError(ctypes.get_errno(), function.__name__)
"""

CONFINE: Final = "assert lib.confine() == 0\n"


def python(program: str, folder: Path | None = None) -> str:
    """
    Run *program* in *folder*; return the last line of what it said on standard error.
    """
    command = [sys.executable, "-c", BEGIN + program]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, cwd=folder
    )
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    "deed",
    [
        "socket.socket(socket.AF_UNIX)",
        "os.execv('/bin/true', ['true'])",
        "os.execve(os.open('/bin/true', os.O_RDONLY), ['true'], {})",
        "os.pidfd_open(os.getpid())",
        "call(libc.process_vm_readv, os.getpid(), None, 0, None, 0, 0)",
        "open('/proc/self/mem', 'r+b')",
        "open('there', 'a')",
        "open('there', 'r+')",
        "os.open('there', os.O_RDONLY | os.O_TRUNC)",
        "os.open('new', os.O_RDONLY | os.O_CREAT)",
        "os.truncate('there', 0)",
        "os.rename('there', 'new')",
        "os.link('there', 'new')",
        "os.symlink('there', 'new')",
        "os.mkdir('new')",
        "os.mkfifo('new')",
        "os.chmod('there', 0o4755)",
        "os.chown('there', 0, 0)",
    ],
)
def test_what_is_refused(deed: str, tmp_path: Path) -> None:
    """
    It works before and fails with EPERM after.
    """
    (tmp_path / "there").write_text("data")
    after = python(CONFINE + deed, tmp_path)

    assert (tmp_path / "there").read_text() == "data"
    assert [tmp_path / "there"] == list(tmp_path.iterdir())
    assert "PermissionError" in after
    assert python(deed, tmp_path) == ""


def test_the_last_deeds_are_not_refused(tmp_path: Path) -> None:
    """
    Files can be read, and the control socket's name goes.
    """
    (tmp_path / "there").write_text("data")

    assert python(CONFINE + "open('there').read(); os.unlink('there')", tmp_path) == ""
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("shut", "result"), [("", ""), ("privilege.shut()", "PermissionError")])
def test_the_controller_is_out_of_reach(shut: str, result: str) -> None:
    """
    A process with the router's privileges can not take a descriptor of one that is shut.

    It can of one that is not: both have the same user, and neither a capability.
    """
    program = f"""
from controller import privilege
ready, go = os.pipe()
pid = os.fork()
privilege.drop_to(())
if not pid:
    {shut or "pass"}
    os.write(go, b"x")
    import signal; signal.pause()
os.read(ready, 1)
try:
    # pidfd_getfd has no name in Python and no wrapper in older C libraries
    call(libc.syscall, 438, os.pidfd_open(pid), 0, 0)
finally:
    os.kill(pid, 9)
"""

    assert result in python(program)
    assert bool(result) == bool(python(program))


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
