"""
Labelled containers that tell whom they serve: Caddy with an access log.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import docker
from docker.types import EndpointConfig

from harness import fetch
from harness.apps import IMAGE, _read_root
from harness.engines import Engine
from harness.machines import Here
from harness.tools import HarnessError, wait_for

Seen = tuple[str, int]
"""The address and port of a client."""

_CADDYFILE = """\
{
	admin off
	auto_https disable_redirects
	skip_install_trust
}
{$SITES} {
	tls internal
	log
	respond "{$APP} {http.request.host} {http.request.proto} {http.request.local.host}"
}
"""


@dataclass(frozen=True, slots=True)
class Witness:
    """
    A running, labelled container; *root* is the CA that its certificates are from.
    """

    engine: Engine
    container: Any
    root: str

    @classmethod
    def run(
        cls,
        engine: Engine,
        labels: dict[str, str],
        *networks: Any,
        name: str = "witness",
        sites: Sequence[str] = (),
    ) -> Self:
        """
        Run a witness in *networks*, for *sites* or the one host of its labels, until it serves.

        Raises:
            HarnessError: It does not serve in time; its log is in the notes.
        """
        config = engine.share / "witness.Caddyfile"
        config.write_text(_CADDYFILE)
        sites = sites or (labels["sniroute.host"],)
        first, *others = (network.name for network in networks)
        container = engine.api.containers.create(
            IMAGE,
            ["/caddy", "run", "--config", str(config), "--adapter", "caddyfile"],
            name=name,
            labels=labels,
            environment={"APP": name, "SITES": ", ".join(sites)},
            volumes={str(config): {"bind": str(config), "mode": "ro"}},
            network=first,
            networking_config={first: EndpointConfig("1.41")},
            **engine.run_options,
        )
        try:
            for network in others:
                engine.api.networks.get(network).connect(container)
            container.start()
            root = wait_for(f"{name} has its CA", lambda: _read_root(container))
            witness = cls(engine, container, root)
            witness.wait_until_serving(sites[0])
        except HarnessError as err:
            err.add_note(container.logs().decode(errors="replace")[-3000:])
            container.remove(force=True)
            raise
        return witness

    def address(self, network: Any = None, key: str = "IPAddress") -> str:
        """
        The address that the container has now in *network*, or in its first one.
        """
        self.container.reload()
        networks = self.container.attrs["NetworkSettings"]["Networks"]
        return (networks[network.name] if network else next(iter(networks.values())))[key]

    def wait_until_serving(self, host: str) -> None:
        """
        Fetch *host* from the container itself until it answers.
        """
        wait_for(
            f"{self.container.name} serves {host}",
            lambda: fetch.fetch(self.engine.host, (self.address(), 443), host, self.root),
        )

    def seen(self) -> list[Seen]:
        """
        Read from its access log whom it has served.
        """
        entries = map(json.loads, self.container.logs().splitlines())
        requests = [e["request"] for e in entries if e["msg"] == "handled request"]
        return [(r["remote_ip"], int(r["remote_port"])) for r in requests]

    def inside(self) -> Here:
        """
        Find the container's own network, to be on as its processes are.
        """
        return self.engine.inside(self.container)

    def remove(self) -> None:
        """
        Stop and remove the container, at once; it may be gone already.
        """
        with contextlib.suppress(docker.errors.NotFound):
            self.container.remove(force=True)
