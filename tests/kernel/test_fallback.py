"""
What the kernel, or a missing privilege, refuses is done by the relay, and nobody loses a byte.

And what the kernel does carry the router does not touch.
"""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    PIECE,
    Backend,
    connection,
    read_all,
    read_exactly,
)
from harness.loopback import LOOPBACK, Product
from harness.loopback import router as start_router
from harness.operate import SNIROUTE, LoneRouter, access_lines, ask, lone_router, sniroute, table
from harness.tools import CAPABILITIES, find_program, limited, wait_for

from bpfprog import MAX_CONNECTIONS, Splice
from controller.core.session import Side
from controller.router.flow import UNTOUCHED, Flow, Handoff, Offer, Prelude, Refused
from controller.router.loop import Loop
from controller.router.relay import RelayHandoff
from controller.router.sockmap import SockmapHandoff

IPPROTO_MPTCP = 262
BULK = 512 * 1024**2
RATE = 160 * 1024**2
"""Bytes a second; well below what the kernel moves here, so that the reader keeps up."""

BLOCK = os.urandom(PIECE)
SLICE = 32 * BLOCK
MOVERS = "recvfrom,recvmsg,recvmmsg,sendto,sendmsg,sendmmsg,splice,sendfile,read,readv,write,writev"
T = TypeVar("T")
REFUSALS = "sniroute_handoff_refusals_total"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


@pytest.fixture
def router(tmp_path: Path, backend: Backend) -> Iterator[LoneRouter]:
    """
    A router by sockmap, under exactly the privileges that it documents.
    """
    prefix = limited(*CAPABILITIES)
    with lone_router(tmp_path, "--handoff", "sockmap", prefix=prefix) as router:
        ask(router.control, table(1, {NAME: [backend.address]}))
        yield router


def without(*names: str) -> list[str]:
    return limited(*(name for name in CAPABILITIES if name not in names))


# --- asked for ---


def test_a_backend_may_ask_for_the_relay(backend: Backend) -> None:
    """
    A route that says so is relayed by a router that has better, and nothing was refused for it.
    """
    routes = {NAME: backend.address}
    with (
        start_router("sockmap", routes, keys={"handoff": "relay"}) as product,
        connection(product.listen, backend),
    ):
        active = product.counts("sniroute_connections_active", "handoff")
        refused = product.counts(REFUSALS, "handoff")

    assert {"relay": 1} == active
    assert {} == refused


# --- without privileges ---


@pytest.mark.parametrize("missing", ["bpf", "perfmon", "net_admin"])
def test_auto_serves_without_a_privilege(missing: str, tmp_path: Path, backend: Backend) -> None:
    """
    Without one of the capabilities `auto` serves by the relay, and tells why everywhere.
    """
    with lone_router(tmp_path, "--handoff", "auto", prefix=without(missing)) as router:
        ask(router.control, table(1, {NAME: [backend.address]}))
        with connection(router.listen, backend) as (client, end):
            end.sendall(b"by the relay")
            heard = read_exactly(client, 12)
        (status,) = ask(router.control, {"type": "status"})
        metric = router.product.get("/metrics")
        told = sniroute("status", "--control", str(router.control)).stdout
        privileges = {tuple(p.items()) for p in thread_privileges(router.process.pid)}

    reason = f"without CAP_{missing.upper()}"
    assert heard == b"by the relay"
    assert status["handoff"]["chosen"] == "relay"
    assert reason in status["handoff"]["reason"]
    assert re.search(
        rf'sniroute_handoff{{handoff="relay",reason="[^"]*{reason};[^"]*"}} 1.0', metric
    )
    assert re.search(rf"hand-off +relay \(.*{reason};.*\)", told)
    # the refusal was logged before the rest was given up: no thread may have kept it
    assert {(("CapPrm", 0), ("CapEff", 0), ("NoNewPrivs", 1))} == privileges


