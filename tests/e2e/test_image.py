"""
The image, built from the Dockerfile and run as compose.example.yaml runs it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from harness import fetch
from harness.apps import BLOB, RunApp
from harness.engines import DOCKER, Daemon, Engine
from harness.roots import import_root, trixie
from harness.tools import CAPABILITIES, REPOSITORY, HarnessError, wait_for

IMAGE = "sniroute"
BASE = "sniroute-test-base"

HOST = "one.example.test"

BPFFS = "/run/bpf"
"""Where the host's bpf filesystem is in the container."""

NOTED = 2.5
"""Seconds from which on a router has noted, for another, what it knows of a connection."""

SAME = ("route", "client", "client_port", "backend", "backend_address", "handoff")
"""What two routers tell of one connection."""

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


def ends(container: Any) -> list[dict[str, Any]]:
    """
    Read the lines of connections that have ended from the log.
    """
    lines = map(json.loads, container.logs().splitlines())
    return [line for line in lines if line["event"] == "connection"]


def under_way(container: Any) -> list[dict[str, Any]]:
    """
    Ask for the connections under way.
    """
    code, output = container.exec_run(["sniroute", "connections", "--json"])
    if code:
        raise OSError(output.decode())
    return json.loads(output)


@pytest.fixture
def image(daemon: Daemon, engine: Engine, archive: Path) -> Iterator[str]:
    """
    Have the image on the engine.
    """
    with _client(daemon, timeout=120) as api, archive.open("rb") as file:
        [image] = api.images.load(file)
    yield image.id
    engine.api.images.remove(image.id, force=True)


RunImage = Callable[..., Any]


@pytest.fixture
def run_image(daemon: Daemon, engine: Engine, image: str) -> Iterator[RunImage]:
    """
    Run the image on the host network, with nothing but what it documents.
    """
    privileges = PRIVILEGES[daemon.kind.name]
    security = ["no-new-privileges:true", *privileges.get("security_opt", ())]
    address, port = engine.front
    containers = []

    def run(*flags: str, name: str = "sniroute", **mounts: Any) -> Any:
        volumes = {
            str(daemon.socket): {"bind": "/run/docker.sock", "mode": "ro"},
            "/sys/fs/bpf": {"bind": BPFFS, "mode": "rw"},
        }
        container = engine.api.containers.run(
            image,
            ["run", "--listen", f"{address}:{port}", "--metrics", f"{address}:9443", *flags],
            detach=True,
            name=name,
            network_mode="host",
            cap_drop=["ALL"],
            cap_add=privileges["cap_add"],
            security_opt=security,
            read_only=True,
            environment={"SNIROUTE_BPFFS": BPFFS},
            volumes=volumes | mounts.get("volumes", {}),
            tmpfs=mounts.get("tmpfs", {"/run/sniroute": "mode=0755"}),
            **engine.run_options,
        )
        containers.append(container)
        wait_for("the image is ready", lambda: status(container).get("ready"))
        return container

    try:
        yield run
    except HarnessError as err:
        for container in containers:
            err.add_note(container.logs().decode()[-5000:])
        raise
    finally:
        for container in containers:
            container.remove(force=True)


@pytest.fixture
def container(run_image: RunImage) -> Any:
    """
    Run the image as the example does.
    """
    return run_image()


def test_the_image_routes_with_only_the_documented_privileges(
    engine: Engine, run_app: RunApp, container: Any
) -> None:
    """
    In the image, with a read-only root and four capabilities, packets are translated.

    Asked to stop it ends well, in no time when no connection is left.
    """
    app = run_app("one", {"sniroute.host": HOST})
    answer = wait_for(
        "a page through the image",
        lambda: fetch.fetch(engine.client, engine.front, HOST, app.root),
    )

    assert fetch.Answer("one", HOST, "HTTP/1.1", app.address) == answer
    assert {"chosen": "packet", "reason": "self-test passed"} == status(container)["handoff"]

    # while the container was not known yet, others were refused
    handoffs = wait_for(
        "its end in the log",
        lambda: {line["handoff"] for line in ends(container) if line["result"] == "forwarded"},
    )

    assert {"packet"} == handoffs

    container.stop(timeout=40)
    container.reload()

    assert 0 == container.attrs["State"]["ExitCode"]


def test_a_download_outlives_the_container(engine: Engine, run_app: RunApp, container: Any) -> None:
    """
    The container is restarted in the middle of a download, which arrives whole.

    The new router knows the connection, and tells of its end.
    """
    app = run_app("one", {"sniroute.host": HOST})
    with wait_for(
        "a connection through the image",
        lambda: fetch.connect(engine.client, engine.front, HOST, app.root),
    ) as sock:
        fetch.ask(sock, HOST, "/blob")
        # until then too little is known of it for another router
        wait_for("a second", lambda: under_way(container)[0]["age"] > NOTED)
        [before] = under_way(container)

        container.restart(timeout=40)
        [after] = wait_for("the connection is adopted", lambda: under_way(container))

        assert before["bytes_out"] < len(BLOB)
        assert BLOB == fetch.read_body(sock)
    assert 1 == container.logs().decode().count('"event":"flows adopted"')
    assert [before[name] for name in SAME] == [after[name] for name in SAME]
    line = wait_for(
        "the end in the log",
        lambda: [x for x in ends(container) if x.get("bytes_out", 0) > len(BLOB)],
    )
    assert [("packet", app.address)] == [(x["handoff"], x["backend_address"]) for x in line]


def test_one_container_takes_the_place_of_another(
    engine: Engine, run_app: RunApp, run_image: RunImage
) -> None:
    """
    Two containers that share the folder of the control socket: the second one replaces the first.

    The first one ends by itself, and a connection goes on.
    """
    shared = engine.share / "run"
    shared.mkdir(exist_ok=True)
    place: dict[str, Any] = {
        "volumes": {str(shared): {"bind": "/run/sniroute", "mode": "rw"}},
        "tmpfs": {},
    }
    first = run_image("--replace", name="first", **place)
    app = run_app("one", {"sniroute.host": HOST})
    with wait_for(
        "a connection through the first",
        lambda: fetch.connect(engine.client, engine.front, HOST, app.root),
    ) as sock:
        assert BLOB == fetch.get(sock, HOST, "/blob")

        second = run_image("--replace", name="second", **place)

        assert 0 == first.wait(timeout=60)["StatusCode"]
        assert BLOB == fetch.get(sock, HOST, "/blob")
        wait_for("the connection is known to the second", lambda: under_way(second))
        assert "one" == fetch.fetch(engine.client, engine.front, HOST, app.root).app
    assert "packet" == status(second)["handoff"]["chosen"]
