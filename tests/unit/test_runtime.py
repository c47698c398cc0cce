"""
Engines: where they are looked for, their names, and which addresses count as local.
"""

import socket
from pathlib import Path

import pytest

from controller.runtime import find_engines, is_local


def names(*choice: str, **environ: str) -> list[str]:
    return [engine.name for engine in find_engines(choice, environ)]


@pytest.fixture
def user_docker(tmp_path: Path) -> Path:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def test_auto_watches_every_usual_place_with_or_without_a_socket(tmp_path: Path) -> None:
    """
    An engine that is only restarting is still watched for, under the same name.
    """
    found = names("auto", XDG_RUNTIME_DIR=str(tmp_path))

    assert ["docker", "podman", "docker-user", "podman-user"] == found


def test_one_place_is_one_engine(tmp_path: Path, user_docker: Path) -> None:
    """
    A second way to the same socket adds nothing.
    """
    link = tmp_path / "link.sock"
    link.symlink_to(user_docker)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "DOCKER_HOST": f"unix://{link}"}

    assert ["docker-user"] == names(f"unix://{user_docker}", str(user_docker), **environ)
    assert 4 == len(names("auto", **environ))


def test_engine_asked_for_goes_by_its_url_unless_usual(tmp_path: Path) -> None:
    """
    Names are stable and distinct: the usual name in a usual place, else the URL.
    """
    urls = [f"unix://{tmp_path}/a.sock", f"unix://{tmp_path}/b.sock", "tcp://192.0.2.1:2375"]

    assert sorted(["docker", *urls]) == sorted(names("unix:///var/run/docker.sock", *urls))


def test_environment_adds_engines_to_auto() -> None:
    """
    DOCKER_HOST and CONTAINER_HOST are places too; a scheme that is not ours is passed over.
    """
    environ = {"DOCKER_HOST": "tcp://192.0.2.1:2375", "CONTAINER_HOST": "ssh://192.0.2.1/x"}

    assert ["tcp://192.0.2.1:2375", "docker", "podman"] == names("auto", **environ)
    assert [] == names("none", **environ)


@pytest.mark.parametrize(
    ("address", "length", "local"),
    [
        ("127.0.0.9", 8, True),
        ("::1", 128, True),
        ("203.0.113.77", 24, False),
        ("2001:db8::77", 64, False),
        ("", 0, False),
    ],
)
def test_address_is_local_with_an_interface_in_its_subnet(
    address: str,
    length: int,
    local: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """
    An address counts as reachable where this host is in its network itself.
    """
    assert local == is_local(address, length)
