"""
`--workers`: several processes, and one router for whoever looks at it.
"""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from harness.crowd import Crowd
from harness.ends import (
    HELLO,
    NAME,
    Backend,
    client_hello,
    connection,
    dial,
    read_all,
    read_exactly,
)
from harness.loopback import Product, router
from harness.operate import (
    LoneRouter,
    access_lines,
    alive,
    ask,
    child,
    has_ended,
    kill,
    log_lines,
    served,
    sniroute,
    write_routes,
)
from harness.tools import wait_for

WORKERS = 3
OPTIONS = ("--workers", str(WORKERS))
STATUS = {"type": "status"}


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    with Crowd() as crowd:
        yield crowd


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


def workers(of: psutil.Process) -> list[psutil.Process]:
    """
    Find the further workers of a router process.
    """
    (nursery,) = of.children()
    return nursery.children()


def by_worker(log: Path) -> Counter[int]:
    """
    Count the connections that each worker has logged; 0 is the router process itself.
    """
    return Counter(line.get("worker", 0) for line in access_lines(log))


def test_all_workers_serve_as_one(crowd: Crowd) -> None:
    """
    Each worker has its part of the clients; status and metrics tell the sum.
    """
    with router("relay", {NAME: crowd.backend}, *OPTIONS) as product:
        crowd.at = product.listen
        crowd.wait_for_more(200)
        crowd.leave()
        done = crowd.done.total()
        wait_for("all lines", lambda: by_worker(product.log).total() == done)
        (status,) = ask(product.control, STATUS)
        (ended,) = product.counts("sniroute_connections_total", "result").values()
        durations = product.counts("sniroute_backend_connect_duration_seconds_count", "route")
        served_by = set(by_worker(product.log))

    assert [] == crowd.failures
    assert {0, 1, 2} == served_by
    assert (done, 0) == (status["connections"]["total"], status["connections"]["active"])
    assert {"running": WORKERS, "of": WORKERS} == status["workers"]
    assert done == ended
    assert {NAME: done} == durations


def test_a_table_is_acknowledged_when_all_serve_it(backend: Backend) -> None:
    """
    Once a change of routes is acknowledged, whichever worker a client comes to has it.
    """
    new = "new.example.com"
    hello = client_hello(new)
    with router("relay", {NAME: backend.address}, *OPTIONS) as product, Backend() as other:
        write_routes(product, {new: [other.address]})
        for _ in range(30):
            with dial(product.listen) as client:
                # an alert: there is no such route any more
                assert read_all(client)[:1] == b"\x15"
        with ExitStack() as stack:
            for _ in range(30):
                client = stack.enter_context(dial(product.listen, hello))
                stack.enter_context(other.accept(hello))
        wait_for("all lines", lambda: by_worker(product.log).total() == 60)
        served_by = set(by_worker(product.log))

    assert {0, 1, 2} == served_by


def test_a_killed_worker_costs_its_connections_only(crowd: Crowd) -> None:
    """
    When a worker dies no new client waits or is refused: another serves, until it is back.

    It is logged and counted, and no counter goes back.
    """
    routes = {NAME: crowd.backend, "other.example.com": crowd.backend}
    with router("relay", routes, *OPTIONS) as product:
        for _ in range(60):
            echo(product)
        first = workers(child(product, "router"))
        before = product.counts("sniroute_connections_total", "result")["forwarded"]
        for worker in first:
            kill(worker)
        seconds = [echo(product) for _ in range(60)]
        wait_for("its count", lambda: ended_workers(product) == 2)
        wait_for("all workers", lambda: running(product) == WORKERS)
        after = product.counts("sniroute_connections_total", "result")["forwarded"]
        lines = [line for line in log_lines(product.log) if line["event"] == "worker ended"]
        old = set(by_worker(product.log).items())
        for _ in range(60):
            echo(product)
        (status,) = ask(product.control, STATUS)

        assert len(set(by_worker(product.log).items()) - old) == WORKERS
        assert max(seconds) < 1
        # what a killed worker had counted since it was looked at last is lost with it
        assert after >= before
        assert sorted((1, 2)) == sorted(line["worker"] for line in lines)
        assert {-signal.SIGKILL} == {line["status"] for line in lines}
        assert not set(first) & set(workers(child(product, "router")))
        assert sorted(routes) == sorted(served(product.control))
        assert status["workers"] == {"running": WORKERS, "of": WORKERS}


