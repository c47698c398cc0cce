"""
The image, built from the Dockerfile and run as compose.example.yaml runs it.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from harness import fetch
from harness.apps import RunApp
from harness.engines import DOCKER, Daemon, Engine
from harness.roots import import_root, trixie
from harness.tools import CAPABILITIES, REPOSITORY, HarnessError, wait_for

IMAGE = "sniroute"
BASE = "sniroute-test-base"

HOST = "one.example.test"

PRIVILEGES = {
    # older than CAP_BPF and CAP_PERFMON: CAP_SYS_ADMIN covers both
    "docker-20": {"cap_add": ["SYS_ADMIN", "NET_ADMIN", "NET_BIND_SERVICE"]},
    "docker-26": {"cap_add": [name.upper() for name in CAPABILITIES]},
    # its seccomp profile knows bpf(2) with CAP_SYS_ADMIN only
    "podman": {
        "cap_add": [name.upper() for name in CAPABILITIES],
        "security_opt": ["seccomp=unconfined"],
    },
}
"""What each engine has to be told so that the router may load its program."""


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Build the image once, on a base image of a trixie root, and save it.
    """
    path = tmp_path_factory.mktemp("image") / "image.tar"
    with Daemon(DOCKER) as daemon, daemon.host.uplink(), _client(daemon, timeout=300) as api:
        import_root(api, trixie(), BASE)
        try:
            image, _ = api.images.build(
                path=str(REPOSITORY), tag=IMAGE, buildargs={"BASE": BASE}, network_mode="host"
            )
        except docker.errors.BuildError as err:
            err.add_note("".join(line.get("stream", "") for line in err.build_log)[-5000:])
            raise
        with path.open("wb") as file:
            file.writelines(image.save(named=True))
    return path


def _client(daemon: Daemon, timeout: float) -> contextlib.closing[docker.DockerClient]:
    return contextlib.closing(docker.DockerClient(daemon.url, version="auto", timeout=timeout))


def status(container: Any) -> dict[str, Any]:
    """
    Ask the router in *container* how it is; it says nothing until it has started.
    """
    container.reload()
    if container.status == "exited":
        raise HarnessError("the container ended")
    code, output = container.exec_run(["sniroute", "status", "--json"])
    return {} if code else json.loads(output)


@pytest.fixture
def container(daemon: Daemon, engine: Engine, archive: Path) -> Iterator[Any]:
    """
    Run the image on the host network, with nothing but what it documents.
    """
    privileges = PRIVILEGES[daemon.kind.name]
    security = ["no-new-privileges:true", *privileges.get("security_opt", ())]
    with _client(daemon, timeout=120) as api, archive.open("rb") as file:
        [image] = api.images.load(file)
    address, port = engine.front
    container = engine.api.containers.run(
        image.id,
        ["run", "--listen", f"{address}:{port}", "--metrics", f"{address}:9443"],
        detach=True,
        name="sniroute",
        network_mode="host",
        cap_drop=["ALL"],
        cap_add=privileges["cap_add"],
        security_opt=security,
        read_only=True,
        tmpfs={"/run/sniroute": "mode=0755"},
        volumes={str(daemon.socket): {"bind": "/run/docker.sock", "mode": "ro"}},
        **engine.run_options,
    )
    try:
        wait_for("the image is ready", lambda: status(container).get("ready"))
        yield container
    except HarnessError as err:
        err.add_note(container.logs().decode()[-5000:])
        raise
    finally:
        container.remove(force=True)
        engine.api.images.remove(image.id, force=True)


def test_the_image_routes_with_only_the_documented_privileges(
    engine: Engine, run_app: RunApp, container: Any
) -> None:
    """
    In the image, with a read-only root and four capabilities, bytes go through the kernel.

    Asked to stop it ends well, in no time when no connection is left.
    """
    app = run_app("one", {"sniroute.host": HOST})
    answer = wait_for(
        "a page through the image",
        lambda: fetch.fetch(engine.client, engine.front, HOST, app.root),
    )

    assert fetch.Answer("one", HOST, "HTTP/1.1", app.address) == answer
    assert {"chosen": "sockmap", "reason": "self-test passed"} == status(container)["handoff"]

    container.stop(timeout=40)
    container.reload()

    assert 0 == container.attrs["State"]["ExitCode"]
