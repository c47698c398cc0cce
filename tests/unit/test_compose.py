"""
What compose.example.yaml and the image that it builds promise to whoever copies them.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "compose.example.yaml"
SNIROUTE = Path(sys.executable).with_name("sniroute")
CADDY = Path(sys.executable).with_name("caddy")
APPS = ("blue", "green")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return yaml.safe_load(EXAMPLE.read_text())


def check(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SNIROUTE, "check", "--compose", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_its_labels_are_clean() -> None:
    """
    `sniroute check` has nothing against the example.
    """
    done = check(EXAMPLE)

    assert 0 == done.returncode, done.stdout + done.stderr


def test_a_slip_in_a_copy_is_found(tmp_path: Path) -> None:
    """
    A copy with a mistyped host does not pass the check, and the answer names it.
    """
    copy = tmp_path / "compose.yaml"
    copy.write_text(EXAMPLE.read_text().replace("host: blue.localhost", "host: blue..localhost"))

    done = check(copy)

    assert done.returncode != 0
    assert "blue..localhost" in done.stdout + done.stderr


def test_sniroute_has_the_four_capabilities_and_no_more(example: dict[str, Any]) -> None:
    """
    Nothing beyond what the router needs: no other capability, no escalation, no writable disk.
    """
    it = example["services"]["sniroute"]

    assert ["ALL"] == it["cap_drop"]
    assert ["BPF", "PERFMON", "NET_ADMIN", "NET_BIND_SERVICE"] == it["cap_add"]
    assert ["no-new-privileges:true"] == it["security_opt"]
    assert it["read_only"] is True
    assert "privileged" not in it


def test_it_sees_two_things_of_the_host(example: dict[str, Any]) -> None:
    """
    The engine's socket is mounted where sniroute looks for it, the bpf filesystem where it is told.
    """
    service = example["services"]["sniroute"]
    volumes = {source: rest for source, _, rest in (v.partition(":") for v in service["volumes"])}

    bpffs = service["environment"]["SNIROUTE_BPFFS"]
    assert {"/var/run/docker.sock": "/run/docker.sock:ro", "/sys/fs/bpf": bpffs} == volumes
    # docker-default, of AppArmor, denies what would be written there
    assert not bpffs.startswith("/sys/")


@pytest.mark.parametrize("name", APPS)
def test_apps_are_reached_by_name_only(example: dict[str, Any], name: str) -> None:
    """
    No app publishes a port: what comes in has named it.
    """
    app = example["services"][name]

    assert f"{name}.localhost" == app["labels"]["sniroute.host"]
    assert not {"ports", "network_mode"} & app.keys()


@pytest.mark.parametrize("name", APPS)
def test_apps_serve_the_name_that_their_label_says(
    example: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """
    Caddy reads the inlined Caddyfile as a site of the labelled host, on :443, with its own CA.
    """
    app = example["services"][name]
    caddyfile = tmp_path / "Caddyfile"
    caddyfile.write_text(example["configs"]["caddyfile"]["content"].replace("$$", "$"))

    done = subprocess.run(
        [CADDY, "adapt", "--validate", "--config", caddyfile],
        env={**os.environ, **app["environment"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert 0 == done.returncode, done.stderr
    server = yaml.safe_load(done.stdout)["apps"]["http"]["servers"]["srv0"]
    assert [":443"] == server["listen"]
    assert [{"host": [app["labels"]["sniroute.host"]]}] == server["routes"][0]["match"]


def test_the_image_says_what_it_is() -> None:
    """
    The image's labels tell the project's version and licence.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "Dockerfile").read_text()

    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', dockerfile))

    assert project["version"] == labels["version"]
    assert project["license"] == labels["licenses"]
