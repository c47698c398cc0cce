"""
What labels on real containers come to.
"""

from collections import Counter

import pytest
from harness import fetch
from harness.apps import App, RunApp
from harness.engines import Engine
from harness.product import Sniroute
from harness.tools import wait_for


def fetch_app(engine: Engine, host: str, *apps: App) -> str:
    """
    Fetch *host* through the product and say which of *apps* answered.
    """
    roots = "".join(app.root for app in apps)
    return fetch.fetch(engine.client, engine.front, host, roots).app


def test_one_container_has_many_names(engine: Engine, run_app: RunApp, sniroute: Sniroute) -> None:
    """
    A comma list, a wildcard and the named form, with a port of its own, lead to one container.
    """
    app = run_app(
        "many",
        {
            "sniroute.host": "a.example.test, B.example.test",
            "sniroute.port": "443",
            "sniroute.wild.host": "*.wild.example.test",
            "sniroute.admin.host": "admin.example.test",
            "sniroute.admin.port": "8443",
        },
        sites="a.example.test, b.example.test, x.wild.example.test, admin.example.test:8443",
    )
    hosts = ("a.example.test", "b.example.test", "*.wild.example.test", "admin.example.test")
    for host in hosts:
        sniroute.wait_for_route(host, app.address)

    for host in ("a.example.test", "b.example.test", "x.wild.example.test", "admin.example.test"):
        assert "many" == fetch_app(engine, host, app)


def test_containers_with_one_host_share_it(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    Two containers with the same host take turns; when one goes the other takes all.
    """
    apps = [run_app(name, {"sniroute.host": "pool.example.test"}) for name in ("one", "two")]
    sniroute.wait_for_route("pool.example.test", *(app.address for app in apps))

    answers = Counter(fetch_app(engine, "pool.example.test", *apps) for _ in range(6))

    assert Counter(one=3, two=3) == answers

    apps[0].remove()
    sniroute.wait_for_route("pool.example.test", apps[1].address)

    answers = Counter(fetch_app(engine, "pool.example.test", *apps) for _ in range(4))

    assert Counter(two=4) == answers


def test_a_container_that_does_not_listen_costs_its_pool_nothing(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A connection that one container of a pool refuses goes to the next, unseen by the client.
    """
    live = run_app("live", {"sniroute.host": "pool.example.test"})
    deaf = run_app(
        "deaf",
        {"sniroute.host": "pool.example.test", "sniroute.port": "444"},
        sites="deaf.example.test",
    )
    sniroute.wait_for_route("pool.example.test", live.address, deaf.address)

    answers = Counter(fetch_app(engine, "pool.example.test", live) for _ in range(6))

    assert Counter(live=6) == answers


def test_a_bad_label_is_a_problem_of_its_container_alone(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A bad label shows by its code in metrics and log, and goes when its container goes.

    The routes of the others, and the good names of the same container, stay.
    """
    good = run_app("good", {"sniroute.host": "good.example.test"})
    bad = run_app(
        "bad",
        {"sniroute.host": "bad.example.test, 192.0.2.1", "sniroute.prot": "443"},
        sites="bad.example.test",
    )
    sniroute.wait_for_route("bad.example.test", bad.address)
    sniroute.wait_for_route("good.example.test", good.address)

    for code, value in (("bad-host", "192.0.2.1"), ("unknown-label", "443")):
        wait_for(code, lambda code=code: sniroute.metric("sniroute_problems", code=code) == 1)
        logged = [x for x in sniroute.log() if x["event"] == "problem" and x["code"] == code]

        assert [("bad", value)] == [(x["container"], x["value"]) for x in logged]

    for app in (good, bad):
        assert app.name == fetch_app(engine, f"{app.name}.example.test", app)

    bad.remove()
    wait_for("problems go", lambda: sniroute.metric("sniroute_problems") == 0)

    assert "good" == fetch_app(engine, "good.example.test", good)
    with pytest.raises(fetch.RefusedError, match="UNRECOGNIZED_NAME"):
        fetch_app(engine, "bad.example.test", bad)
