"""
`--replace`: one router in the place of another, and no client that notices.
"""

import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.crowd import Crowd
from harness.ends import HELLO, NAME, dial, read_exactly
from harness.loopback import Address, Product, router
from harness.operate import (
    SNIROUTE,
    LoneRouter,
    Talk,
    ask,
    child,
    free_addresses,
    has_ended,
    log_lines,
    lone_router,
    served,
    sniroute,
    table,
)
from harness.tools import wait_for

OPTIONS = ("--handoff", "relay", "--hello-timeout", "3", "--drain", "10")


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    with Crowd() as crowd:
        yield crowd


@pytest.fixture
def old(crowd: Crowd, tmp_path: Path) -> Iterator[LoneRouter]:
    """
    A router with a table, to be replaced.
    """
    with LoneRouter(tmp_path, *OPTIONS) as router:
        ask(router.control, table(7, {NAME: [crowd.backend]}))
        yield router


def events(router: LoneRouter) -> list[str]:
    return [line["event"] for line in log_lines(router.log)]


def test_no_client_notices(crowd: Crowd, old: LoneRouter) -> None:
    """
    While routers replace each other twice, no client is refused or reset, however slow it is.

    Each old one ends by itself, with status 0, and its successor served with its table at once.
    """
    crowd.at = old.listen
    crowd.wait_for_more(200)
    with LoneRouter(old.log.parent, *OPTIONS, replaces=old) as second:
        crowd.wait_for_more(200)
        first_status = old.process.wait(30)
        crowd.wait_for_more(200)
        with LoneRouter(old.log.parent, *OPTIONS, replaces=second) as third:
            crowd.wait_for_more(200)
            second_status = second.process.wait(30)
            crowd.wait_for_more(200)
            crowd.leave()
            (status,) = ask(third.control, {"type": "status"})

            assert ([], 0, 0) == (crowd.failures, first_status, second_status)
            assert (7, True, False) == tuple(
                status[key] for key in ("generation", "ready", "draining")
            )
            assert "old router listens no more" in events(third)
            assert {"replaced", "draining", "router stopped"} <= set(events(second))
            assert not [e for e in events(old) + events(second) if e == "old router lost"]
            assert third.stop() == 0
            assert not third.control.exists()


def test_no_client_notices_a_new_run(crowd: Crowd, tmp_path: Path) -> None:
    """
    `sniroute run --replace` takes the place of another, whose processes all end by themselves.

    The new one's routes hold from then on: the old controller has no say any more.
    """
    routes = {NAME: crowd.backend}
    with router("relay", routes, "--hello-timeout", "3", "--drain", "10") as first:
        crowd.at = first.listen
        crowd.wait_for_more(100)
        more = {**routes, "new.example.com": crowd.backend}
        with second_run(first, tmp_path, more) as second:
            wait_for("the new routes", lambda: len(served(first.control)) == len(more))
            crowd.wait_for_more(100)
            wait_for("the end of the first", lambda: has_ended(first.pid))
            crowd.wait_for_more(100)
            crowd.leave()
            (status,) = ask(first.control, {"type": "status"})

            assert crowd.failures == []
            assert {name: [crowd.backend] for name in more} == served(first.control)
            assert status["controllers"] == 1
            assert child(second, "router").pid != child(second, "controller").pid


@contextmanager
def second_run(first: Product, folder: Path, routes: Mapping[str, Address]) -> Iterator[Product]:
    """
    Run a `run` with *routes* in the place of *first*; it must end well.
    """
    file, log = folder / "routes.toml", folder / "log"
    file.write_text(
        "".join(
            f'[[route]]\nhost = ["{host}"]\nbackends = ["{at[0]}:{at[1]}"]\n'
            for host, at in routes.items()
        )
    )
    command = [
        *(SNIROUTE, "run", "--replace", "--engine", "none", "--routes", str(file), *OPTIONS),
        *("--control", str(first.control), "--client-ip", "off"),
        *("--listen", "{}:{}".format(*first.listen)),
        *("--metrics", "{}:{}".format(*first.metrics)),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=out)
    try:
        yield Product(first.listen, first.metrics, first.control, process.pid, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    except BaseException as err:
        err.add_note(log.read_text()[-5000:])
        raise
    finally:
        process.kill()
        process.wait()


def test_nobody_to_replace(tmp_path: Path) -> None:
    """
    Where no router runs, or one was killed, --replace just starts.
    """
    with LoneRouter(tmp_path, *OPTIONS, "--replace") as router:
        router.process.kill()
        router.process.wait()
        assert router.control.exists()

    with lone_router(tmp_path, *OPTIONS, "--replace") as router:
        assert ask(router.control, {"type": "status"})[0]["ready"] is False


def test_addresses_are_not_shared_by_mistake(tmp_path: Path, old: LoneRouter) -> None:
    """
    Without --replace, or at another control socket, a second router on an address does not start.
    """
    listen, metrics = (f"{host}:{port}" for host, port in (old.listen, old.metrics))
    (spare,) = (f"{host}:{port}" for host, port in free_addresses(1))
    other = str(tmp_path / "other.sock")
    for words, says in (
        (("--control", str(old.control), "--listen", spare), "another router listens here"),
        (("--control", other, "--listen", listen), f"listen on {listen}: Address already in use"),
        (("--control", other, "--listen", listen, "--replace"), "Address already in use"),
        (
            ("--control", other, "--listen", spare, "--metrics", metrics),
            f"metrics address {metrics}",
        ),
    ):
        done = sniroute("router", *("--client-ip", "off", "--metrics", "off"), *words)

        assert (1, True) == (done.returncode, says in done.stderr), done.stderr
    assert ask(old.control, {"type": "status"})[0]["ready"]


def test_one_successor_at_a_time(old: LoneRouter) -> None:
    """
    While one router takes the place, another is told to wait; one that gave up bars nobody.
    """
    with Talk(old.control) as first, Talk(old.control) as second:
        heard = first.ask({"type": "replace"})
        refused = second.ask({"type": "replace"})
        done = sniroute("router", *old.flags(), "--replace")
        first.socket.close()
        wait_for("the place", lambda: second.ask({"type": "replace"})["type"] == "listening")

    name = "[{}]:{}".format
    sockets = {name(*old.listen): 1, name(*old.metrics): 1}
    listening = {"type": "listening", "sockets": sockets, "owner": 0, "packet_off": False}
    assert listening == heard
    assert ("nack", True) == (refused["type"], "being replaced" in refused["error"])
    assert (1, True) == (done.returncode, "it is being replaced right now" in done.stderr)
    assert ask(old.control, {"type": "status"})[0]["ready"]


def test_a_successor_that_dies_takes_no_client_along(old: LoneRouter) -> None:
    """
    When the new router is killed while the old one still accepts, that one gets the clients again.
    """
    with LoneRouter(old.log.parent, *OPTIONS, replaces=old) as second:
        second.process.kill()
        second.process.wait()
        with dial(old.listen) as client:
            assert HELLO == read_exactly(client, len(HELLO))


def test_a_switch_that_was_not_announced_is_refused(old: LoneRouter) -> None:
    """
    Only who has announced itself can have a router drain as replaced.
    """
    with Talk(old.control) as talk:
        assert talk.ask({"type": "switched", "plumbing": True}) is None

    assert ask(old.control, {"type": "status"})[0]["draining"] is False
