"""
`sniroute run`: whichever of the two processes dies, what stands is kept, and it comes back.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness.ends import NAME, Backend, connection, read_exactly
from harness.loopback import Product, router
from harness.operate import (
    SNIROUTE,
    aged,
    alive,
    ask,
    child,
    free_addresses,
    kill,
    log_lines,
    served,
    sniroute,
    write_routes,
)
from harness.tools import wait_for


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


@pytest.fixture
def product(backend: Backend) -> Iterator[Product]:
    with router("relay", {NAME: backend.address}, "--drain", "2") as product:
        yield product


def echoes(client: socket.socket, end: socket.socket) -> bool:
    """
    Send a word each way.
    """
    client.sendall(b"there")
    end.sendall(b"back!")
    return (read_exactly(end, 5), read_exactly(client, 5)) == (b"there", b"back!")


def controllers(product: Product) -> int:
    (status,) = ask(product.control, {"type": "status"})
    return int(status["controllers"])


def test_a_killed_controller_comes_back(product: Product, backend: Backend) -> None:
    """
    Connections and routes outlive the controller; the next one takes over where it was.
    """
    with connection(product.listen, backend) as ends:
        first = child(product, "controller")
        wait_for("a controller", lambda: controllers(product) == 1)
        kill(first)
        wait_for("none", lambda: controllers(product) == 0)

        assert {NAME: [backend.address]} == served(product.control)
        assert product.get("/healthz") == "ready\n"
        assert echoes(*ends)

        second = child(product, "controller")
        wait_for("a controller again", lambda: controllers(product) == 1)
        routes = {NAME: [backend.address], "new.example.com": [backend.address]}
        write_routes(product, routes)

        assert echoes(*ends)
        assert second.pid != first.pid


def test_a_killed_router_comes_back_with_its_routes(product: Product, backend: Backend) -> None:
    """
    A router that dies takes its connections along; the next one gets the routes and serves.
    """
    first = child(product, "router")
    # one that dies while it starts has failed to start
    aged(first, 2.5)
    controller = child(product, "controller")
    kill(first)

    wait_for("a ready router", lambda: product.get("/healthz") == "ready\n")

    with connection(product.listen, backend) as ends:
        assert echoes(*ends)
    assert first.pid != child(product, "router").pid
    assert controller == child(product, "controller")
    assert {NAME: [backend.address]} == served(product.control)
    events = [line["event"] for line in log_lines(product.log)]
    assert events.count("router ready") == 2


def test_a_router_that_can_not_start_ends_all(tmp_path: Path, backend: Backend) -> None:
    """
    `run` does not go on without a router: it says why and exits with 1, and nothing is left.
    """
    control = tmp_path / "router.sock"
    taken = f"{backend.address[0]}:{backend.address[1]}"
    routes = tmp_path / "routes.toml"
    routes.write_text("")

    done = sniroute(
        *("run", "--engine", "none", "--routes", str(routes), "--control", str(control)),
        *("--listen", taken, "--metrics", "off", "--handoff", "relay"),
    )

    assert done.returncode == 1
    assert f"sniroute router: listen on {taken}: Address already in use\n" in done.stderr
    assert not [p for p in psutil.process_iter() if str(control) in environment(p)]


@pytest.mark.parametrize("command", ["run", "router", "doctor"])
def test_code_of_the_current_directory_is_not_run(command: str, tmp_path: Path) -> None:
    """
    Whoever may write where the command is given does not run as who gives it.
    """
    (tmp_path / "controller").mkdir()
    (tmp_path / "controller/__init__.py").write_text("open('taken', 'w')")
    engine = () if command == "router" else ("--engine", "none")

    # neither runs on: the address to listen on is none
    done = sniroute(command, *engine, "--listen", "443", "--control", "sock", cwd=tmp_path)

    assert done.returncode
    assert not (tmp_path / "taken").exists()


def environment(process: psutil.Process) -> str:
    try:
        return process.environ().get("SNIROUTE_CONTROL", "")
    except psutil.Error:
        return ""


def test_a_killed_supervisor_leaves_nobody_behind(backend: Backend, tmp_path: Path) -> None:
    """
    When the supervisor is killed both processes end by themselves, the router after a drain.
    """
    routes = tmp_path / "routes.toml"
    routes.write_text(f'[[route]]\nhost = ["{NAME}"]\nbackends = ["%s:%d"]\n' % backend.address)
    listen, metrics = free_addresses(2)
    log, control = tmp_path / "log", tmp_path / "router.sock"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(SNIROUTE, "run", "--engine", "none"),
                *("--routes", str(routes), "--control", str(control), "--handoff", "relay"),
                *("--listen", f"{listen[0]}:{listen[1]}"),
                *("--metrics", f"{metrics[0]}:{metrics[1]}"),
            ],
            stdout=out,
            stderr=out,
        )
    product = Product(listen, metrics, control, process.pid)
    try:
        wait_for("ready", lambda: product.get("/healthz"))
        children = [child(product, "router"), child(product, "controller")]
        with connection(product.listen, backend) as ends:
            process.kill()
            process.wait()
            wait_for("no controller", lambda: not alive(children[1]))

            assert alive(children[0])
            assert echoes(*ends)

        wait_for("nobody", lambda: not any(map(alive, children)))
    finally:
        process.kill()


def test_the_controller_is_stopped_too(product: Product) -> None:
    """
    At SIGTERM both processes end, and the log has no error.
    """
    processes = [child(product, name) for name in ("router", "controller")]
    wait_for("a controller", lambda: controllers(product) == 1)
    os.kill(product.pid, signal.SIGTERM)

    wait_for("the end", lambda: not any(map(alive, processes)))

    levels = {line["level"] for line in log_lines(product.log)}
    assert "error" not in levels
