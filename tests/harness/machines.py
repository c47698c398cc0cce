"""
Whole machines played in namespaces: a host for an engine, a client out in the world.

A machine is one process, the first of its own network, process and mount namespaces.  When it
ends the kernel ends all that ran on the machine and drops its mounts, bridges and filters:
nothing is left to clean up, whatever went wrong.
"""

import contextlib
import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil

from harness.tools import HarnessError, find_program, run

HOST_ADDRESS = "203.0.113.1"
CLIENT_ADDRESS = "203.0.113.2"

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)

_BOOT = """
set -e
root=$1 share=$2
if [ "$root" = / ]; then
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /run
    mount -t bpf bpf /sys/fs/bpf
else
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/run"
    mount -t bpf bpf "$root/sys/fs/bpf"
    mkdir -p "$root$share"
    mount --bind "$share" "$root$share"
    cd "$root"
    mkdir -p .old
    pivot_root . .old
    umount -l /.old
    cd /
fi
# ignored signals stay ignored over exec: the kernel then reaps every orphan by itself
echo up
exec env --ignore-signal=CHLD sleep infinity
"""


class Here:
    """
    The machine that we are on.
    """

    pid: int | None = None
    """The process whose network it is; None is our own."""

    def outside(self, *command: str | Path) -> list[str]:
        """
        Write *command* as one of our processes that has this machine's network.
        """
        enter = [] if self.pid is None else ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]
        return [*enter, *map(str, command)]

    def run(self, *command: str | Path, timeout: float = 60) -> str:
        """
        Run *command* with this machine's network and return what it printed.
        """
        return run(*self.outside(*command), timeout=timeout)

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """
        Be on this machine's network meanwhile: sockets that this thread makes belong to it.
        """
        if self.pid is None:
            yield
            return
        ours = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        with Path(ours).open() as back, Path(f"/proc/{self.pid}/ns/net").open() as there:
            _set_network(there.fileno())
            try:
                yield
            finally:
                _set_network(back.fileno())


class Machine(Here):
    """
    A running machine with *root* as its file system.

    The folder *share* it has in common with ours, at the same path.
    """

    def __init__(self, share: Path, root: Path = Path("/")) -> None:
        if os.geteuid() != 0:
            raise HarnessError("namespaces need root: run this as root")
        find_program("ip", "iproute2")
        self._unshare = subprocess.Popen(
            [
                # should we be killed, so is the machine
                *("setpriv", "--pdeathsig=KILL", "--"),
                *("unshare", "--net", "--mount", "--propagation=private", "--pid", "--fork"),
                *("--kill-child", "sh", "-c", _BOOT, "boot", str(root), str(share)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with self._unshare.stdout as said:
            if (line := said.readline()) != "up\n":
                rest = said.read()
                self._unshare.wait(timeout=10)
                raise HarnessError(f"machine does not boot: {line}{rest}")
        self.pid = psutil.Process(self._unshare.pid).children()[0].pid
        self.run("ip", "link", "set", "lo", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """
        Switch the machine off, with all that runs on it.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self._unshare.wait(timeout=30)

    def inside(self, *command: str | Path) -> list[str]:
        """
        Write *command* as a process of this machine: its network, files and processes.
        """
        entered = ("nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--")
        return [*entered, *map(str, command)]

    @contextlib.contextmanager
    def uplink(self) -> Iterator[None]:
        """
        Let the machine reach the world meanwhile, as our processes do.
        """
        slirp = find_program("slirp4netns", "slirp4netns")
        address = ("--configure", "--mtu=1400", "--cidr", "198.19.0.0/24")
        process = subprocess.Popen(
            [slirp, *address, "--ready-fd", "1", str(self.pid), "up0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            if process.stdout.read(1) != b"1":
                raise HarnessError(f"no uplink: {process.stderr.read().decode()}")
            yield
        finally:
            process.terminate()
            process.communicate(timeout=30)


def _set_network(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def join(host: Machine, client: Machine) -> None:
    """
    Plug *client* into *host*, as the world outside.
    """
    veth = ("type", "veth", "peer", "name", "eth0", "netns", str(client.pid))
    host.run("ip", "link", "add", "out0", *veth)
    for machine, device, address in (
        (host, "out0", HOST_ADDRESS),
        (client, "eth0", CLIENT_ADDRESS),
    ):
        machine.run("ip", "addr", "add", f"{address}/30", "dev", device)
        machine.run("ip", "link", "set", device, "up")
    client.run("ip", "route", "add", "default", "via", HOST_ADDRESS)
