"""
`sniroute check`: what it finds in files, and its exit code.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from controller.check import Findings, check, check_compose
from controller.settings import ControllerSettings

NONE = ("none",)


def compose(folder: Path, text: str) -> Findings:
    path = folder / "compose.yaml"
    path.write_text(text)
    return check_compose(path)


def run(*files: Path, as_json: bool = False, **settings: Any) -> tuple[int, str]:
    out = io.StringIO()
    made = ControllerSettings(**{"engine": NONE, **settings})
    return check(made, list(files), as_json, out), out.getvalue()


SERVICES = """
name: shop
services:
  map:
    labels: {sniroute.host: map.example.com, sniroute.port: 8443, sniroute.enable: true}
  list:
    labels: ["sniroute.host=list.example.com", "other"]
    ports: ["127.0.0.1:8443:443/tcp", "53:53/udp"]
  expose:
    labels: {sniroute.host: expose.example.com, sniroute.network: front}
    expose: ["8443"]
    networks: {front: {}, back: null}
  long:
    labels: {sniroute.host: long.example.com}
    ports: [{target: 9443, published: "443"}]
    networks: [front]
  sidecar:
    labels: {sniroute.host: sidecar.example.com, sniroute.port: "1443"}
    network_mode: "service:long"
networks:
  front: {}
  back: {driver: bridge}
"""


def test_good_compose_file_has_no_problems(tmp_path: Path) -> None:
    """
    Labels as map or list, ports in every form, networks and network modes are understood.
    """
    found = compose(tmp_path, SERVICES)

    assert ([], [], 5) == (found.problems, found.notes, found.containers)
    assert {
        "expose.example.com": 8443,
        "list.example.com": 443,
        "long.example.com": 9443,
        "map.example.com": 8443,
        "sidecar.example.com": 1443,
    } == {route.host: route.backends[0].port for route in found.routes}


@pytest.mark.parametrize(
    ("service", "code"),
    [
        ("labels: {sniroute.host: a..b}", "bad-host"),
        ("labels: {sniroute.hots: a.example}", "unknown-label"),
        ("labels: {sniroute.host: a, sniroute.port: 1, sniroute.client-ip: no}", "bad-client-ip"),
        ("labels: {sniroute.host: a, sniroute.proxy-protocol: 2}", "bad-proxy-protocol"),
        ("labels: {sniroute.host: a.example}\n    expose: [80-81]", "ambiguous-port"),
        ("labels: {sniroute.host: a, sniroute.port: 1, sniroute.network: b}", "unknown-network"),
        ("labels: {sniroute.host: a, sniroute.port: 1}\n    networks: [lan]", "no-network"),
        ("labels: {sniroute.host: a, sniroute.port: 1}\n    network_mode: none", "no-network"),
        ("labels: {sniroute.host: a, sniroute.port: 1}\n    networks: [x, y]", "ambiguous-network"),
    ],
)
def test_problem_of_a_compose_file_is_found(tmp_path: Path, service: str, code: str) -> None:
    """
    What would be a problem of the running container is one of the file.
    """
    text = f"services:\n  web:\n    {service}\nnetworks:\n  lan: {{driver: macvlan}}\n"

    found = compose(tmp_path, text)

    assert [(code, "web")] == [(p.code.value, p.container) for p in found.problems]


@pytest.mark.parametrize(
    "service",
    [
        "labels: {sniroute.host: a.example}",
        "labels: {sniroute.host: 'a.${SNIROUTE_TEST_UNSET}', sniroute.port: 1}",
        "labels: {sniroute.host: a, sniroute.port: 1}\n    network_mode: 'container:x'",
    ],
    ids=["image's ports", "variable", "foreign container"],
)
def test_what_the_file_can_not_tell_is_a_note(tmp_path: Path, service: str) -> None:
    """
    The image's ports, unset variables and containers of elsewhere are no problems.
    """
    found = compose(tmp_path, f"services:\n  web:\n    {service}\n")

    assert ([], 1) == (found.problems, len(found.notes))


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A label is checked with the variables of the environment, and with their defaults.
    """
    monkeypatch.setenv("SNIROUTE_TEST_DOMAIN", "example.com")
    labels = "{sniroute.host: 'a.${SNIROUTE_TEST_DOMAIN}', sniroute.port: '${SNIROUTE_P:-443}'}"

    found = compose(tmp_path, f"services:\n  web:\n    labels: {labels}\n")

    assert ["a.example.com"] == [route.host for route in found.routes]


def test_words_for_the_client_address_are_read_as_yaml_has_them(tmp_path: Path) -> None:
    """
    An unquoted off, which YAML takes for false, is off; internal networks are seen.
    """
    found = compose(
        tmp_path,
        """
services:
  web:
    labels: {sniroute.host: a, sniroute.port: 1, sniroute.proxy-protocol: off}
    networks: [front, back]
  db:
    labels: {sniroute.host: b, sniroute.port: 1, sniroute.client-ip: nat}
    networks: [back]
networks:
  back: {internal: true}
""",
    )

    assert [] == [p.code.value for p in found.problems if p.code != "ambiguous-network"]
    assert {"a": ("", "off"), "b": ("nat", "off")} == {
        route.host: (route.backends[0].client_ip, route.backends[0].proxy_protocol)
        for route in found.routes
    }
    assert "internal_network" == found.routes[1].backends[0].detour


@pytest.mark.parametrize("text", ["services: [", "[]", "", "services: 1", "\x00"])
def test_what_is_no_compose_file_is_a_problem(tmp_path: Path, text: str) -> None:
    """
    A file that can not be read is a problem, not a crash.
    """
    found = compose(tmp_path, text)

    assert ["bad-compose-file"] == [problem.code.value for problem in found.problems]


def test_exit_code_tells_of_errors(tmp_path: Path) -> None:
    """
    0 when all is well, 1 with an error anywhere, 2 when there was nothing to look at.
    """
    good, bad, routes = (tmp_path / name for name in ("good.yaml", "bad.yaml", "routes.toml"))
    good.write_text(SERVICES)
    bad.write_text("services: {web: {labels: {sniroute.host: a..b}}}")
    routes.write_text("route = 1")

    assert 0 == run(good)[0]
    assert 1 == run(good, bad)[0]
    assert 1 == run(good, routes=routes)[0]
    assert 1 == run(good, engine=(f"unix://{tmp_path}/none.sock",))[0]
    assert 2 == run()[0]


def test_output_is_for_people_or_for_programs(tmp_path: Path) -> None:
    """
    A line names code, container, label, value and remedy; JSON has the same in fields.
    """
    bad = tmp_path / "bad.yaml"
    bad.write_text("services: {web: {labels: {sniroute.host: a, sniroute.port: x}}}")

    text = run(bad)[1]
    (place,) = json.loads(run(bad, as_json=True)[1])

    assert "error   bad-port: web sniroute.port='x': not a port" in text
    (problem,) = place["problems"]
    assert {"code": "bad-port", "severity": "error", "container": "web"}.items() <= problem.items()
    assert {"label": "sniroute.port", "value": "x"}.items() <= problem.items()
