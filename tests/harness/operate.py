"""
What an operator does with a running product: change routes, ask, read the log, kill a process.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from controller.core.routes import Backend, Route, RouteTable
from controller.core.wire import MAX_LINE, Decoder, Message, dump_table, encode
from harness.loopback import LOOPBACK, Address, Product
from harness.tools import VENV, HarnessError, wait_for

SNIROUTE = str(VENV / "bin" / "sniroute")

PATIENCE = 10.0


def sniroute(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """
    Run one command to its end.
    """
    return subprocess.run(
        [SNIROUTE, *words], capture_output=True, text=True, timeout=60, check=False, cwd=cwd
    )


# --- routes ---


def write_routes(product: Product, routes: Mapping[str, Sequence[Address]]) -> None:
    """
    Write the product's routes file anew, and wait until the router serves what it says.
    """
    text = "".join(
        f"[[route]]\nhost = [{json.dumps(host)}]\n"
        f"backends = {json.dumps([f'{address}:{port}' for address, port in pool])}\n\n"
        for host, pool in routes.items()
    )
    put_routes(product, text)
    wait_for("the new routes", lambda: sets(served(product.control)) == sets(routes))


def put_routes(product: Product, text: str) -> None:
    """
    Put *text* in the place of the product's routes file, at once.
    """
    path = product.control.parent / "routes.toml"
    half = path.with_suffix(".half")
    half.write_text(text)
    half.replace(path)


def served(control: Path) -> dict[str, list[Address]]:
    """
    Ask which addresses the router has for each host.
    """
    (answer,) = ask(control, {"type": "routes"})
    return {
        route["host"]: [(b["address"], b["port"]) for b in route["backends"]]
        for route in answer["routes"]
    }


def sets(routes: Mapping[str, Sequence[Address]]) -> dict[str, set[Address]]:
    """
    Forget the order of each pool.
    """
    return {host: set(pool) for host, pool in routes.items()}


def table(generation: int, routes: Mapping[str, Sequence[Address]]) -> Message:
    """
    Make the message that has a router serve *routes*.
    """
    pools = (
        Route(host, tuple(Backend(f"app-{port}", "test", ip, port) for ip, port in pool))
        for host, pool in routes.items()
    )
    return {"type": "table", **dump_table(RouteTable(generation, pools))}


# --- the control socket ---


class Talk:
    """
    A connection to the control socket.
    """

    def __init__(self, control: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # with a timeout set, a full backlog would be an error rather than a wait (unix(7))
        try:
            self.socket.connect(str(control))
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(PATIENCE)
        self._decoder = Decoder()
        self._heard: list[Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def hear(self) -> Message | None:
        """
        Wait for the next message; None when the router has hung up.
        """
        while not self._heard:
            try:
                data = self.socket.recv(1024 * 1024)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._heard.extend(self._decoder.feed(data))
        return self._heard.pop(0)

    def ask(self, message: Message) -> Message | None:
        """
        Say *message* and wait for the answer.
        """
        return self.say(encode(message))

    def say(self, data: bytes) -> Message | None:
        """
        Send *data*, as much as is taken, and wait for the answer.
        """
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            assert len(data) > MAX_LINE
        return self.hear()


def ask(control: Path, *messages: Message) -> list[Message]:
    """
    Ask all *messages* on one connection, and return the answers.
    """
    with Talk(control) as talk:
        answers = [talk.ask(message) for message in messages]
    if None in answers:
        raise HarnessError("the router hung up")
    return [answer for answer in answers if answer is not None]


# --- processes ---


def child(product: Product, name: str) -> psutil.Process:
    """
    Find the `router` or the `controller` process; it may be just starting.
    """
    module = {"router": "controller.router", "controller": "controller"}[name]

    def find() -> psutil.Process | None:
        for process in psutil.Process(product.pid).children():
            # one that has just ended has no command line, or is no more
            try:
                if module in process.cmdline():
                    return process
            except psutil.Error:
                pass
        return None

    return wait_for(f"a {name} process", find)


def kill(process: psutil.Process) -> None:
    """
    Kill *process*, and wait until it is no more.
    """
    process.kill()
    wait_for("the kill", lambda: not alive(process))


def alive(process: psutil.Process) -> bool:
    """
    Tell whether *process* still runs.
    """
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class LoneRouter:
    """
    A `sniroute router` without a controller: the test is its controller.

    One that *replaces* another has its addresses, and is up when all new clients are its own.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        prefix: Sequence[str] = (),
        replaces: "LoneRouter | Product | None" = None,
    ) -> None:
        if replaces is None:
            self.control = folder / "router.sock"
            self.log = folder / "log"
            self.listen, self.metrics = free_addresses(2)
        else:
            self.control, self.listen, self.metrics = (
                replaces.control,
                replaces.listen,
                replaces.metrics,
            )
            self.log = replaces.log.with_name(f"{replaces.log.name}-next")
            options = (*options, "--replace")
        self._replaces = replaces is not None
        command = [*prefix, SNIROUTE, "router", *self.flags(), *options]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=out)
        pid = self.process.pid
        self.product = Product(self.listen, self.metrics, self.control, pid, self.log)
        wait_for("a router that listens", self._up)

    def flags(self) -> list[str]:
        """
        Write what it is started with.
        """
        listen, metrics = (f"{host}:{port}" for host, port in (self.listen, self.metrics))
        return [
            *("--control", str(self.control), "--listen", listen, "--metrics", metrics),
            *("--drain", "1", "--client-ip", "off"),
        ]

    def _up(self) -> bool:
        if self.process.poll() is not None:
            raise HarnessError(f"router ended: {self.log.read_text()[-3000:]}")
        if self._replaces:
            return "router ready" in [line["event"] for line in log_lines(self.log)]
        (status,) = ask(self.control, {"type": "status"})
        return bool(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, err: BaseException | None, _: object) -> None:
        if err is not None:
            err.add_note(self.log.read_text()[-5000:])
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """
        Ask it to stop, and return its exit status.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def lone_router(folder: Path, *options: str, prefix: Sequence[str] = ()) -> Iterator[LoneRouter]:
    """
    Run a router without a controller until the block ends; it must end well.
    """
    with LoneRouter(folder, *options, prefix=prefix) as router:
        yield router
        if code := router.stop():
            raise HarnessError(f"router ended with {code}")


def free_addresses(count: int) -> list[Address]:
    """
    Find addresses that nobody listens on.
    """
    # all held at once, or the kernel may give one out twice
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    addresses = [s.getsockname() for s in sockets]
    for s in sockets:
        s.close()
    return addresses


# --- the log ---


def log_lines(path: Path) -> list[dict[str, Any]]:
    """
    Read the whole lines of a log; what is no JSON raises ValueError.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def access_lines(log: Path) -> list[dict[str, Any]]:
    """
    Read the lines of a log that tell of a connection.
    """
    return [line for line in log_lines(log) if line["event"] == "connection"]


def aged(process: psutil.Process, seconds: float) -> None:
    """
    Wait until *process* has run for *seconds*.
    """
    age = f"a process of {seconds} s"
    wait_for(age, lambda: time.time() - process.create_time() > seconds, every=0.1)


def has_ended(pid: int) -> bool:
    """
    Tell whether our child *pid* has ended; its status stays there for who waits for it.
    """
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