@pytest.mark.parametrize("missing", ["bpf", "perfmon", "net_admin"])
def test_sockmap_does_not_start_without_a_privilege(missing: str, tmp_path: Path) -> None:
    """
    Who asks for sockmap and can not have it gets the reason and exit status 1, not a relay.
    """
    done = subprocess.run(
        [
            *without(missing),
            *(SNIROUTE, "router", "--handoff", "sockmap", "--listen", f"{LOOPBACK}:0"),
            *("--client-ip", "off"),
            *("--control", str(tmp_path / "router.sock"), "--metrics", "off"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith("sniroute router: hand-off sockmap does not work here: load the BPF")
    assert line.endswith(f", without CAP_{missing.upper()}")


def thread_privileges(pid: int) -> list[dict[str, int]]:
    """
    Read what each thread of *pid* may do: capabilities are a thread's, not a process's.
    """
    names = ("CapPrm", "CapEff", "NoNewPrivs")
    threads = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        fields = dict(
            line.split(":\t")
            for line in (thread / "status").read_text().splitlines()
            if ":\t" in line
        )
        threads.append({name: int(fields[name], 16) for name in names})
    return threads


def test_no_privilege_is_left_after_the_start(router: LoneRouter, backend: Backend) -> None:
    """
    The four capabilities suffice for sockmap; once it serves no thread of the router has any.
    """
    with connection(router.listen, backend) as (client, end):
        end.sendall(b"by sockmap")
        assert read_exactly(client, 10) == b"by sockmap"
        active = router.product.counts("sniroute_connections_active", "handoff")
        threads = thread_privileges(router.process.pid)

    assert {"sockmap": 1} == active
    assert [{"CapPrm": 0, "CapEff": 0, "NoNewPrivs": 1}] * len(threads) == threads


# --- connections that the kernel refuses ---


def test_a_client_that_has_ended_already_is_relayed(router: LoneRouter, backend: Backend) -> None:
    """
    Hello and FIN in one segment: too late to join, so the relay carries it, and no byte is lost.
    """
    more = b"all that I have to say"
    with socket.create_connection(router.listen, PATIENCE) as client:
        # held back until the FIN, which then goes with it
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        client.sendall(HELLO + more)
        client.shutdown(socket.SHUT_WR)
        with backend.accept() as end:
            heard = read_all(end)
            end.sendall(BLOCK)
            end.shutdown(socket.SHUT_WR)
            answer = read_all(client)
    wait_for("its line", lambda: access_lines(router.log))
    (line,) = access_lines(router.log)

    assert (more, BLOCK) == (heard, answer)
    assert {"sockmap": 1} == router.product.counts(REFUSALS, "handoff")
    assert (line["handoff"], line["reason"]) == ("relay", "client_fin")
    assert line["refused_by"][0].startswith("sockmap: ")
    assert (len(HELLO + more), len(BLOCK)) == (line["bytes_in"], line["bytes_out"])


@contextlib.contextmanager
def pair(protocol: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """
    Connect two sockets of *protocol* on loopback.
    """
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as near,
    ):
        listener.bind((LOOPBACK, 0))
        listener.listen()
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        with far:
            yield near, far


@pytest.mark.parametrize("which", list(Side), ids=["client", "backend"])
def test_an_mptcp_socket_is_relayed(which: Side) -> None:
    """
    A sockmap takes no MPTCP socket: it is refused, and the relay carries every byte once.
    """
    protocols = [socket.IPPROTO_TCP, socket.IPPROTO_TCP]
    protocols[which] = IPPROTO_MPTCP
    loop, over = Loop(), list[Flow]()
    with (
        Splice() as splice,
        pair(protocols[0]) as (client, client_side),
        pair(protocols[1]) as (backend_side, backend),
    ):
        sockmap = SockmapHandoff(loop, splice, 1024 * 1024)
        for end in (client, client_side, backend_side, backend):
            end.setblocking(False)
        client.sendall(HELLO)
        refusals, leaves, prelude = [], [], UNTOUCHED
        ladder: list[Handoff] = [sockmap, RelayHandoff(loop)]
        for handoff in ladder:
            try:
                flow = handoff.take(
                    Offer(client_side.fileno(), backend_side.fileno(), over.append, prelude)
                )
                break
            except Refused as refusal:
                prelude = refusal.prelude or prelude
                refusals.append((handoff.name, str(refusal)))
                leaves += [refusal.leave] if refusal.leave else []
        client_side.detach()
        backend_side.detach()
        heard = turn_until(loop, lambda: received(backend, len(HELLO)))
        backend.sendall(b"and back")
        answer = turn_until(loop, lambda: received(client, 8))
        moved = flow.bytes(Side.CLIENT), flow.bytes(Side.BACKEND)
        with pytest.raises(BlockingIOError):
            backend.recv(1)
        client.close()
        backend.close()
        turn_until(loop, lambda: over)
        held = MAX_CONNECTIONS - len(sockmap._free)  # noqa: SLF001 - numbers not free yet
        for leave in leaves:
            leave()
        loop.turn(0)
        left = MAX_CONNECTIONS - len(sockmap._free)  # noqa: SLF001 - as above

    # the client of a backend that was refused is in the map until it is closed
    assert (int(which is Side.BACKEND), 0) == (held, left)
    assert (HELLO, b"and back") == (heard, answer)
    assert (len(HELLO), 8) == moved
    assert flow.handoff == "relay"
    assert [name for name, _ in refusals] == ["sockmap"]


def test_the_rest_of_a_segment_is_moved_once() -> None:
    """
    Of a segment that was read in part the kernel moves what is left, and the end comes behind it.
    """
    loop, over = Loop(), list[Flow]()
    with (
        Splice() as splice,
        pair(socket.IPPROTO_TCP) as (client, client_side),
        pair(socket.IPPROTO_TCP) as (backend_side, backend),
    ):
        sockmap = SockmapHandoff(loop, splice, 1024 * 1024)
        for end in (client, client_side, backend_side, backend):
            end.setblocking(False)
        client.sendall(HELLO)
        backend_side.sendall(client_side.recv(40))
        flow = sockmap.take(
            Offer(client_side.fileno(), backend_side.fileno(), over.append, Prelude(40, 40, 40))
        )
        client_side.detach()
        backend_side.detach()
        client.sendall(b"more")
        heard = turn_until(loop, lambda: received(backend, len(HELLO) + 4))
        client.close()
        backend.close()
        turn_until(loop, lambda: over)
        moved = flow.bytes(Side.CLIENT)

    assert HELLO + b"more" == heard
    assert len(HELLO) + 4 == moved
    assert flow.session.reason == "client_fin"


def received(end: socket.socket, size: int) -> bytes:
    """
    Read *size* bytes once they are there.
    """
    with contextlib.suppress(BlockingIOError):
        if len(end.recv(size, socket.MSG_PEEK)) == size:
            return end.recv(size)
    return b""


def turn_until(loop: Loop, condition: Callable[[], T]) -> T:
    end = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < end, "not within 10 s"
        loop.turn(0.01)
    return value


# --- what the kernel carries ---


@contextlib.contextmanager
def traced(pid: int, log: Path) -> Iterator[None]:
    """
    Have strace write to *log* each call of *pid* that could move bytes.
    """
    command = (find_program("strace", "strace"), "-f", "-p", str(pid), "-e", f"trace={MOVERS}")
    with subprocess.Popen([*command, "-o", str(log)], stderr=subprocess.DEVNULL) as strace:
        try:
            wait_for("strace at every thread", lambda: is_traced(pid))
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(timeout=10)


def is_traced(pid: int) -> bool:
    """
    Whether all threads of *pid* that there are now are being traced.
    """
    try:
        statuses = [(t / "status").read_text() for t in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        # one has ended meanwhile
        return False
    return all("TracerPid:\t0\n" not in status for status in statuses)


@pytest.mark.parametrize("source", list(Side), ids=["upload", "download"])
def test_the_router_makes_no_call_for_bytes(
    source: Side, router: LoneRouter, backend: Backend, tmp_path: Path
) -> None:
    """
    512 MiB arrive whole while the router reads, writes and splices nothing; all are counted.

    They go in slices.  A worker of the kernel that waits for a core is, to the router, a reader
    that lags: a slice that met one does not count, and another is sent for it.
    """
    calls = tmp_path / "calls"
    sent = untouched = 0
    with connection(router.listen, backend) as ends, traced(router.process.pid, calls):
        # 47: SO_MAX_PACING_RATE (asm-generic/socket.h)
        ends[source].setsockopt(socket.SOL_SOCKET, 47, RATE)
        while untouched < BULK:
            assert sent < 3 * BULK, f"only {untouched} of {sent} bytes went untouched"
            # its line is written before what a call has read can go on
            before = calls.stat().st_size
            sender = threading.Thread(target=ends[source].sendall, args=(SLICE,))
            sender.start()
            received = read_exactly(ends[source.other], len(SLICE))
            sender.join()
            sent += len(SLICE)
            untouched += len(SLICE) if calls.stat().st_size == before else 0

            assert hashlib.sha256(SLICE).digest() == hashlib.sha256(received).digest()

    wait_for("its line", lambda: access_lines(router.log))
    expected = {"in": len(HELLO), "out": 0}
    expected["in" if source is Side.CLIENT else "out"] += sent
    assert expected == bytes_moved(router.product)


def bytes_moved(product: Product) -> dict[str, float]:
    return product.counts("sniroute_forward_bytes_total", "direction")