def echo(product: Product) -> float:
    """
    Have the hello echoed once, and return how long that took.
    """
    began = time.monotonic()
    with dial(product.listen) as client:
        assert HELLO == read_exactly(client, len(HELLO))
    return time.monotonic() - began


def ended_workers(product: Product) -> float:
    return sum(product.counts("sniroute_worker_ends_total", "").values())


def running(product: Product) -> int:
    (status,) = ask(product.control, STATUS)
    return int(status["workers"]["running"])


def test_no_client_notices_a_replacement(crowd: Crowd, tmp_path: Path) -> None:
    """
    Routers with different numbers of workers replace each other, and no client notices.
    """
    options = ("--handoff", "relay", "--hello-timeout", "3", "--drain", "10")
    routes = {NAME: crowd.backend}
    with router("relay", routes, *options[2:], *OPTIONS) as first:
        crowd.at = first.listen
        crowd.wait_for_more(100)
        with LoneRouter(tmp_path, *options, "--workers", "2", replaces=first) as second:
            crowd.wait_for_more(100)
            wait_for("the end of the first", lambda: has_ended(first.pid))
            crowd.wait_for_more(100)
            with LoneRouter(tmp_path, *options, replaces=second) as third:
                crowd.wait_for_more(100)
                second_status = second.process.wait(30)
                crowd.wait_for_more(100)
                crowd.leave()

                assert ([], 0) == (crowd.failures, second_status)
                assert third.stop() == 0


def test_a_drain_waits_for_the_connections_of_all(backend: Backend) -> None:
    """
    At SIGTERM every worker stops accepting, and the router ends when the last connection has.
    """
    with (
        router("relay", {NAME: backend.address}, "--drain", "30", *OPTIONS) as product,
        ExitStack() as stack,
    ):
        pairs = [stack.enter_context(connection(product.listen, backend)) for _ in range(12)]
        everyone = [child(product, "router"), *workers(child(product, "router"))]
        os.kill(product.pid, signal.SIGTERM)
        wait_for("a closed port", lambda: refuses(product), timeout=5)
        for client, end in pairs:
            client.sendall(b"still here")
            assert read_exactly(end, 10) == b"still here"
        before = has_ended(product.pid)
        for client, end in pairs:
            client.close()
            end.close()
        wait_for("the end", lambda: has_ended(product.pid), timeout=5)

        assert not before
        assert not any(map(alive, everyone))
        # among them those that only looked whether the port was closed
        assert Counter(line["result"] for line in access_lines(product.log))["forwarded"] == 12
        assert "worker ended" not in [line["event"] for line in log_lines(product.log)]


def refuses(product: Product) -> bool:
    try:
        socket.create_connection(product.listen).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_worker_has_what_it_needs_and_no_more(backend: Backend) -> None:
    """
    Each worker is pinned to a processor, has no capability left, and is confined.
    """
    with router("relay", {NAME: backend.address}, *OPTIONS) as product:
        main = child(product, "router")
        processes = [main, *workers(main)]
        processors = [os.sched_getaffinity(process.pid) for process in processes]
        facts = [
            dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
            for status in (Path(f"/proc/{p.pid}/status").read_text() for p in processes)
        ]

    mine = sorted(os.sched_getaffinity(0))
    assert [{mine[i % len(mine)]} for i in range(WORKERS)] == processors
    assert {("0" * 16, "0" * 16, "1", "2")} == {
        tuple(one[key] for key in ("CapPrm", "CapEff", "NoNewPrivs", "Seccomp")) for one in facts
    }


def test_connections_are_shared_out(tmp_path: Path) -> None:
    """
    The workers' limits add up to --max-connections; one that leaves a worker without is refused.
    """
    with LoneRouter(tmp_path, "--handoff", "relay", "--max-connections", "8", *OPTIONS) as lone:
        (status,) = ask(lone.control, STATUS)
    done = sniroute("router", *lone.flags(), "--max-connections", "2", *OPTIONS)

    assert status["connections"]["max"] == 8
    assert (1, True) == (done.returncode, "fewer than the 3 workers" in done.stderr)


def test_workers_end_with_a_killed_router(tmp_path: Path) -> None:
    """
    Nothing is left of a router that is killed, and the next one finds its addresses free.
    """
    with LoneRouter(tmp_path, "--handoff", "relay", *OPTIONS) as lone:
        (nursery,) = psutil.Process(lone.process.pid).children()
        everyone = [nursery, *nursery.children()]
        lone.process.kill()
        wait_for("nobody", lambda: not any(map(alive, everyone)))

    assert len(everyone) == WORKERS
