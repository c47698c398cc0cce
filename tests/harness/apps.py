"""
Labelled containers with a real TLS web server in them: Caddy with its internal CA.
"""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import docker
from docker.types import EndpointConfig

from harness import fetch
from harness.tools import VENV, HarnessError, wait_for

if TYPE_CHECKING:
    from harness.engines import Engine

IMAGE = "sniroute-test-caddy"

BLOB = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(32768))
"""What every app serves at /blob: 1 MiB that does not compress."""

_ROOT = "/data/caddy/pki/authorities/local/root.crt"

# the answer tells who answered, for which name, over which protocol, and from which address;
# Caddy's clean-up at start can remove the folder that it is about to save a new certificate in
_CADDYFILE = b"""\
{
	admin off
	auto_https disable_redirects
	skip_install_trust
	storage_clean_interval off
	servers {
		protocols h1 h2
	}
}
{$SITES} {
	tls internal
	handle /blob {
		root /srv
		file_server
	}
	respond "{$APP} {http.request.host} {http.request.proto} {http.request.local.host}"
}
"""


RunApp = Callable[..., "App"]
"""`Engine.run_app`, for containers that are gone after the test."""


def import_caddy(api: docker.DockerClient) -> None:
    """
    Make the image of a Caddy from the binary in our virtual environment, without a registry.
    """
    files = {"Caddyfile": _CADDYFILE, "srv/blob": BLOB}
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(VENV / "bin/caddy", "caddy")
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        changes = [
            'CMD ["/caddy", "run", "--config", "/Caddyfile", "--adapter", "caddyfile"]',
            "ENV XDG_DATA_HOME=/data",
            "ENV XDG_CONFIG_HOME=/config",
            "EXPOSE 443/tcp",
        ]
        api.api.import_image_from_data(file.getvalue(), repository=IMAGE, changes=changes)


def remove_caddy(api: docker.DockerClient) -> None:
    """
    Remove the image, if it is there.
    """
    with contextlib.suppress(docker.errors.ImageNotFound):
        api.images.remove(IMAGE, force=True)


@dataclass(frozen=True, slots=True)
class App:
    """
    A running, labelled container; *root* is the CA that its certificates are from.

    *at* is where it serves, if that is not its own address.
    """

    engine: "Engine"
    container: Any
    root: str
    at: fetch.Endpoint | None = None

    @classmethod
    def run(
        cls,
        engine: "Engine",
        name: str,
        labels: dict[str, str],
        *,
        sites: str | None = None,
        address: str | None = None,
        serve: bool = True,
        at: fetch.Endpoint | None = None,
        **options: Any,
    ) -> Self:
        """
        Run an app that serves *sites*, by default the hosts of its labels; return once it does.

        One that is not to *serve* is only there, for instance to take an address.  *options* are
        the engine's; one that serves in no network of its own has a `network_mode` among them.

        Raises:
            HarnessError: It does not serve in time; its log is in the notes.
        """
        named = sites or ",".join(v for k, v in labels.items() if k.endswith("host"))
        hosts = [host.strip() for host in named.split(",")]
        if "network_mode" not in options:
            network = engine.network.name
            options["network"] = network
            options["networking_config"] = {network: EndpointConfig("1.41", ipv4_address=address)}
        container = engine.api.containers.run(
            IMAGE,
            detach=True,
            name=name,
            labels=labels,
            environment={"APP": name, "SITES": ", ".join(hosts)},
            **options,
            **engine.run_options,
        )
        try:
            root = wait_for(f"app {name} has its CA", lambda: _read_root(container))
            app = cls(engine, container, root, at)
            if serve:
                app.wait_until_serving(hosts[0].partition(":")[0])
        except HarnessError as err:
            err.add_note(container.logs().decode(errors="replace")[-3000:])
            container.remove(force=True)
            raise
        return app

    @property
    def name(self) -> str:
        """
        The container's name, which is what it answers with.
        """
        return self.container.name

    @property
    def address(self) -> str:
        """
        The address that the container has now.
        """
        self.container.reload()
        networks = self.container.attrs["NetworkSettings"]["Networks"]
        return networks[self.engine.network.name]["IPAddress"]

    @property
    def endpoint(self) -> fetch.Endpoint:
        """
        Where the container itself serves, past sniroute.
        """
        return self.at or (self.address, 443)

    def wait_until_serving(self, host: str) -> fetch.Answer:
        """
        Fetch *host* from the app itself until it answers.
        """
        return wait_for(
            f"app {self.name} serves {host}",
            lambda: fetch.fetch(self.engine.host, self.endpoint, host, self.root),
        )

    def remove(self) -> None:
        """
        Stop and remove the container, at once; it may be gone already.
        """
        with contextlib.suppress(docker.errors.NotFound):
            self.container.remove(force=True)


def _read_root(container: Any) -> str | None:
    try:
        chunks, _ = container.get_archive(_ROOT)
    except docker.errors.APIError:
        container.reload()
        if container.status == "exited":
            raise HarnessError(f"app {container.name} ended") from None
        return None
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
        return tar.extractfile("root.crt").read().decode()
